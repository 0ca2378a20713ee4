"""Crews at work: threads for sync handlers, tasks of an event loop for async ones."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from barnabas.engine.crew import Crew
from barnabas.engine.lanes import Run
from barnabas.engine.work import SLOT
from barnabas.future import Future


def within(timeout: float, future: Any, more: str = "") -> None:
    """Wait for a user's function; raises what it raises, TimeoutError after `timeout` seconds."""
    try:
        future.result(timeout)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"it took longer than {timeout:g} s{more}") from None


class ThreadCrew(Crew):
    """Threads: for sync handlers."""

    def start(self) -> None:
        self._idle = 0
        self._left = False
        self._calls: deque[Callable[[], None]] = deque()
        self._work = threading.Condition(self.lanes.lock)
        self.threads: list[threading.Thread] = []
        for slot in range(self.size):
            name = f"{self.handler.name}-{slot}"
            self.threads.append(threading.Thread(target=self._drive, args=(slot,), name=name, daemon=True))
            self.threads[-1].start()

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 5.0) -> None:
        future: Future[None] = Future()

        def act() -> None:
            try:
                future.resolve(function(*args))
            except BaseException as error:
                future.fail(error)

        with self._work:
            self._calls.append(act)
            self._work.notify_all()
        within(timeout, future, f", or no thread of {self.handler.name!r} was free for it")

    def _drive(self, slot: int) -> None:
        try:
            self.body(self, slot).send(None)
        except StopIteration:
            pass
        except BaseException as error:  # GeneratorExit and the like: the run in hand is settled by nobody
            self.died(slot, error)
            self.take(slot)  # nothing but calls

    def take(self, slot: int) -> Run | None:
        if (run := self._hauled(slot)) is not None:
            return run
        with self._work:
            while not self._left:  # a stopped crew still answers calls: revoked, tear_down
                if self._calls:
                    act = self._calls.popleft()
                    self._work.release()
                    try:
                        act()
                    finally:
                        self._work.acquire()
                    continue
                run = self._refill(slot)
                if run is not None:
                    if self._idle and self.lanes.ready:
                        self._work.notify()
                    return run
                self._idle += 1
                self._work.wait()
                self._idle -= 1
        return None

    def _ready(self) -> None:
        if self._idle:
            self._work.notify()

    def nudge(self) -> None:
        """Wake a worker; it wakes the next if there is more (a cascade: no herd)."""
        with self._work:
            if self._idle and (self.lanes.ready or self.solo):
                self._work.notify()

    def leave(self) -> None:
        with self._work:
            self._left = True
            self._work.notify_all()


class LoopCrew(Crew):
    """Tasks on an event loop: for async handlers. Long-lived workers, never a task a message."""

    loop: asyncio.AbstractEventLoop
    _telling = False

    def start(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.tasks: list[asyncio.Task[None]] = []
        asyncio.run_coroutine_threadsafe(self._begin(), self.loop).result()

    async def _begin(self) -> None:
        self.tasks = [asyncio.create_task(self.body(self, slot), name=f"{self.handler.name}-{slot}") for slot in range(self.size)]
        for task in self.tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.died(self.tasks.index(task), error)

    def _ran_out(self) -> None:
        """While others are at work, a few results are not worth waking the fetch thread each time that one has nothing to do:
        it would not settle them yet."""
        if self.fresh >= self.enough or len(self._waiters) + 1 >= self.size:
            self._tell()
        elif not self._telling:
            self._telling = True
            self.loop.call_later(0.01, self._told)

    def _told(self) -> None:
        self._telling = False
        if self.fresh:
            self._tell()

    async def idle(self, slot: int) -> bool:
        if self.stopping:
            return False
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        await waiter
        return not self.stopping

    def take(self, slot: int) -> Run | None:
        run = super().take(slot)
        if run is not None and self._waiters and self.lanes.ready:
            self._ready()
        return run

    def _ready(self) -> None:
        if self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def nudge(self) -> None:
        """Wake a worker on its own loop."""
        self.loop.call_soon_threadsafe(self._ready)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 5.0) -> None:
        async def act() -> None:
            out = function(*args)
            if asyncio.iscoroutine(out):
                await out

        within(timeout, asyncio.run_coroutine_threadsafe(act(), self.loop))

    def cancel(self, slot: int, run: Run, why: str) -> bool:
        at = slot * SLOT + self.base + 1
        offset = self.box[at]

        def now() -> None:
            if self.current[slot] is run and self.box[at] == offset != -1:  # else it is past what took so long
                self.cancelled[slot] = why
                self.tasks[slot].cancel()

        self.loop.call_soon_threadsafe(now)
        return True

    def blocked(self, slot: int) -> bool:
        running = asyncio.current_task(self.loop)
        return running is self.tasks[slot] or (running is None and slot in self.cancelled)  # it swallowed its cancellation

    def stop(self) -> None:
        super().stop()

        def wake_all() -> None:
            while self._waiters:
                self._ready()

        self.loop.call_soon_threadsafe(wake_all)
