"""Many threads and processes on one SQLite file: durable sends, turns to write, wake-up, idling, a backlog, shared work."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGTERM
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter, process_time, sleep, time
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
from topics import RAW, send_ours, shop

from barnabas import App
from barnabas.cli.process import Stopper
from barnabas.cli.run import alone
from barnabas.worker import Worker, memory

SENDERS = 16  # threads
BUSY = 3  # processes
RATE = 200  # messages a second
SHARERS, PARTITIONS = 4, 8


def _most(what: str, target: float | None, unit: str) -> Row:
    return Row(what, target, unit, unit, at_most=True)


def percentile(times: list[float], part: float) -> float:
    """Of seconds, in milliseconds."""
    return 1000 * sorted(times)[int(part * len(times))]


# Durable sends from many threads.


def send_bare(path: str, n: int) -> float:
    """Messages a second, one row a transaction."""
    db, encode = raw_db(path, RAW), msgspec.json.Encoder().encode
    began = perf_counter()
    for order in orders(n):
        row = (order.customer, encode(order), time())
        db.execute("INSERT INTO messages (key, value, time) VALUES (?, ?, ?)", row)
    seconds = perf_counter() - began
    expect("stored", db.execute("SELECT count(*) FROM messages").fetchone()[0], n)
    db.close()
    return n / seconds


def send_by(path: str, n: int, send: Callable[[Any, int], None]) -> float:
    """Messages a second, however `send(topic, n)` sends them."""
    app, topic = shop(path)
    app.events.flush(0)
    began = perf_counter()
    send(topic, n)
    seconds = perf_counter() - began
    expect("stored", sum(end - first for first, end, _ in app.events.topics()[0].partitions), n)
    app.close()
    return n / seconds


def send_waiting(topic: Any, n: int) -> None:
    def one_by_one(part: list[Order]) -> None:
        for order in part:
            topic.send(order).result(WAIT)

    every = [*orders(n)]
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(one_by_one, [every[number::SENDERS] for number in range(SENDERS)]))


def send_collecting(topic: Any, n: int) -> None:
    for future in [topic.send(order) for order in orders(n)]:
        future.result(WAIT)


NOTE = "raw: one row a transaction; the target is for a disk where that makes 5 k/s or more"


@bench(
    10_000,
    200,
    Row("durable sends from 16 threads, each waiting for its `.result()`", 2.5, "x", "/s", note=NOTE),
    Row("durable sends without waiting, futures collected", 20.0, "x", "/s", note=NOTE),
)
def sends(n: int, turn: int) -> list[Figure]:
    tune()
    with TemporaryDirectory(dir=Path.cwd()) as folder:

        def ours() -> tuple[float, float]:
            one, two = f"{folder}/waiting.db", f"{folder}/collecting.db"
            return send_by(one, 2 * n, send_waiting), send_by(two, 20 * n, send_collecting)

        raw, own = in_turn(turn, lambda: send_bare(f"{folder}/raw.db", n), ours)
    return [Figure(rate / raw, raw, rate) for rate in own]


# Who waits for whom.


@bench(1_000, 20, _most("a durable send (`.result()`) while a handler thread computes without pause, p99", 15, "ms"))
def send_beside(n: int, turn: int) -> list[Figure]:
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        app, topic = shop(f"{folder}/file.db")
        tasks, begun, end, times = app.topic("tasks", int), Event(), False, []

        @app.consumer(tasks)
        def compute(number: int) -> None:
            begun.set()
            while not end:
                number += 1

        worker = Worker(app)
        worker.start()
        tune()
        tasks.send(1).result(WAIT)
        expect("computing", begun.wait(WAIT), True)
        for order in orders(n):
            began = perf_counter()
            topic.send(order).result(WAIT)
            times.append(perf_counter() - began)
        end = True
        expect("handlers that held the stop up", worker.stop(5.0), [])
        app.close()
    ms = percentile(times, 0.99)
    return [Figure(ms, None, ms)]


def be_busy(parent: Connection, path: str, n: int) -> None:
    """Send and handle without pause; how long each write took, from its wish to its commit."""
    app, topic = shop(path)
    write, times = app.events.write, []

    def timed(act: Any, **options: Any) -> Any:
        began = perf_counter()
        try:
            return write(act, **options)
        finally:
            times.append(perf_counter() - began)

    @app.consumer(topic)
    def handle(order: Order) -> None:
        pass

    worker = Worker(app)
    worker.start()
    tune()
    sleep(0.5)  # the partitions are shared out
    app.events.write = timed
    parent.send("ready")
    parent.recv()
    expect("sent", topic.send_many(orders(n)).result(WAIT), n)
    parent.send("done")
    parent.recv()  # the others are at work to their own end
    app.events.write = write
    expect("handlers that held the stop up", worker.stop(5.0), [])
    app.close()
    parent.send(times)


@bench(
    200_000,
    2_000,
    _most("a write turn, from the wish to the commit, with 3 processes that send and handle without pause: worst", 100, "ms"),
    _most("of which: p99", None, "ms"),
)
def turns(n: int, turn: int) -> list[Figure]:
    with TemporaryDirectory(dir=Path.cwd()) as folder, ExitStack() as stack:
        processes = [stack.enter_context(other(be_busy, f"{folder}/file.db", n)) for _ in range(BUSY)]
        for word in ("go", "end"):
            for process in processes:
                process.recv()
            for process in processes:
                process.send(word)
        times = [each for process in processes for each in process.recv()]
    return [Figure(ms, None, ms) for ms in (1000 * max(times), percentile(times, 0.99))]


# Waking up, and sleeping.


def handle_timed(parent: Connection, place: str, n: int) -> None:
    """The seconds from each send to its handler's start: `total` says when it was sent, on a clock of all processes."""
    app, topic = shop(place)
    tally, times = Tally(n), []

    @app.consumer(topic)
    def handle(order: Order) -> None:
        times.append(perf_counter() - order.total)
        tally.one(order)

    def started(worker: Worker) -> None:
        tune()
        assigned(worker)
        parent.send("ready")

    work_off(app, "handle", n, started)
    assert tally.seconds
    parent.send(times)
    app.close()


@bench(
    5 * RATE,
    40,
    _most("from a send in one process to its handler's start in another, 200 messages/s, p50", 2, "ms"),
    _most("the same, p99", 8, "ms"),
)
def wake_up(n: int, turn: int) -> list[Figure]:
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        return woken(f"{folder}/file.db", n)


def woken(place: str, n: int) -> list[Figure]:
    """From a send here to its handler's start in another process."""
    with other(handle_timed, place, n) as handler:
        app, topic = shop(place)
        app.topic("first", int).send(1).result(WAIT)  # the sink is open
        handler.recv()
        tune()
        began = perf_counter()
        for number in range(1, n + 1):
            sleep(max(0.0, began + number / RATE - perf_counter()))
            topic.send(Order(number, f"customer-{number}", perf_counter()))
        times = handler.recv()
        app.close()
    return half_and_most(times)


def half_and_most(times: list[float]) -> list[Figure]:
    """p50 and p99."""
    return [Figure(ms, None, ms) for ms in (percentile(times, 0.5), percentile(times, 0.99))]


def do_nothing(parent: Connection, path: str, seconds: int) -> None:
    """`barnabas run` with nothing to do; the percentage of a core that it takes."""
    app, topic = shop(path)
    app.consumer(topic, name="one")(Tally(1).one)
    app.consumer(topic, name="two")(Tally(1).one)
    app.job(name="noop")(Tally(1).job)
    stopper = Stopper()

    def look() -> None:
        sleep(1.5)  # it has started
        began, used = perf_counter(), process_time()
        sleep(seconds)
        parent.send(100 * (process_time() - used) / (perf_counter() - began))
        stopper.asked(SIGTERM)

    Thread(target=look).start()
    expect("exit status", alone(app, stopper, None, (), (), False), 0)
    app.close()


@bench(10, 1, _most("an idle worker with two consumers and a queue, of a core", 0.5, "%"))
def idle(n: int, turn: int) -> list[Figure]:
    with TemporaryDirectory(dir=Path.cwd()) as folder, other(do_nothing, f"{folder}/file.db", n) as worker:
        part = worker.recv()
    return [Figure(part, None, part)]


# A backlog.


def handle_backlog(parent: Connection, place: str, n: int) -> None:
    """The megabytes that a worker had at its peak, and by which it grew while it handled the last four fifths."""
    app, topic = shop(place)
    tally, sizes, seen = Tally(n), [], 0

    @app.consumer(topic)
    def handle(order: Order) -> None:
        nonlocal seen
        seen += 1
        if seen in (n // 5, n):
            sizes.append(memory())
        tally.one(order)

    work_off(app, "handle", n, lambda _: tune())
    assert tally.seconds
    app.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parent.send((peak / 1e6, (sizes[1] - sizes[0]) / 1e6))


@bench(
    1_000_000,
    10_000,
    _most("a worker at a backlog of 1,000,000 messages: peak memory", 150, "MB"),
    _most("of which: grown after the first 200,000", 10, "MB"),
)
def backlog(n: int, turn: int) -> list[Figure]:
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        path = f"{folder}/file.db"
        with other(send_ours, path, n) as sender:
            sender.recv()
            sender.send("go")
            sender.recv()
        with other(handle_backlog, path, n) as worker:
            return [Figure(mb, None, mb) for mb in worker.recv()]


# Work that processes share.


def spin(times: int) -> None:
    for _ in range(times):
        pass


def spins(seconds: float) -> int:
    """How often to spin to compute for so long."""
    best = 1.0
    for _ in range(50):
        began = perf_counter()
        spin(10_000)
        best = min(best, perf_counter() - began)
    return int(10_000 * seconds / best)


def tasks_on(place: str) -> tuple[App, Any]:
    app = app_on(place)
    return app, app.topic("tasks", int, partitions=PARTITIONS)


def take_share(parent: Connection, place: str, processes: int, times: int) -> None:
    """Handle by computing until the parent says that all is done; the numbers that were handled here, and the last's time."""
    app, tasks = tasks_on(place)
    seen, last = [], 0.0

    @app.consumer(tasks)
    def compute(number: int) -> None:
        nonlocal last
        spin(times)
        seen.append(number)
        last = perf_counter()

    worker = Worker(app)
    worker.start()
    tune()
    assigned(worker, PARTITIONS // processes)
    parent.send("ready")
    parent.recv()
    expect("handlers that held the stop up", worker.stop(5.0), [])
    app.close()
    parent.send((seen, last))


def shared_by(place: str, processes: int, n: int, times: int) -> float:
    """Messages a second, from the first send to the last handled."""
    with ExitStack() as stack:
        app, tasks = tasks_on(place)
        app.events.declare([tasks])
        workers = [stack.enter_context(other(take_share, place, processes, times)) for _ in range(processes)]
        for worker in workers:
            worker.recv()
        app.topic("first", int).send(1).result(WAIT)  # the sink is open
        began = perf_counter()
        tasks.send_many(range(n)).result(WAIT)
        while app.events.open_work({"bench-compute": ["tasks"]}, []):
            expect("in time", perf_counter() - began < WAIT, True)
            sleep(0.05)
        for worker in workers:
            worker.send("end")
        seen, lasts = zip(*[worker.recv() for worker in workers], strict=True)
        expect("handled", sorted(number for numbers in seen for number in numbers), [*range(n)])
        app.close()
    return n / (max(lasts) - began)


@bench(
    4_000,
    80,
    Row("handlers of 1 ms of computing: 4 processes on one file", 1.8, "x", "/s", note="raw: 1 process; two free cores"),
)
def share(n: int, turn: int) -> list[Figure]:
    times = spins(0.001)
    with TemporaryDirectory(dir=Path.cwd()) as folder:
        one, four = in_turn(
            turn,
            lambda: shared_by(f"{folder}/one.db", 1, n, times),
            lambda: shared_by(f"{folder}/four.db", SHARERS, n, times),
        )
    return [Figure(four / one, one, four)]
