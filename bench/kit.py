"""What the benches share: how one is declared, what is carried, handlers that count, and a second process."""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Event
from time import perf_counter, sleep
from typing import Any, NamedTuple

import apsw
import msgspec

from barnabas import App
from barnabas.cli.process import _tune
from barnabas.worker import Worker

WAIT = 120.0  # seconds after which a run that did not finish has failed
SPAWN = get_context("spawn")
tune = _tune  # what `barnabas run` does to its process; the raw loop of the same bench gets it too


class Missing(Exception):
    """What a bench needs is not on this machine: its rows are left out, with this line."""


class Row(NamedTuple):
    """One line of the table. `unit` is the figure's ("x": raw's time over ours), `each` that of raw and ours.

    With `percent`, a round gives all it measured, and the figure is that percentile over all rounds, not a median of theirs.
    """

    what: str
    target: float | None  # None: for the reader
    unit: str
    each: str  # "/s", "us", "ms"
    at_most: bool = False
    note: str = ""
    percent: int | None = None


class Figure(NamedTuple):
    """What one round gave for one row."""

    value: float | list[float]
    raw: float | None
    ours: float | None


class Bench(NamedTuple):
    """`run(n, turn)` measures the raw loop and Barnabas in turn (`turn` odd: Barnabas first): a figure a row.

    `server(folder)` is entered once for all rounds of all benches that name it; its address is in the environment, by its name.
    """

    name: str
    run: Callable[[int, int], list[Figure]]
    n: int
    tiny: int
    rows: tuple[Row, ...]
    server: Callable[[str], AbstractContextManager[str]] | None


BENCHES: dict[str, Bench] = {}


def bench(n: int, tiny: int, *rows: Row, server: Any = None) -> Callable[[Any], Any]:
    """Register a function as a bench of `n` messages (`tiny` in a quick look)."""

    def register(run: Any) -> Any:
        assert run.__name__ not in BENCHES, run.__name__
        BENCHES[run.__name__] = Bench(run.__name__, run, n, tiny, rows, server)
        return run

    return register


def in_turn(turn: int, raw: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Any, Any]:
    """Run both, in an order that changes from round to round; returns raw's outcome first."""
    if turn % 2:
        own = ours()
        return raw(), own
    return raw(), ours()


def expect(what: str, found: Any, wanted: Any) -> None:
    """A bench must not be fast by doing nothing."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r} instead of {wanted!r}")


class Order(msgspec.Struct, omit_defaults=True):
    """About 55 bytes of JSON, 130 with a note."""

    id: int
    customer: str
    total: float
    note: str = ""


NOTE = "left at the neighbour's, who will ring; the bell is out of order"
_KEYS = [f"customer-{i}" for i in range(1_000)]


def orders(n: int, keys: int = 1_000, note: str = NOTE) -> Iterator[Order]:
    """Orders 1 to n, their customers in turn."""
    for i in range(1, n + 1):
        yield Order(i, _KEYS[i % keys], i / 4, note)


class Tally:
    """Handlers that add up ids, so that the end is known and checked, and when the first and the last were called."""

    def __init__(self, n: int) -> None:
        goal, total = n * (n + 1) // 2, 0
        self.marks: list[float] = []
        mark = self.marks.append

        def job(number: int) -> None:
            nonlocal total
            if not total:
                mark(perf_counter())
            total += number
            if total == goal:
                mark(perf_counter())

        def one(order: Order) -> None:
            job(order.id)

        async def one_async(order: Order) -> None:
            job(order.id)

        def batch(batch: list[Order]) -> None:
            job(sum([order.id for order in batch]))

        self.job, self.one, self.one_async, self.batch = job, one, one_async, batch

    @property
    def seconds(self) -> float:
        """From the first to the last."""
        if len(self.marks) < 2:
            raise AssertionError("not every message was handled, or one was handled twice")
        return self.marks[-1] - self.marks[0]


def app_on(place: str, **settings: Any) -> App:
    """An app on a SQLite file, or on another backend's URL."""
    url = place if "://" in place else f"sqlite:///{place}"
    return App("bench", events=url, jobs="memory:" if url.startswith("kafka") else url, create_topics=True, **settings)


def assigned(worker: Worker, count: int = 6) -> None:
    """Wait until its runner has so many partitions of a topic of ours: 6 is all of them by default."""
    until = perf_counter() + WAIT
    while sum(part.topic in worker.app.topics for part in worker.runners[0].parts) != count:
        expect("its share in time", perf_counter() < until, True)
        sleep(0.01)
    sleep(0.1)  # it waits


def work_off(app: App, name: str, n: int, started: Callable[[Worker], None] = lambda worker: None) -> float:
    """Run a worker until n are settled, see that nothing else came of them, stop it; when the last was settled."""
    left, ends, last = [n], [0.0], Event()

    @app.observe
    def watch(record: Any) -> None:
        left[0] -= record.count
        if left[0] <= 0:
            ends[0] = perf_counter()
            last.set()

    worker = Worker(app)
    worker.start()
    started(worker)
    if not last.wait(WAIT):
        faulthandler.dump_traceback()
        raise TimeoutError(f"{left[0]} of {n} are not settled after {WAIT} s; the worker's error: {worker.failed()!r}")
    expect("handlers that held the stop up", worker.stop(5.0), [])
    expect("the worker's error", worker.failed(), None)
    expect("outcomes", app.observers.counts, {(name, "done"): n})
    return ends[0]


def raw_db(path: str, schema: str = "") -> apsw.Connection:
    """A bare connection that promises what ours does: WAL, synchronous=FULL."""
    db = apsw.Connection(path)
    db.set_busy_timeout(60_000)
    db.execute(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {schema}").fetchall()  # else it stops at a row
    expect("synchronous", db.pragma("synchronous"), 2)
    return db


@contextmanager
def other(function: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """`function(connection, *args)` in a process of its own; gives this side's connection."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=function, args=(there, *args), daemon=True)
    process.start()
    there.close()
    yield here
    process.join(WAIT)
    expect(f"exit status of {function.__name__}", process.exitcode, 0)
