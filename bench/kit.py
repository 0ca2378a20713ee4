"""What the benches share: how one is declared, what is carried, handlers that count, and a second process."""

import faulthandler
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple

import apsw
import msgspec

from barnabas import App
from barnabas.cli.process import _tune as tune  # what `barnabas run` does: raw loops get it too
from barnabas.worker import Worker

RUN = Path(__file__).parent / "run.py"
WAIT = 120.0  # seconds after which a run that did not finish has failed
KEYS = 1_000


class Row(NamedTuple):
    """One line of the table. `unit` is the figure's, `each` that of the two absolutes; no target: for the reader."""

    what: str
    target: float | None
    unit: str  # "x": raw's time over ours; else as `each`
    each: str  # "/s", "us", "ms"
    at_most: bool = False
    note: str = ""


class Figure(NamedTuple):
    """What one round gave for one row."""

    value: float
    raw: float | None
    ours: float


class Bench(NamedTuple):
    """`run(n, turn)` measures the raw loop and Barnabas in turn (`turn` odd: Barnabas first), a figure a row."""

    name: str
    run: Callable[[int, int], list[Figure]]
    n: int
    tiny: int
    rows: list[Row]


BENCHES: dict[str, Bench] = {}


def bench(n: int, tiny: int, *rows: Row) -> Callable[[Any], Any]:
    """Register a function as a bench of `n` messages (`tiny` in a quick look)."""

    def register(run: Any) -> Any:
        BENCHES[run.__name__] = Bench(run.__name__, run, n, tiny, list(rows))
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


# What is carried.


class Order(msgspec.Struct):
    """About 140 bytes of JSON."""

    id: int
    customer: str
    total: float
    note: str


_KEYS = [f"customer-{i}" for i in range(KEYS)]


def orders(n: int, keys: int = KEYS) -> Iterator[Order]:
    """Orders 1 to n, their customers in turn."""
    for i in range(1, n + 1):
        yield Order(i, _KEYS[i % keys], i / 4, "left at the neighbour's, who will ring; the bell is out of order")


# Who handles it. Each handler adds up the ids, so that the end is known and checked, and costs both sides the same.


class Tally:
    """Handlers of every kind, and when (perf_counter) they had their first and their last of n messages."""

    def __init__(self, n: int) -> None:
        goal, total, count = n * (n + 1) // 2, 0, 0
        self.marks = marks = []
        self.done = done = threading.Event()

        def end() -> None:
            marks.append(perf_counter())
            done.set()

        def one(order: Order) -> None:
            nonlocal total
            if not total:
                marks.append(perf_counter())
            total += order.id
            if total == goal:
                end()

        async def one_async(order: Order) -> None:
            nonlocal total
            if not total:
                marks.append(perf_counter())
            total += order.id
            if total == goal:
                end()

        def batch(batch: list[Order]) -> None:
            nonlocal count
            if not count:
                marks.append(perf_counter())
            count += len(batch)
            if count == n:
                expect("what the batch holds", type(batch[-1]), Order)
                end()

        def job(number: int) -> None:
            nonlocal total
            if not total:
                marks.append(perf_counter())
            total += number
            if total == goal:
                end()

        self.one, self.one_async, self.batch, self.job = one, one_async, batch, job

    @property
    def seconds(self) -> float:
        """From the first to the last handled; waits for it."""
        if not self.done.wait(WAIT):
            faulthandler.dump_traceback()
            raise TimeoutError(f"not all messages were handled within {WAIT} s")
        return self.marks[-1] - self.marks[0]


def work_off(app: App, name: str, n: int, wait: Callable[[], Any]) -> Any:
    """Run a worker until `wait` returns (its outcome is ours), see that all is settled, and stop it."""
    worker = Worker(app)
    worker.start()
    try:
        out = wait()
        until = perf_counter() + WAIT
        while app.observers.counts.get((name, "done"), 0) < n and worker.failed() is None and perf_counter() < until:
            sleep(0.002)
    finally:
        held = worker.stop(5.0)
    expect("error", worker.failed(), None)
    expect("handlers that held the stop up", held, [])
    expect("settled", app.observers.counts, {(name, "done"): n})
    return out


def raw_db(path: str, schema: str = "") -> apsw.Connection:
    """A bare connection that promises what ours does: WAL, synchronous=FULL."""
    db = apsw.Connection(path)
    db.set_busy_timeout(60_000)
    db.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
    if schema:
        db.execute(schema)
    return db


# A second process. Both sides talk in lines of JSON.


def say(what: Any) -> None:
    """Tell the process that started this one."""
    print(json.dumps(what), flush=True)


def hear() -> Any:
    """Wait for what the process that started this one says."""
    return json.loads(sys.stdin.readline())


class Other:
    """`module.function(*args)` in a process of its own."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        command = [sys.executable, str(RUN), "--part", f"{function.__module__}:{function.__name__}", json.dumps(args)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, what: Any) -> None:
        """Tell it."""
        assert self._process.stdin
        print(json.dumps(what), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        """Wait for what it says."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[3]} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, failed: Any, *_: object) -> None:
        if failed:
            self._process.kill()
        status = self._process.wait(WAIT)
        self._process.stdin.close()
        self._process.stdout.close()
        if not failed:
            expect("exit status", status, 0)
