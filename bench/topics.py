"""Topics on one SQLite file: from a sender's process to a handler in another, and into a table."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import perf_counter, sleep, time
from typing import Any

import msgspec
from kit import Figure, Order, Other, Row, Tally, bench, expect, hear, in_turn, orders, raw_db, say, tune, work_off

from barnabas import App

RAW = """
CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, key TEXT, value BLOB NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS positions (name TEXT PRIMARY KEY, offset INTEGER NOT NULL);
INSERT OR IGNORE INTO positions VALUES ('handle', 0);
"""
RAW_ROWS = 1_000  # of a transaction, and of a read: what suits the bare loop best here
TABLE_KEYS = 400


def shop(path: str) -> tuple[App, Any]:
    """The app of both processes."""
    app = App("bench", events=f"sqlite:///{path}", jobs=f"sqlite:///{path}")
    return app, app.topic("orders", Order, key="customer")


def send_raw(path: str, n: int) -> None:
    db = raw_db(path, RAW)
    encode = msgspec.json.Encoder().encode
    tune()
    say("ready")
    hear()
    began = perf_counter()
    rows = []
    for order in orders(n):
        rows.append((order.customer, encode(order), time()))
        if len(rows) == RAW_ROWS or order.id == n:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO messages (key, value, time) VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")
            rows = []
    say([began, perf_counter()])


def send_ours(path: str, n: int) -> None:
    app, topic = shop(path)
    app.events.flush(0)
    tune()
    say("ready")
    hear()
    began = perf_counter()
    expect("sent", topic.send_many(orders(n)).result(300), n)
    say([began, perf_counter()])
    app.close()


def handle_raw(path: str, n: int) -> None:
    db = raw_db(path, RAW)
    decode = msgspec.json.Decoder(Order).decode
    tally = Tally(n)
    handle = tally.one
    tune()
    say("ready")
    position = 0
    while position < n:
        rows = db.execute(
            "SELECT id, key, value, time FROM messages WHERE id > ? ORDER BY id LIMIT ?", (position, RAW_ROWS)
        ).fetchall()
        if not rows:
            sleep(0.001)
            continue
        for row in rows:
            handle(decode(row[2]))
        position = rows[-1][0]
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE positions SET offset = ? WHERE name = 'handle'", (position,))
        db.execute("COMMIT")
    expect("all handled", tally.done.is_set(), True)
    say(tally.marks)


def handle_ours(path: str, n: int) -> None:
    app, topic = shop(path)
    tally = Tally(n)
    app.consumer(topic, name="handle")(tally.one)

    def wait() -> None:
        tune()
        sleep(0.1)  # it has its partitions, and waits
        say("ready")
        assert tally.seconds

    work_off(app, "handle", n, wait)
    say(tally.marks)
    app.close()


def both(send: Callable[..., None], handle: Callable[..., None], n: int) -> float:
    """Seconds from the first send in one process to the last handled in the other."""
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        path = f"{folder}/topics.db"
        with Other(handle, path, n) as handler:
            handler.hear()
            with Other(send, path, n) as sender:
                sender.hear()
                sender.say("go")
                began, _ = sender.hear()
                return handler.hear()[-1] - began


@bench(
    300_000,
    3_000,
    Row("SQLite topics end to end: `send_many` in one process, typed sync handler in another", 1.0, "x", "/s"),
)
def topics(n: int, turn: int) -> list[Figure]:
    raw, ours = in_turn(turn, lambda: both(send_raw, handle_raw, n), lambda: both(send_ours, handle_ours, n))
    return [Figure(raw / ours, n / raw, n / ours)]


def consume(n: int, with_table: bool) -> float:
    """Messages a second of a consumer, from its first handled to its last settled."""
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        app, topic = shop(f"{folder}/table.db")
        counts = app.table("counts", int)
        tally = Tally(n)
        first: list[float] = []

        def count(order: Order) -> None:
            if not first:
                first.append(perf_counter())
            counts[order.customer] = counts.get(order.customer, 0) + 1

        function = count if with_table else tally.one
        app.consumer(topic, name="handle", tables=[counts] if with_table else [])(function)
        settled, last = [0], Event()
        end = [0.0]

        @app.observe
        def watch(record: Any) -> None:
            settled[0] += record.count
            end[0] = perf_counter()
            if settled[0] >= n:
                last.set()

        topic.send_many(orders(n, TABLE_KEYS)).result()
        tune()
        expect("all settled", work_off(app, "handle", n, lambda: last.wait(300)), True)
        if with_table:
            with counts.open() as view:
                expect("cells", sorted(view.items()), sorted(_expected(n).items()))
        app.close()
        return n / (end[0] - (first or tally.marks)[0])


def _expected(n: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for order in orders(n, TABLE_KEYS):
        found[order.customer] = found.get(order.customer, 0) + 1
    return found


@bench(
    300_000,
    3_000,
    Row("counting into a table with 400 keys, position and cells in one transaction", 100_000, "/s", "/s"),
    Row("the same, against the same consumer without a table", 0.4, "x", "/s", note="raw: ours without a table"),
)
def table(n: int, turn: int) -> list[Figure]:
    plain, counting = in_turn(turn, lambda: consume(n, False), lambda: consume(n, True))
    return [Figure(counting, None, counting), Figure(counting / plain, plain, counting)]
