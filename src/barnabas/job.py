"""The handle that `@app.job(...)` returns: a plain function that can also be enqueued."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Never

import msgspec

from barnabas.codec import known, make_codec
from barnabas.consumer import check_call, check_name, check_priority, check_queue
from barnabas.engine.hand import CURRENT
from barnabas.engine.handler import hints_of, refuse_generator
from barnabas.engine.hooks import check_hooks, check_takes, refuse_async
from barnabas.errors import DeclarationError, JobFailed, NoOutcome, SendError, is_text, must, patience, refuse_unknown, whole
from barnabas.future import Future, gathered, resolved
from barnabas.jobs.beyond import KEPT, read_outcome
from barnabas.jobs.limit import Concurrent, limits
from barnabas.jobs.payload import CHAIN, PayloadError, build, build_many, derived_jid, failed, hooked, new_jid, new_jids
from barnabas.jobs.unique import Claim, Lock
from barnabas.message import LockedJob, OutgoingJob, note, ranked
from barnabas.topic import END

STORED = ("retry_for", "retry_queue", "backtrace", "dead", "tags")  # options that travel with a job, for whoever runs it
CALLED = ("retry_delay", "on_exhausted", "on_death")
OPTIONS = (
    "queue", "retry", "name", "timeout", "hooks", "expires_in", "result_ttl", "max_runtime", "priority", "unique", "limit",
    *STORED, *CALLED,
)  # fmt: skip
LINK = -1.0  # in place of the time of a job that begins when the one before it in its chain has ended
PLAIN = "a job gets what JSON can say: plain types, dataclasses, TypedDicts, msgspec Structs"
RETRIES = "give the number of retries (0: none), True for 25, or False"
_NONE: dict[str, Any] = {}
_new: Any = tuple.__new__  # a third of the price of OutgoingJob(...)
_NEEDED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Calls:
    """What a job and a job with other options have: ways to enqueue it."""

    _job: "Job"
    _call: Mapping[str, Any] = _NONE

    def enqueue(self, *args: Any, **kwargs: Any) -> Future[str]:
        """Store a job; the future gives its id once it is durable (None if a before_enqueue hook refused it).

        Keywords are bound to positions. Inside a handler the job leaves when the handler has returned. Raises
        SendError for arguments that do not fit the function or cannot be stored.
        """
        return self._job._enqueue(args, kwargs, None, self._call)

    def enqueue_in(self, delay: float | timedelta, *args: Any, **kwargs: Any) -> Future[str]:
        """Store a job that runs after `delay` (seconds or a timedelta)."""
        return self._job._enqueue(args, kwargs, self._job._after(delay), self._call)

    def enqueue_at(self, when: float | datetime, *args: Any, **kwargs: Any) -> Future[str]:
        """Store a job that runs at `when`: epoch seconds, or a datetime (a naive one is local time)."""
        return self._job._enqueue(args, kwargs, _at(when), self._call)

    def enqueue_many(self, arguments: Iterable[tuple[Any, ...]]) -> Future[list[str]]:
        """Store one job for each tuple of arguments; the future gives their ids once all are durable."""
        job, call = self._job, self._call
        if job.queued:  # each may be refused
            return gathered([job._enqueue(args, _NONE, None, call) for args in map(job._tuple, arguments)])
        hand = CURRENT.get()
        held = hand is not None and hand.open and "now" not in call
        out, calls, low, high = list[OutgoingJob](), iter(arguments), job._least, job._most
        while chunk := [
            a if type(a) is tuple and low <= len(a) <= high else job._positions(job._tuple(a), _NONE) for a in islice(calls, 1000)
        ]:
            ids = [job._new_id(not held, call)[0] for _ in chunk] if held or "batch" in call else new_jids(len(chunk))
            out += job._alike(chunk, call, ids)
        if not (jids := [made[3] for made in out]):
            return resolved(jids)
        last: Future[str] = Future()
        out[-1] = out[-1]._replace(future=last)
        many: Future[list[str]] = Future(None, hand if held else None)
        job._leave(out, held)
        return gathered([last], many, jids)

    def then(self, *jobs: "Calls") -> "Options":
        """A chain: `job.then(second, third).enqueue(...)`. Each begins when the one before it has returned, with what that
        returned as its argument. It is stored in the job itself; a job that dies ends it, and retried goes on with it."""
        if strange := [each for each in jobs if not isinstance(each, Calls)]:
            raise DeclarationError(f"{self._job.owner}: then({strange[0]!r}): give jobs, as app.job has made them")
        more = self._call.get("more", {})
        chain = [*more.get("then", ()), *(link._link() for link in jobs)]
        if len(chain) >= CHAIN:
            raise DeclarationError(f"{self._job.owner}: a chain of {len(chain) + 1} jobs: {CHAIN} are the most")
        for each in [self._job, *(link._job for link in jobs[:-1])]:
            if each.app.job_handlers.get(each.name) is not each:
                raise DeclarationError(f"{each.owner} is run by another program, which knows no chains: it can only be the last")
        last = (jobs[-1]._job, len(chain)) if jobs else (self._job, 0)
        return Options(self._job, {**self._call, "more": {**more, "then": chain}, "last": last})

    def _link(self) -> dict[str, Any]:
        """What a chain stores of this job. Raises DeclarationError for what cannot be part of one."""
        job, call = self._job, self._call
        if job._least > 1 or not (job._most or job._rest):
            what = "it gets one argument, what the job before it returned, and takes"
            raise DeclarationError(f"{job.owner} cannot be part of a chain: {what} {job._signature}")
        if job.queued:
            raise DeclarationError(f"{job.owner} is unique from its enqueueing on: in a chain it can only be the first job")
        if {"then", "batch"} & call.get("more", {}).keys() or "now" in call:
            raise DeclarationError(f"{job.owner}: a chain is made of jobs, not of chains; now= and batch= are its first job's")
        queue, retry, extra = job._called(call, LINK)
        return {"class": job.name, "queue": queue, "retry": retry, **extra}


class Job(Calls):
    """A job of an app. Calling it calls the function; `enqueue` stores it for a worker, in Sidekiq's JSON."""

    def __init__(self, app: Any, function: Callable[..., Any], **options: Any) -> None:
        named = options.get("name")
        self.name: str = getattr(function, "__name__", "") if named is None else named
        self.owner = f"job {self.name!r}"
        refuse_unknown(self.owner, options, OPTIONS)
        self.app, self.function, self._job = app, function, self
        self.queue: str = options.get("queue", "default")
        self.retry: bool | int = options.get("retry", 25)
        self.timeout: float | None = options.get("timeout")
        self.dead: bool = options.get("dead", True)
        self.retry_for: int | None = options.get("retry_for")
        self.retry_queue: str | None = options.get("retry_queue")
        self.retry_delay: Callable[[int, BaseException, dict[str, Any]], Any] | None = options.get("retry_delay")
        self.on_exhausted: Callable[[dict[str, Any], BaseException], Any] | None = options.get("on_exhausted")
        self.on_death: Callable[[dict[str, Any], BaseException], Any] | None = options.get("on_death")
        self.backtrace: bool | int = options.get("backtrace", False)
        self.tags: list[str] = options.get("tags", [])
        self.expires_in: float | None = options.get("expires_in")
        self.result_ttl: float | None = options.get("result_ttl")
        self.max_runtime: float | None = options.get("max_runtime")
        self.priority: int = options.get("priority", 0)
        self.hooks = check_hooks(self.owner, options.get("hooks", []))
        self._check()
        self._check_failing()
        plain = {"retry_for": None, "retry_queue": None, "backtrace": False, "dead": True, "tags": None}
        self._extra = {name: options[name] for name in STORED if name in options and options[name] is not plain[name]} or None
        more = {"expires_in": self.expires_in, "result_ttl": self.result_ttl, "priority": self.priority or None}
        self._more = {name: value for name, value in more.items() if value is not None}  # see jobs.payload.More
        self.awaited = inspect.iscoroutinefunction(function)
        refuse_async(self.owner, self.awaited, [*app.hooks, *self.hooks])
        refuse_generator(self.owner, function)
        self._signature = inspect.signature(function)
        self._plan()
        unique = options.get("unique")
        self.lock = None if unique is None else Lock(self.owner, self.name, self.queue, self._signature, unique)
        self.queued = self.lock is not None and self.lock.queued
        self.limits = limits(self.owner, self.name, self._signature, options.get("limit", []))
        self.begun = set[str]()  # of jobs that are late the ids of those for which it is not too late: a loop of theirs has begun
        runs = self.lock is not None and self.lock.runs
        self.slots = runs or any(isinstance(each.limit, Concurrent) for each in self.limits)  # others may wait for its end
        self.guarded = bool(self.limits) or (self.lock is not None and (runs or self.lock.starts))
        functools.update_wrapper(self, function, updated=())  # its attributes are not ours: tenacity's `retry`, say

    def _must(self, fits: Any, option: str, way_out: str) -> None:
        must(fits, self.owner, option, getattr(self, option), way_out)

    def _check(self) -> None:
        plain = callable(self.function) and not inspect.isclass(self.function)
        self._must(plain, "function", "decorate a function, sync or async")
        check_name("job", "name", "" if self.name == "<lambda>" else self.name, slashes=True)
        check_queue(self.owner, self.queue)
        self._must(isinstance(self.retry, int) and self.retry >= 0, "retry", RETRIES)
        self._must(isinstance(self.dead, bool), "dead", "give False if a job out of retries is to vanish (counted), else True")

    def _check_failing(self) -> None:
        window = self.retry_for
        within = window is None or (whole(window) and 0 < window <= 10**9)
        self._must(within, "retry_for", "give whole seconds since the first failure, 1 to 1,000,000,000, or None")
        way_out = f"retry={self.retry!r} says that there are no retries; leave one of them out"
        self._must(window is None or self.retry, "retry_for", way_out)
        if self.retry_queue is not None:
            check_queue(self.owner, self.retry_queue, "retry_queue")
        lines = isinstance(self.backtrace, int) and self.backtrace >= 0
        self._must(lines, "backtrace", "give the number of lines to store, True for all, or False")
        seconds = {name: getattr(self, name) for name in ("timeout", "expires_in", "result_ttl", "max_runtime")}
        check_call(self.owner, self.tags, **seconds)
        check_priority(self.owner, self.priority)
        for option in CALLED:
            if (function := getattr(self, option)) is not None:
                takes = "count, error, job" if option == "retry_delay" else "job, error"
                plain = callable(function) and not inspect.iscoroutinefunction(function)
                self._must(plain, option, f"give a plain function({takes}), not an `async def`: it runs between two jobs")
                check_takes(f"{self.owner}: {option}", function, *takes.split(", "))

    def _plan(self) -> None:
        """Read the signature once: how many arguments, and how stored ones are decoded by their annotations."""
        parameters = list(self._signature.parameters.values())
        hints = hints_of(self.owner, self.function)
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        self._rest = False
        for p in parameters:
            hint = hints.get(p.name, Any)
            if p.kind is p.VAR_POSITIONAL:
                self._rest = True
            elif p.kind not in _NEEDED:
                way_out = "a job's arguments are stored in order; keyword-only ones cannot be (a wrapper needs functools.wraps)"
                must(False, self.owner, "parameter", p.name, way_out)
            elif p.default is p.empty:
                fields.append((f"a{len(fields)}", hint))
            else:
                fields.append((f"a{len(fields)}", hint | msgspec.UnsetType if hint is not Any else Any, msgspec.UNSET))
        keeps = self.result_ttl is not None
        self._returned = make_codec(f"{self.owner}: what it returns", hints.get("return", Any), "json")[1] if keeps else None
        self._least = sum(1 for f in fields if len(f) == 2)
        self._most = len(fields)
        try:
            shape = msgspec.defstruct("Args", fields, array_like=True, forbid_unknown_fields=not self._rest)
            self._decode = msgspec.json.Decoder(known(shape)).decode
        except TypeError as error:
            said = f"its arguments cannot be decoded by their annotations: {error}; {PLAIN}"
            raise DeclarationError(f"{self.owner}: {said}") from None
        self._free = msgspec.json.Decoder(list[Any]).decode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job {self.name}>"

    def decode_args(self, data: Any) -> tuple[Any, ...]:
        """Stored arguments as the function's annotations ask for them. Raises msgspec.ValidationError on a mismatch."""
        args = msgspec.structs.astuple(self._decode(data))
        if self._rest:
            return args[: self._most] + tuple(self._free(data)[self._most :])
        if self._least < self._most and msgspec.UNSET in args:
            return args[: args.index(msgspec.UNSET)]
        return args

    # Enqueueing.

    def _positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if not kwargs and self._least <= len(args) and (len(args) <= self._most or self._rest):
            return args
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SendError(f"{self.owner} cannot be enqueued: {error}; it takes {self._signature}") from None
        if kwargs:
            bound.apply_defaults()
        return bound.args

    def _tuple(self, arguments: Any) -> tuple[Any, ...]:
        if not isinstance(arguments, tuple | list):
            raise SendError(f"{self.owner}: enqueue_many([{arguments!r}]): give a tuple of arguments for each job, such as (42,)")
        return tuple(arguments)

    def _new_id(self, now: bool, call: Mapping[str, Any] = _NONE) -> tuple[str, Future[str] | None]:
        """An id: derived from its cause inside a handler (with the future that is held back there), else at random."""
        hand = CURRENT.get()
        if hand is not None and hand.open and not now:
            if hand.app is not self.app:
                hand.refuse(self)
            future: Future[str] = hand.future(derived_jid)
            return future.id, future  # type: ignore[return-value]
        return call["batch"].new_jid() if "batch" in call else new_jid(), None

    def _outgoing(
        self, args: tuple[Any, ...], at: float | None, call: Mapping[str, Any], jid: str, future: Any
    ) -> OutgoingJob | None:
        target, retry, extra = self.queue, self.retry, self._extra
        if call or self._more:
            target, retry, extra = self._called(call, at)
        claim = self._claim(args, at) if self.queued else None
        if claim is not None:
            extra = {**(extra or {}), **claim.fields}
        try:
            now = self.app.clock.now()
            payload = build(self.name, args, queue=target, retry=retry, jid=jid, now=now, at=at is not None, extra=extra)
            if self.app.enqueue_hooks:
                if (changed := hooked(self.app.enqueue_hooks, payload, target)) is None:
                    return None
                payload, target = changed
        except PayloadError as error:
            raise SendError(f"{self.owner} cannot be enqueued: {error}") from error
        priority = self._ranked(call) if call or self._more else 0
        if claim is not None:
            out = LockedJob(target, payload, at, jid, future)
            if claim.on_conflict == "reject":
                claim = claim._replace(buried=failed(payload, claim.refusal("?"), now, final=True).payload)
            out.lock, out.priority = claim, priority
            return out
        plain: OutgoingJob = ranked(priority, _new(OutgoingJob, (target, payload, at, jid, future)))
        return call["batch"].take(plain) if "batch" in call else plain

    def _alike(self, calls: list[tuple[Any, ...]], call: Mapping[str, Any], jids: list[str]) -> list[OutgoingJob]:
        """The same for many calls at once, which begin now."""
        if self.app.enqueue_hooks:
            all_made = (self._outgoing(args, None, call, jid, None) for args, jid in zip(calls, jids, strict=True))
            return [job for job in all_made if job is not None]
        target, retry, extra = self._called(call, None) if call or self._more else (self.queue, self.retry, self._extra)
        try:
            made = build_many(self.name, calls, jids, queue=target, retry=retry, now=self.app.clock.now(), extra=extra)
        except PayloadError as error:
            raise SendError(f"{self.owner} cannot be enqueued: {error}") from error
        out = [_new(OutgoingJob, (target, payload, None, jid, None)) for payload, jid in zip(made, jids, strict=True)]
        if (call or self._more) and (priority := self._ranked(call)):
            out = [ranked(priority, job) for job in out]
        return [*map(call["batch"].take, out)] if "batch" in call else out

    def _called(self, call: Mapping[str, Any], at: float | None) -> tuple[str, Any, dict[str, Any]]:
        """Queue, retry and further fields of a job with what a call of it says."""
        extra, more = {**(self._extra or {})}, {**self._more, **call.get("more", {})}
        if "retry" in call:
            extra.pop("retry_for", None)  # a call's own count beats the job's window
        if "tags" in call:
            extra["tags"] = call["tags"]
        if "expires_in" in more and at != LINK:
            more["expires_at"] = (self.app.clock.now() if at is None else at) + more.pop("expires_in")
        if more:
            extra["barnabas"] = more
        return call.get("queue", self.queue), call.get("retry", self.retry), extra

    def _ranked(self, call: Mapping[str, Any]) -> int:
        """The priority of a job with what a call of it says. Raises SendError where queues have none."""
        more = call.get("more", _NONE)
        priority: int = more.get("priority", self.priority)
        if priority or any("priority" in link.get("barnabas", ()) for link in more.get("then", ())):
            self.app.ranks(self.owner)
        return priority

    def _claim(self, args: tuple[Any, ...], at: float | None) -> Claim | None:
        """The lock that a job with these arguments takes: by the arguments as its worker will see them."""
        try:
            stored = self.decode_args(msgspec.json.encode(args))
        except msgspec.DecodeError as error:
            raise SendError(f"{self.owner} cannot be enqueued: its arguments do not fit its function: {error}") from None
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None  # `build` says what is wrong with them
        now = self.app.clock.now()
        try:
            return self.lock.claim(stored, now if at is None else max(at, now))  # type: ignore[union-attr]
        except Exception as error:
            raise SendError(f"{self.owner} cannot be enqueued: the by= of its unique= failed: {error!r}") from error

    def _enqueue(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: float | None, call: Mapping[str, Any] = _NONE
    ) -> Future[str]:
        jid, held = self._new_id("now" in call, call)
        future = held if held is not None else self._future(jid, call) if call or self._more else Future(jid)
        out = self._outgoing(self._positions(args, kwargs), at, call, jid, future)
        if out is None:
            return resolved(None)
        self._leave([out], held is not None)
        return future

    def _future(self, jid: str, call: Mapping[str, Any]) -> Future[str]:
        last, links = call.get("last", (self, 0))
        return Future(jid) if last.result_ttl is None else Enqueued(jid, _last=last, _links=links)

    def outcome(self, jid: str, timeout: float | None = None) -> Any:
        """What the job with this id returned, by the function's annotation. Waits for it, at most `timeout` seconds: it is
        told, nobody asks again and again. For a job with `result_ttl`, from any process; in a coroutine, by way of a thread.

        Raises JobFailed when it is dead, dropped or expired, NoOutcome (a TimeoutError) when it waits or runs, or was done
        longer than `result_ttl` ago.
        """
        if self._returned is None:
            raise DeclarationError(f"{self.owner}: nothing is kept of what it returns; declare it with result_ttl=SECONDS")
        said = self.app.jobs.note(f"result:{jid}", patience(f"{self.owner}: outcome", timeout))
        if said is None:
            raise NoOutcome(f"{self.owner}: no outcome of {jid} within {timeout} s: see barnabas jobs show {jid}, and result_ttl")
        found = read_outcome(said)
        if found.error:
            raise JobFailed(f"{self.owner}, {jid}: {found.error}")
        return self._returned(found.value)

    def _leave(self, outs: list[OutgoingJob], held: bool) -> None:
        """Send these, or hold them back until the handler has returned."""
        if held:
            for out in outs:
                CURRENT.get().add(out)  # type: ignore[union-attr]
        else:
            self.app.jobs.send(outs)

    def _after(self, delay: float | timedelta, call: str = "enqueue_in(") -> float:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not -END < seconds < END - 1e10:
            raise SendError(f"{call}{delay!r}): give seconds or a timedelta")
        return float(self.app.clock.now() + max(0.0, seconds))

    def enqueue_debounced(self, key: str, /, *args: Any, wait: float | timedelta, **kwargs: Any) -> Future[str]:
        """Store a job that runs after `wait` (seconds or a timedelta), unless it is asked for again by the same `key`: of calls
        that follow each other more quickly, the last one runs. The others end as "superseded"."""
        if self.app.job_handlers.get(self.name) is not self:
            raise SendError(f"{self.owner} cannot be debounced: it is run by another program, which would run every call")
        if not is_text(key) or not key:
            raise SendError(f"{self.owner}: enqueue_debounced({key!r}): give a text that names what is to be done once")
        if self.queued:
            raise SendError(f"{self.owner} cannot be debounced: the first call takes its lock; on_conflict=\"replace\" does it")
        at, name = self._after(wait, "enqueue_debounced(wait="), f"debounce:{self.name}:{key}"
        jid, held = self._new_id(False)
        future = held if held is not None else Future(jid)
        out = self._outgoing(self._positions(args, kwargs), at, {"more": {"debounce": name}}, jid, None)
        if out is None:
            return resolved(None)
        last: Future[str] = Future()
        gathered([last], future, jid)
        # The note comes last: it never names a job that is not there.
        self._leave([out, note(name, jid.encode(), at + KEPT, last)], held is not None)
        return future

    def options(
        self, *, queue: str | None = None, retry: bool | int | None = None, tags: list[str] | None = None,
        expires_in: float | None = None, priority: int | None = None, now: bool = False, batch: Any = None, **unknown: Never,
    ) -> "Options":
        """The same job with other options for the next call: `job.options(queue="slow").enqueue(...)`. now: inside a handler,
        it leaves at once. batch: an app.batch() that it is to be of."""
        refuse_unknown(f"{self.owner}: options", unknown, ["queue", "retry", "tags", "expires_in", "priority", "now", "batch"])
        if queue is not None:
            check_queue(self.owner, queue)
        must(retry is None or (isinstance(retry, int) and retry >= 0), self.owner, "retry", retry, RETRIES)
        check_call(self.owner, tags or [], expires_in=expires_in)
        check_priority(self.owner, priority or 0)
        more = {name: value for name, value in (("expires_in", expires_in), ("priority", priority)) if value is not None}
        said = {"queue": queue, "retry": retry, "tags": tags, "now": now or None, "more": more or None}
        found = Options(self, {name: value for name, value in said.items() if value is not None})
        return found if batch is None else found.options(batch=batch)


class Enqueued(Future[str], eq=False, gc=False):
    """The future of a job whose outcome is kept."""

    _last: Any = None  # the last job of its chain, or itself
    _links: int = 0

    def outcome(self, timeout: float | None = None) -> Any:
        """What the job returned (of a chain: the last one), as Job.outcome."""
        jid = self.result(timeout)
        if jid is None:
            raise JobFailed(f"{self._last.owner}: not enqueued: a hook refused it, or another has its lock (on_conflict=log)")
        for _ in range(self._links):
            jid = derived_jid(jid, 0)
        return self._last.outcome(jid, timeout)


class Options(Calls):
    """A job with other options, as `job.options(...)` returns it."""

    def __init__(self, job: Job, call: Mapping[str, Any]) -> None:
        self._job, self._call = job, call

    def options(self, *, batch: Any = None, **unknown: Never) -> "Options":
        """The same as one of a batch. Raises DeclarationError for what cannot be of one."""
        job = self._job
        refuse_unknown(f"{job.owner}: options(...).options", unknown, ["batch"])
        mine = getattr(batch, "app", None) is job.app and hasattr(batch, "take")
        must(mine, job.owner, "batch", batch, "give what app.batch() or app.current_batch() of its own app has returned")
        if job.queued or job.app.job_handlers.get(job.name) is not job:
            one, other = "it is run by another program, which tells nobody of its end", "unique from its enqueueing on"
            raise DeclarationError(f"{job.owner} cannot be of a batch: {one}, or {other}, so that it may not be stored at all")
        return Options(job, {**self._call, "batch": batch, "more": {**self._call.get("more", {}), "batch": batch.id}})


def _at(when: float | datetime) -> float:
    at: Any = when
    with suppress(ValueError, OverflowError, OSError):  # the system knows no such time
        at = when.timestamp() if isinstance(when, datetime) else when
    if isinstance(at, bool) or not isinstance(at, int | float) or not -END < at < END:
        raise SendError(f"enqueue_at({when!r}): give epoch seconds (not milliseconds), up to the year 9999, or a datetime")
    return float(at)
