"""The workers of one subscription, and what they share: lanes in front of them, results behind them.

Three kinds, one interface: threads, tasks of an event loop, or nobody at all (`Crew` itself: tests and simulation drive
the workers' coroutines themselves).
"""

import asyncio
import threading
from array import array
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from barnabas.engine.lanes import Lanes, Run
from barnabas.engine.work import SLOT, work, work_batches
from barnabas.errors import TimedOut
from barnabas.future import Future
from barnabas.message import Row
from barnabas.ports import Part, Result

TICK = 0.05  # seconds a run works on before it settles what is done and looks around
STOP = -1.0


class Crew:
    """The workers' side of a subscription. `size` workers share `lanes`; each has a place in `box`.

    The box is memory that outlives a killed process where the backend has such: it says which offset is in work.
    """

    def __init__(
        self,
        handler: Any,  # a Handler, or the JobHandler that has the same face
        order: str,
        size: int,
        clock: Any,
        *,
        box: Any = None,
        base: int = 0,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        batch = handler.batch
        self.handler = handler
        self.size = size
        self.clock = clock
        self.monotonic = clock.monotonic
        self.lanes = Lanes(order, clock.monotonic, batch.max if batch else 1 << 30, batch.wait if batch else 0.0)
        self.box = array("q", bytes(8 * SLOT * size)) if box is None else box
        self.base = base
        self.wake = wake
        self.results: deque[Result] = deque()
        self.fresh = 0  # rows in results that the fetch thread has not seen
        self.enough = 500  # fresh rows that are worth waking the fetch thread for
        self.current: list[Run | None] = [None] * size
        self.given = [0] * size
        self.began = [0.0] * size
        self.cancelled: dict[int, str] = {}
        self.late: set[tuple[int, int]] = set()
        self.pace = 0.0  # seconds a row took of late
        self.stopping = False
        self.held = False
        self.solo: Run | None = None
        self.error: BaseException | None = None
        self.body = work_batches if batch else work
        self.drive: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run  # for `step` and `call` of async handlers

    # The workers' side.

    def take(self, slot: int) -> Run | None:
        """The next run for this worker; None if there is none now."""
        with self.lanes.lock:
            return None if self.stopping else self._take()

    def _take(self) -> Run | None:
        if self.held:
            solo, self.solo = self.solo, None
            return solo
        return self.lanes.take(self._count())

    def _count(self) -> int:
        """How many loose rows a worker takes at once: about a millisecond of work, so a slow one holds no other."""
        return min(100, max(1, int(0.001 / self.pace))) if self.pace else 1

    async def idle(self, slot: int) -> bool:
        """Wait for work; False if this worker is to end."""
        return False

    def begin(self, slot: int, run: Run) -> float:
        """A run starts: until when (monotonic seconds) it may go on without looking around, negative to stop."""
        now = self.monotonic()
        self.box[slot * SLOT + self.base] = run.part.id + 1
        self.box[slot * SLOT + self.base + 2] = 1
        self.current[slot] = run
        self.given[slot] = 0
        self.began[slot] = now
        if run.part.closed or self.stopping or now > run.part.until:
            return STOP
        return min(now + TICK, run.part.until)

    def breathe(self, slot: int, run: Run, done: int) -> float:
        """Between two deliveries: give what is done, and say until when to go on (negative: stop here)."""
        if self.current[slot] is not run:
            return STOP
        self._give(slot, run, done)
        if self.fresh:
            self._tell()
        now = self.monotonic()
        if run.part.closed or self.stopping or now > run.part.until:
            return STOP
        return min(now + TICK, run.part.until)

    def _give(self, slot: int, run: Run, done: int) -> None:
        start = self.given[slot]
        if done > start and not run.part.closed:
            rows = run.rows if start == 0 and done == len(run.rows) else run.rows[start:done]
            self.results.append(Result(run.part, rows, run.outputs, run.cells, run.others))
            self.fresh += done - start
            self.given[slot] = done
            run.outputs, run.cells, run.others = [], {}, {}

    def end(self, slot: int, run: Run, done: int, parked: float | None) -> None:
        """A run is over: `done` rows have their outcome, the rest is parked until then or goes back to the source."""
        base = slot * SLOT + self.base
        self.box[base] = 0
        now = self.monotonic()
        if self.current[slot] is not run:  # it was abandoned: its outcome is settled, whatever it does now
            return
        if done:
            self.pace += ((now - self.began[slot]) / done - self.pace) * 0.2
        self._give(slot, run, done)
        if parked is not None and parked >= 0 and not run.part.closed:  # no row is done, but the attempt is to be kept
            self.results.append(Result(run.part, (), run.outputs, run.cells, run.others))
            run.outputs, run.cells, run.others = [], {}, {}
        with self.lanes.lock:
            self.current[slot] = None
            if self.lanes.give(run, done, None if parked is None or parked < 0 else parked):
                self._ready()
            idle = not self.lanes.ready
        if idle or self.fresh >= self.enough or parked is not None:
            self._tell()

    def _tell(self) -> None:
        self.fresh = 0
        self.wake()

    def _ready(self) -> None:
        """A lane became ready while the lock is held: see that somebody takes it."""

    def failed(self, slot: int, run: Run, row: Row, error: BaseException, whole: bool = False) -> float | None:
        """What becomes of a row whose run ended in `error`: None to go on with the next, or when to run it again
        (monotonic seconds; negative: stop, it is given back)."""
        if self.current[slot] is not run:
            return STOP
        if isinstance(error, asyncio.CancelledError) and self.handler.awaited:
            why = self._uncancel(slot)
            if why == "release":
                return STOP
            if why == "timeout":
                error = TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s")
        if (id(run), row[0]) in self.late:
            self.late.discard((id(run), row[0]))
            error = TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s, then: {error!r}")
        now = self.clock.now()
        try:
            at = self.handler.failed(run, row, error, now, whole)
        except BaseException as problem:  # on_dead="stop", or a failure of the failing: nothing may be lost by it
            self.error = problem
            self.stopping = True
            return STOP
        return None if at is None else self.monotonic() + max(0.0, at - now)

    def _uncancel(self, slot: int) -> str | None:
        """Why we cancelled what this task runs; the task forgets about it."""
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        return self.cancelled.pop(slot, None)

    def overdue(self, slot: int, run: Run, row: Row) -> None:
        """A handler returned, and somebody in the crew was past his timeout: raise TimedOut if it was this one."""
        if self.handler.awaited:
            if self._uncancel(slot) != "timeout":
                return
        elif (id(run), row[0]) not in self.late:
            return
        self.late.discard((id(run), row[0]))
        raise TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s")

    def abandon(self, slot: int, run: Run) -> None:
        """A sync handler did not return after twice its timeout: its delivery has failed, whatever it does later.

        Only for a process that is about to end: the thread cannot be ended.
        """
        offset = self.box[slot * SLOT + self.base + 1]
        for done, row in enumerate(run.rows):
            if row[0] == offset:
                parked = self.failed(slot, run, row, TimedOut(f"did not return after twice its timeout of {self.handler.limit(run)} s"))
                self.end(slot, run, done + (parked is None), parked)
                return

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 5.0) -> None:
        """Call a user's function where the handler runs; raises what it raises, TimeoutError after `timeout` seconds."""
        out = function(*args)
        if asyncio.iscoroutine(out):
            self.drive(out)

    def decode_each(self, run: Run, rows: Sequence[Row]) -> tuple[list[Any], list[Row]]:
        """Decode what can be decoded; the others are dead on their own."""
        decode = self.handler.decoder(run.part.topic)
        values, kept = [], []
        for row in rows:
            try:
                values.append(decode(row[2]))
                kept.append(row)
            except Exception as error:
                self.handler.failed(run, row, error, self.clock.now(), False)
        return values, kept

    # The fetch thread's side.

    def put(self, batches: Sequence[tuple[Part, Sequence[Row]]]) -> None:
        """Hand fetched rows over: one hop for all of them."""
        for part, rows in batches:
            self.lanes.put(part, rows)

    def put_alone(self, part: Part, row: Row) -> None:
        """Let one row run while all others are held."""
        self.solo = self.lanes.claim(part, row)
        self.nudge()

    def hand_in(self, run: Run) -> None:
        """A run that needed no worker: its rows have their outcome."""
        self.results.append(Result(run.part, run.rows, run.outputs, run.cells, run.others))

    def nudge(self) -> None:
        """See that somebody looks for work."""

    def collect(self) -> list[Result]:
        """The results since the last call."""
        results, taken = self.results, []
        while results:
            taken.append(results.popleft())
        return taken

    def unpark(self, now: float) -> None:
        """Make ready whatever was parked until now."""
        self.lanes.unpark(now)

    def busy(self, parts: Sequence[Part] = ()) -> bool:
        """Whether a worker has a run (of these partitions) in hand."""
        return any(run is not None and (not parts or run.part in parts) for run in self.current)

    def cancel(self, slot: int, run: Run, why: str) -> bool:
        """Cancel what this worker has in hand ("timeout" or "release"); False where that cannot be done (threads)."""
        return False

    def start(self) -> None:
        """Begin to work."""

    def stop(self) -> None:
        """Take no further run; what is in hand goes on until its next delivery."""
        self.stopping = True

    def leave(self) -> None:
        """End; a stopped crew still answers `call`."""

    def step(self) -> None:
        """Run every worker until nothing is ready (tests and simulation)."""
        if self.handler.awaited:
            self.drive(self._together())
            return
        for slot in range(self.size):
            body = self.body(self, slot)
            try:
                body.send(None)
            except StopIteration:
                continue
            raise RuntimeError("a sync handler's worker was suspended")

    async def _together(self) -> None:
        await asyncio.gather(*(self.body(self, slot) for slot in range(self.size)))


class ThreadCrew(Crew):
    """Threads: for sync handlers."""

    def start(self) -> None:
        self._idle = 0
        self._left = False
        self._calls: deque[Callable[[], None]] = deque()
        self._work = threading.Condition(self.lanes.lock)
        self.threads = [
            threading.Thread(target=self._drive, args=(slot,), name=f"{self.handler.name}-{slot}", daemon=True)
            for slot in range(self.size)
        ]
        for thread in self.threads:
            thread.start()

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
        try:
            future.result(timeout)
        except TimeoutError:
            if future.done():
                raise
            raise TimeoutError(f"it waited {timeout} s for a thread of {self.handler.name!r}, which is at work") from None

    def _drive(self, slot: int) -> None:
        self.handler.enter()
        try:
            self.body(self, slot).send(None)
        except StopIteration:
            pass
        except BaseException as error:  # SystemExit and the like: the run in hand is settled by nobody
            self.error = error
            self.stopping = True
            self.wake()
            self.take(slot)  # nothing but calls
        finally:
            self.handler.leave()

    def take(self, slot: int) -> Run | None:
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
                run = self._take() if not self.stopping else None
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

    def put(self, batches: Sequence[tuple[Part, Sequence[Row]]]) -> None:
        super().put(batches)
        self.nudge()

    def nudge(self) -> None:
        """Wake a worker; it wakes the next if there is more (a cascade: no herd)."""
        with self._work:
            if self._idle and (self.lanes.ready or self.solo):
                self._work.notify()

    def unpark(self, now: float) -> None:
        if self.lanes.unpark(now):
            self.nudge()

    def leave(self) -> None:
        with self._work:
            self._left = True
            self._work.notify_all()


class LoopCrew(Crew):
    """Tasks on an event loop: for async handlers. Long-lived workers, never a task a message."""

    loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.tasks: list[asyncio.Task[None]] = []
        asyncio.run_coroutine_threadsafe(self._begin(), self.loop).result()

    async def _begin(self) -> None:
        self.handler.enter()
        self.tasks = [
            asyncio.create_task(self.body(self, slot), name=f"{self.handler.name}-{slot}") for slot in range(self.size)
        ]
        for task in self.tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            self.error = task.exception()
            self.stopping = True
            self.wake()

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

    def put(self, batches: Sequence[tuple[Part, Sequence[Row]]]) -> None:
        super().put(batches)
        self.nudge()

    def nudge(self) -> None:
        """Wake a worker on its own loop."""
        self.loop.call_soon_threadsafe(self._ready)

    def unpark(self, now: float) -> None:
        if self.lanes.unpark(now):
            self.nudge()

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 5.0) -> None:
        async def act() -> None:
            out = function(*args)
            if asyncio.iscoroutine(out):
                await out

        asyncio.run_coroutine_threadsafe(act(), self.loop).result(timeout)

    def cancel(self, slot: int, run: Run, why: str) -> bool:
        at = slot * SLOT + self.base + 1
        offset = self.box[at]

        def now() -> None:
            if self.current[slot] is run and self.box[at] == offset != -1:  # else it is past what took so long
                self.cancelled[slot] = why
                self.tasks[slot].cancel()

        self.loop.call_soon_threadsafe(now)
        return True

    def stop(self) -> None:
        super().stop()

        def wake_all() -> None:
            while self._waiters:
                self._ready()

        self.loop.call_soon_threadsafe(wake_all)
