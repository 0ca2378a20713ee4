"""Take-over: how long the partitions of a process that is killed or frozen see nothing handled."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

from kit import SPAWN, WAIT, Figure, Row, app_on, bench

from barnabas import App, Delivery
from barnabas.worker import Worker

PARTITIONS, WORKERS = 6, 3
EVERY = 0.01  # seconds between two messages of a partition


def shop(place: str, session: float, **options: Any) -> tuple[App, Any]:
    app = app_on(place, session_timeout=session, **options)
    return app, app.topic("ticks", int, partitions=PARTITIONS)


def work(owner: Any, since: Any, place: str, session: float, options: dict[str, Any]) -> None:
    """A worker that says from when on it handled what of each partition."""
    app, ticks = shop(place, session, **options)
    me = os.getpid()

    @app.consumer(ticks)
    def tick(n: int, delivery: Delivery[int]) -> None:
        if owner[delivery.partition] != me:
            since[delivery.partition] = monotonic()
            owner[delivery.partition] = me

    Worker(app).start()
    Event().wait()


class Group:
    """Workers, and a thread that sends to every partition all the time."""

    def __init__(self, place: str, session: float, **options: Any) -> None:
        self._owner, self._since = SPAWN.Array("q", PARTITIONS, lock=False), SPAWN.Array("d", PARTITIONS, lock=False)
        self._args = (self._owner, self._since, place, session, options)
        self._app, self._ticks = shop(place, session, **options)
        self._app.events.declare([self._ticks])
        self._end = Event()
        self._workers = [self._start() for _ in range(WORKERS)]
        Thread(target=self._send, daemon=True).start()

    def _start(self) -> BaseProcess:
        worker = SPAWN.Process(target=work, args=self._args, daemon=True)
        worker.start()
        return worker

    def _send(self) -> None:
        while not self._end.wait(EVERY):
            for partition in range(PARTITIONS):
                self._ticks.send(1, partition=partition)

    def _settle(self) -> None:
        """Wait until every worker has its share."""
        wait(lambda: all(list(self._owner).count(worker.pid) == PARTITIONS // WORKERS for worker in self._workers))

    def hit(self, number: signal.Signals) -> float:
        """Send the signal to a worker; the seconds until all its partitions are handled by others."""
        self._settle()
        worker = self._workers.pop(0)
        sleep(0.137)  # at no particular instant of what happens twice a second
        lost = [n for n in range(PARTITIONS) if self._owner[n] == worker.pid]
        began = monotonic()
        os.kill(worker.pid or 0, number)
        wait(lambda: worker.pid not in list(self._owner))
        if number == signal.SIGSTOP:
            os.kill(worker.pid or 0, signal.SIGCONT)
            worker.join(0.1)  # one that was stopped in a transaction has been killed by the others
        else:
            worker.join()
        self._workers.append(worker if worker.is_alive() else self._start())
        return max(self._since[n] for n in lost) - began

    def close(self) -> None:
        """End all of it."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._end.set()
        self._app.close()


def wait(done: Callable[[], bool]) -> None:
    until = monotonic() + WAIT
    while not done():
        if monotonic() > until:
            raise TimeoutError(f"no take-over within {WAIT} s")
        sleep(0.001)


WHAT = "from SIGKILL of a process to the handling of all its partitions by others"


@bench(
    6,
    2,
    Row(f"{WHAT}, p99", 2000, "ms", "ms", at_most=True, percent=99),
    Row("of which: median", None, "ms", "ms", percent=50),
    Row("the same after SIGSTOP, session 10 s", 12_000, "ms", "ms", at_most=True),
)
def failover(n: int, turn: int) -> list[Figure]:
    def measure(number: signal.Signals) -> list[float]:
        with TemporaryDirectory(dir=Path.cwd()) as folder:
            group = Group(f"{folder}/file.db", 10.0 if n > 2 else 2.0)
            try:
                return [1000 * group.hit(number) for _ in range(n if number == signal.SIGKILL else 1)]
            finally:
                group.close()

    with ThreadPoolExecutor(2) as pool:  # a frozen process is found after seconds in which little happens
        kills, [frozen] = pool.map(measure, (signal.SIGKILL, signal.SIGSTOP))
    return [Figure(kills, None, None), Figure(kills, None, None), Figure(frozen, None, frozen)]
