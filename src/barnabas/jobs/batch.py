"""Batches of jobs, and what follows once all of them have ended.

A batch is a set of ids for each way in which its members stand ("open", "done", "dead"), which the backend changes in the same
step in which it settles a job, and a note (`Record`) that changes at the few turns of its life. A member is a job, or a batch
that was made inside. Whoever settles the last open member looks what follows; a keeper in each process finds what was lost.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from itertools import count, islice
from time import thread_time
from typing import Any, Optional

import msgspec

from barnabas.engine.hand import CURRENT, Hand
from barnabas.errors import BackendError, DeclarationError, EndedBatch, SendError, UnknownBatch, is_text, must
from barnabas.future import Future
from barnabas.jobs.beyond import ALL, KEPT, end_without, in_hand, linked
from barnabas.jobs.payload import derived_jid, new_jid
from barnabas.message import Member, OutgoingJob, member, note

log = logging.getLogger("barnabas")
CALLBACKS = ("on_death", "on_complete", "on_success")
LINK = -1.0  # as job.LINK
LOOK = 15.0  # seconds between two looks for members that are stored nowhere
MISSES = 3  # so many looks in a row have to miss one: a job may move while we look
MISSING = 100_000  # of those, and of the dead, so many are kept in mind
OBEYED = 1.0  # seconds after which every process knows that a batch was cancelled
HOUR, DAY, LARGE = 3600.0, 86400.0, 1000  # seconds; members


class Record(msgspec.Struct, omit_defaults=True):
    """What is known of a batch. `callbacks`: a job as a chain stores it, by option. `sealed`: its `with` has ended; `size`: it
    had so many members then. Times in epoch seconds; `counts` (open, done, dead) are those of the last turn, `at`."""

    created: float
    at: float = 0.0
    description: str = ""
    parent: str | None = None
    callbacks: dict[str, dict[str, Any]] = {}
    sealed: bool = False
    size: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    cancelled: float | None = None
    death: float | None = None
    complete: float | None = None
    success: float | None = None


class Status(msgspec.Struct):
    """How far a batch is. state: "filling" (its `with` has not ended), "running", "complete" (all ended, some dead), "success" or
    "cancelled". Of `total` members so many are open, done and dead. Times in epoch seconds."""

    id: str
    state: str
    description: str
    total: int
    open: int
    done: int
    dead: int
    created: float
    death: float | None
    complete: float | None
    success: float | None
    cancelled: float | None
    parent: str | None


_record = msgspec.json.Decoder(Record).decode
_FILLING: ContextVar[Optional["JobBatch"]] = ContextVar("barnabas_batch", default=None)


def _find(app: Any, id: str) -> tuple[bytes, Record] | None:
    stored = app.jobs.note(f"batch:{id}") if is_text(id) else None
    return None if stored is None else (stored, _record(stored))


def _swap(app: Any, id: str, stored: bytes, record: Record, jobs: Iterable[OutgoingJob] = ()) -> bool:
    record.at = app.clock.now()
    return app.jobs.swap(f"batch:{id}", stored, msgspec.json.encode(record), record.at + KEPT, list(jobs))  # type: ignore[no-any-return]


def _change(app: Any, id: str, change: Callable[[Record], None]) -> None:
    while True:
        found = _find(app, id)
        if found is None:
            raise UnknownBatch(f"there is no batch {id!r}; one is forgotten 30 days after its last change")
        change(found[1])
        if _swap(app, id, *found):
            return look(app, id)


def standing(app: Any, id: str, fresh: bool = False) -> str:
    """"cancelled" (it, or one around it), "complete" or ""; as it was within the last second, unless asked for `fresh`."""
    met, now = app.batches_met, app.clock.monotonic()
    until, said = met.get(id, (0.0, ""))
    if fresh or now >= until:
        found = _find(app, id)
        record = found[1] if found is not None else Record(0.0)
        said = "complete" if record.complete else ""
        if record.cancelled or (record.parent is not None and standing(app, record.parent, fresh) == "cancelled"):
            said = "cancelled"
        if len(met) > 10_000:
            met.clear()
        met[id] = (now + OBEYED, said)
    return said  # type: ignore[no-any-return]


def look(app: Any, id: str) -> None:
    """Do what follows from how the members of a batch stand, if it was not done yet."""
    home = app.jobs
    while (found := _find(app, id)) is not None:
        stored, record = found
        now, counts = app.clock.now(), home.batch(id)
        is_open, _, dead = counts
        stopped = standing(app, id, True) == "cancelled"
        ended = record.sealed and not is_open and (record.complete is not None or sum(counts) >= record.size)
        turns = {"death": dead > 0, "complete": ended, "success": ended and not dead and not stopped}
        due = [turn for turn, come in turns.items() if come and getattr(record, turn) is None]
        if not due and (record.complete or counts == record.counts or now < record.at + DAY):
            return
        for turn in due:
            setattr(record, turn, now)
        if record.complete is None or "complete" in due:
            record.counts = counts
        calls = [f"on_{turn}" for turn in due if not stopped and f"on_{turn}" in record.callbacks]
        links = [({**record.callbacks[call]}, derived_jid(id, CALLBACKS.index(call))) for call in calls]
        made = [linked(app, link, [id] if link.pop("takes") else [], jid, now, {}) for link, jid in links]
        if not _swap(app, id, stored, record, [job for job in made if job is not None]):
            continue
        if ended and due:
            _ended(app, id, record)
        return


def _ended(app: Any, id: str, record: Record) -> None:
    """It has, for good or bad: tell the batch around it, and keep no more of it than that."""
    if record.parent is not None:
        app.jobs.end(record.parent, [id], "done" if record.success else "dead")
        look(app, record.parent)
    app.jobs.end(ALL, [id], "done" if record.success or record.cancelled else "dead")
    if sum(record.counts) <= LARGE:  # (that takes its time: the hourly look does it)
        app.jobs.forget(id, "done")  # a number says as much


def bury(app: Any, payloads: Iterable[bytes]) -> None:
    """These jobs were dropped or buried by an operator: they count as dead in their batches, if they are of any, and who waits
    for their outcome is told."""
    batches: dict[str, list[str]] = {}
    for data in payloads:
        if (end := end_without(data)) is None:
            continue
        if told := [*end.lost(app.clock.now(), "an operator dropped it")]:
            app.jobs.send(told)
        if end.batch:
            batches.setdefault(end.batch, []).append(end.jid)
    for id, jids in batches.items():
        app.jobs.end(id, jids, "dead")
        look(app, id)


def status(app: Any, id: str) -> Status:
    """How far a batch is. Raises UnknownBatch."""
    found = _find(app, id)
    if found is None:
        raise UnknownBatch(f"there is no batch {id!r}; one is forgotten 30 days after its last change")
    record, (is_open, done, dead) = found[1], app.jobs.batch(id)
    total = is_open + done + dead
    if record.complete is not None:
        total = sum(record.counts)
        done = total - is_open - dead
    state = "success" if record.success else "complete" if record.complete else "running" if record.sealed else "filling"
    if not record.success and standing(app, id, True) == "cancelled":
        state = "cancelled"
    times = (record.created, record.death, record.complete, record.success, record.cancelled)
    return Status(id, state, record.description, total, is_open, done, dead, *times, record.parent)


def statuses(app: Any) -> Iterator[Status]:
    """All batches that are remembered: those under way, then those that have ended."""
    for state in ("open", "dead", "done"):
        for id in app.jobs.batch_members(ALL, state):
            with suppress(UnknownBatch):
                yield status(app, id)


def cancel(app: Any, id: str) -> None:
    """Let those of a batch's jobs that have not begun be skipped, as every process meets them from a second later on, and
    those of the batches inside it; loops of steps() end between two items; no callback runs. Raises UnknownBatch, and Refused
    where it has ended."""

    def change(record: Record) -> None:
        if record.complete is not None:
            raise EndedBatch(f"batch {id} has ended; there is nothing to cancel")
        record.cancelled, record.sealed = record.cancelled or app.clock.now(), True

    _change(app, id, change)
    app.batches_met.clear()


def current(app: Any) -> Optional["JobBatch"]:
    """The batch whose `with` this is in, else that of the job in hand; None where there is none."""
    filling, end = _FILLING.get(), in_hand()
    if filling is not None and filling.app is app:
        return filling
    return JobBatch(app, None, end.batch) if end is not None and end.batch else None


class JobBatch:
    """A batch of jobs: `with app.batch(...) as batch: batch.enqueue(job, ...)`; in a coroutine outside of handlers `async with`.

    id: its name for `app.batch_status`, known once the block has begun.
    """

    def __init__(self, app: Any, record: Record | None, id: str = "") -> None:
        self.app, self.id = app, id
        self._record = record  # None: it is that of the job in hand
        self._hand: Hand | None = None
        self._filling, self._size = record is None, 0
        self._head, self._numbers = new_jid()[:12], count(int(new_jid()[:11], 16))

    def enqueue(self, job: Any, /, *args: Any, **kwargs: Any) -> Future[str]:
        """Job.enqueue of a job (or `job.options(...)`, or a chain) that is of this batch; `job.options(batch=batch)` gives the
        other ways to enqueue. Raises SendError where the batch has ended, DeclarationError for jobs that cannot be of one."""
        return self._of(job).enqueue(*args, **kwargs)  # type: ignore[no-any-return]

    def enqueue_many(self, job: Any, arguments: Iterable[tuple[Any, ...]]) -> Future[list[str]]:
        """As Job.enqueue_many."""
        return self._of(job).enqueue_many(arguments)  # type: ignore[no-any-return]

    def _of(self, job: Any) -> Any:
        if not hasattr(job, "options"):
            raise DeclarationError(f"batch: {job!r} is no job: give what @app.job has made, or job.options(...)")
        return job.options(batch=self)

    def status(self) -> Status:
        """How far it is, as app.batch_status."""
        if self._filling and self._hand is None:
            self.app.jobs.flush(self.app.settings.send_timeout)
        return status(self.app, self.id)

    def cancel(self) -> None:
        """As app.cancel_batch."""
        cancel(self.app, self.id)

    def new_jid(self) -> str:
        """An id for a job. They follow each other, so that those of jobs that end together stand together where they are kept."""
        return f"{self._head}{next(self._numbers):012x}"

    def take(self, out: OutgoingJob) -> Member:
        """Make a job a member. Raises SendError where it is too late for that."""
        if not self._filling:
            how = "a job of it adds others by app.current_batch().enqueue(...)"
            raise SendError(f"batch {self.id or '(not begun)'} takes jobs inside its `with` block only; {how}")
        if self._record is None and standing(self.app, self.id) == "complete":
            raise SendError(f"batch {self.id} has ended: it takes no more jobs; make another: with app.batch(...)")
        self._size += 1
        return member(self.id, out)

    # Its block.

    def __enter__(self) -> "JobBatch":
        hand = CURRENT.get()
        if asyncio._get_running_loop() is not None and not (hand is not None and hand.open):
            raise SendError("the end of a batch waits for what is stored; in a coroutine write `async with app.batch(...)`")
        return self._begin()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._end(kind is not None)
        if self._hand is None:
            self._seal(kind is not None)

    async def __aenter__(self) -> "JobBatch":
        return self._begin()

    async def __aexit__(self, kind: Any, *error: Any) -> None:
        self._end(kind is not None)
        if self._hand is None:
            await asyncio.to_thread(self._seal, kind is not None)

    def _begin(self) -> "JobBatch":
        if self._record is None or self.id:
            raise SendError(f"batch {self.id} was begun already; each has one `with` block: make another by app.batch(...)")
        hand, outer = CURRENT.get(), current(self.app)
        self._hand = hand if hand is not None and hand.open else None
        self.id = f"b-{new_jid() if self._hand is None else self._hand.future(derived_jid).id}"
        self._record.created = self._record.at = self.app.clock.now()
        self._joins = [member(ALL, OutgoingJob("", b"", None, self.id, None))]
        if outer is not None:
            self._record.parent = outer.id
            self._joins.append(outer.take(self._joins[0]))
        if self._hand is None:
            self.app.jobs.send([*self._joins, self._note()])
        self._filling, self._token = True, _FILLING.set(self)
        return self

    def _note(self, future: Any = None) -> OutgoingJob:
        assert self._record is not None
        return note(f"batch:{self.id}", msgspec.json.encode(self._record), self._record.created + KEPT, future)

    def _end(self, failed: bool) -> None:
        _FILLING.reset(self._token)
        self._filling = False
        if self._hand is not None:  # all of it leaves with the handler, in one go
            record: Record = self._record  # type: ignore[assignment]
            record.sealed, record.size, record.cancelled = True, self._size, record.created if failed else None
            future: Future[str] = Future()
            future.add_done_callback(lambda _: self.app.jobs.ripe(self.id))
            for out in [*self._joins, self._note(future)]:
                self._hand.add(out)

    def _seal(self, failed: bool) -> None:
        if self.app.jobs.flush(self.app.settings.send_timeout):
            raise SendError(f"batch {self.id}: its jobs are not stored after {self.app.settings.send_timeout} s; it stays open")

        def change(record: Record) -> None:
            record.sealed, record.cancelled = True, self.app.clock.now() if failed else record.cancelled

        _change(self.app, self.id, change)


def new(app: Any, description: str, **callbacks: Any) -> JobBatch:
    """A batch with these callbacks (None: none). Raises DeclarationError for what is no job of this app."""
    must(is_text(description), "batch", "description", description, "give a text")
    links = {option: _link(app, option, target) for option, target in callbacks.items() if target is not None}
    return JobBatch(app, Record(0.0, description=description, callbacks=links))


def _link(app: Any, option: str, target: Any) -> dict[str, Any]:
    """What a batch stores of a callback."""
    from_options = getattr(target, "_job", None)
    job, call = (target, {}) if from_options is None else (from_options, target._call)
    if getattr(job, "app", None) is not app or not hasattr(job, "_called"):
        raise DeclarationError(f"batch: {option}={target!r}: give a job of this app, or job.options(...)")
    if job._least > 1 or job.queued or {"then", "batch"} & call.get("more", {}).keys() or "now" in call:
        what = "a callback gets one argument, the batch's id, or none, and is neither a chain nor unique from its enqueueing on"
        raise DeclarationError(f"batch: {option}={job.name!r}: {what}")
    queue, retry, extra = job._called(call, LINK)
    return {"class": job.name, "queue": queue, "retry": retry, **extra, "takes": bool(job._most or job._rest)}


class Seen:
    """Ids that one look has met, in 8 MiB at most, however many there are. One that was met is known; of those that were not,
    some are taken for others (of a million every ninth), which another look, with other places for all, does not."""

    def __init__(self) -> None:
        self._salt, self._places = new_jid(), bytearray(1 << 23)

    def add(self, id: str) -> None:
        """This one was met."""
        self._places[hash(self._salt + id) % len(self._places)] = 1

    def __contains__(self, id: str) -> bool:
        return self._places[hash(self._salt + id) % len(self._places)] == 1


class Keeper:
    """What a process does for batches: it looks at those whose last job it has settled, at once, and one process looks at all,
    from time to time, for members that nobody will settle."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._ripe: deque[str] = deque()
        self._bell = threading.Event()
        self._turn = threading.Lock()
        self._name = new_jid().encode()
        self._next, self._purge = app.clock.monotonic() + LOOK, 0.0
        self._missed: dict[tuple[str, str], int] = {}
        self._ends = self._led = False

    def ripe(self, id: str) -> None:
        """This one is worth a look. From any thread."""
        self._ripe.append(id)
        self._bell.set()

    def idle(self) -> bool:
        """Whether there is nothing to look at just now."""
        return not self._ripe

    def run(self, stopping: threading.Event) -> None:
        """Look at what is worth it, until the process stops."""
        while not stopping.is_set():
            self._bell.wait(0.5)
            self._bell.clear()
            self._follow()

    def tend(self, stopping: threading.Event) -> None:
        """Look at all from time to time, until the process stops. In a thread of its own: no callback is to wait for that."""
        while not stopping.wait(min(0.5, LOOK)):
            self._look_around()

    def end(self) -> None:
        """Let what follows from what this process has settled be done, and no more; its threads end."""
        self._ends = True
        self._follow()
        self._bell.set()
        if self._led:  # who goes on need not wait until that is over
            with suppress(BackendError):
                self._leads(0.0)

    def step(self) -> bool:
        """Look at what is worth it, and at all if it is time; whether anything was worth it."""
        moved = self._follow()
        self._look_around()
        return moved

    def _follow(self) -> bool:
        moved = False
        with self._turn:
            try:
                while self._ripe:
                    look(self._app, self._ripe[0])
                    self._ripe.popleft()
                    moved = True
            except (Exception, SystemExit) as error:  # of a hook
                log.error("batches: trying again: %s", error, exc_info=not isinstance(error, BackendError))
                self._ripe.rotate(-1)  # others first
        return moved

    def _look_around(self) -> None:
        clock, began, pause = self._app.clock, thread_time(), LOOK
        if clock.monotonic() < self._next or self._ends:
            return
        try:
            self._reconcile()
            pause = max(LOOK, (4 if self._missed else 20) * (thread_time() - began))
            if self._led:
                self._leads(pause + LOOK)
        except (Exception, SystemExit) as error:
            log.error("batches: trying again: %s", error, exc_info=not isinstance(error, BackendError))
        self._next = clock.monotonic() + pause

    def _reconcile(self) -> None:
        """Find members that are stored nowhere (an operator of Sidekiq has deleted them) or dead, and what followed from none."""
        app, home, now = self._app, self._app.jobs, self._app.clock.now()
        ids, failed = ([*home.batch_members(ALL, state)] for state in ("open", "dead"))
        if not (ids or failed or now >= self._purge) or not self._leads(4 * LOOK):
            return
        if now >= self._purge:
            self._purge = now + HOUR
            for id in [*failed, *home.batch_members(ALL, "done")]:
                found = (b"", Record(0.0)) if self._ends else _find(app, id)
                if found is None or (found[1].complete and any(home.batch_members(id, "done"))):
                    home.forget(id, "done" if found else None)
        stored, dead = Seen(), set[str]()
        for job in home.find_jobs() if any(home.batch(id)[0] for id in ids) else ():
            if self._ends:
                return
            if b'"batch"' in job.payload and (job.state != "dead" or len(dead) < MISSING):
                (dead if job.state == "dead" else stored).add(job.jid)
        before, self._missed = self._missed, {}
        for id in ids:
            lost = (jid for jid in home.batch_members(id, "open") if self._lost(id, jid, stored, dead, before))
            while some := list(islice(lost, 1000)):
                home.end(id, some, "dead")
                log.warning("batch %s: %d jobs that others have deleted or buried count as dead: %s...", id, len(some), some[0])
            if (found := _find(app, id)) is None:
                if self._misses(id, "", before):
                    home.forget(id)
            elif found[1].complete:
                _ended(app, id, found[1])
            else:
                look(app, id)
        for id in failed:  # the last dead one of which may have been retried, and done
            if not home.batch(id)[2]:
                look(app, id)

    def _leads(self, seconds: float) -> bool:
        """Whether this process is the one that looks, for so many seconds."""
        home, until, leader = self._app.jobs, self._app.clock.now() + seconds, self._app.jobs.note("batches")
        self._led = leader in (None, self._name) and home.swap("batches", leader, self._name, until, ())
        return self._led

    def _lost(self, id: str, jid: str, stored: Seen, dead: set[str], before: dict[tuple[str, str], int]) -> bool:
        if jid in stored:
            return False
        if jid in dead:
            return True
        if jid.startswith("b-") and (found := _find(self._app, jid)) is not None:
            if found[1].complete is not None:
                _ended(self._app, jid, found[1])
            return False
        return self._misses(id, jid, before)

    def _misses(self, id: str, jid: str, before: dict[tuple[str, str], int]) -> bool:
        if len(self._missed) >= MISSING and (id, jid) not in before:
            return False
        self._missed[id, jid] = misses = before.get((id, jid), 0) + 1
        return misses >= MISSES
