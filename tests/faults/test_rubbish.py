"""Bytes that are no messages and no jobs: no worker crashes, each one ends in the dead letters with its reason."""

import random
from collections import Counter

import apsw
import pytest
from shops import Shop, opened, until

from barnabas.dead import deal, letters
from barnabas.errors import BarnabasError, SendError, ValueTooLarge
from barnabas.future import Future
from barnabas.message import OutgoingJob

shop = pytest.fixture(name="shop")(opened)
COUNT = 100_000
DEEP = 100_000
# Texts that each break a reader somewhere; all of them are no Item, and no job.
TRAPS = [
    b"",
    b"\x00" * 50,
    b"null",
    b"NaN",
    b"Infinity",
    b'{"id": 1e400, "key": "a"}',
    b'{"id": ' + b"9" * 5000 + b', "key": "a"}',
    b'{"id": 1, "key": "\\ud800"}',
    b'{"id": 1, "key": "\xed\xa0\x80"}',
    b'{"id": 1, "key": "a", "id": "b"}',
    b"[" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b'{"class": "note", "args": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"class": "note", "args": {"id": 1}}',
    b'{"class": "note", "args": [NaN]}',
    b'{"class": "note", "args": [1e400]}',
    b'{"class": "note", "args": [' + b"9" * 5000 + b"]}",
    b'{"class": "note", "args": ["\\ud800"], "retry": 0}',
    b'{"class": "note", "args": [1], "retry_count": 1e99}',
    b'{"class": 5, "args": []}',
    b'{"class": "note", "args": []}',
    b'{"class": "nobody", "args": [1], "retry": 0}',
]
KEYS = [None, "", "k1", "\U0001f600", "\x00", b"", b"\x00\xff\xfe", b"\xed\xa0\x80"]
LONG = [b"k" * (1 << 20), "k" * (1 << 20)]


@pytest.fixture
def hushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line for each would be most of the work."""
    monkeypatch.setenv("BARNABAS_LOG_LEVEL", "CRITICAL")


@pytest.mark.slow
@pytest.mark.usefixtures("hushed")
@pytest.mark.parametrize(("name", "count"), [("step", COUNT), ("many", COUNT // 5)])
def test_rubbish_as_messages_is_dead_with_its_reason(shop: Shop, name: str, count: int) -> None:
    dice, app = random.Random(11), shop.app
    topic, item = shop.module.items, shop.module.Item
    values = [*TRAPS, *(dice.randbytes(dice.randrange(60)) for _ in range(count - len(TRAPS)))]
    dice.shuffle(values)
    headers = [None, [("", b"")], [("barnabas-reason", b"\xff")], [("\U0001f600" * 50, b"\x00" * 500)] * 3]
    for at in range(0, count, 1000):
        topic.send_many(item(at // 100 + n, "good") for n in range(10))
        app.events.send([(topic, None, dice.choice(KEYS), v, dice.choice(headers), 1.7e9, None) for v in values[at : at + 1000]])
    with pytest.raises(ValueTooLarge):
        topic.send(item(1, "a", pad="x" * 10_000_000))
    app.events.send([(topic, None, key, b"x" * 10_000_000, None, 1.7e9, None) for key in LONG])
    app.events.send([(topic, None, key, values[0], None, 1.7e9, None) for key in LONG])
    assert app.events.flush(30) == 0
    worker = shop.worker("--drain", "--only", name)
    assert until(lambda: worker.poll() is not None, "the worker to drain", 80) and worker.returncode == 0, shop.log()[-3000:]
    assert {int(words[-1]) for words in shop.said("end", name)} == set(range(count // 100))
    letters, places, left_out = Counter(), set(), []
    app.events.refresh()
    states = {state.name: state.partitions for state in app.events.topics()}
    for number, (low, high, _) in enumerate(states["items.dead"]):
        for _, _, value, fields, _ in app.events.read("items.dead", number, low, high - low):
            last = dict(fields)  # a message's own headers come first
            assert last["barnabas-group"] == f"shop-{name}".encode()
            assert last["barnabas-reason"].startswith(b"undecodable: "), last
            letters[value] += 1
            places.add((last["barnabas-partition"], last["barnabas-offset"]))
            left_out += [size for field, size in fields if field == "barnabas-value-left-out"]
    assert letters == Counter([*values, *[None, values[0]] * len(LONG)])
    assert len(places) == count + 2 * len(LONG)
    assert left_out == [b"10000000"] * len(LONG)


@pytest.mark.slow
@pytest.mark.usefixtures("hushed")
def test_rubbish_as_jobs_is_dead_with_its_reason(shop: Shop) -> None:
    dice, app = random.Random(12), shop.app
    values = [*TRAPS, *(dice.randbytes(dice.randrange(60)) for _ in range(COUNT - len(TRAPS)))]
    dice.shuffle(values)
    at = [None] * 20 + [1.0, 2e9]
    jobs = [OutgoingJob("notes", value, dice.choice(at), f"{n:024x}", None) for n, value in enumerate(values)]
    for n in range(0, COUNT, 1000):
        shop.module.note.enqueue(n)
        app.jobs.send(jobs[n : n + 1000])
    assert app.jobs.flush(30) == 0
    # Behind everybody's back, as types that only SQL can give.
    with apsw.Connection(str(shop.path)) as db:
        db.set_busy_timeout(10_000)
        (queue,) = db.execute("SELECT gid FROM heads WHERE topic = 'notes'").fetchone()
        for payload in (5, 1.5, "text", '{"class": "note", "args": [-7]}', b"x" * 10_000_000):
            for state, at in ((0, None), (2, 2e9)):
                row = (queue, state, at, "sql", payload)
                db.execute("INSERT INTO jobs (queue, state, at, jid, payload) VALUES (?, ?, ?, ?, ?)", row)
        db.execute("UPDATE jobs SET state = 2, at = 1.0 WHERE at > 1.9e9")
    worker = shop.worker("--drain", "--only", "queue:notes")
    assert until(lambda: worker.poll() is not None, "the worker to drain", 80) and worker.returncode == 0, shop.log()[-3000:]
    assert {int(words[-1]) for words in shop.said("end", "note")} == {*range(0, COUNT, 1000), -7}
    rows = app.jobs.query("SELECT state, note, typeof(payload) FROM jobs")
    assert Counter(state for state, _, _ in rows) == {4: COUNT + 8}
    assert all(note for _, note, _ in rows)
    with apsw.Connection(str(shop.path)) as db:
        db.execute("UPDATE jobs SET payload = 5 WHERE jid = 'sql'")
    assert sum(letter.name == "?" for letter in letters(app, queue="notes")) > COUNT // 2
    assert deal(app, letters(app, ["sql"]), retry=True).done == 8


@pytest.mark.parametrize(
    "how",
    [
        {"timestamp": "noon"},
        {"timestamp": float("nan")},
        {"timestamp": float("inf")},
        {"timestamp": 1 << 70},
        {"key": "\ud800"},
        {"key": 1.5},
        {"headers": [("\ud800", b"")]},
        {"headers": [("a\0b", b"")]},
        {"headers": [("a",)]},
        {"headers": [("a", 5)]},
        {"headers": 5},
        {"partition": 99},
        {"partition": "1"},
    ],
    ids=str,
)
def test_what_cannot_be_stored_is_refused_at_the_sender(shop: Shop, how: dict) -> None:
    topic = shop.app.topic("plain", bytes, codec="raw")
    shop.app.events.declare([topic])
    with pytest.raises(SendError):
        topic.send(b"x", **how).result(5)
    with pytest.raises(BarnabasError):
        shop.module.note.enqueue(object())
    assert topic.send(b"x").result(5).value == b"x"  # and nobody behind it is held up


def test_one_that_the_file_refuses_holds_up_no_other(shop: Shop) -> None:
    """Should such a thing get into the buffer all the same, its sender hears of it, and the others go on."""
    events = shop.app.events
    topic = shop.module.items
    futures = [Future() for _ in range(5)]
    rows = [(topic, None, f"k{n}", b'{"id": 1, "key": "k"}', None, 1.0, future) for n, future in enumerate(futures)]
    rows[1] = (topic, None, 5, *rows[1][3:])  # a key that is none
    rows[3] = (*rows[3][:5], "noon", futures[3])
    events.send(rows)
    assert [type(future.exception(5)) for future in futures] == [type(None), SendError, type(None), SendError, type(None)]

