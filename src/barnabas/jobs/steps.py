"""Long jobs in steps: how far the loop of a job has come is a note, so that it goes on from there, in whichever process.

A cursor names the last item that is finished. It is stored only when all that the items up to it have sent is stored, so an
item may come twice after a crash, and none is left out.
"""

from asyncio import CancelledError, to_thread
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from inspect import isawaitable
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec

from barnabas.engine.checkpoint import flush
from barnabas.engine.hand import CURRENT, Hand
from barnabas.errors import BackendError, BarnabasError, SendError
from barnabas.jobs.beyond import KEPT, SAID, Progress, Unneeded, in_hand, steps_note
from barnabas.jobs.payload import PayloadError, dumps
from barnabas.message import OutgoingJob, note
from barnabas.ports import FOREVER

T = TypeVar("T")
SAVE = 1.0  # seconds between two saves of a cursor
MOST = 1 << 20  # bytes of a cursor
HELD = 1000  # messages and jobs that the items have sent, and that wait for a save: then it comes at once


class BadSteps(BarnabasError):
    """A loop that cannot be gone on with: the text says what is wrong with it."""


class Interrupted(CancelledError):
    """A job lets itself go between two items. `over`: its slice is, and others go first; else its process stops. `unneeded`: it
    is not to go on at all."""

    def __init__(self, over: bool, unneeded: Unneeded | None = None) -> None:
        super().__init__("the job goes on from its cursor, in another slice or process")
        self.over, self.unneeded = over, unneeded


class Saved(msgspec.Struct, omit_defaults=True):
    """How far a loop has come: the cursor, the items done (of `total`), and how many sends had ids by then."""

    cursor: msgspec.Raw
    done: int = 0
    total: int | None = None
    sent: int = 0


_saved = msgspec.json.Decoder(Saved).decode


class Steps(Generic[T]):
    """The items of a source that are left; see `barnabas.steps`."""

    _hand: Hand | None = None  # of the job that it runs in, if any
    _told = ""
    row: Any = None

    def __init__(self, source: Any, cursor: Any, total: int | None) -> None:
        self._pages = not isinstance(source, Iterable | AsyncIterable)
        if self._pages and not callable(source):
            raise BadSteps(f"steps({source!r}): give something to iterate over, or a function fetch(cursor)")
        if not self._pages and (isinstance(cursor, bool) or not isinstance(cursor, int | None) or (cursor or 0) < 0):
            raise BadSteps(f"steps(cursor={cursor!r}): of what is iterated over it is a number of items; else give fetch(cursor)")
        if total is None:
            with suppress(TypeError):
                total = len(source)
        self._source, self._at, self._done, self._total = source, cursor, 0, total

    def __iter__(self) -> Iterator[T]:
        self._begin()
        try:
            for at, item in self._pairs():
                yield item
                if self._reached(at):
                    self._breathe()
        finally:
            self._end()

    async def __aiter__(self) -> AsyncIterator[T]:
        await to_thread(self._begin)
        try:
            async for at, item in self._pairs_awaited():
                yield item
                if self._reached(at):
                    await to_thread(self._breathe)
        finally:
            self._end()

    # Where items come from, each with the cursor that it leaves.

    def _pairs(self) -> Iterator[tuple[Any, T]]:
        at, source = self._at, self._source
        if not self._pages:
            yield from enumerate(islice(_plain(source), at or 0, None), (at or 0) + 1)
            return
        while True:
            before, came = at, False
            for pair in _plain(source(at)):
                came, (at, item) = True, _pair(pair)
                yield at, item
            if not came:
                return
            _forward(before, at)

    async def _pairs_awaited(self) -> AsyncIterator[tuple[Any, T]]:
        at, source, count = self._at, self._source, 0
        while True:
            before, came, found = at, False, source(at) if self._pages else source
            async for each in _any(await found if isawaitable(found) else found):
                came, count = True, count + 1
                if self._pages:
                    at, item = _pair(each)
                    yield at, item
                elif count > (at or 0):
                    yield count, each
            if not came or not self._pages:
                return
            _forward(before, at)

    # What becomes of them.

    def _begin(self) -> None:
        """Take up the job in hand where it was left; anywhere else it is a plain loop."""
        hand = CURRENT.get()
        if hand is None or not hand.open or hand.run is None or hand.run.part.partition >= 0 or not hand.row[1]:
            return
        if hand.steps is not None and hand.steps.row is hand.row:
            raise BadSteps("a job has one loop of steps(): make the other a job of its own, and chain them: first.then(second)")
        self._part, self.row = hand.run.part, hand.row
        self._crew = self._part.runner.crew_of(self.row)
        job = self._crew.handler.job(self.row)
        self._app, self._clock, self._jid = job.app, job.app.clock.monotonic, self.row[1]
        self._name, now = steps_note(self._jid), self._clock()
        said = self._app.jobs.note(self._name)
        if said is not None:
            saved = _saved(said)
            self._at, self._done = msgspec.json.decode(saved.cursor), saved.done
            hand.sent = max(hand.sent, saved.sent)  # ids go on
        hand.steps = self
        hand.add(note(self._name, b"", self._app.clock.now()))  # it leaves if the job returns
        self._outputs, self._sent = hand.outputs, hand.sent
        self._start = self._mark = len(hand.outputs)
        self._hand, self._fresh, self._next, self._save_at = hand, False, 0.0, now + SAVE
        # An item done after a crash shows that it does not kill: the job ends its slice, and with that the crash is forgotten.
        self._ends = 0.0 if self._part.crashes.get(self.row[0]) else now + (job.max_runtime or FOREVER)
        if self._crew.stopping:
            raise Interrupted(False)

    def _reached(self, at: Any) -> bool:
        """An item is done; whether there is something to see to."""
        self._at, self._done = at, self._done + 1
        if self._hand is None:
            return False
        self._fresh, self._mark, self._sent = True, len(self._outputs), self._hand.sent
        return self._crew.stopping or self._clock() >= self._next or self._mark >= self._start + HELD

    def _breathe(self) -> None:
        """Save how far it is, if it is time for that; raise Interrupted if it is time to let go, or its batch was cancelled."""
        now, stored = self._clock(), self._note()
        stops = self._crew.stopping or self._part.closed or now > self._part.until
        over = stops or now >= self._ends
        if over or now >= self._save_at or self._mark >= self._start + HELD:
            with suppress(SendError, BackendError):  # whoever stores says so; an older cursor leaves no item out
                self._flush()
                if not stops and (job := in_hand()) is not None and (unneeded := job.cancelled()) is not None:
                    raise Interrupted(False, unneeded)
                if not over:
                    self._app.jobs.send([stored])
            self._save_at = now + SAVE
        if over:
            raise Interrupted(not stops)
        if SAID.get(self._jid, self._told) == self._told:  # else the job itself says how far it is
            self._told = SAID[self._jid] = str(Progress(self._done, self._total))
        self._next = min(self._save_at, self._ends)

    def _flush(self) -> None:
        """Make durable what the items sent: before the cursor that leaves them behind."""
        sent = self._hand.marked(self._outputs[self._start : self._mark])  # type: ignore[union-attr]
        for kind, size in (("events", 7), ("jobs", 5)):
            if some := [out for out in sent if len(out) == size]:
                flush(getattr(self._app, kind), some)
        del self._outputs[self._start : self._mark]
        self._mark = self._start

    def _note(self) -> OutgoingJob:
        try:
            cursor = dumps(self._at)
        except PayloadError as error:
            raise BadSteps(f"a cursor is what JSON can say, an id or a time as text: {error}") from None
        if len(cursor) > MOST:
            raise BadSteps(f"a cursor of {len(cursor):,} bytes; {MOST:,} are the most: give the last item's id, not the items")
        data = msgspec.json.encode(Saved(msgspec.Raw(cursor), self._done, self._total, self._sent))
        return note(self._name, data, self._app.clock.now() + KEPT)

    def left(self, error: BaseException) -> list[OutgoingJob]:
        """What is to be stored as a run ends in this. (Items come again if what they sent is not stored yet.)"""
        if isinstance(error, Interrupted) and error.unneeded is not None:
            return [note(self._name, b"", self._app.clock.now())]
        if self._fresh and self._mark == self._start:
            with suppress(BadSteps):
                return [self._note()]
        return []

    def _end(self) -> None:
        if self._hand is not None:
            SAID.pop(self._jid, None)


def at_work(row: Any) -> Steps[Any] | None:
    """The loop that the job in hand is, or was, in."""
    steps = getattr(CURRENT.get(), "steps", None)
    return steps if steps is not None and steps.row is row else None


def _plain(source: Any) -> Iterable[Any]:
    if isinstance(source, Iterable):
        return source
    if hasattr(source, "close"):  # a coroutine
        source.close()
    raise BadSteps(f"fetch(cursor) gave {source!r}: give (cursor, item) pairs; if it is `async def`, loop with `async for`")


async def _any(source: Any) -> AsyncIterator[Any]:
    if isinstance(source, AsyncIterable):
        async for each in source:
            yield each
    else:
        for each in _plain(source):
            yield each


def _pair(pair: Any) -> tuple[Any, Any]:
    try:
        at, item = pair
    except (TypeError, ValueError):
        raise BadSteps(f"fetch(cursor) gave {pair!r}: give (cursor, item) pairs") from None
    return at, item


def _forward(before: Any, at: Any) -> None:
    if at == before:
        raise BadSteps(f"fetch({before!r}) gave items up to {at!r} again: give those that come after the cursor")
