"""Lanes: FIFO per key, many keys at once. The whole of the order promise is in this file.

`part.lanes[key]` is absent (idle), or a waiting Run that grows until somebody takes it, or None (in work and nothing
behind it). A worker takes a whole run, so a hot key costs no more than a plain queue. Partition order is the same code
with one lane a partition; rows without a key have no lane. A lane that is parked (a retry, a batch that fills up) is a
waiting run that is not among the ready ones until its time has come.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from barnabas.message import Row, Unread
from barnabas.ports import FOREVER, Part

WHOLE: Any = ("whole partition",)  # the lane key of partition order
LOOSE: Any = ("no order",)  # rows with no order among each other
MOMENT = 0.05  # seconds until what was stopped is looked at again
_ABSENT: Any = object()


class Run(msgspec.Struct, eq=False):
    """Rows of one lane on their way through one worker, with what their handlers sent and wrote."""

    part: Part
    key: Any
    rows: Any  # a list, or Unread
    outputs: list[Any] = []
    cells: dict[Any, Any] = {}
    others: dict[int, Any] = {}
    ripe: float = 0.0
    fills: bool = False  # it waits for its batch to fill up: for nothing else, neither a worker nor a retry's time
    limit: float | None = None  # seconds that the delivery in hand may take, where that differs


class Lanes:
    """The queue between a fetch thread and its workers. `order` is "key", "partition" or "none".

    `most` caps the rows of one run (a batch handler's max); `wait` holds a run back until it has `most` rows or is that
    many seconds old.
    """

    def __init__(self, order: str, monotonic: Callable[[], float], most: int = 1 << 30, wait: float = 0.0) -> None:
        self.order = order
        self.most = most
        self.wait = wait
        self.ready: deque[Run] = deque()
        self.lock = threading.Lock()
        self._monotonic = monotonic
        self._parked: list[tuple[float, int, Run]] = []
        self._count = 0

    def put(self, part: Part, rows: Sequence[Row]) -> None:
        """Take rows that were fetched, in the partition's order."""
        with self.lock:
            if self.order == "key":
                self._by_key(part, rows)
            elif self.order == "partition" or self.most < 1 << 30:  # a batch handler without order still wants batches
                self._extend(part, WHOLE, rows if type(rows) is Unread else list(rows))
            else:
                self.ready.append(Run(part, LOOSE, list(rows)))

    def _by_key(self, part: Part, rows: Sequence[Row]) -> None:
        lanes, ready, wait = part.lanes, self.ready, self.wait
        for row in rows:
            key = row[1]
            if key is None and not wait:
                ready.append(Run(part, LOOSE, [row]))
                continue
            run = lanes.get(key, _ABSENT)
            if run is _ABSENT:
                lanes[key] = run = Run(part, key, [row])
                if wait:
                    self._ripen(run)
                else:
                    ready.append(run)
            elif run is None:
                lanes[key] = Run(part, key, [row])
            else:
                run.rows.append(row)
                if run.fills and len(run.rows) == self.most:
                    self._ripen(run)

    def _extend(self, part: Part, key: Any, rows: Any) -> None:
        run = part.lanes.get(key, _ABSENT)
        if run is _ABSENT:
            part.lanes[key] = run = Run(part, key, rows)
            self._ripen(run)
        elif run is None:
            part.lanes[key] = Run(part, key, rows)
        else:
            run.rows += rows
            if run.fills and len(run.rows) >= self.most:
                self._ripen(run)

    def _ripen(self, run: Run) -> None:
        """Make a waiting run ready: now, or when its batch is full or old enough."""
        run.fills = self.wait > 0 and len(run.rows) < self.most and not run.part.crashes
        if run.fills:
            self._park(run, self._monotonic() + self.wait)
        else:
            run.ripe = -1.0  # among the ready ones: the heap's entry, if any, is void
            self.ready.append(run)

    def _park(self, run: Run, at: float) -> None:
        self._count += 1
        run.ripe = at
        heapq.heappush(self._parked, (at, self._count, run))

    def put_later(self, part: Part, row: Row, at: float) -> None:
        """Take a row without order that is not to run before `at` (monotonic seconds)."""
        with self.lock:
            self._park(Run(part, LOOSE, [row]), at)

    def claim(self, part: Part, row: Row) -> Run:
        """A run of just this row, its lane (which must be idle) in work."""
        with self.lock:
            key = WHOLE if self.order == "partition" else LOOSE if self.order == "none" or row[1] is None else row[1]
            if key is not LOOSE:
                part.lanes[key] = None
            return Run(part, key, [row])

    def take(self, count: int = 1 << 30) -> Run | None:
        """The next run that is ready, None if there is none. Of rows without order at most `count`. Hold the lock."""
        ready = self.ready
        while ready:
            run = ready[0]
            part, rows = run.part, run.rows
            if run.key is LOOSE and len(rows) > count and part.until:
                first = Run(part, LOOSE, rows[:count])
                del rows[:count]
                return first
            ready.popleft()
            if not part.until:  # being revoked, or gone
                continue
            if run.key is LOOSE:
                return run
            most = self.most
            if part.crashes:  # a batch that was in work at a crash comes again as smaller ones: fewer are in work at the next
                most = max(1, most // 10 ** max(part.crashes.get(row[0], 0) for row in rows[:most]))
            if len(rows) > most:
                part.lanes[run.key] = Run(part, run.key, rows[most:])
                run.rows = rows[:most]
            else:
                part.lanes[run.key] = None
            return run
        return None

    def give(self, run: Run, done: int, at: float | None = None) -> bool:
        """Take a run back of which `done` rows are settled by the worker; True if its lane became ready.

        The rest goes back to the head of its lane: parked until `at` (monotonic seconds); if that is None for a moment (a
        stop, a revocation, which drops it, or the end of a claim that may be renewed).
        """
        part, key = run.part, run.key
        if part.closed:
            return False
        rest, lanes = run.rows[done:], part.lanes
        if rest:
            stopped = at is None
            at = self._monotonic() + MOMENT if at is None else at
            if key is LOOSE:
                head = len(rest) if stopped else 1
                self._park(Run(part, LOOSE, rest[:head]), at)
                if len(rest) > head:
                    self.ready.append(Run(part, LOOSE, rest[head:]))
                return len(rest) > head
            behind = lanes.get(key)
            if behind is not None:
                rest += behind.rows
            lanes[key] = behind = Run(part, key, rest)
            self._park(behind, at)
            return False
        if key is LOOSE:
            return False
        behind = lanes.get(key)
        if behind is None:
            lanes.pop(key, None)
            return False
        self._ripen(behind)
        return True

    def unpark(self, now: float) -> bool:
        """Make ready what was parked until `now` (monotonic seconds); True if there was any."""
        parked, any_ready = self._parked, False
        if not parked or parked[0][0] > now:
            return False
        with self.lock:
            while parked and parked[0][0] <= now:
                at, _, run = heapq.heappop(parked)
                if run.ripe == at and not run.part.closed:
                    run.ripe = -1.0
                    run.fills = False
                    self.ready.append(run)
                    any_ready = True
        return any_ready

    def next_parked(self) -> float:
        """When the next parked run is due (monotonic seconds); FOREVER if none is parked."""
        parked = self._parked
        while parked and parked[0][2].part.closed:
            with self.lock:
                heapq.heappop(parked)
        return parked[0][0] if parked else FOREVER

    def drop(self, part: Part) -> None:
        """Forget what waits of a partition that is no longer ours. The workers finish what they have in hand."""
        with self.lock:
            part.closed = True
            part.until = 0.0
            part.lanes = {}
