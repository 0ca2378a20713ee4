"""Queues and the jobs in them: what `barnabas queues` and `barnabas jobs` show and do."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from hashlib import sha1
from itertools import chain
from typing import Any

import msgspec

from barnabas.app import App
from barnabas.inspect import chunks
from barnabas.jobs.batch import bury
from barnabas.jobs.limit import WAIT, Need
from barnabas.jobs.payload import PayloadError, parse, seconds
from barnabas.jobs.unique import RUN, Guard, held
from barnabas.ports import QueueState, StoredJob

CHUNK = 1000  # jobs moved at once


class QueueInfo(msgspec.Struct, frozen=True):
    """A queue: its jobs by state, how long the first ready one waits (seconds, 0 where there is none), whether it is paused.

    Under the name "" are jobs that the backend does not keep by queue.
    """

    name: str
    ready: int
    work: int
    scheduled: int
    retry: int
    dead: int
    latency: float
    paused: bool


def queues(app: App) -> list[QueueInfo]:
    """All queues, stored or declared, by name."""
    asked, now = app.jobs.control(), app.clock.now()
    states = {state.name: state for state in app.jobs.queue_states()}
    found = []
    for name in sorted({*states, *(job.queue for job in app.job_handlers.values())}):
        state = states.get(name) or QueueState(name, 0, 0, 0, 0, 0, None)
        latency = 0.0 if state.since is None else max(0.0, now - state.since)
        found.append(QueueInfo(*state[:6], latency, f"pause queue:{name}" in asked))
    return found


class _Fields(msgspec.Struct):
    name: Any = msgspec.field(name="class", default="?")
    wrapped: Any = None  # Rails: what its ActiveJob runs
    args: msgspec.Raw = msgspec.Raw(b"")
    retry_count: Any = None
    error_class: Any = None
    error_message: Any = None
    created_at: Any = None
    enqueued_at: Any = None
    failed_at: Any = None
    retried_at: Any = None
    tags: Any = ()


_fields = msgspec.json.Decoder(_Fields).decode
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Entry(msgspec.Struct, frozen=True):
    """A stored job: what the backend knows of it, and what it says itself ("?" as the name of bytes that are no job).

    args: its arguments' JSON. runs: how often it has failed. error: class and message of the last failure, "" for none.
    time: when something happened to it last (epoch seconds).
    """

    job: StoredJob
    name: str
    args: str
    runs: int
    error: str
    time: float
    tags: tuple[str, ...] = ()


def entry(job: StoredJob) -> Entry:
    """Read a stored job."""
    try:
        said = _fields(job.payload)
    except _BROKEN as error:
        return Entry(job, "?", job.payload.decode(errors="backslashreplace"), 0, f"not a job: {error}", job.at or 0.0)
    failure = f"{said.error_class}: {said.error_message}" if said.error_class is not None else _unfit(job)
    stamps = (said.created_at, said.enqueued_at, said.failed_at, said.retried_at)
    time = max([seconds(stamp) or 0.0 for stamp in stamps] + [job.at or 0.0 if job.state == "dead" else 0.0])
    runs = said.retry_count + 1 if type(said.retry_count) is int else 0
    tags = tuple(tag for tag in said.tags if isinstance(tag, str)) if isinstance(said.tags, list) else ()
    name, args = str(said.wrapped or said.name), bytes(said.args).decode(errors="backslashreplace")
    return Entry(job, name, args, runs, failure, time, tags)


def _unfit(job: StoredJob) -> str:
    """Why a dead job that has not failed was buried: it is no job that could run."""
    try:
        if job.state == "dead":
            parse(job.payload)
    except PayloadError as error:
        return str(error)
    return ""


def locks(app: App, found: Entry) -> dict[str, str]:
    """What a stored job has of the locks of unique jobs ("holds"), and what it waits for ("waits for")."""
    job, home, has = found.job, app.jobs, list[str]()
    if (key := held(job.payload)) and home.holder(key) == job.jid:
        has.append(key)
    ask = Guard(app.job_handlers)(job.payload)
    said: dict[str, str] = {}
    if ask is not None and job.state == "scheduled" and b'"enqueued_at"' in job.payload:  # it was in its queue before
        limits = app.job_handlers[parse(job.payload).name].limits
        said = {"waits for": "its turn: " + ", ".join(repr(each.limit) for each in limits)}
    run = next((need.key for need in ask.needs if need.key.endswith(RUN)), None) if ask is not None else None
    holder = home.holder(run) if run is not None else None
    if run is not None and job.state == "work" and holder == job.jid:
        has.append(run)
    if holder is not None and job.state == "scheduled" and (job.at or 0.0) <= app.clock.now() + WAIT:
        said["waits for"] = f"job {holder}, at work with the lock {run}"
    return ({"holds": ", ".join(has)} if has else {}) | said


class LimitInfo(msgspec.Struct, frozen=True):
    """A limit, or one kind of it: how many slots are taken, how many jobs wait, when a rate with none free has one (epoch
    seconds)."""

    limit: str
    key: str
    rule: str
    taken: int
    waiting: int
    next: float | None


def limits(app: App, most: int) -> tuple[list[LimitInfo], int]:
    """The limits of the app's jobs, those with most jobs first, and how many there are; of one with `by=` the kinds of which jobs
    are in work or wait."""
    shown: dict[Need, tuple[str, str, str]] = {}
    busy: Counter[Need] = Counter()
    for each in [each for job in app.job_handlers.values() for each in job.limits if each.limit.by is None]:
        if (need := each.need(())) is not None:
            shown[need] = (each.shown, "", str(each.limit))
    for stored in chain(app.jobs.find_jobs("work"), app.jobs.find_jobs("scheduled")):
        if stored.state == "work" or b'"enqueued_at"' in stored.payload:  # (who waits for a slot was in its queue before)
            with suppress(Exception):  # rubbish needs none, nor does what its `by` fails with
                payload = parse(stored.payload)
                job = app.job_handlers[payload.name]
                args = job.decode_args(payload.args)
                for each in job.limits:
                    if (need := each.need(args)) is not None:
                        busy[need] += 1
                        shown.setdefault(need, (each.shown, each.key(args), str(each.limit)))
    first = sorted(shown, key=lambda need: -busy[need])[: most + 1000]  # a job waits for but one of its limits
    found = [LimitInfo(*shown[need], *of) for need, of in zip(first, app.jobs.taken(first), strict=True)]
    return sorted(found, key=lambda of: (-of.waiting, -of.taken))[:most], len(shown)


def jobs(
    app: App, jids: Iterable[str] = (), *, queue: str | None = None, state: str | None = None, name: str | None = None,
    error: str | None = None, tag: str | None = None, since: datetime | None = None,
) -> Iterator[Entry]:
    """The stored jobs, streamed: first to run first within a state. jids: only these (a repeated send stores an id twice).
    error: a text in the class or message of the last failure; since: something happened to it not before."""
    wanted, begin = frozenset(jids), since.timestamp() if since is not None else 0.0
    for job in app.jobs.find_jobs(state, queue):
        if not job.jid:  # rubbish is to be named, too
            job = job._replace(jid=f"raw-{sha1(job.payload).hexdigest()[:16]}")
        if wanted and job.jid not in wanted:
            continue
        found = entry(job)
        fits = (name is None or found.name == name) and (tag is None or tag in found.tags) and found.time >= begin
        if fits and (error is None or error in found.error):
            yield found


def move(app: App, found: Iterable[Entry], to: str | None, *, dry_run: bool = False) -> Counter[str]:
    """Make jobs "ready" now, as Sidekiq's "Retry now" does, put them into another queue ("queue:NAME"), or drop them (None).
    How many were: "moved", "in work" (which are left alone), "there" already, or "gone" (somebody else was quicker).
    dry_run: only count."""
    counts: Counter[str] = Counter()

    def movable() -> Iterator[Any]:
        for each in found:
            if each.job.state == "work":
                counts["in work"] += 1
            elif to in (each.job.state, f"queue:{each.job.queue}"):
                counts["there"] += 1
            else:
                yield each.job

    for jobs in chunks(movable(), CHUNK):
        moved = len(jobs) if dry_run else app.jobs.move_jobs([job.ref for job in jobs], to)
        counts["moved"] += moved
        counts["gone"] += len(jobs) - moved
        if to in (None, "dead") and moved == len(jobs) and not dry_run:  # else a look at all batches tells who is still there
            bury(app, [job.payload for job in jobs if job.state != "dead"])
    return counts
