"""`sqlite:///FILE`: topics, queues and tables in one file that many processes share.

Writers of all processes take turns at a lock file (host.Turn); whoever has the turn commits everybody's pending sends of
its process in the same transaction (group commit). Readers have a connection of their own and never wait. Always apsw,
never the standard library's sqlite3: that one waits a switch interval for every step (facts: sqlite.md).
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any, TypeVar

import apsw

from barnabas.backends import sqlite_limits
from barnabas.backends.neighbours import Neighbours
from barnabas.backends.shares import NOTES, Notes, Room, unnoted
from barnabas.backends.sqlite_admin import SqliteAdmin
from barnabas.backends.sqlite_file import OpenFile, identity
from barnabas.backends.sqlite_read import explain, one
from barnabas.errors import BackendError, DeclarationError, Replaced, SendError
from barnabas.jobs.limit import Need
from barnabas.message import Outgoing, OutgoingJob, note
from barnabas.ports import Listener, Source

T = TypeVar("T")
log = logging.getLogger("barnabas")
TURN, TURN_BYTES = 2000, 2 << 20  # sends of one transaction, some 5 ms: what others may have to wait for several times
ENOUGH = 5.0  # seconds that anything may take when a backend is closed


class SqliteBackend(Notes, SqliteAdmin):
    """One file, as this process sees it."""

    def __init__(self, url: str, settings: Any, clock: Any) -> None:
        self.url, self.closed, self.clock = url, False, clock
        self._joining, self._next, self._mutex = (threading.Lock() for _ in range(3))  # the last two: doors as host.Turn has
        super().__init__(OpenFile(url.removeprefix("sqlite:///"), settings.session_timeout))
        self._names: dict[tuple[str, str], int] = {}
        self.retention: dict[str, Any] = {}
        self._pending: list[Outgoing | OutgoingJob] = []
        self._limbo: list[tuple[list[Outgoing | OutgoingJob], list[tuple[Any, Any]]]] = []  # stored in a file that is away
        self._failed: BaseException | None = None
        self._room = Room(self.path, "messages", settings, lambda: self._failed or self.file.turn.trouble)
        self._committer: threading.Thread | None = None
        self._spin = int.from_bytes(os.urandom(2), "little")
        self._moved: dict[int, int] = {}
        self._end = threading.Event()
        self.neighbours = Neighbours(self, settings.session_timeout)
        self.sources: list[Any] = []
        self._watchers: list[Callable[[], None]] = []
        self._listening = False
        self.blind: str | None = None  # why nobody hears of what is new
        self.refresh()

    def check(self) -> None:
        """See that the file at our path still is the one we have open: what is stored elsewhere, nobody will find.

        If another one of Barnabas stands there it is used from now on. Raises Replaced where sources still read from the
        old one, BackendError where there is none.
        """
        if self.file.moved():
            with self._alone():
                if self.file.moved():
                    self._follow()

    def _follow(self) -> None:
        if identity(self.file.name) is None:
            what = "nothing is stored or handled until it is back; to begin with an empty file, start any process anew"
            raise BackendError(f"{self.path} was deleted or moved away while it was open: {what}")
        before, file = self.file, OpenFile(self.file.name, self.neighbours.session, self.file)
        if self.sources:
            file.close()
            raise Replaced(f"{self.path} was replaced by another file while it was open")
        self.neighbours.abandon()
        with self._reading:
            self.file, self.path = file, file.path
            self.heads, self.parts, self.queue_ids, self._names, self._known = {}, {}, {}, {}, frozenset()
            self.neighbours = Neighbours(self, self.neighbours.session)
        while self._limbo:
            self._give_back(self._limbo.pop()[0])
        before.close()
        log.warning("%s was replaced by another file: that one is used from now on", self.path)
        if self._listening:
            file.bell.watch(self._rung)
        self.refresh()

    # Writing.

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the one who writes in this process. Who waits takes the next door first: the committer, who is there again at
        once, kept others out for half a second."""
        limit = ENOUGH if self.closed else -1  # at the end nobody waits forever for who waits for its turn
        held = self._next.acquire(timeout=limit)
        try:
            if not (held and self._mutex.acquire(timeout=limit)):
                raise BackendError(f"{self.path}: another thread of this process has no turn to write; {self.file.turn.trouble}")
        finally:
            if held:
                self._next.release()
        try:
            yield
        finally:
            self._mutex.release()

    def write(self, act: Callable[[apsw.Connection], T], whole: bool = False) -> T:
        """Run `act` in one durable transaction, in turn, after what is waiting in the send buffer (the whole, or a turn's)."""
        with self._alone():
            if self.file.moved():
                self._follow()
                if self._committer is not threading.current_thread():
                    raise Replaced(f"{self.path} was replaced by another file just now; what was for the old one is not done")
            while self._limbo:  # the file is back, and has them
                self._resolve(*self._limbo.pop(0))
            with self.file.turn.take(ENOUGH if self.closed else None):
                result = self._commit(act, self._take_pending(whole))
        try:
            if self._stir:
                self._stir = False
                self.refresh()
            self.file.bell.ring()
            self._wake_own()
        except Exception as error:  # it is stored: whoever took this for a failure would store it again
            log.exception("%s: what was stored could not be told of; others find it within a second: %s", self.path, error)
        return result

    def _commit(self, act: Callable[[apsw.Connection], T], pending: list[Outgoing | OutgoingJob]) -> T:
        known = self.parts, self.queue_ids, self._names
        db = self.file.writer
        self._moved = {}
        try:
            db.execute("BEGIN IMMEDIATE")
            stored = self._store(db, pending) if pending else []
            result = act(db)
            db.execute("COMMIT")
        except BaseException as error:
            with suppress(apsw.Error):  # what made the commit fail may do so again; SQLite forgets it all the same
                if db.in_transaction:
                    db.execute("ROLLBACK")
            self.parts, self.queue_ids, self._names = known  # what was created in it does not exist
            self._known = frozenset()  # (and what a reader learned meanwhile is learned again)
            self._give_back(pending)
            if isinstance(error, apsw.Error | OSError):
                raise explain(self.path, error) from error
            raise
        self.heads.update(self._moved)
        if pending and self.file.moved():  # nobody is to be told that something is stored which nobody else will find
            self._limbo.append((pending, stored))
        else:
            self._resolve(pending, stored)
        return result

    swept = ""  # up to which note it was looked whose time is over
    _stir = False  # counts in `heads` moved in a way that only reading tells

    def stir(self, db: apsw.Connection, where: str, args: Sequence[Any] = ()) -> None:
        """Inside a write: tell all processes that something changed for a queue, all queues, or a group's members."""
        db.execute(f"UPDATE heads SET next = next + 1 WHERE {where}", args)
        self._stir = True

    def _take_pending(self, whole: bool = False) -> list[Outgoing | OutgoingJob]:
        with self._room:
            most = len(self._pending) if whole else TURN
            if self._room.size > TURN_BYTES and not whole:
                sizes = accumulate(len(out[3] or b"") if len(out) == 7 else 0 for out in self._pending[:TURN])
                most = 1 + sum(size < TURN_BYTES for size in sizes)
            pending, self._pending = self._pending[:most], self._pending[most:]
            return pending

    def _give_back(self, pending: list[Outgoing | OutgoingJob]) -> None:
        with self._room:
            self._pending = pending + self._pending

    def _resolve(self, pending: list[Outgoing | OutgoingJob], stored: list[tuple[Any, Any]]) -> None:
        self.settled(stored)
        if pending:
            self._room.leave(len(pending), sum([len(out[3] or b"") for out in pending if len(out) == 7]))

    def declare(self, topics: Iterable[Any]) -> None:
        for topic in topics:
            self.retention[topic.name] = topic.retention
            known = self.parts.get(topic.name)
            if known is not None and topic.partitions is not None and len(known) != topic.partitions:
                raise DeclarationError(
                    f"topic {topic.name!r}: partitions={topic.partitions}, but {self.path} has it with {len(known)}, and a topic "
                    "of a file keeps its number: leave partitions out, or declare a topic of another name"
                )
        missing = [t for t in topics if t.name not in self.parts]
        if missing:
            self.write(lambda db: [self._create(db, topic) for topic in missing])

    # The sink.

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        if self.closed:
            raise SendError(f"{self.path} was closed; the app opens it again at its next use")
        size = sum([len(out[3] or b"") for out in outgoing if len(out) == 7])
        with self._room:
            self._room.enter(len(outgoing), size)
            self._pending += outgoing
            if self._committer is None:
                self._committer = threading.Thread(target=self._commit_pending, name="barnabas-commit", daemon=True)
                self._committer.start()
            self._room.notify_all()

    def _commit_pending(self) -> None:
        while True:
            with self._room:
                while not self._pending and not self._limbo:
                    if self.closed:
                        return
                    self._room.wait()
            try:
                self.write(lambda db: None)
                if self._failed is not None:
                    self._failed = None
                    log.warning("%s: sends are stored again", self.path)
            except Exception as error:
                if _of_one(error):
                    self._one_by_one()
                    continue
                if self._failed is None:
                    log.error("%s: sends cannot be stored, trying again every 0.2 s: %s", self.path, error)
                self._failed = error
                if self._end.wait(0.2):
                    return

    def _one_by_one(self) -> None:
        """Something in the buffer cannot be stored: it is to hold up no other, and its sender is to know."""
        with self._alone():
            pending = self._take_pending()
            for index, out in enumerate(pending):
                try:
                    with self.file.turn.take():
                        self._commit(lambda db: None, [out])
                except Exception as error:
                    with self._room:
                        self._pending.remove(out)  # `_commit` gave it back
                    if not _of_one(error):
                        self._give_back(pending[index:])
                        return
                    refused = SendError(f"{self.path}: a message or job cannot be stored: {error}")
                    log.error("%s", refused)
                    self._resolve([out], [(out[-1], refused)])

    def swap(self, name: str, old: bytes | None, new: bytes, until: float, jobs: Sequence[OutgoingJob]) -> bool:
        def act(db: apsw.Connection) -> bool:
            tbl = self.name_id(db, "table", NOTES)
            row = one(db, "SELECT value FROM cells WHERE tbl = ? AND key = ?", (tbl, name))
            same = unnoted(row and row[0], self.clock.now()) == old
            if same:
                self._store(db, [*jobs, note(name, new, until)])
            return same

        return self.write(act)

    def flush(self, timeout: float) -> int:
        return self._room.emptied(timeout)

    # What consumers and workers use.

    def listen(self) -> None:
        """Watch the bell."""
        with self._alone():
            if not self._listening:
                self._listening = True
                self.file.bell.watch(self._rung)

    def _rung(self) -> None:
        if self._watchers or any(source.waiting for source in self.sources):
            try:
                self.refresh()
                self.blind = None
            except BackendError as error:  # whoever waits for what is new is to say so
                self.blind = str(error)
            self._wake_own()

    def _wake_own(self) -> None:
        for source in self.sources:
            if source.waiting:
                source.look()
        for wake in [*self._watchers]:
            wake()

    def box(self, workers: int) -> tuple[Any, int]:
        self._join()
        life = self.neighbours.life
        assert life is not None
        return life.box, life.places(workers)

    def _join(self) -> None:
        with self._joining:
            self.neighbours.join()
        self.listen()

    def log(self, group: str, topics: Sequence[Any], *, start: str, ordered: bool, listener: Listener) -> Source:
        from barnabas.backends.sqlite_sources import SqliteLog

        self.declare(topics)
        self._join()
        return SqliteLog(self, group, topics, start, ordered, listener)

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any = None) -> Source:
        from barnabas.backends.sqlite_queues import SqliteQueues

        self._join()
        return SqliteQueues(self, queues, listener, guard)

    def hold(self, token: str, need: Need) -> float:
        self._join()
        return self.write(lambda db: sqlite_limits.hold(self, db, token, need))

    def let_go(self, token: str, need: Need, begun: bool = True) -> None:
        self.write(lambda db: sqlite_limits.let_go(self, db, token, need, begun))

    def settled(self, stored: list[tuple[Any, Any]]) -> None:
        """After a settlement's commit: its sends are durable."""
        for future, value in stored:
            if future is not None:
                future.settle(value)

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        self.listen()
        self._watchers.append(wake)
        return lambda: self._watchers.remove(wake)

    def close(self) -> None:
        """Store what is still waiting, at most `send_timeout` seconds, say what could not be, and let go."""
        if self.closed:
            return
        left = self.flush(self._room.timeout)
        if left:
            why = self._failed or self.file.turn.trouble
            log.error("%s: %d messages could not be stored before the end: %s", self.path, left, why)
        self.closed = True
        self._end.set()
        with self._room:
            self._room.notify_all()
        if self._committer is not None and self._committer is not threading.current_thread():
            self._committer.join(ENOUGH)
        self.neighbours.leave()
        lost = SendError(f"{self.path} was closed before this could be stored")
        for out in [*self._take_pending(whole=True), *(out for pending, _ in self._limbo for out in pending)]:
            if out[-1] is not None:
                out[-1].fail(lost, told=True)
        with suppress(BackendError), self._alone(), self._reading:  # else a thread waits for its turn: it ends with the process
            self.file.close()

    def disown(self) -> None:
        """In a forked child: the locks of the turn and of the life are to go with the parent."""
        self.file.turn.close()
        if self.neighbours.life is not None:
            self.neighbours.life.abandon()


def _of_one(error: BaseException) -> bool:
    """Whether an error is about something that was to be stored, not about the file."""
    if isinstance(error, BackendError):
        return isinstance(error.__cause__, apsw.TooBigError | apsw.ConstraintError | apsw.MismatchError)
    return not isinstance(error, MemoryError)


open_backend = SqliteBackend
