"""Unique jobs: at most one of a kind in the queues (`until_*`), or at work (`while_*`). Pure: which lock a job needs.

A lock's key is what sidekiq-unique-jobs 7 and later makes of the same name, arguments and queue (facts: unique-jobs.md 3.2),
so that its locks and ours can stand in one Redis. A lock of the queues belongs to a job id for as long as that job is
stored, and travels in its payload as `lock_digest`. A lock of the run is never stored with a job: whoever claims it asks
the job's declaration for it.
"""

import inspect
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import msgspec

from barnabas.errors import BarnabasError, Conflict, check_seconds, must, told
from barnabas.jobs.beyond import end_without
from barnabas.jobs.limit import By, Kind, Need, digest, slack, slot
from barnabas.jobs.payload import Failed, PayloadError, failed, parse
from barnabas.message import LockedJob, OutgoingJob

VAIN = inf
MANY = 100  # of those who wait for a slot behind such a job (which takes none) look anew
AGAIN = 5.0  # seconds after which a job with on_conflict="reschedule" is tried again
RUN = ":RUN"
AT_ENQUEUE = ("raise", "reject", "replace", "log")
AT_RUN = ("wait", "raise", "reject", "reschedule", "log")


class Unique(NamedTuple):
    """When a job is one of a kind, as the functions below make it. `ttl`: seconds, of until_expired alone."""

    kind: str
    by: By
    on_conflict: str
    ttl: float | None = None


def until_executed(by: By = None, on_conflict: str = "raise") -> Unique:
    """One of a kind from its enqueueing until it is done or dead, retries included.

    by: the parameter(s) that make the kind, or a function of the arguments; all of them if left out. None from it: this one
    is not unique. on_conflict, of the second one: "raise" Conflict from its future, "reject" it to the dead, "replace" the
    first (unless that runs: then it raises), or "log" and drop it (the future gives None).
    """
    return Unique("until_executed", by, on_conflict)


def until_executing(by: By = None, on_conflict: str = "raise") -> Unique:
    """One of a kind from its enqueueing until it begins to run; otherwise as until_executed."""
    return Unique("until_executing", by, on_conflict)


def until_expired(by: By = None, on_conflict: str = "raise", *, ttl: float) -> Unique:
    """One of a kind for `ttl` seconds after its enqueueing (or the time it is scheduled for), whatever becomes of it."""
    return Unique("until_expired", by, on_conflict, ttl)


def while_executing(by: By = None, on_conflict: str = "wait") -> Unique:
    """One of a kind at work; any number may be enqueued. by: as for until_executed.

    on_conflict, of the second one: "wait" for its turn, first enqueued first, without holding a thread; "reschedule" it in
    5 s, in no order; "raise": it has failed, with its retries; "reject" it to the dead; "log" and drop it.
    """
    return Unique("while_executing", by, on_conflict)


def until_and_while_executing(by: By = None, on_conflict: str = "raise") -> Unique:
    """One of a kind in the queues and one at work: until_executing, whose run waits for its turn as in while_executing."""
    return Unique("until_and_while_executing", by, on_conflict)


class Claim(NamedTuple):
    """The lock that a job takes as it is enqueued. `until`: epoch seconds of its end, None: as long as the job is stored.
    `buried`: the job as a second one would be buried, for on_conflict="reject". `fields`: what the job says of its lock."""

    key: str
    on_conflict: str
    until: float | None
    buried: bytes
    owner: str
    fields: dict[str, str]

    def refusal(self, holder: str) -> Conflict:
        """What becomes of the second one's future."""
        return Conflict(f"{self.owner} is unique: job {holder} holds its lock, so this one is not enqueued", holder)


def ousted(job: LockedJob, now: float, first: bytes | None = None) -> list[OutgoingJob]:
    """What tells who waits for the job that this one has replaced (`first`), or for this one, which another's lock has buried."""
    end = end_without(first or job.lock.buried)
    why = f"job {job.jid} has replaced it" if first else f"{job.lock.owner} is unique: another job holds its lock"
    return [] if end is None else [*end.lost(now, f'{why} (on_conflict="{job.lock.on_conflict}")')]


def answer(job: LockedJob, holder: str) -> Any:
    """What the future of a job gives whose lock `holder` has."""
    if job.lock.on_conflict == "reject":
        return job.jid
    refusal = job.lock.refusal(holder)
    if job.lock.on_conflict != "log":
        return refusal
    import logging  # 3 ms that `import barnabas` need not pay

    logging.getLogger("barnabas").warning('%s, and dropped (on_conflict="log")', refusal)
    return None


class Ask(NamedTuple):
    """What a claimed job needs before it may run: a slot of each of `needs` (a lock of the run is one, the first); `free`: the
    lock that it gives back as it begins, "" for none. `fault`: why that could not be told. `created`: epoch seconds; VAIN: it
    is too late for it, or its batch was cancelled, so it is not to run, and takes no slots for that."""

    needs: tuple[Need, ...]
    free: str
    fault: str
    jid: str
    created: float


class Busy(Conflict):
    """The lock of its run is held by another job."""


class Lock:
    """A job's declared uniqueness, checked against its parameters."""

    def __init__(self, owner: str, name: str, queue: str, signature: inspect.Signature, unique: Any) -> None:
        must(isinstance(unique, Unique), owner, "unique", unique, "give while_executing(...), until_executed(...) or the like")
        self.owner, self._name, self._queue, self._signature = owner, name, queue, signature
        self.kind, self.by, self.on_conflict, self.ttl = unique
        option = f"{owner}: unique={self.kind}"
        self.queued = self.kind != "while_executing"  # it takes a lock as it is enqueued
        self.runs = self.kind in ("while_executing", "until_and_while_executing")
        self.starts = self.kind in ("until_executing", "until_and_while_executing")
        possible = [one for one in (AT_ENQUEUE if self.queued else AT_RUN) if self.ttl is None or one != "replace"]
        if self.on_conflict not in possible:
            why = {"wait": "; nobody can wait as he enqueues", "reschedule": "; one that is scheduled holds the lock, too"}
            why["replace"] = "; the first may be done, or at work"
            hint = why.get(self.on_conflict, "") if isinstance(self.on_conflict, str) else ""
            must(False, option, "on_conflict", self.on_conflict, f"give one of {', '.join(possible)}{hint}")
        check_seconds(option, ttl=self.ttl)
        self._kind = Kind(option, self.by, signature)

    def key(self, args: Sequence[Any]) -> str | None:
        """The lock for these arguments; None if they are not unique. Raises what `by` raises."""
        scope = self._kind.scope(args)
        if self.by is None:
            bound = self._signature.bind(*args)
            bound.apply_defaults()
            scope = list(bound.args)
        of = [["class", self._name], ["lock_args", scope], ["queue", self._queue]]
        return None if scope is None else digest("uniquejobs", of)

    def claim(self, args: Sequence[Any], begins: float) -> Claim | None:
        """The lock that a job with these arguments takes as it is enqueued; `begins`: when it is due (epoch seconds)."""
        key = self.key(args) if self.queued else None
        if key is None:
            return None
        fields = {"lock_digest": key} if self.ttl is None else {}
        if self.starts:  # or it would be taken for one that has lost its lock
            fields["lock"] = self.kind
        return Claim(key, self.on_conflict, None if self.ttl is None else begins + self.ttl, b"", self.owner, fields)


class _Held(msgspec.Struct):
    lock_digest: Any = ""


_held = msgspec.json.Decoder(_Held).decode


def held(data: bytes) -> str:
    """The lock that a stored job says it took as it was enqueued; "" for none."""
    if b'"lock_digest"' not in data:
        return ""
    try:
        found = _held(data).lock_digest
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


class Guard:
    """What a source asks of each job that it has claimed, in the fetch thread."""

    def __init__(self, jobs: Mapping[str, Any]) -> None:
        self._jobs = {name: job for name, job in jobs.items() if job.guarded}

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def __call__(self, data: bytes) -> Ask | None:
        """What this job needs; None if nothing. It raises nothing: a fault is the job's, and told where it would run."""
        try:
            payload = parse(data)
            job = self._jobs.get(payload.name)
        except PayloadError:
            return None  # it does not run anyway
        if job is None:
            return None
        lock, option = job.lock, "unique"
        try:
            args = job.decode_args(payload.args)
            key = lock.key(args) if lock is not None and lock.runs else None
            needs = [] if key is None else [slot(key + RUN, 1, 0.0, lock.queued or lock.on_conflict == "wait")]
            option = "limit"
            needs += [need for limit in job.limits if (need := limit.need(args)) is not None]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # nor does that
        except (Exception, SystemExit) as error:  # what a handler's may end, the fetch thread's may not
            return Ask((), "", f"in the by= of its {option}=: {told(error)}", payload.jid, 0.0)
        free, since, more = held(data) if lock is not None and lock.starts else "", payload.created_at or 0.0, payload.more
        if more is not None and payload.jid not in job.begun:
            late = more.expires_at is not None and job.app.clock.now() > more.expires_at
            since = VAIN if late or job.app.batches_met.get(more.batch, ("", ""))[1] == "cancelled" else since
        return Ask(tuple(needs), free, "", payload.jid, since) if needs or free else None


class Late(BarnabasError):
    """A job did not begin soon after it had a slot: it gives that back, and has not run."""


def marked(ask: Ask, holder: str | None = None, since: float | None = None) -> list[tuple[str, bytes]] | None:
    """What a claimed job's row says of its needs, in the place of headers: who has its lock, what is wrong, until when it must
    begin (its slots were taken no sooner than `since`, monotonic seconds); nothing if it may run."""
    if holder is not None or ask.created == VAIN:
        return [("busy", holder.encode())] if holder is not None else [("vain", b"")]
    spans = [need.span for need in ask.needs if need.span] if since is not None else ()
    if spans:
        return [("until", repr(since + 0.75 * min(map(slack, spans))).encode())]  # type: ignore[operator]
    return [("fault", ask.fault.encode())] if ask.fault else None


def refused(owner: str, mark: Sequence[tuple[str, bytes]], now: float) -> Exception | None:
    """Why a job with such a mark does not run (now: monotonic seconds)."""
    (what, said), *_ = mark
    text = said.decode(errors="replace")
    if what in ("until", "vain"):
        return Late() if what == "vain" or now > float(text) else None
    return Busy(f"{owner} is unique: job {text} is at work", text) if what == "busy" else BarnabasError(f"{owner}: {text}")


def clash(on_conflict: str, data: bytes, error: BaseException, now: float) -> Failed | None:
    """What becomes of a job that does not get its run's lock; None: it has failed like any other."""
    if on_conflict == "reject":
        return failed(data, error, now, final=True)._replace(spent=False)
    if on_conflict == "log":
        return Failed("drop", data, now, f'on_conflict="log": {error}')
    return Failed("again", data, now + AGAIN, "") if on_conflict == "reschedule" else None
