"""What a handler has sent and written so far: held back until it returns, thrown away if it fails."""

from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

from barnabas.errors import SendError, WaitInHandler
from barnabas.future import Future
from barnabas.message import Key, Outgoing, OutgoingJob, Row, offset_of
from barnabas.ports import Part, Result
from barnabas.verdict import Again

ID = "barnabas-id"  # the header


def cause_of(part: Part, row: Row) -> str:
    """What names a delivery for good: a repeat of it has the same cause, so its sends get the same ids."""
    if part.partition < 0:  # a job keeps its id over retries
        return f"{part.topic}/{row[1]!r}"
    return f"{part.group}/{part.topic}/{part.partition}/{offset_of(row)}"


def sent_for(output: Any, result: Result, row: Row) -> bool:
    """Whether this was sent by the handler of this row (its id says so), or is the row itself on its way to be retried."""
    id = next((value for name, value in reversed(output[4] or ()) if name == ID), b"")
    again = type(result.others.get(row[0])) is Again and output[2:4] == row[1:3]
    return again or id.startswith(f"{cause_of(result.part, row)}/".encode())


def id_of(derive: Any, part: Part, row: Row, index: int) -> str:
    """The id of the `index`-th send of a delivery."""
    return derive(cause_of(part, row), index)  # type: ignore[no-any-return]


class Hand(msgspec.Struct, eq=False):
    """The sends and table writes of the delivery a worker has in hand. `used` says that there are any. (A Struct, because an
    async worker makes one a message: a plain object costs 0.1 us more.)"""

    app: Any
    run: Any = None
    row: Any = None
    open: bool = False
    used: bool = False
    sent: int = 0
    respond: Any = None
    steps: Any = None  # the loop of the job in hand (jobs.steps); it knows whose it is
    keys: Collection[Key] | None = frozenset()  # None where one call has a whole batch in hand
    outputs: Any = ()  # of Outgoing or OutgoingJob: a list from the first send on
    tables: Any = None
    names: frozenset[str] = frozenset()  # of the tables
    cells: Any = None  # with tables: what was written, encoded, by the table's name and the key

    def awaited(self, future: Future[Any], blocking: bool) -> None:
        """Refuse a wait by the handler (or a task it started) whose sends are held back here."""
        if self.open and CURRENT.get() is self:
            how = "to send at once, whatever becomes of this message, use send(..., now=True)"
            why = "a send inside a handler leaves after the handler returned, so waiting for it here would never end"
            raise WaitInHandler(f"{why}; {how}")

    def refuse(self, target: Any) -> None:
        """Refuse what another app declares: it would be stored with this handler's position, where that app never looks."""
        if self.app is not None:
            where = f"{target!r} belongs to {target.app!r}, and this handler to {self.app!r}"
            raise SendError(f"{where}: declare it there as well, or let it leave at once, by now=True")

    def add(self, output: Outgoing | OutgoingJob) -> None:
        """Hold this back until the handler returns."""
        if self.outputs:
            self.outputs.append(output)
        else:
            self.outputs = [output]
        self.used = True

    def future(self, derive: Any) -> Future[Any]:
        """A future for a send that is held back; its id is derived from the cause when somebody asks."""
        self.sent = index = self.sent + 1
        self.used = True  # so that the next delivery counts from 1 again
        return Future((id_of, derive, self.run.part, self.row, index), self)

    def has_key(self, key: Key) -> bool:
        """Whether a message of the batch in hand has this key."""
        if self.keys is None:
            self.keys = {row[1] for row in self.run.rows}
        return key in self.keys

    def keep(self) -> None:
        """The handler succeeded: what it sent and wrote becomes part of its run's result."""
        run = self.run
        if self.outputs:
            run.outputs += self.marked(self.outputs) if run.part.marked else self.outputs
            self.outputs = ()
        cells = self.cells
        if cells:
            written = run.cells
            while cells:  # emptied, not replaced: a new dict costs more
                cell, data = cells.popitem()
                written[cell] = data
        self.used = False
        self.sent = 0

    def marked(self, outputs: Sequence[Outgoing | OutgoingJob]) -> list[Outgoing | OutgoingJob]:
        """These, each message with its id as a header: where outputs and position are not stored in one step, a repeat is told
        by it."""
        cause = cause_of(self.run.part, self.row)
        found: list[Outgoing | OutgoingJob] = []
        for index, out in enumerate(outputs, 1):
            if len(out) == 7:
                future = out[6]
                id = (future.id if type(future) is Future else None) or f"{cause}/+{index}"
                out = (*out[:4], [*(out[4] or ()), (ID, id.encode())], *out[5:])
            found.append(out)
        return found

    def forget(self) -> None:
        """The handler failed: nothing of it leaves. Ids go on, for what a hook may still send."""
        for output in self.outputs:
            if output[-1] is not None:
                output[-1].resolve(None)
        self.outputs = ()
        self.cells = {}
        self.respond = None

    def drop(self) -> None:
        """The delivery failed: nothing of it leaves."""
        self.forget()
        self.used = False
        self.sent = 0


def maker(handler: Any) -> Callable[..., Hand]:
    """What makes hands for a handler: of its app, a run, a row, and whether they are open. They write to its tables, if any."""
    tables = handler.tables
    return Hand if tables is None else lambda *known: Hand(*known, tables=tables, names=tables.names, cells={})  # type: ignore[misc]


CURRENT: ContextVar[Hand | None] = ContextVar("barnabas_hand", default=None)
