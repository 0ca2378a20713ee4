"""Topics on one SQLite file: from a sender's process to a handler in another, and into a table."""

from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep, time
from typing import Any

import msgspec
from kit import (
    WAIT,
    Figure,
    Order,
    Row,
    Tally,
    app_on,
    assigned,
    bench,
    expect,
    in_turn,
    orders,
    other,
    raw_db,
    tune,
    work_off,
)

from barnabas import App

RAW = """
CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, key TEXT, value BLOB NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS positions (name TEXT PRIMARY KEY, offset INTEGER NOT NULL);
INSERT OR IGNORE INTO positions VALUES ('handle', 0);
"""
RAW_ROWS = 1_000  # of a transaction, and of a read: more is no faster
TABLE_KEYS = 400


def shop(place: str) -> tuple[App, Any]:
    app = app_on(place)
    return app, app.topic("orders", Order, key="customer")


def send_raw(parent: Connection, path: str, n: int) -> None:
    db, encode, rows = raw_db(path, RAW), msgspec.json.Encoder().encode, []
    tune()
    parent.send("ready")
    parent.recv()
    began = perf_counter()
    for order in orders(n):
        rows.append((order.customer, encode(order), time()))
        if len(rows) == RAW_ROWS or order.id == n:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO messages (key, value, time) VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")
            rows = []
    parent.send(began)


def send_ours(parent: Connection, path: str, n: int) -> None:
    app, topic = shop(path)
    app.events.flush(0)
    tune()
    parent.send("ready")
    parent.recv()
    began = perf_counter()
    expect("sent", topic.send_many(orders(n)).result(WAIT), n)
    parent.send(began)
    app.close()


def handle_raw(parent: Connection, path: str, n: int) -> None:
    db, decode, tally, position = raw_db(path, RAW), msgspec.json.Decoder(Order).decode, Tally(n), 0
    handle = tally.one
    tune()
    parent.send("ready")
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
    assert tally.seconds
    parent.send(tally.marks[-1])


def handle_ours(parent: Connection, path: str, n: int) -> None:
    app, topic = shop(path)
    tally = Tally(n)
    app.consumer(topic, name="handle")(tally.one)

    def started(worker: Any) -> None:
        tune()
        assigned(worker)
        parent.send("ready")

    work_off(app, "handle", n, started)
    assert tally.seconds
    parent.send(tally.marks[-1])
    app.close()


def both(send: Callable[..., None], handle: Callable[..., None], n: int) -> float:
    """Seconds from the first send in one process to the last handled in the other."""
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        path = f"{folder}/topics.db"
        with other(handle, path, n) as handler:
            handler.recv()
            with other(send, path, n) as sender:
                sender.recv()
                sender.send("go")
                return -sender.recv() + handler.recv()


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

        def count(order: Order) -> None:
            tally.one(order)
            counts[order.customer] = counts.get(order.customer, 0) + 1

        app.consumer(topic, name="handle", tables=[counts] if with_table else [])(count if with_table else tally.one)
        topic.send_many(orders(n, TABLE_KEYS)).result(WAIT)
        tune()
        end = work_off(app, "handle", n)
        assert tally.seconds
        if with_table:
            with counts.open() as view:
                expect("cells", dict(view.items()), Counter(order.customer for order in orders(n, TABLE_KEYS)))
        app.close()
        return n / (end - tally.marks[0])


@bench(
    300_000,
    3_000,
    Row("counting into a table with 400 keys, position and cells in one transaction", 100_000, "/s", "/s"),
    Row("the same, against the same consumer without a table", 0.4, "x", "/s", note="raw: ours without a table"),
)
def table(n: int, turn: int) -> list[Figure]:
    plain, counting = in_turn(turn, lambda: consume(n, False), lambda: consume(n, True))
    return [Figure(counting, None, counting), Figure(counting / plain, plain, counting)]
