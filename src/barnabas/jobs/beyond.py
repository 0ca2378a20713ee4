"""What a job's field "barnabas" asks for: a deadline, the last of several calls, a chain, a result, the end of a run by the
clock. A job without that field meets none of this."""

from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from math import isfinite
from typing import Any, Optional

import msgspec

from barnabas.engine.hand import CURRENT
from barnabas.errors import BarnabasError, is_text
from barnabas.jobs.payload import More, Payload, PayloadError, build, derived_jid, dumps, hooked, parse, with_more
from barnabas.message import OutgoingJob, member, note, ranked
from barnabas.verdict import Again, Done

BATCHES = "barnabas.batches"  # the table of batches and their members, and of what has ended
ALL = "all"  # the batch whose members are the batches: "open" until they have ended, then "done", or "dead" if jobs of theirs are
KEPT = 30 * 86400.0  # seconds that notes are kept which only tell late-comers something


class Unneeded(BarnabasError):
    """A job that is not to run any more; `outcome` says why: "expired", "superseded" or "cancelled"."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class BadResult(BarnabasError):
    """What a job returned cannot be kept or handed on."""


class Outcome(msgspec.Struct, omit_defaults=True):
    """What came of a job: the value it returned, or why it will not return one."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


SAID: dict[str, str] = {}  # how far the jobs are that this process has in hand, by id
_IN_HAND: ContextVar[Optional["End"]] = ContextVar("barnabas_job", default=None)
read_outcome = msgspec.json.Decoder(Outcome).decode


def end_of(jid: str, more: More) -> tuple[str, float | None]:
    """The id of the last job of a chain (of the job itself where there is none), and how long its result is kept."""
    ttl = more.result_ttl
    for _ in more.then:
        jid = derived_jid(jid, 0)
    if more.then:
        ttl = msgspec.json.decode(more.then[-1]).get("barnabas", {}).get("result_ttl")
    return jid, ttl


def leave(data: bytes, payload: Payload, now: float, patience: float) -> Again | None:
    """Let a job that nobody here knows go by, to be met again in a while by whoever takes it: after one second at first, then
    ever longer, up to half a minute. None once it has been so for `patience` seconds."""
    since = (payload.more and payload.more.unknown_since) or now
    if now - since >= patience:
        return None
    at = min(now + min(30.0, max(1.0, (now - since) / 2)), since + patience)
    return Again(at, with_more(data, unknown_since=float(since)))


def steps(source: Any, *, cursor: Any = None, total: int | None = None) -> Any:
    """Inside a job: `for item in steps(source)` (or `async for`), a loop that is gone on with after a stop, a crash, a failure or
    the end of a slice (the job's `max_runtime`), in any process. Anywhere else it is a plain loop.

    source: anything to iterate over, which is made anew in each run and skipped as far as it is done (the cursor is a number of
    items); or a function `fetch(cursor)` that gives (cursor, item) pairs beyond the cursor, a page or all, and is called until
    it gives none. cursor: where the first run begins (None). total: items in all, for `barnabas jobs show` and `top`.

    The cursor is saved about once a second, and as the run ends: an item may come again, none is left out. What an item sends
    leaves with the cursor. Raises BadSteps for cursors that are no JSON or over 1 MiB, and for a second loop: the job is dead.
    """
    from barnabas.jobs.steps import Steps  # most jobs have none

    return Steps[Any](source, cursor, total)


def steps_note(jid: str) -> str:
    """Where the cursor of a job is kept."""
    return f"steps:{jid}"


def progress(done: float, total: float | None = None, note: str = "") -> None:
    """Inside a job with a `result_ttl`: say how far it is, for `barnabas jobs show` and `top`; told at most five times a
    second. Anywhere else it does nothing, so that the function can be called as it is."""
    end = _IN_HAND.get()
    if end is not None and end.tells:
        if not is_text(note) or not all(type(n) in (int, float) and isfinite(n) for n in (done, total or 0)):
            raise ValueError(f"progress({done!r}, {total!r}, {note!r}): give one or two numbers, and a text")
        end.say(Progress(done, total, note))


class Progress(msgspec.Struct, omit_defaults=True):
    """How far a job is: `done` of `total`, and a word about it."""

    done: int | float
    total: int | float | None = None
    note: str = ""

    def __str__(self) -> str:
        share = f" of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.done:,}{share} {self.note}".rstrip()


def in_hand() -> Optional["End"]:
    """The job that is running here, if it asks for more."""
    return _IN_HAND.get()


def how_far(jobs: Any, jid: str) -> str:
    """What a job said last of its progress; "" for nothing."""
    said = jobs.note(f"progress:{jid}") or jobs.note(steps_note(jid))
    return str(msgspec.json.decode(said, type=Progress)) if said else ""


def end_without(data: bytes) -> Optional["End"]:
    """The end of a stored job that will not run; None where nothing follows from it."""
    with suppress(PayloadError):
        if b'"barnabas"' in data and (payload := parse(data)).more is not None:
            return End(None, payload)
    return None


class End:
    """A job in hand that asks for more: whether it is to run, and what follows its end."""

    __slots__ = ("_entry", "_more", "_payload", "_said", "_token", "batch", "function", "jid", "tells")

    def __init__(self, entry: Any, payload: Payload) -> None:
        self._entry, self._payload = entry, payload
        self._more: More = payload.more  # type: ignore[assignment]
        self.jid, self.batch, self.tells = payload.jid, self._more.batch, self._more.result_ttl is not None
        self.function, self._said = entry and entry.function, 0.0

    def __enter__(self) -> None:
        self._token = _IN_HAND.set(self)

    def __exit__(self, *error: Any) -> None:
        _IN_HAND.reset(self._token)
        if self.tells:
            SAID.pop(self.jid, None)

    def say(self, how_far: Progress) -> None:
        """Tell how far it is, if that was not said just now."""
        app, ttl, jid = self._entry.job.app, self._more.result_ttl or 0.0, self.jid
        now = app.clock.monotonic()
        SAID[jid] = str(how_far)
        if now >= self._said + 0.2 or how_far.done == how_far.total:
            self._said = now
            app.jobs.send([note(f"progress:{jid}", msgspec.json.encode(how_far), app.clock.now() + ttl)])

    def admit(self) -> None:
        """Raise Unneeded if it is too late, or if the same was asked for again since."""
        more, app = self._more, self._entry.job.app
        late = more.expires_at is not None and app.clock.now() > more.expires_at
        if late and app.jobs.note(steps_note(self.jid)) is None:  # else it has begun
            raise Unneeded("expired", f"it was to begin {app.clock.now() - (more.expires_at or 0.0):.1f} s ago (expires_in)")
        if more.debounce is not None:
            newest = app.jobs.note(more.debounce)
            if newest is not None and newest != self.jid.encode():
                raise Unneeded("superseded", f"it was asked for again, by job {newest.decode(errors='replace')}")
        if (cancelled := self.cancelled()) is not None:
            raise cancelled

    def cancelled(self) -> Unneeded | None:
        """What to raise if its batch was cancelled."""
        if self.batch is None:
            return None
        app = self._entry.job.app
        until, standing = app.batches_met.get(self.batch, (0.0, ""))
        if app.clock.monotonic() >= until:
            from barnabas.jobs import batch  # most apps have none

            standing = batch.standing(app, self.batch)
        return Unneeded("cancelled", f"its batch {self.batch} was cancelled") if standing == "cancelled" else None

    def done(self, out: Any) -> None:
        """It returned: what follows leaves as it is settled. Raises BadResult."""
        app, more = self._entry.job.app, self._more
        if not (more.then or more.cron) and more.result_ttl is None:
            return
        out, now, hand = None if out is Done or isinstance(out, Done) else out, app.clock.now(), CURRENT.get()
        assert hand is not None
        try:
            if more.then:
                for made in self._next(app, out, now):
                    hand.add(made)
            if more.result_ttl is not None:
                value = dumps(out)
                if len(value) > app.settings.value_limit:
                    raise PayloadError(f"it is {len(value)} bytes, and value_limit is {app.settings.value_limit}")
                hand.add(_result(self.jid, Outcome(msgspec.Raw(value)), now + more.result_ttl))
        except PayloadError as error:
            raise BadResult(f"what it returned cannot be kept or handed on: {error}") from error
        for ended in self._ended(now):
            hand.add(ended)

    def lost(self, now: float, reason: str) -> Iterator[OutgoingJob]:
        """It will not return: tell who waits for it, or for the end of its chain."""
        jid, ttl = end_of(self.jid, self._more)
        where = f"job {self._payload.name!r} ({self.jid}) ended the chain: " if self._more.then else ""
        if ttl is not None:
            yield _result(jid, Outcome(error=where + reason), now + ttl)
        if self._more.then and self._more.result_ttl is not None:
            yield _result(self.jid, Outcome(error=reason), now + self._more.result_ttl)
        yield from self._ended(now)

    def _ended(self, now: float) -> Iterator[OutgoingJob]:
        if self._more.cron is not None:
            yield note(f"ended:{self._more.cron}", self.jid.encode(), now + KEPT)

    def _next(self, app: Any, out: Any, now: float) -> Iterator[OutgoingJob]:
        """The next job of the chain; if a before_enqueue hook refuses it, what tells who waits for the last one."""
        first, *rest = self._more.then
        own: dict[str, Any] = {"step": self._more.step + 1} | ({"then": rest} if rest else {})
        own |= {"batch": self.batch} if self.batch else {}
        made = linked(app, msgspec.json.decode(first), [out], derived_jid(self.jid, 0), now, own)
        jid, ttl = end_of(self.jid, self._more)
        if made is not None:
            yield member(self.batch, made) if self.batch else made
        elif ttl is not None:
            yield _result(jid, Outcome(error="a before_enqueue hook refused a job of its chain"), now + ttl)


def linked(app: Any, said: dict[str, Any], args: list[Any], jid: str, now: float, more: dict[str, Any]) -> OutgoingJob | None:
    """A job of which a chain or a batch has stored what it needs; None if a before_enqueue hook refuses it."""
    own = {**said.pop("barnabas", {})}
    if "expires_in" in own:
        own["expires_at"] = now + own.pop("expires_in")
    name, queue, retry, more = said.pop("class"), said.pop("queue"), said.pop("retry"), own | more
    data = build(name, args, queue=queue, retry=retry, jid=jid, now=now, extra=said | ({"barnabas": more} if more else {}))
    made = hooked(app.enqueue_hooks, data, queue)
    priority = more.get("priority", 0) if app.jobs.ranks else 0  # (who stored it there did not ask)
    return None if made is None else ranked(priority, OutgoingJob(made[1], made[0], None, jid, None))


def _result(jid: str, outcome: Outcome, until: float) -> OutgoingJob:
    return note(f"result:{jid}", msgspec.json.encode(outcome), until)
