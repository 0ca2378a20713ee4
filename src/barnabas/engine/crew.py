"""The workers of one subscription, and what they share: lanes in front of them, results behind them.

Three kinds, one interface: threads, tasks of an event loop, or nobody at all (`Crew` itself: tests and simulation drive
the workers' coroutines themselves).
"""

import asyncio
import contextlib
import logging
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from barnabas.engine.hand import CURRENT
from barnabas.engine.lanes import LOOSE, Lanes, Run
from barnabas.engine.work import SLOT, work, work_batches
from barnabas.errors import BackendError, TimedOut, told
from barnabas.message import Row, Stretch, Unread, offset_of
from barnabas.ports import FOREVER, Part, Result

TICK = 0.05  # seconds a run works on before it settles what is done and looks around
QUICK = 0.003  # seconds a row takes where a worker takes more than one at once, and what they may take together: where ten
# threads contend, each lock a run less is worth more than what a run takes
STOP = -1.0
AWAY = 1.0  # seconds until what met a backend that cannot be read is tried again


class Crew:
    """The workers' side of a subscription. `size` workers share `lanes`; each has a place in `box`.

    The box is memory that outlives a killed process where the backend has such: it says which offset is in work.
    """

    def __init__(self, handler: Any, order: str, size: int, clock: Any, *, box: Any = None, base: int = 0) -> None:
        batch = handler.batch  # of a Handler, or the JobHandler that has the same face
        self.handler, self.size, self.clock, self.monotonic = handler, size, clock, clock.monotonic
        self.lanes = Lanes(order, clock.monotonic, batch.max if batch else 1 << 30, batch.wait if batch else 0.0)
        self.box = array("q", bytes(8 * SLOT * size)) if box is None else box
        self.base = base
        for slot in range(size):
            self.box[slot * SLOT + base + 2] = 1
        self.wake: Callable[[], None] = lambda: None  # the runner's
        self.results: deque[Result | tuple[Part, Sequence[Row]]] = deque()  # a pair: done, and nothing else to say
        self.fresh = 0  # rows in results that the fetch thread has not seen
        self.quiet = float("-inf")  # until when it is not said again that a backend is away
        self.enough = 500  # fresh rows that are worth waking the fetch thread for
        self.current: list[Run | None] = [None] * size
        self.hands: list[Any] = [None] * size
        self.given = [0] * size
        self.hauls: list[deque[Run]] = [deque() for _ in range(size)]
        self.ended: list[list[tuple[Run, int, float | None]]] = [[] for _ in range(size)]
        self.until = [0.0] * size
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
        run = self._hauled(slot)
        if run is None:
            with self.lanes.lock:
                run = self._refill(slot)
        return run

    def _hauled(self, slot: int) -> Run | None:
        haul = self.hauls[slot]
        try:
            if haul and not self.stopping:
                self.current[slot] = haul[0]  # before it leaves the haul: see `busy`
                return haul.popleft()
        except IndexError:  # `rescue` was faster
            self.current[slot] = None
        return None

    def _refill(self, slot: int) -> Run | None:
        """Give the lanes of finished runs back and take the next runs, with one hold of the lock for both.

        Several at once where they are short: a lock a run would cost more than the run. Hold the lock.
        """
        lanes, ended = self.lanes, self.ended[slot]
        if ended:
            for given, done, at in ended:
                if lanes.give(given, done, at):
                    self._ready()
            self._measure(slot)
            ended.clear()
        first: Run | None = None
        if self.held:
            first, self.solo = self.solo, None
        elif not self.stopping:
            pace = self.pace
            count = min(100, int(QUICK / pace)) if 0 < pace <= QUICK else 1
            first = lanes.take(count)
            if first is not None and count > 1 and lanes.ready:
                haul = self.hauls[slot]
                for _ in range(min(count, max(len(lanes.ready) // self.size, int(0.0001 / pace)))):
                    run = lanes.take(1)
                    if run is None:
                        break
                    haul.append(run)
        if first is None:
            self.box[slot * SLOT + self.base] = 0
            if self.fresh:
                self._ran_out()
        else:
            self.current[slot] = first
            self.until[slot] = 0.0
        return first

    def _measure(self, slot: int) -> None:
        """How long a row took of late: it decides how many a worker takes at once, and how far ahead jobs are claimed."""
        ended = self.ended[slot]
        rows = ended[0][1] if len(ended) == 1 else sum([done for _, done, _ in ended])
        if rows:
            self.pace += ((self.monotonic() - self.began[slot]) / rows - self.pace) * 0.2

    async def idle(self, slot: int) -> bool:
        """Wait for work; False if this worker is to end."""
        return False

    def begin(self, slot: int, run: Run) -> float:
        """A run starts: until when (monotonic seconds) it may go on without looking around, negative to stop."""
        part = run.part
        self.box[slot * SLOT + self.base] = part.id + 1
        self.given[slot] = 0
        until = self.until[slot]
        if not until:  # the first of a haul
            self.began[slot] = now = self.monotonic()
            self.until[slot] = until = now + TICK
        if part.until < until or self.stopping:
            return STOP if self.stopping or part.until < self.began[slot] else float(part.until)
        return until

    def breathe(self, slot: int, run: Run, done: int) -> float:
        """Between two deliveries: give what is done, and say until when to go on (negative: stop here)."""
        if self.current[slot] is not run:
            return STOP
        self._give(slot, run, done)
        if self.fresh:
            self._tell()
        now = self.monotonic()
        if self.hauls[slot] or self.ended[slot]:
            self._unload(slot, now)
        with self.lanes.lock:
            if self.stopping or now > run.part.until or done >= len(run.rows):  # (a `rescue` took the row that was next)
                return STOP
            until: float = min(now + TICK, run.part.until)
            self.until[slot] = until
            return until

    def _unload(self, slot: int, now: float) -> None:
        """This run takes longer than thought: give the others that were taken with it to other workers."""
        haul, ended = self.hauls[slot], self.ended[slot]
        with self.lanes.lock:
            self._measure(slot)
            for run, done, at in [*ended, *((run, 0, now) for run in haul)]:
                if self.lanes.give(run, done, at):
                    self._ready()
            ended.clear()
            haul.clear()
        self.wake()  # the fetch thread makes ready what was parked until now

    def _give(self, slot: int, run: Run, done: int) -> None:
        start = self.given[slot]
        if done > start and not run.part.closed:
            rows = run.rows if start == 0 and done == len(run.rows) else run.rows[start:done]
            self.fresh += done - start
            self.given[slot] = done
            if run.outputs or run.cells or run.others:
                if run.cells:
                    self.handler.tables.give(run.part, run.cells)
                self.results.append(Result(run.part, rows, run.outputs, run.cells, run.others))
                run.outputs, run.cells, run.others = [], {}, {}
            else:  # what is not asked for again is freed by who had it in hand: for another core it costs twice as much
                unread = type(rows) is Unread and not run.part.attempts and not run.part.crashes
                self.results.append((run.part, Stretch(rows.messages) if unread else rows))

    def end(self, slot: int, run: Run, done: int, parked: float | None) -> None:
        """A run is over: `done` rows have their outcome, the rest is parked until then or goes back to the source."""
        if self.current[slot] is not run:  # it was abandoned: its outcome is settled, whatever it does now
            return
        self._give(slot, run, done)
        self.current[slot] = None
        if type(run.rows) is Unread and done == len(run.rows):
            run.rows = ()  # others may keep the run for a while
        failed = parked is not None and parked >= 0
        if failed and not run.part.closed:  # no row is done, but the attempt is to be kept
            self.results.append(Result(run.part, (), run.outputs, run.cells, run.others))
            run.outputs, run.cells, run.others = [], {}, {}
        self.ended[slot].append((run, done, parked if failed else None))
        if parked is not None or self.fresh >= self.enough:
            self._tell()

    def hurry(self) -> None:
        """The delivery in hand is about to end, and its settlement is waited for elsewhere."""
        self.fresh += self.enough

    def _tell(self) -> None:
        self.fresh = 0
        self.wake()

    def _ran_out(self) -> None:
        """There is nothing for a worker to do, and results that the fetch thread has not seen."""
        self._tell()

    def _ready(self) -> None:
        """A lane became ready while the lock is held: see that somebody takes it."""

    def failed(self, slot: int, run: Run, row: Row, error: BaseException, whole: bool = False) -> float | None:
        """What becomes of a row whose run ended in `error`: None to go on with the next, or when to run it again
        (monotonic seconds; negative: stop, it is given back)."""
        if isinstance(error, KeyboardInterrupt | GeneratorExit):  # Ctrl-C in a test, the end of a loop: not the handler's failure
            raise error
        if self.current[slot] is not run:
            return STOP
        if self.handler.awaited and (slot in self.cancelled or isinstance(error, asyncio.CancelledError)):
            why = self._uncancel(slot)
            if why == "release":
                return STOP
            if why == "timeout":
                error = TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s")
        if (id(run), row[0]) in self.late:
            self.late.discard((id(run), row[0]))
            error = TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s, then: {told(error)}")
        if isinstance(error, BackendError):  # a table could not be read: not the message's fault, and no attempt of it
            if self.monotonic() >= self.quiet:
                self.quiet = self.monotonic() + 10.0
                what = "%s: what its handler asked of a backend failed; it runs again, every second until that works: %s"
                logging.getLogger("barnabas").warning(what, self.handler.name, told(error))
            return float(self.monotonic() + AWAY)
        now = self.clock.now()
        try:
            at = self.handler.failed(run, row, error, now, whole)
        except BaseException as problem:  # on_dead="stop", or a failure of the failing: nothing may be lost by it
            self.error, self.stopping = problem, True
            return STOP
        return None if at is None else self.monotonic() + max(0.0, at - now)

    def _uncancel(self, slot: int) -> str | None:
        """Why we cancelled what this task runs; the task forgets about it."""
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        return self.cancelled.pop(slot, None)

    def overdue(self, slot: int, run: Run, row: Row) -> None:
        """A handler returned, and somebody in the crew was cancelled or past his timeout: raise if it was this one."""
        if slot in self.cancelled:  # and it swallowed that: whatever it did is not done
            raise asyncio.CancelledError
        if (id(run), row[0]) in self.late:
            self.late.discard((id(run), row[0]))
            raise TimedOut(f"ran longer than its timeout of {self.handler.limit(run)} s")

    def died(self, slot: int, error: BaseException) -> None:
        """A worker ended with this error: so does the runner, and gives back what is not settled."""
        self.error, self.stopping = error, True
        self.current[slot] = None
        self.wake()

    def abandon(self, slot: int, run: Run) -> None:
        """A handler did not return after twice its timeout: its delivery has failed, whatever it does later.

        Only for a process that is about to end: the thread, or loop, cannot be had back.
        """
        at = slot * SLOT + self.base + 1
        offset, whole = self.box[at], self.box[at + 1] > 1
        self.late.discard((id(run), offset))
        self.cancelled.pop(slot, None)
        error = TimedOut(f"did not return after twice its timeout of {self.handler.limit(run)} s")
        for done, row in enumerate(run.rows):
            if row[0] == offset:
                parked = self.failed(slot, run, row, error, whole)
                if whole and parked is None:  # the next process is to run each alone
                    run.part.attempts.update({row[0]: self.handler.consumer.retry.times + 1 for row in run.rows})
                    parked = self.monotonic()
                self.end(slot, run, done + (parked is None), parked)
                return

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 5.0) -> None:
        """Call a user's function where the handler runs; raises what it raises, TimeoutError after `timeout` seconds."""
        out = function(*args)
        if asyncio.iscoroutine(out):
            self.drive(out)

    def decode_each(self, run: Run, rows: Sequence[Row]) -> tuple[list[Any], list[Row], list[tuple[Row, BaseException]]]:
        """Decode what can be decoded; the values and their rows, and the others with their errors."""
        decode = self.handler.decoder(run.part.topic)
        values, kept, bad = list[Any](), list[Row](), list[tuple[Row, BaseException]]()
        for row in rows:
            try:
                values.append(decode(row[2]))
                kept.append(row)
            except Exception as error:
                bad.append((row, error))
        return values, kept, bad

    # The fetch thread's side.

    def put(self, batches: Sequence[tuple[Part, Sequence[Row]]]) -> None:
        """Hand fetched rows over: one hop for all of them."""
        for part, rows in batches:
            self.lanes.put(part, rows)
        self.nudge()

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
        """The results since the last call; where order does not matter, one a partition for all plain ones."""
        results = self.results
        taken: list[Result] = []
        plain: dict[Part, list[Row]] = defaultdict(list)
        apart = self.lanes.order == "partition"
        while results:
            result = results.popleft()
            if type(result) is Result:
                taken.append(result)
            elif apart:
                taken.append(Result(result[0], result[1], [], {}, {}))
            else:
                plain[result[0]] += result[1]
        return taken + [Result(part, rows, [], {}, {}) for part, rows in plain.items()]

    def unpark(self, now: float) -> float:
        """Make ready whatever was parked until now, or waits behind a delivery that takes long; seconds until the next look."""
        loose = (run.rows for run in self.current if run is not None and run.key is LOOSE)
        hoards = 0 < self.pace <= QUICK and (any(self.hauls) or any(len(rows) > 1 for rows in loose))
        if hoards:
            self.rescue(now)
        if self.lanes.unpark(now):
            self.nudge()
        return min(TICK if hoards else FOREVER, max(0.0, self.lanes.next_parked() - now))

    def rescue(self, now: float) -> None:
        """Take back what waits behind deliveries that take long, for other workers.

        Without a lock a delivery: a worker first writes down which one it has in hand and then looks at the clock; past
        `until` it asks `breathe`, which waits for the lock and finds what was taken gone.
        """
        with self.lanes.lock:
            for slot, run in enumerate(self.current):
                at = self.box[self.base + slot * SLOT + 1]
                if run is None or not 0 < self.until[slot] < now or at < 0 or self.stopping:
                    continue
                if run.key is LOOSE:
                    behind = 1 + next((n for n, row in enumerate(run.rows) if row[0] == at), 0)
                    if rest := run.rows[behind:]:
                        del run.rows[behind:]
                        self.lanes.give(Run(run.part, LOOSE, rest), 0, now)
                while haul := self.hauls[slot]:
                    with contextlib.suppress(IndexError):  # the worker was faster
                        self.lanes.give(haul.pop(), 0, now)

    def busy(self, parts: Sequence[Part] = ()) -> bool:
        """Whether a worker has a run (of these partitions) in hand."""
        taken = not parts and not self.stopping and any(self.hauls)
        return taken or any(run is not None and (not parts or run.part in parts) for run in self.current)

    def at(self, slot: int, run: Run) -> int:
        """The offset that this worker is at."""
        if type(run.rows) is Unread and (hand := self.hands[slot]) is not None and hand.row is not None:
            return offset_of(hand.row)
        return int(self.box[self.base + slot * SLOT + 1])

    def cancel(self, slot: int, run: Run, why: str) -> bool:
        """Cancel what this worker has in hand ("timeout" or "release"); False where that cannot be done (threads)."""
        return False

    def blocked(self, slot: int) -> bool:
        """Whether it is what this worker runs that does not come back, and not another beside it."""
        return True

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
            finally:
                CURRENT.set(None)  # whatever ended it, a test's own thread has nothing in hand
            raise RuntimeError("a sync handler's worker was suspended")

    async def _together(self) -> None:
        await asyncio.gather(*(self.body(self, slot) for slot in range(self.size)))
