"""One subscription at work: fetch, hand over, settle. The fetch thread's loop; it never runs user code."""

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from barnabas.engine.alone import Alone, Gate
from barnabas.engine.checkpoint import checkpoint
from barnabas.engine.crew import Crew
from barnabas.engine.hand import sent_for
from barnabas.engine.handler import Stop, retry_at
from barnabas.engine.lanes import Run
from barnabas.engine.observe import Observers, Settled
from barnabas.errors import BackendError, PositionLost, Replaced, SendError, told
from barnabas.message import Row
from barnabas.ports import FOREVER, Part, Result, Source
from barnabas.verdict import Again

log = logging.getLogger("barnabas")
CANCELLED = 1.0  # seconds that coroutines which were cancelled may take to end


class Pauses(NamedTuple):
    """What operators have paused of a runner: all it fetches, these keys, or these queues."""

    all: bool = False
    keys: frozenset[str | bytes] = frozenset()
    queues: frozenset[str] = frozenset()


class Runner:
    """A source, its crews (one; a queue with sync and async jobs has two), and the loop between them.

    `limit` is the most messages in flight per partition; `interval` the longest time (seconds) a result waits for its
    settlement while there is other work. `ahead`: seconds of work to take ahead, where rows have no order (jobs).
    `widths`: queues of which only so many jobs may be in hand.
    """

    def __init__(
        self, name: str, crews: Sequence[Crew], *, clock: Any, observers: Observers, sinks: Callable[[Any], Any] | None,
        gate: Gate, route: Callable[[Row], int] | None = None, limit: int = 4000, interval: float = 0.1, grace: float = 5.0,
        ahead: float | None = None, widths: Mapping[str, int] | None = None,
        on_parts: Callable[[str, list[Part]], None] | None = None,
    ) -> None:
        self.name, self.clock, self.observers, self.limit, self.grace = name, clock, observers, limit, grace
        self._interval, self._sinks, self._ahead, self._route, self._on_parts = interval, sinks, ahead, route, on_parts
        self.crews, self.size = list(crews), sum(crew.size for crew in crews)
        self.error: BaseException | None = None
        self.stopping = self.quiet = False
        self.finished, self.overrun = threading.Event(), threading.Event()
        self.parts: list[Part] = []
        self.pauses = self._pauses = Pauses()  # set by any thread; the fetch thread heeds it at its next step
        self._held: dict[Part, list[Row]] = {}  # fetched, but of paused keys
        self.begins: Callable[[], Any] | None = None
        self.ends: Callable[[], Any] | None = None
        self.dump: Callable[[], None] = lambda: None
        self._widths, self._alone = widths or {}, Alone(self, gate)
        self._unsettled: list[Result] = []
        self._count, self._settled_at = 0, 0.0
        self.away = ""  # what the backend cannot do, if it cannot
        self._marks = False
        for crew in self.crews:
            crew.wake = self.wake
            crew.enough = max(1, limit // 4) if not widths else 1  # there what is finished makes room
        gate.runners.append(self)

    def attach(self, source: Source, marks: bool = False) -> None:
        """Give the runner its source (which needed the runner as its listener). `marks`: what is sent carries its id."""
        self.source, self._marks = source, marks
        for part in self.parts:
            part.marked = self._marks

    def wake(self) -> None:
        """End the wait of the fetch thread."""
        self.source.wake()

    # The loop.

    def run(self) -> None:
        """The fetch thread: until `stop`, then settle what is finished and leave."""
        try:
            while not self.stopping:
                if self._stopped_by_crew() or (self.quiet and not any(crew.busy() for crew in self.crews)):
                    break
                self._guard(self.step, 2.0)
            self._end()
        except Replaced as error:  # nothing of what is in hand can be settled; whoever runs us starts anew
            self.error = error
            with contextlib.suppress(Exception):
                self.source.close()
        except BaseException as error:
            self.error = error
            log.exception("%s: the fetch thread failed", self.name)
        finally:
            self.finished.set()

    def _stopped_by_crew(self) -> bool:
        self.error = next((crew.error for crew in self.crews if crew.error is not None), self.error)
        return self.error is not None

    def _guard(self, act: Callable[[float], Any], timeout: float) -> bool:
        """Do it; where the backend cannot, say so once, wait a little, and let the loop try again."""
        try:
            act(timeout)
        except Replaced:
            raise
        except (PositionLost, Stop) as error:
            self.error = error
            return False
        except Exception as error:
            if self.away != told(error):
                self.away = told(error)
                shown = None if isinstance(error, BackendError | SendError) else error  # these have said it all
                log.error("%s: the backend failed, trying again every second: %s", self.name, error, exc_info=shown)
            self.finished.wait(1.0 if not self.stopping else 0.2)
            return False
        if self.away and timeout:  # that it can be closed is no sign
            self.away = ""
            log.warning("%s: the backend works again", self.name)
        return True

    def step(self, timeout: float) -> bool:
        """One turn: settle, unpark, fetch, hand over. True if it did anything."""
        if self.pauses is not self._pauses:
            self._heed()
        if self.quiet and self._ahead is not None:
            self._give_back()
        moved = self._settle_if_due()
        now = self.clock.monotonic()
        wait = timeout
        for crew in self.crews:
            wait = min(wait, crew.unpark(now))
        if self._unsettled:
            wait = min(wait, max(0.0, self._settled_at + self._interval - now))
        if self._alone and not self.quiet:
            behind = self._alone.step()
            self._hand_over(behind)  # before the fetch, which may fail or revoke
            wait = 0.0 if behind else min(wait, 0.01)
        batches = self.source.fetch(0 if self._pauses.all or self.quiet else self._room(), wait)
        batches = [batch for batch in batches if not batch[0].closed]  # revoked while others were fetched
        if batches:
            if self._pauses.keys:
                batches = self._hold(batches)
            self._hand_over(batches)
        return moved or bool(batches)

    def _room(self) -> int:
        """The most deliveries in flight (of a partition). Jobs are taken only as far ahead as they can start soon: what
        waits here, another process could be doing."""
        if self._ahead is None:
            return self.limit
        return min(self.limit, sum(c.size + (int(c.size * self._ahead / c.pace) if c.pace else 0) for c in self.crews))

    def _heed(self) -> None:
        """Operators have paused or resumed something: what was held back is looked at anew."""
        self._pauses = self.pauses
        for part in self.parts:
            part.paused = part.topic in self._pauses.queues
        held, self._held = self._held, {}
        self._hand_over(self._hold([*held.items()]))

    def _give_back(self) -> None:
        """Jobs that have not begun are for others at once: what is in hand here may take long."""
        now = self.clock.now()
        for crew in self.crews:
            with crew.lanes.lock:
                runs = [*crew.lanes.ready]
                crew.lanes.ready.clear()
            self._unsettled += [Result(r.part, r.rows, [], {}, {row[0]: Again(now, None) for row in r.rows}) for r in runs]

    def _hold(self, batches: Sequence[tuple[Part, Sequence[Row]]]) -> list[tuple[Part, Sequence[Row]]]:
        """What may be handed over now. Rows of paused keys are held back, in partition order with all that is behind them;
        they count as in flight, and are not settled, so a revocation or an end gives them to who comes next."""
        keys, whole = self._pauses.keys, self.crews[0].lanes.order == "partition"
        free: list[tuple[Part, Sequence[Row]]] = []
        for part, some in batches:
            rows = [self.crews[0].handler.whole(row) for row in some]
            if whole and not part.retries:
                first = next((n for n, row in enumerate(rows) if row[1] in keys), len(rows)) if part not in self._held else 0
                go, stay = rows[:first], rows[first:]
            else:
                go, stay = [row for row in rows if row[1] not in keys], [row for row in rows if row[1] in keys]
            if stay:
                self._held.setdefault(part, []).extend(stay)
            if go:
                free.append((part, go))
        return free

    def _hand_over(self, batches: list[tuple[Part, Sequence[Row]]]) -> None:
        ready = []
        for part, rows in batches:
            if part.crashes:
                rows = self._alone.sift(part, rows)
            if part.retries:
                self._park_until_due(part, rows)
            elif rows:
                ready.append((part, rows))
        if not ready:
            return
        if self._route is None:
            self.crews[0].put(ready)
            return
        for part, rows in ready:
            by_crew: dict[int, list[Row]] = {}
            for row in rows:
                by_crew.setdefault(self._route(row), []).append(row)
            for index, own in by_crew.items():
                self.crews[index].put([(part, own)])

    def crew_of(self, row: Row) -> Crew:
        """The crew that runs this row."""
        return self.crews[self._route(row) if self._route is not None else 0]

    def _park_until_due(self, part: Part, rows: Sequence[Row]) -> None:
        """Messages of a retry topic wait for their time; those of one key wait for each other no more."""
        ahead = self.clock.monotonic() - self.clock.now()
        for row in rows:
            self.crews[0].lanes.put_later(part, row, retry_at(row) + ahead)

    # Settling.

    def _settle_if_due(self) -> bool:
        self._collect()
        if not self._unsettled:
            return False
        now = self.clock.monotonic()
        early = self._count < self.limit // 4 and now - self._settled_at < self._interval
        if early and any(crew.lanes.ready or crew.busy() for crew in self.crews):
            return False
        self.settle()
        return True

    def _collect(self) -> None:
        for crew in self.crews:
            for result in crew.collect():
                self._unsettled.append(result)
                self._count += len(result.rows)
                result.part.room += len(result.rows)

    def unsettled(self) -> bool:
        """Whether something has ended and is not settled yet."""
        return bool(self._unsettled)

    def settle(self) -> None:
        """Settle all results there are: outputs, then state, then positions."""
        self._collect()
        results = [r for r in self._unsettled if not r.part.closed]
        began = self.clock.monotonic()
        outputs = checkpoint(self.source, self._sinks, results, self._bury) if results else 0
        self._unsettled, self._count, self._settled_at = [], 0, began  # whatever fails now, these are stored
        if results:
            count = sum(len(r.rows) for r in results)
            for result in results:
                result.part.done += len(result.rows) - len(result.others)
            for crew in self.crews:
                if crew.handler.tables is not None:
                    crew.handler.tables.settled(results)
            self.observers.count(self.name, "done", count - sum(len(r.others) for r in results))
            if self.observers.watchers:
                self.observers.tell(Settled(self.name, count, outputs, self.clock.monotonic() - began))

    def _bury(self, results: Sequence[Result], refused: Sequence[Any]) -> Sequence[Result]:
        """Rows whose outputs are refused for good are dead; a batch's run again, each alone, to find the culprit."""
        settled, now, handler = list(results), self.clock.now(), self.crews[0].handler
        for output, error in refused:
            of = [(n, row) for n, r in enumerate(results) if any(out is output for out in r.outputs) for row in r.rows]
            found = ((n, handler.whole(row)) for n, row in of)
            index, row = next(((n, row) for n, row in found if sent_for(output, results[n], row)), (0, None))
            if row is None:
                raise error
            result, rest, part = results[index], settled[index], results[index].part
            run, verdict = Run(part, None, []), result.others.get(row[0])
            if handler.batch is not None and len(of) > 1 and type(verdict) is not Again:
                run.rows = [row for row in map(handler.whole, result.rows) if row[0] not in rest.others]
                handler.apart(run, now)
            elif rest.others.get(row[0]) is verdict:  # the first of its outputs
                try:
                    handler.bury(run, row, f"an output cannot be stored: {error}", error, part.attempts.get(row[0], 0) + 1, now)
                except Exception as problem:  # on_dead="stop"
                    self.error, self._unsettled = problem, [r for r in self._unsettled if r.part is not part]
                    raise
            if output[-1] is not None:
                output[-1].fail(error, True)
            left = [out for out in rest.outputs if out is not output]
            settled[index] = rest._replace(outputs=left + run.outputs, others={**rest.others, **run.others})
        return settled

    # Rebalances: called by the source inside fetch, on the fetch thread.

    def assigned(self, parts: list[Part]) -> None:
        """Partitions came."""
        self.parts += parts
        for part in parts if self._widths else ():
            part.room = self._widths.get(part.topic, FOREVER)
        for part in parts:
            part.marked, part.runner = self._marks, self
        if self._on_parts is not None:
            self._on_parts("assigned", parts)

    def revoked(self, parts: list[Part]) -> None:
        """Partitions go: drop what waits of them, give what runs a bounded grace, settle it, discard the rest."""
        for part in parts:
            part.until = 0.0  # workers stop before their next delivery
        self._wait(parts, min(0.5, self.grace) if self.overrun.is_set() else self.grace)
        work = [(crew, slot, run) for crew in self.crews for slot, run in enumerate(crew.current) if run and run.part in parts]
        cancelled = [crew.cancel(slot, run, "release") for crew, slot, run in work]
        if any(cancelled):
            self._wait(parts, CANCELLED)  # what they had done before is settled with the rest
        try:
            self.settle()
        except Exception as error:
            log.error("%s: what was done of revoked partitions could not be settled and will run again: %s", self.name, error)
        for part in parts:
            for crew in self.crews:
                crew.lanes.drop(part)
            self._alone.forget(part)
            self._held.pop(part, None)
        known = [part for part in parts if part in self.parts]  # the others were revoked before: in doubt, or at an end
        self.parts = [p for p in self.parts if p not in parts]
        if self._on_parts is not None:
            self._on_parts("revoked", known)

    def _wait(self, parts: list[Part], seconds: float) -> None:
        """Until nobody has anything of these in hand, at most so long."""
        deadline = self.clock.monotonic() + seconds
        while any(crew.busy(parts) for crew in self.crews) and self.clock.monotonic() < deadline:
            self.finished.wait(0.005)

    # Stopping.

    def hush(self) -> None:
        """Take nothing new: finish what is in hand, settle it, leave; the process lives on."""
        self.quiet = True
        for crew in self.crews:
            crew.stop()
        self.wake()

    def stop(self) -> None:
        """Fetch no more; `finished` is set when all that ended in time is settled and the source is closed."""
        self.stopping = True
        for crew in self.crews:
            crew.stop()
        self.wake()

    def _end(self) -> None:
        """Wait for the deliveries in hand (the worker decides how long), settle them, give the rest back."""
        for crew in self.crews:
            crew.stop()
        while any(crew.busy() for crew in self.crews) and not self.overrun.is_set() and self.error is None:
            self.overrun.wait(0.01)
        for _ in range(5):
            if self._guard(lambda _: self.settle(), 0.0):
                break
        self._guard(lambda _: self.source.close(), 0.0)
