"""What is kept beside a committed offset, options, errors: without a broker."""

import asyncio
import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from confluent_kafka import KafkaError

pytest.importorskip("confluent_kafka")

from confluent_kafka import Message

from barnabas import App
from barnabas.backends.kafka_admin import ROOM, KafkaAdmin, topic_config
from barnabas.backends.kafka_group import Claim
from barnabas.backends.kafka_log import KafkaLog
from barnabas.backends.kafka_options import Quiet
from barnabas.backends.kafka_words import MARK, MOST, as_bare_rows, as_row, as_rows, pack, unpack, whole
from barnabas.backends.shares import open_account
from barnabas.cli.run import _announce
from barnabas.engine.ledger import Ledger, Straight
from barnabas.errors import BackendError, BufferFull, DeclarationError, SendError, SettingError
from barnabas.inspect import check
from barnabas.message import Row
from barnabas.ports import Part


@pytest.mark.parametrize("seed", range(200))
def test_what_is_packed_is_unpacked(seed: int) -> None:
    choose = random.Random(seed)
    at = offset = choose.choice([0, 5, 10**6, 2**62])
    done = []
    for _ in range(choose.choice([0, 1, 3, 100])):
        low = at + choose.choice([1, 2, 200, 10**6])
        at = low + choose.choice([1, 2, 5000])
        done.append((low, at))
    few = choose.choice([0, 1, 20])
    attempts = {offset + choose.randrange(10**6): choose.randrange(1, 1000) for _ in range(few)}
    ends = sorted((offset + choose.randrange(1, 10**6) for _ in range(choose.randrange(6))), reverse=True)
    ahead = choose.choice([0, 1, 10**6])
    text = pack(offset, done, attempts, ends, ahead)
    assert unpack(offset, text) == (done, attempts, ends, ahead) and text.isascii() and len(text) <= MOST


@pytest.mark.parametrize("kind", [Ledger, Straight])
def test_what_an_earlier_owner_finished_never_overlaps_what_we_did(kind) -> None:
    for seed in range(100):
        choose, offset, flight, own = random.Random(seed), 0, [], set()
        before = [(low, low + choose.randrange(1, 60)) for low in choose.sample(range(0, 400, 70), 3)]
        account = kind(0, sorted(before))
        while offset < 400:
            rows = [(n, None, b"", None, 0.0) for n in range(offset, offset + choose.randrange(1, 40))]
            offset = account.next = rows[-1][0] + 1
            flight += account.add(rows)
            some = flight[: choose.randrange(len(flight) + 1)] if kind is Straight else choose.sample(flight, len(flight) // 2)
            if some:
                account.finish(some)
                flight = [row for row in flight if row not in some]
                own |= {row[0] for row in some}
            at, done = account.position()
            edges = [at, *(edge for span in done for edge in span)]
            assert edges == sorted(edges) and unpack(at, pack(at, done, {}))[0] == done
            told = {*range(at)} | {n for low, high in done for n in range(low, high)}
            assert told >= {n for low, high in before for n in range(low, high)} | (own if kind is Ledger else set())
            assert not told & {row[0] for row in flight}


def test_what_is_too_long_is_cut_at_its_end() -> None:
    done = [(n, n + 1) for n in range(10, 100_000, 1000)] + [(n, n + 1) for n in range(200_000, 300_000, 7)]
    text = pack(0, done, {0: 3})
    kept, attempts, *_ = unpack(0, text)
    assert len(text) <= MOST and attempts == {0: 3} and kept == done[: len(kept)] and len(kept) > 1000


@pytest.mark.parametrize("most", [10, 900, 10_000])
def test_of_too_many_attempts_the_most_and_oldest_are_kept_and_the_marks_always(most: int) -> None:
    attempts = {7 + 900 * n: 1 + n % 3 for n in range(most)}
    text = pack(5, [(6, 7)], attempts, [2**40, 2**39, 9, 8], 1_000_000)
    _, kept, ends, ahead = unpack(5, text)
    first = sorted(attempts, key=lambda at: (-attempts[at], at))[: len(kept)]
    assert len(text) <= MOST and (ends, ahead) == ([2**40, 2**39, 9, 8], 1_000_000)
    assert kept == {at: attempts[at] for at in first} and len(kept) >= min(most, 600)


@pytest.mark.parametrize("text", [None, "", "stream-time=7", "b1:AAAA", MARK + "%%", MARK + "AQ==", MARK + "gICA", MARK + "é"])
def test_what_others_wrote_is_no_account(text: str | None) -> None:
    assert unpack(5, text) == ([], {}, [], 0)


def events(monkeypatch=None, url="kafka://127.0.0.1:1", **options):
    return App("shop", events=url, jobs="memory:", kafka=options).events


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("enable.auto.commit", True, "when handlers have finished"),
        ("enable.auto.offset.store", False, "when handlers have finished"),
        ("enable.idempotence", False, "twice or out of order"),
        ("acks", 1, "all replicas"),
        ("group.id", "x", "group="),
        ("bootstrap.servers", "x", "URL"),
        ("allow.auto.create.topics", True, "mistyped"),
        ("auto.offset.reset", "none", "earliest, latest, or error"),
        ("delivery.report.only.error", True, "resolves by its delivery report"),
        ("stats_cb", print, "observe"),
        ("session.timeout.ms", "10s", "give a whole number"),
        ("batch.size", "64k", "give a whole number"),
        ("sasl.password", "env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
        ("sasl.password", "file:/no/such/file", "cannot be read"),
    ],
)
def test_options_that_break_a_guarantee_are_refused(option: str, value: object, why: str) -> None:
    with pytest.raises(SettingError, match=why):
        events(**{option: value})


def test_a_function_that_makes_tokens_is_called_by_the_driver() -> None:
    asked = threading.Event()
    options = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "OAUTHBEARER"}
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", send_timeout=0.1, kafka={
        **options, "oauth_cb": lambda config: asked.set() or ("token", time.time() + 60),
    })  # fmt: skip
    assert app.events.admin is not None and asked.wait(5)
    app.close()


def test_an_option_that_the_driver_does_not_know_is_refused_with_its_name() -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", kafka={"linger.msec": 5})
    with pytest.raises(SettingError, match=r"linger\.msec"):
        app.topic("orders").send(1)


def test_the_size_of_batches_may_come_from_elsewhere(monkeypatch) -> None:
    monkeypatch.setenv("KAFKA_BATCH", "5000000")
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", kafka={"batch.size": "env:KAFKA_BATCH"})
    assert topic_config(app.topic("orders", int))[1]["max.message.bytes"] == str(5_000_000 + ROOM)


def test_secrets_come_from_elsewhere_and_are_not_shown(monkeypatch, tmp_path) -> None:
    (tmp_path / "secret").write_text("hush1\n")
    monkeypatch.setenv("KAFKA_SECRET", "hush2")
    options = {"sasl.password": f"file:{tmp_path}/secret", "ssl.key.password": "env:KAFKA_SECRET"}
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", kafka=options)
    assert app.events.options == {"sasl.password": "hush1", "ssl.key.password": "hush2"}
    assert "hush" not in repr([*app.settings.rows(), vars(app)])
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", kafka={"sasl.password": "hush3"})
    assert "hush" not in repr(app.settings.rows())


def test_what_kafka_cannot_do_is_refused_in_a_sentence() -> None:
    with pytest.raises(SettingError, match="topics, not queues; set jobs="):
        App("shop", events="memory:", jobs="kafka://127.0.0.1:1").jobs  # noqa: B018
    for wrong in ("acks=1", "prefx=", "prefix=a&prefix=b"):
        with pytest.raises(SettingError, match="prefix=NAME alone"):
            events(url=f"kafka://127.0.0.1:1?{wrong}")
    for right in ("[::1]:9092", "a.b-c_d:1,b", "127.0.0.1:1,"):
        assert events(url=f"kafka://{right}").servers == right
    for wrong in ("clerk:hush@127.0.0.1:1", "127.0.0.1:1/shop", "127.0.0.1:1, 127.0.0.1:2", "a:http", "::1", "a:1#prefix=b"):
        with pytest.raises(SettingError, match=r"users and passwords go into kafka=") as caught:
            events(url=f"kafka://{wrong}")
        assert "hush" not in str(caught.value)
    with pytest.raises(SettingError):  # at once, however long: not after a year of trying
        events(url=f"kafka://{'broker-of-a-long-name.' * 9}:http")
    home = events()
    with pytest.raises(DeclarationError, match=r"'totals': tables cannot be kept on kafka: yet; set events=sqlite"):
        home.cell("totals", "a")


@pytest.mark.parametrize("door", ["positions", "topics", "processes", "control"])
def test_a_cluster_out_of_reach_is_a_backend_error_in_time(door: str, monkeypatch) -> None:
    monkeypatch.setattr(KafkaAdmin.metadata, "__defaults__", (0.2,))
    with pytest.raises(BackendError, match=r"did not answer in time.*; see that it runs"):
        getattr(events(), door)()


def test_a_run_waits_once_for_a_cluster_out_of_reach(monkeypatch, capsys) -> None:
    monkeypatch.setattr(KafkaAdmin.metadata, "__defaults__", (0.2,))
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:")
    app.consumer(app.topic("orders"), name="bill")(print_it)
    app.job(name="mail")(print_it)
    with pytest.raises(BackendError, match=r"did not answer in time.*; see that it runs"):
        _announce(app, (), (), supervised=False)
    assert "shop: events kafka" in capsys.readouterr().out
    _announce(app, (), (), supervised=True)  # its processes try again
    _announce(app, (), ("bill",), supervised=False)  # what runs does not need it
    assert capsys.readouterr().out.count("shop: events kafka://127.0.0.1:1, jobs memory:") == 2


def test_what_the_driver_says_is_for_who_looks_but_not_that_it_counts_anew(caplog) -> None:
    said = "ProduceRequest for orders [0] with 2 message(s) failed due to skipped sequence numbers: recovering and retrying"
    with caplog.at_level("WARNING"):
        Quiet.log(3, "%s [%s] %s", "FAIL", "barnabas#producer-1", "[thrd:a]: connection refused")
        Quiet.log(4, "%s [%s] %s", "ERRSEQ", "barnabas#producer-1", said)
    assert [record.getMessage() for record in caplog.records] == [
        f"as a leader moved, what was on its way to any partition may be stored twice: {said}"
    ]


def test_the_driver_is_asked_to_say_how_it_counts(caplog) -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", send_timeout=0.1)
    with caplog.at_level("DEBUG", "barnabas.kafka"):
        app.topic("orders", int).send(1)
        end = time.monotonic() + 10
        while "IDEMPSTATE" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.05)
    app.close()


def test_check_says_that_tables_are_refused() -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:")
    app.consumer(app.topic("orders"), tables=[app.table("totals")], name="tally")(print_it)
    app.events.control = dict
    app.events.plan = lambda topics: []
    assert "tables cannot be kept on kafka" in check(app)[0][0]


def print_it(order: dict) -> None:
    print(order)


def test_what_is_the_matter_is_said_once_until_it_works_again(caplog) -> None:
    home = events()
    for _ in range(3):
        for code in (KafkaError._RESOLVE, KafkaError._ALL_BROKERS_DOWN):
            home.trouble(KafkaError(code))
    home.works()
    home.trouble(KafkaError(KafkaError._RESOLVE))
    said = [line.split(": ")[1] for line in caplog.messages]
    assert said == ["resolve", "all brokers down", "works again", "resolve"]


PLAIN = {"key": b"k", "value": b"v", "headers": None}


@pytest.mark.parametrize("odd", [{}, {"key": None}, {"key": b"\xff"}, {"headers": [("a", None), ("b", b"1")]}, {"value": None}])
def test_rows_are_the_same_however_many_are_made_at_once(odd: dict[str, Any]) -> None:
    kinds = [PLAIN, PLAIN | odd, PLAIN]
    messages = [Message(topic="t", partition=0, offset=n, timestamp=(1, 1500 + n), **k) for n, k in enumerate(kinds)]
    rows = as_rows(messages)
    assert rows == [as_row(message) for message in messages] == [whole(row) for row in as_bare_rows(messages)]
    assert [row[0] for row in rows] == [0, 1, 2] and [whole(row) for row in rows] == rows
    key, value, headers = (odd.get(name, PLAIN[name]) for name in PLAIN)
    wanted = {None: None, b"k": "k"}.get(key, key), value, headers and [("a", b""), ("b", b"1")]
    assert rows[1][1:4] == wanted and rows[1][4] == 1.501


def test_what_is_finished_out_of_order_leaves_room_before_the_next_commit() -> None:
    claim = Claim(Part("t", 0, 1, "g"), ("t", 0), ("t", 0), "")
    open_account(claim.part, False, 0, [], {})
    log = KafkaLog.__new__(KafkaLog)
    log._claims, log._limit, log._found = {claim.at: claim}, 2, []
    claim.behind = [(offset, str(offset), b"", None, 0.0) for offset in range(4)]

    def handed_out() -> list[Row]:
        log._found.clear()
        log._hand_out(0.0)
        return [row for _, rows in log._found for row in rows]

    first = handed_out()
    assert [row[0] for row in first] == [0, 1] and handed_out() == []
    claim.part.held.finish(first[1:])
    assert handed_out() == []  # the older one is still open: both count
    claim.part.held.finish(first[:1])
    assert [row[0] for row in handed_out()] == [2, 3]


def test_a_password_in_a_url_is_in_no_error_and_no_setting() -> None:
    for wrong in ("kafka://clerk:hush@127.0.0.1:1?acks=1", "kafka://127.0.0.1:1?sasl.password=hush"):
        with pytest.raises(SettingError) as caught:
            events(url=wrong)
        assert "hush" not in f"{caught.value} {App('shop', events=wrong).settings.rows()}"
        with pytest.raises(SettingError) as caught:
            App("shop", events="memory:", jobs=wrong).jobs  # noqa: B018
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_who_finds_no_room_for_bytes_is_told_in_time(size: int) -> None:
    """Many values, or one that is larger than the whole buffer."""
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", buffer_bytes=1 << 20, send_timeout=0.5)
    topic, futures = app.topic("orders", bytes, codec="raw", limit=5_000_000), []

    def fill() -> None:
        for _ in range(60):
            futures.append(topic.send(bytes(size)))

    with ThreadPoolExecutor(1) as pool, pytest.raises(BufferFull, match=r"was full for 0\.5 s.*buffer_bytes"):
        pool.submit(fill).result(8)
    if futures:
        with pytest.raises(BufferFull):
            app.events.store("shop.control", "k", bytes(size)).result(1)
    app.close()
    assert all(isinstance(future.exception(1), SendError) for future in futures)


def test_an_event_loop_waits_no_longer_than_an_instant_for_a_cluster_that_is_away() -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", send_timeout=0.1)

    async def send() -> float:
        began = time.monotonic()
        futures.append(app.topic("orders", int).send(1))
        return time.monotonic() - began

    futures: list[Any] = []
    assert asyncio.run(send()) < 1.0
    app.close()
    assert isinstance(futures[0].exception(1), SendError)


def test_what_could_not_leave_before_the_end_is_counted_in_one_line(caplog) -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", send_timeout=0.1)
    topic = app.topic("orders", int)
    for n in range(3):
        topic.send(n)
    topic.send(3)
    app.close()
    gc.collect()
    assert "4 messages could not be stored before the end" in caplog.text and "nobody looked" not in caplog.text
