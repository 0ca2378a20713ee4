"""Jobs at work: which function a stored job names, how its arguments are read, and what a failure becomes."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import CoroutineType
from typing import Any

import msgspec

from barnabas.engine.hand import CURRENT, Hand
from barnabas.engine.handler import Stop, as_it_is, call
from barnabas.engine.hooks import wrap
from barnabas.engine.lanes import Run
from barnabas.engine.observe import Failed, Observers
from barnabas.errors import BarnabasError, Reject, RetryAfter, TimedOut, told
from barnabas.jobs.beyond import BadResult, End, Unneeded, leave
from barnabas.jobs.payload import Payload, PayloadError, Wait, enqueued, failed, parse, with_more
from barnabas.jobs.steps import BadSteps, Interrupted, at_work
from barnabas.jobs.unique import Busy, Guard, Late, clash, refused
from barnabas.message import Delivery, Row
from barnabas.verdict import Again, Dead

log = logging.getLogger("barnabas")


class UnknownJob(BarnabasError):
    """A stored job names something that this app does not declare."""


class BadArguments(BarnabasError):
    """A stored job's arguments do not fit its function."""


_OURS = (Stop, Busy, TimedOut, BadArguments, BadResult, BadSteps, UnknownJob, Unneeded, PayloadError)  # their text says it all


class _Name(msgspec.Struct):
    name: str = msgspec.field(name="class")


_name = msgspec.json.Decoder(_Name).decode


class Entry:
    """One declared job, compiled: its function with its hooks around it."""

    __slots__ = ("awaited", "function", "hooked", "job")

    def __init__(self, job: Any, hooks: Sequence[Any]) -> None:
        self.job = job
        self.awaited = inspect.iscoroutinefunction(job.function)
        self.hooked = bool(hooks)
        self.function: Callable[..., Any] = wrap(job.function, hooks, self.awaited, job.name) if hooks else job.function

    def delay(self, count: int, error: BaseException, fields: dict[str, Any]) -> Wait:
        """What the error or the job's retry_delay says; None, and a word in the log, where that makes no sense."""
        if isinstance(error, RetryAfter):
            return error.seconds
        try:
            wait: Wait = self.job.retry_delay(count, error, fields)
            if wait is None or wait in ("discard", "kill") or type(wait) in (int, float):
                return wait
            raise TypeError(f"it returned {wait!r}: give seconds, None, 'discard' or 'kill'")
        except BaseException:
            log.exception("%s: retry_delay failed; Sidekiq's own delay is taken", self.job.owner)
            return None

    def tell(self, option: str, run: Run, row: Row, data: bytes, error: BaseException) -> Any:
        """Call the job's on_exhausted or on_death; what it sends leaves as the job is settled. An error is logged, no more."""
        function = getattr(self.job, option)
        if function is None:
            return None
        hand = Hand(self.job.app, run, row, True)
        hand.sent = 1 << (20 if option == "on_death" else 21)  # no ids of what a later run of the job may send
        before = CURRENT.set(hand)
        try:
            answer = function(msgspec.json.decode(data), error)
            hand.keep()
            return answer
        except BaseException:
            hand.drop()
            log.exception("%s: %s failed; the job goes where it went without it", self.job.owner, option)
            return None
        finally:
            hand.open = False
            CURRENT.reset(before)


class JobHandler:
    """All sync, or all async, jobs of an app: the same face to a crew as a consumer's Handler."""

    decode = None
    answer = None
    tables = None
    batch = None
    group = ""
    whole = staticmethod(as_it_is)
    hurry: Callable[[], None]  # the crew's

    def __init__(
        self, name: str, entries: Mapping[str, Entry], awaited: bool, observers: Observers, patience: float = 0.0
    ) -> None:
        self._patience, self._met = patience, set[str]()  # how long unknown jobs are left to others; which ones a log line named
        self.name, self.awaited, self.observers, self._entries = name, awaited, observers, entries
        self.app = next((entry.job.app for entry in entries.values()), None)
        self.timed = any(e.job.timeout for e in entries.values())
        self.function: Callable[..., Any] = call  # (an async job's coroutine is awaited by who calls)
        self.guard = Guard({name: entry.job for name, entry in entries.items()})
        self._guarded = bool(self.guard)

    def job(self, row: Row) -> Any:
        """The declared job of a row."""
        return self._entries[name_of(row)].job  # type: ignore[index]

    def limit(self, run: Run) -> float | None:
        """Seconds the delivery in hand may take."""
        return run.limit

    def bind(self, run: Run, row: Row) -> tuple[Any, ...]:
        """The function of a stored job and its arguments."""
        payload = parse(row[2])  # type: ignore[arg-type]
        entry = self._entries.get(payload.name)
        if entry is None:
            how = f"start the worker that has it on this queue ({payload.queue!r}), or give it a queue of its own"
            raise UnknownJob(f"no job {payload.name!r} is declared here; declare it, {how}")
        try:
            args = entry.job.decode_args(payload.args)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadArguments(f"the arguments of {payload.name!r} do not fit its function: {error}") from None
        if self.timed:
            run.limit = entry.job.timeout
        if entry.hooked:
            at = payload.created_at or row[4]
            args = (Delivery(run.part.topic, -1, row[0], payload.jid, args, [], at, payload.attempt, payload.name), *args)
        target = (entry.function, *args)
        guarded = self._guarded and entry.job.guarded
        if payload.more is not None:
            end = End(entry, payload)
            if end.batch is not None:
                run.part.batches[row[0]] = (end.batch, payload.jid)
            end.admit()
            target = (_more_async if self.awaited else _more, end, *args)
        if guarded and row[3]:
            if (why := refused(entry.job.owner, row[3], entry.job.app.clock.monotonic())) is not None:
                if isinstance(why, Late):
                    entry.job.begun.add(payload.jid)
                raise why
            run.part.begun.add(row[0])
        if guarded and entry.job.slots:
            return (_then_async if self.awaited else _then, self.hurry, *target)
        return target

    def failed(self, run: Run, row: Row, error: BaseException, now: float, whole: bool) -> None:
        """Write the failure into the job and decide as Sidekiq does: to the retry set, to the dead set, or dropped."""
        if isinstance(error, Late):
            run.others[row[0]] = Again(now, None)
            return self.hurry()
        data: bytes = row[2]  # type: ignore[assignment]
        try:
            payload = parse(data)
        except PayloadError as rubbish:
            self._note(run, row, "rubbish", 1, Dead(f"undecodable: {rubbish}", data), rubbish)
            return
        steps = at_work(row)
        if steps is not None:
            run.outputs += steps.left(error)
            if isinstance(error, Interrupted) and error.unneeded is None:
                run.others[row[0]] = Again(0.0, enqueued(data, now)) if error.over else Again(now, None)
                return self.observers.count(payload.name, "steps")
            error = getattr(error, "unneeded", error)
        entry = self._entries.get(payload.name)
        if isinstance(error, Unneeded):
            self._note(run, row, payload.name, payload.attempt, Dead(str(error), None), error, error.outcome)
            self._lost(run, row, entry, payload, now, str(error))
            return
        if entry is None and self._patience and (left := leave(data, payload, now, self._patience)) is not None:
            if payload.name not in self._met:
                self._met.add(payload.name)
                log.warning("job %r is not declared here: jobs of it are left to workers that know it", payload.name)
            return self._note(run, row, payload.name, payload.attempt, left, error, "waits")
        if entry is not None and payload.more is not None and payload.more.unknown_since is not None:
            data = with_more(data, unknown_since=None)  # who does not know it at its next run waits anew
        final = isinstance(error, Reject | BadArguments | BadResult | BadSteps)
        locked = clash(entry.job.lock.on_conflict, data, error, now) if entry is not None and isinstance(error, Busy) else None
        outcome = locked or failed(
            data, error, now, default_retry=entry.job.retry if entry is not None else True,
            delay=entry.delay if entry is not None and (entry.job.retry_delay or isinstance(error, RetryAfter)) else None,
            **({"rand": lambda: 0.0} if isinstance(error, RetryAfter) else {}), queue=run.part.topic, final=final,
        )
        verdict: Again | Dead
        if entry is not None and outcome.kind != "again":
            if outcome.spent and entry.tell("on_exhausted", run, row, outcome.payload, error) == "discard":
                outcome = outcome._replace(kind="drop", reason=f"discarded by on_exhausted, {outcome.reason}")
            entry.tell("on_death", run, row, outcome.payload, error)
        if outcome.kind != "again":
            self._lost(run, row, entry, payload, now, outcome.reason)
        if outcome.kind == "again":
            verdict = Again(outcome.at, outcome.payload, outcome.queue if outcome.queue != run.part.topic else None)
        elif outcome.kind == "drop" and entry is not None:
            verdict = Dead(f"dropped: {outcome.reason}", None)
        else:
            verdict = Dead(outcome.reason, outcome.payload)
        self._note(run, row, payload.name, payload.attempt, verdict, error)

    def bury(self, run: Run, row: Row, reason: str, error: BaseException | None, attempt: int, now: float) -> None:
        """A job is dead whatever it says itself: it took its process with it too often."""
        data: bytes = row[2]  # type: ignore[assignment]
        with suppress(PayloadError):
            payload = parse(data)
            entry, why = self._entries.get(payload.name), error or BarnabasError(reason)
            self._lost(run, row, entry, payload, now, reason)
            data = failed(data, why, now, final=True).payload
            if entry is not None:
                entry.tell("on_death", run, row, data, why)
        self._note(run, row, run.part.topic, attempt, Dead(reason, data), error)

    def _lost(self, run: Run, row: Row, entry: Entry | None, payload: Payload, now: float, reason: str) -> None:
        if payload.more is not None:
            run.outputs += End(entry, payload).lost(now, reason)
            if payload.more.batch is not None:
                run.part.batches[row[0]] = (payload.more.batch, payload.jid)

    def _note(
        self, run: Run, row: Row, name: str, attempt: int, verdict: Again | Dead, error: BaseException | None, outcome: str = ""
    ) -> None:
        run.others[row[0]] = verdict
        if isinstance(verdict, Again):
            outcome, reason = outcome or "again", told(error)  # type: ignore[arg-type]  # there is one
        else:
            outcome, reason = outcome or ("dead" if verdict.payload is not None else "dropped"), verdict.reason
        shown = error if not isinstance(error, _OURS) else None
        self.observers.failed(Failed(name, run.part.topic, -1, row[0], attempt, outcome, reason, shown, str(row[1] or "")))


def name_of(row: Row) -> str | None:
    """Which job a stored one names; None for rubbish."""
    try:
        return _name(row[2]).name  # type: ignore[arg-type]
    except Exception:
        return None


def router(entries: Mapping[str, Entry]) -> Callable[[Row], int]:
    """Which crew runs a row: 0 for sync jobs (and what nobody knows), 1 for async ones."""
    async_names = {name for name, entry in entries.items() if entry.awaited}

    return lambda row: 1 if name_of(row) in async_names else 0


def _more(end: End, *args: Any) -> Any:
    with end:
        out = end.function(*args)
        if type(out) is not CoroutineType:  # else it is refused
            end.done(out)
        return out


async def _more_async(end: End, *args: Any) -> Any:
    with end:
        out = await end.function(*args)
        end.done(out)
        return out


def _then(hurry: Callable[[], None], function: Callable[..., Any], *args: Any) -> Any:
    """Others wait for the lock of this run."""
    try:
        return function(*args)
    finally:
        hurry()


async def _then_async(hurry: Callable[[], None], function: Callable[..., Any], *args: Any) -> Any:
    try:
        return await function(*args)
    finally:
        hurry()
