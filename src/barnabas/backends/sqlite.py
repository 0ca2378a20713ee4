"""`sqlite:///FILE`: topics, queues and tables in one file that many processes share.

Writers of all processes take turns at a lock file (host.Turn); whoever has the turn commits everybody's pending sends of
its process in the same transaction (group commit). Readers have a connection of their own and never wait. Always apsw,
never the standard library's sqlite3: that one waits a switch interval for every step (facts: sqlite.md).
"""

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, TypeVar
from zlib import crc32

import apsw
import msgspec

from barnabas.backends.host import Bell, Turn
from barnabas.backends.neighbours import Neighbours
from barnabas.backends.shares import by_target
from barnabas.backends.sqlite_admin import SqliteAdmin
from barnabas.backends.sqlite_open import check_library, check_place, migrate
from barnabas.backends.sqlite_read import SHIFT, connect, explain, one
from barnabas.errors import BackendError, BufferFull, DeclarationError, SendError, UnknownTopic
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Listener, Source

T = TypeVar("T")
log = logging.getLogger("barnabas")
DEFAULT_PARTITIONS = 6
BATCH_COUNT, BATCH_BYTES = 1000, 256 * 1024  # the most a record holds
TURN, TURN_BYTES = 2000, 2 << 20  # sends of one transaction, some 5 ms: what others may have to wait for several times
_encode = msgspec.msgpack.Encoder().encode
_open: "weakref.WeakSet[SqliteBackend]" = weakref.WeakSet()
_inherited: list[Any] = []  # a forked child keeps its parent's handles untouched, here


def open_backend(url: str, settings: Any, clock: Any) -> "SqliteBackend":
    """Open the file of a URL, creating it if need be."""
    backend = SqliteBackend(url, settings, clock)
    _open.add(backend)
    return backend


class SqliteBackend(SqliteAdmin):
    """One file, as this process sees it."""

    def __init__(self, url: str, settings: Any, clock: Any) -> None:
        self.url = url
        self.closed = False
        self.clock = clock
        path = os.path.realpath(url.removeprefix("sqlite:///"))  # under another name it would have other locks
        self._send_timeout: float = settings.send_timeout
        self._most = (settings.buffer_messages, settings.buffer_bytes)
        if not os.path.isdir(os.path.dirname(path)):
            raise BackendError(f"{path}: its folder does not exist; create it, or change the URL")
        check_library(apsw.sqlitelibversion())
        check_place(path)
        self._joining, self._next, self._mutex = (threading.Lock() for _ in range(3))  # the last two: doors as host.Turn has
        self.turn = Turn(path)
        self._bell = Bell(path)
        with self.turn.take():  # SQLite lets two that make a new file a WAL file at once meet SQLITE_BUSY without waiting
            self._db = connect(path)
            try:
                migrate(self._db, path)
            except apsw.Error as error:
                raise explain(path, error) from error
        super().__init__(path)
        self._names: dict[tuple[str, str], int] = {}
        self.retention: dict[str, Any] = {}
        self._pending: list[Outgoing | OutgoingJob] = []
        self._waiting = [0, 0]  # messages and bytes in the buffer
        self._failed: BaseException | None = None
        self._room = threading.Condition()
        self._committer: threading.Thread | None = None
        self._spin = int.from_bytes(os.urandom(2), "little")
        self._moved: dict[int, int] = {}
        self._end = threading.Event()
        self.neighbours = Neighbours(self, settings.session_timeout)
        self.sources: list[Any] = []
        self._watchers: list[Callable[[], None]] = []
        self._listening = False
        self.refresh()

    # Writing.

    def write(self, act: Callable[[apsw.Connection], T], whole: bool = False) -> T:
        """Run `act` in one durable transaction, in turn, after what is waiting in the send buffer (the whole, or a turn's)."""
        with self._next:  # else the committer, who is there again at once, kept others out for half a second
            self._mutex.acquire()
        try:
            with self.turn.take():
                result = self._commit(act, self._take_pending(whole))
        finally:
            self._mutex.release()
        if self._stir:
            self._stir = False
            self.refresh()
        self._bell.ring()
        self._wake_own()
        return result

    def _commit(self, act: Callable[[apsw.Connection], T], pending: list[Outgoing | OutgoingJob]) -> T:
        known = self.parts, self.queue_ids, self._names
        self._moved = {}
        try:
            self._db.execute("BEGIN IMMEDIATE")
            stored = self._store(self._db, pending) if pending else []
            result = act(self._db)
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(apsw.Error):  # what made the commit fail may do so again; SQLite forgets it all the same
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            self.parts, self.queue_ids, self._names = known  # what was created in it does not exist
            self._known = frozenset()  # (and what a reader learned meanwhile is learned again)
            self._give_back(pending)
            if isinstance(error, apsw.Error | OSError):
                raise explain(self.path, error) from error
            raise
        self.heads.update(self._moved)
        self._resolve(pending, stored)
        return result

    _stir = False  # counts in `heads` moved in a way that only reading tells

    def stir(self, db: apsw.Connection, where: str, args: Sequence[Any] = ()) -> None:
        """Inside a write: tell all processes that something changed for a queue, all queues, or a group's members."""
        db.execute(f"UPDATE heads SET next = next + 1 WHERE {where}", args)
        self._stir = True

    def _take_pending(self, whole: bool = False) -> list[Outgoing | OutgoingJob]:
        with self._room:
            most = len(self._pending) if whole else TURN
            if self._waiting[1] > TURN_BYTES and not whole:
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
            size = sum([len(out[3] or b"") for out in pending if len(out) == 7])
            with self._room:
                self._waiting[0] -= len(pending)
                self._waiting[1] -= size
                self._room.notify_all()

    def _store(self, db: apsw.Connection, outgoing: Iterable[Outgoing | OutgoingJob]) -> list[tuple[Any, Any]]:
        """Insert messages and jobs; returns the futures to resolve after the commit, and with what."""
        messages, jobs = by_target(outgoing)
        stored: list[tuple[Any, Any]] = []
        if messages:
            self._store_messages(db, messages, stored)
        if jobs:
            self._store_jobs(db, jobs, stored)
        return stored

    def _store_messages(self, db: apsw.Connection, messages: list[Outgoing], stored: list[tuple[Any, Any]]) -> None:
        by_gid: dict[int, list[Outgoing]] = {}
        last, gids, count = None, [], 0
        for out in messages:
            topic, partition, key = out[0], out[1], out[2]
            if topic is not last:  # most come many of a topic
                last, gids = topic, self.parts.get(topic.name) or self._create(db, topic)
                count = len(gids)
            if partition is None:
                if key is None:
                    self._spin += 1
                    partition = self._spin % count
                else:
                    partition = crc32(key.encode() if type(key) is str else key) % count  # type: ignore[arg-type]
            elif not 0 <= partition < count:
                stored.append((out[6], UnknownTopic(f"topic {topic.name!r} has no partition {partition}; it has {count}")))
                continue
            rows = by_gid.get(gids[partition])
            if rows is None:
                by_gid[gids[partition]] = rows = []
            rows.append(out)
        for gid, rows in by_gid.items():
            self._append(db, gid, rows, stored)

    def _append(self, db: apsw.Connection, gid: int, rows: list[Outgoing], stored: list[tuple[Any, Any]]) -> None:
        """Append rows to one partition, as records of at most BATCH_COUNT rows and about BATCH_BYTES."""
        count, size, records = len(rows), 0, []
        while rows:
            batch = rows[:BATCH_COUNT]
            data = self._pack(batch)
            while len(data) > BATCH_BYTES and len(batch) > 1:
                batch = batch[: max(1, len(batch) * BATCH_BYTES // len(data))]
                data = self._pack(batch)
            rows = rows[len(batch) :]
            records.append((batch, data))
            size += len(data)
        grown = "UPDATE heads SET next = next + ?, bytes = bytes + ? WHERE gid = ? RETURNING next"
        self._moved[gid] = one(db, grown, (count, size, gid))[0]
        base = self._moved[gid] - count
        for batch, data in records:
            _, _, _, _, _, times, futures = zip(*batch, strict=True)
            db.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (gid << SHIFT | base, len(batch), float(max(times)), data))
            if any(futures):  # (a Future is always true)
                partition = self.parts[batch[0][0].name].index(gid)
                for offset, out in enumerate(batch, base):
                    if out[6] is not None:
                        stored.append((out[6], (out[0], partition, offset, out[2], out[3], out[4], out[5])))
            base += len(batch)

    def _pack(self, batch: list[Outgoing]) -> bytes:
        _, _, keys, values, headers, times, _ = zip(*batch, strict=True)
        return _encode((keys, values, headers if any(headers) else None, times))

    def _store_jobs(self, db: apsw.Connection, jobs: list[OutgoingJob], stored: list[tuple[Any, Any]]) -> None:
        now = self.clock.now()
        rows: list[tuple[Any, ...]] = []
        counts: dict[int, int] = {}
        for queue, payload, at, jid, future in jobs:
            qid = self.queue_ids.get(queue)
            if qid is None:
                qid = self._create_queue(db, queue)
            later = at is not None and at > now
            rows.append((qid, 2 if later else 0, at if later else None, jid, payload))
            counts[qid] = counts.get(qid, 0) + 1
            if future is not None:
                stored.append((future, jid))
        db.executemany("INSERT INTO jobs (queue, state, at, jid, payload) VALUES (?, ?, ?, ?, ?)", rows)
        for qid, n in counts.items():
            self._moved[qid] = one(db, "UPDATE heads SET next = next + ? WHERE gid = ? RETURNING next", (n, qid))[0]

    # Topics, queues, names.

    def declare(self, topics: Iterable[Any]) -> None:
        for topic in topics:
            self.retention[topic.name] = topic.retention
            known = self.parts.get(topic.name)
            if known is not None and topic.partitions is not None and len(known) != topic.partitions:
                raise DeclarationError(
                    f"topic {topic.name!r}: partitions={topic.partitions}, but {self.path} has it with {len(known)}; leave "
                    f"partitions out, or change it on purpose: barnabas topics apply"
                )
        missing = [t for t in topics if t.name not in self.parts]
        if missing:
            self.write(lambda db: [self._create(db, topic) for topic in missing])

    def _create(self, db: apsw.Connection, topic: Any) -> list[int]:
        """Create a topic's partitions where they are missing. Keeps what another process created meanwhile."""
        found = [r[0] for r in db.execute("SELECT gid FROM heads WHERE topic = ? AND partition >= 0 ORDER BY gid", (topic.name,))]
        for partition in range(0 if found else topic.partitions or self._partitions_of(topic)):
            db.execute("INSERT INTO heads (topic, partition) VALUES (?, ?)", (topic.name, partition))
            found.append(db.last_insert_rowid())
        self.parts = {**self.parts, topic.name: found}
        return found

    def _partitions_of(self, topic: Any) -> int:
        """A dead-letter or retry topic has as many partitions as its source."""
        parent = topic.parent
        return len(self.parts[parent.name]) if parent is not None and parent.name in self.parts else DEFAULT_PARTITIONS

    def _create_queue(self, db: apsw.Connection, queue: str) -> int:
        row = one(db, "SELECT gid FROM heads WHERE topic = ? AND partition = -1", (queue,))
        if row is None:
            db.execute("INSERT INTO heads (topic, partition) VALUES (?, -1)", (queue,))
            row = (db.last_insert_rowid(),)
        self.queue_ids = {**self.queue_ids, queue: row[0]}
        return int(row[0])

    def name_id(self, db: apsw.Connection, kind: str, name: str) -> int:
        """The number of a group or table, given out at its first use."""
        known = self._names.get((kind, name))
        if known is None:
            db.execute("INSERT OR IGNORE INTO names (kind, name) VALUES (?, ?)", (kind, name))
            known = one(db, "SELECT id FROM names WHERE kind = ? AND name = ?", (kind, name))[0]
            self._names = {**self._names, (kind, name): known}
        return known

    # The sink.

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        if self.closed:
            raise SendError(f"{self.path} was closed; the app opens it again at its next use")
        count = len(outgoing)
        size = sum([len(out[3] or b"") for out in outgoing if len(out) == 7])
        most, most_bytes = self._most
        with self._room:
            waiting = self._waiting
            if waiting[0] and (waiting[0] + count > most or waiting[1] + size > most_bytes):
                self._wait_for_room(count, size)
            waiting[0] += count
            waiting[1] += size
            self._pending += outgoing
            if self._committer is None:
                self._committer = threading.Thread(target=self._commit_pending, name="barnabas-commit", daemon=True)
                self._committer.start()
            self._room.notify_all()

    def _wait_for_room(self, count: int, size: int) -> None:
        """On an event-loop thread nobody may block: twice the limit is the end there."""
        most, most_bytes = self._most
        import asyncio

        timeout = self._send_timeout
        if asyncio._get_running_loop() is not None:
            if self._waiting[0] + count <= 2 * most and self._waiting[1] + size <= 2 * most_bytes:
                return
            timeout = 0.0
        fits = self._room.wait_for(
            lambda: not self._waiting[0] or (self._waiting[0] + count <= most and self._waiting[1] + size <= most_bytes), timeout
        )
        if not fits:
            why = f" (the last try failed: {self._failed})" if self._failed else ""
            raise BufferFull(
                f"the send buffer of {self.path} was full for {timeout} s: {self._waiting[0]} messages, {self._waiting[1]} "
                f"bytes wait{why}; send slower, or raise buffer_messages, buffer_bytes or send_timeout"
            )

    def _commit_pending(self) -> None:
        while True:
            with self._room:
                while not self._pending:
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
        with self._mutex:
            pending = self._take_pending()
            for index, out in enumerate(pending):
                try:
                    with self.turn.take():
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

    def flush(self, timeout: float) -> int:
        with self._room:
            if timeout:
                self._room.wait_for(lambda: not self._waiting[0], timeout)
            return self._waiting[0]

    # What consumers and workers use.

    def listen(self) -> None:
        """Watch the bell."""
        with self._mutex:
            if not self._listening:
                self._listening = True
                self._bell.watch(self._rung)

    def _rung(self) -> None:
        if self._watchers or any(source.waiting for source in self.sources):
            with suppress(BackendError):  # whoever fetches next meets the same error, and says so
                self.refresh()
            self._wake_own()

    def _wake_own(self) -> None:
        for source in self.sources:
            if source.waiting:
                source.look()
        for wake in self._watchers:
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

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener) -> Source:
        from barnabas.backends.sqlite_sources import SqliteQueues

        self._join()
        return SqliteQueues(self, queues, listener)

    def store(
        self, db: apsw.Connection, outputs: Iterable[Any], cells: dict[tuple[str, Any], bytes | None]
    ) -> list[tuple[Any, Any]]:
        """Inside a settlement's transaction: what its handlers sent and wrote."""
        stored = self._store(db, outputs)
        upsert, drop = [], []
        for (table, key), data in cells.items():
            tbl = self.name_id(db, "table", table)
            if data is None:
                drop.append((tbl, key))
            else:
                upsert.append((tbl, key, data))
        if upsert:
            db.executemany("INSERT INTO cells VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", upsert)
        if drop:
            db.executemany("DELETE FROM cells WHERE tbl = ? AND key = ?", drop)
        return stored

    def settled(self, stored: list[tuple[Any, Any]]) -> None:
        """After a settlement's commit: its sends are durable."""
        for future, value in stored:
            if future is not None:
                future.fail(value) if isinstance(value, Exception) else future.resolve(value)

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        self.listen()
        self._watchers = [*self._watchers, wake]

        def end() -> None:
            self._watchers = [w for w in self._watchers if w is not wake]

        return end

    def close(self) -> None:
        """Store what is still waiting, at most `send_timeout` seconds, say what could not be, and let go."""
        if self.closed:
            return
        left = self.flush(self._send_timeout)
        if left:
            log.error("%s: %d messages could not be stored before the end: %s", self.path, left, self._failed)
        self.closed = True
        self._end.set()
        with self._room:
            self._room.notify_all()
        if self._committer is not None and self._committer is not threading.current_thread():
            self._committer.join(5.0)
        self.neighbours.leave()
        with self._mutex, self._reading:
            self._bell.close()
            self._reader.close()
            self._db.close()
            self.turn.close()
        _open.discard(self)


def _of_one(error: BaseException) -> bool:
    """Whether an error is about something that was to be stored, not about the file."""
    if isinstance(error, BackendError):
        return isinstance(error.__cause__, apsw.TooBigError | apsw.ConstraintError | apsw.MismatchError)
    return not isinstance(error, MemoryError)


def _at_exit() -> None:
    for backend in list(_open):
        backend.close()


def _in_child() -> None:
    """After a fork: the parent's handles are its own; the child opens new ones at its next use."""
    for backend in list(_open):
        backend.closed = True
        backend.turn.close()  # its locks, too, go with the parent
        if backend.neighbours.life is not None:
            backend.neighbours.life.abandon()
        _inherited.append((backend, backend._db, backend._reader))
    _open.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
