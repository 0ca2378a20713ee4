"""Batches of jobs: what being of one costs a job, how soon its callback follows, and the groups and chords of others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import perf_counter
from typing import Any

from kit import WAIT, Figure, Missing, Row, Tally, bench, expect, in_turn, other, tune, work_off
from peers import BATCHES
from redis_jobs import most, run_peer, server, shop

from barnabas.worker import Worker

SIZE = 10  # jobs of a batch whose callback is waited for


@contextmanager
def place(kind: str) -> Iterator[tuple[str, Any]]:
    """A URL of that kind, with nothing in it; the server's client."""
    if kind == "Redis":
        with server() as client:
            yield client.url, client
    else:
        with TemporaryDirectory(dir=Path.cwd()) as folder:
            yield f"sqlite:///{folder}/jobs.db", None


def run(parent: Connection, url: str, n: int, batched: bool) -> None:
    """The seconds to enqueue n no-op jobs and to run them, the callback of their batch included; and from the first one's start
    to that callback's."""
    tune()
    with shop(url) as app:
        tally, ends = Tally(n), []
        noop = app.job(name="noop")(tally.job)
        end = app.job(name="end")(lambda: ends.append(perf_counter()))
        began = perf_counter()
        if batched:
            with app.batch(on_complete=end) as batch:
                batch.enqueue_many(noop, ((number,) for number in range(1, n + 1)))
        else:
            noop.enqueue_many((number,) for number in range(1, n + 1)).result(WAIT)
        enqueued = perf_counter()
        ended = work_off(app, "jobs", n + batched)
        assert tally.seconds and len(ends) == batched
        parent.send((enqueued - began + ended - tally.marks[0], (ends or [ended])[0] - tally.marks[0]))


def timed(url: str, n: int, batched: bool) -> tuple[float, float]:
    with other(run, url, n, batched) as process:
        return process.recv()  # type: ignore[no-any-return]


def ring(parent: Connection, url: str, n: int) -> None:
    """The milliseconds from the end of the last job of a batch to its callback's start."""
    tune()
    times: list[float] = []
    with shop(url) as app:
        ends, called = [0.0], Event()

        @app.job
        def step(number: int) -> None:
            ends[0] = perf_counter()

        @app.job
        def end() -> None:
            times.append(1000 * (perf_counter() - ends[0]))
            called.set()

        worker = Worker(app)
        worker.start()
        for _ in range(n):
            with app.batch(on_complete=end) as batch:
                batch.enqueue_many(step, [(number,) for number in range(SIZE)])
            expect("the callback in time", called.wait(WAIT), True)
            called.clear()
        expect("handlers that held the stop up", worker.stop(5.0), [])
    parent.send(times)


def cost(kind: str) -> Callable[[int, int], list[Figure]]:
    def compare(n: int, turn: int) -> list[Figure]:
        with place(kind) as (url, _), place(kind) as (second, _):
            (raw, _), (own, _) = in_turn(turn, lambda: timed(url, n, False), lambda: timed(second, n, True))
            with other(ring, url, max(20, n // 250)) as process:
                times = process.recv()
        return [Figure(raw / own, n / raw, n / own), Figure(times, None, None)]

    compare.__name__ = f"batches_{kind.lower()}"
    return compare


for kind in ("SQLite", "Redis"):
    bench(
        100_000,
        1_000,
        Row(f"{kind}: no-op jobs of one batch, enqueued and run, with its callback", 0.5, "x", "/s", note="raw: plain jobs"),
        most(f"{kind}: from the end of a batch's last job to its callback, p99", 50, "ms", 99),
    )(cost(kind))


def peer(name: str) -> Callable[[int, int], list[Figure]]:
    def compare(n: int, turn: int) -> list[Figure]:
        missing = [module for module in BATCHES[name].modules if find_spec(module) is None]
        if missing:
            raise Missing(f"the comparison with {name} needs the extra bench ({', '.join(missing)})")
        count = min(100_000, 50 * n)
        with place("Redis") as (url, client):
            raw, (_, seconds) = in_turn(turn, lambda: run_peer(client, name, n), lambda: timed(url, count, True))
        return [Figure(count / seconds / raw, raw, count / seconds)]

    compare.__name__ = f"batches_{name}"
    return compare


for name, each in BATCHES.items():
    what = f"Redis: a batch of no-op jobs, from its first job to its callback, against {name.replace('_', chr(39) + 's ')}"
    bench(each.jobs, 100, Row(what, 10, "x", "/s", note=f"raw: {each.how}"))(peer(name))
