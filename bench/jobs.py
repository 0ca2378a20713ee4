"""Jobs on SQLite: no-op jobs, each settled durably, against a bare loop on the same tables and against huey."""

import logging
import os
from importlib.resources import files
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep, time
from typing import Any

import msgspec
from kit import WAIT, Figure, Row, Tally, bench, expect, in_turn, other, raw_db, tune, work_off

from barnabas import App

CLAIM = (
    "UPDATE jobs SET state = 1, owner = 1 WHERE id IN "
    "(SELECT id FROM jobs WHERE state = 0 AND queue = 1 AND rank = 0 ORDER BY id LIMIT 100) RETURNING id, payload"
)


class Job(msgspec.Struct):
    """Sidekiq's JSON, as Barnabas writes it."""

    retry: int
    queue: str
    name: str = msgspec.field(name="class")
    args: Any
    jid: str
    created_at: float
    enqueued_at: float


class Stored(msgspec.Struct):
    """What a loop must read of it to find the function and its arguments."""

    name: str = msgspec.field(name="class")
    args: msgspec.Raw


def bare(path: str, n: int) -> tuple[float, float]:
    """Seconds to enqueue and to run n jobs, without a framework."""
    db = raw_db(path, files("barnabas.backends").joinpath("sqlite.sql").read_text())
    tally = Tally(n)
    functions = {"noop": (tally.job, msgspec.json.Decoder(tuple[int]).decode)}
    encode, decode, rows = msgspec.json.Encoder().encode, msgspec.json.Decoder(Stored).decode, []
    began = perf_counter()
    for number in range(1, n + 1):
        now, jid = time(), os.urandom(12).hex()
        rows.append((jid, encode(Job(25, "default", "noop", (number,), jid, now, now))))
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO jobs (queue, state, at, jid, payload) VALUES (1, 0, NULL, ?, ?)", rows)
    db.execute("COMMIT")
    enqueued = perf_counter()
    done: list[tuple[int]] = []
    while True:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM jobs WHERE id = ?", done)
        claimed = db.execute(CLAIM).fetchall()
        db.execute("COMMIT")
        if not claimed:
            break
        done = []
        for id_, payload in claimed:
            job = decode(payload)
            function, arguments = functions[job.name]
            function(*arguments(job.args))
            done.append((id_,))
    ended = perf_counter()
    assert tally.seconds
    expect("jobs left", db.execute("SELECT count(*) FROM jobs").fetchone()[0], 0)
    db.close()
    return enqueued - began, ended - enqueued


def ours(path: str, n: int) -> tuple[float, float]:
    """The same with Barnabas; the run from the worker's first job to its last settlement."""
    app = App("bench", events=f"sqlite:///{path}", jobs=f"sqlite:///{path}")
    tally = Tally(n)
    noop = app.job(name="noop")(tally.job)
    expect("waiting sends", app.jobs.flush(0), 0)  # the file is there
    began = perf_counter()
    ids = noop.enqueue_many((number,) for number in range(1, n + 1)).result(WAIT)
    enqueued = perf_counter()
    expect("distinct ids", len(set(ids)), n)
    end = work_off(app, "jobs", n)
    assert tally.seconds
    expect("jobs left", app.jobs.open_work({}, ["default"]), 0)
    app.close()
    return enqueued - began, end - tally.marks[0]


def figures(n: int, theirs: tuple[float, float], own: tuple[float, float]) -> list[Figure]:
    """Of the whole, of enqueueing, of running."""
    pairs = [(sum(theirs), sum(own)), *zip(theirs, own, strict=True)]
    return [Figure(raw / ours, n / raw, n / ours) for raw, ours in pairs]


@bench(
    100_000,
    1_000,
    Row("SQLite jobs, no-op, `enqueue_many` then run, each settled durably", 0.7, "x", "/s"),
    Row("of which: enqueue", None, "x", "/s", note="raw: one transaction"),
    Row("of which: run", 0.7, "x", "/s", note="raw: claim 100, acknowledge with the next claim"),
)
def jobs(n: int, turn: int) -> list[Figure]:
    tune()
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        one, two = f"{folder}/raw.db", f"{folder}/ours.db"
        return figures(n, *in_turn(turn, lambda: bare(one, n), lambda: ours(two, n)))


def run_huey(parent: Connection, path: str, n: int) -> None:
    """The peer: its own loop with one worker thread."""
    from huey import SqliteHuey
    from huey.consumer import Consumer

    logging.getLogger("huey").setLevel(logging.ERROR)
    peer, tally = SqliteHuey(filename=path), Tally(n)
    noop = peer.task(name="noop")(tally.job)
    tune()
    began = perf_counter()
    for number in range(1, n + 1):
        noop(number)
    enqueued = perf_counter()
    consumer = Consumer(peer, workers=1, periodic=False)
    consumer.start()
    while len(tally.marks) < 2:
        sleep(0.01)
    consumer.stop(graceful=True)
    expect("jobs left", peer.pending_count(), 0)
    parent.send((enqueued - began, tally.seconds))


HUEY = "raw: huey, whose promise is weaker: it removes a job before it runs, so one killed in work is lost"


@bench(
    10_000,
    200,
    Row("for the reader: huey on SQLite, the same no-op jobs, one worker thread", None, "x", "/s", note=HUEY),
    Row("of which: enqueue", None, "x", "/s", note="raw: huey, a transaction a job"),
    Row("of which: run", None, "x", "/s", note="raw: huey"),
)
def huey(n: int, turn: int) -> list[Figure]:
    tune()

    def theirs() -> Any:
        with other(run_huey, f"{folder}/huey.db", n) as peer:
            return peer.recv()

    with TemporaryDirectory(dir=Path.cwd()) as folder:
        return figures(n, *in_turn(turn, theirs, lambda: ours(f"{folder}/ours.db", n)))
