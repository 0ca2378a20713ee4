"""The reading half of a SQLite file: it never waits for writers and never writes."""

import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import apsw
import msgspec

from barnabas.backends.shares import told
from barnabas.errors import BackendError
from barnabas.message import Row
from barnabas.ports import TopicState

if TYPE_CHECKING:
    from barnabas.backends.sqlite_file import OpenFile

SHIFT = 40  # id of a record = partition's number << SHIFT | offset
_decode = msgspec.msgpack.Decoder(
    tuple[list[Any], list[bytes | None], list[list[tuple[str, bytes]] | None] | None, list[float]]
).decode


_SYSTEM = {errno.ENOSPC: "FullError", errno.EDQUOT: "FullError", errno.ENOENT: "CantOpenError"}
_SYSTEM |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "ReadOnlyError")


def connect(path: str, refuse: Callable[[apsw.Connection], None] = lambda db: None) -> apsw.Connection:
    """A connection with the settings that every one of ours has. `refuse` may raise before the file is changed."""
    with explained(path):
        db = apsw.Connection(path)
        if db.readonly("main"):  # SQLite's way out where it may not write; nothing would be well again once it may
            raise apsw.ReadOnlyError("attempt to write a readonly database")
        db.set_busy_timeout(10_000)  # against outside tools only: our own writers take turns
        refuse(db)
        [(mode,)] = db.execute("PRAGMA journal_mode=WAL").fetchall()  # (a statement not read to its end stops the next one)
        if mode != "wal":
            raise BackendError(f"{path}: its file system has no shared memory, which SQLite's WAL needs; put it on a local disk")
        db.execute("PRAGMA synchronous=FULL").fetchall()
        return db


def explain(path: str, error: apsw.Error | OSError) -> BackendError:
    """The driver's or the system's error in our words: what happened, and what to do."""
    ways = {
        "FullError": "the disk is full; make room, and work goes on by itself",
        "ReadOnlyError": "this user may not write the file or its folder; change their owner or mode",
        "CantOpenError": "it cannot be opened; see that its folder exists and this user may write there",
        "NotADBError": "it is not a SQLite file; use another URL",
        "CorruptError": "it is damaged; stop all processes and restore a backup",
        "BusyError": "another program holds it locked; end that program's transaction",
        "IOError": "the system could not read or write it; see if the disk is full, a limit reached, and the system's log",
    }
    name = type(error).__name__
    if isinstance(error, OSError):
        path = error.filename or path
        name = _SYSTEM.get(error.errno or 0, name)
    return BackendError(f"{path}: {ways.get(name, 'SQLite refused')} ({name}: {error})")


@contextmanager
def explained(path: str, kind: type[apsw.Error | OSError] = apsw.Error) -> Iterator[None]:
    """Errors of this kind in it are raised in our words."""
    try:
        yield
    except kind as error:
        raise explain(path, error) from error


def one(db: apsw.Connection, sql: str, args: Sequence[Any] = ()) -> Any:
    """The first row of a query, None if there is none."""
    return db.execute(sql, args).fetchone()


class SqliteReader:
    """What is stored in one file."""

    clock: Any
    check: Callable[[], None]  # that the file at our path still is the one we have open

    def __init__(self, file: "OpenFile") -> None:
        self.file, self.path = file, file.path
        self._reading = threading.Lock()
        self.heads: dict[int, int] = {}
        self.parts: dict[str, list[int]] = {}  # a topic's partitions by number
        self.queue_ids: dict[str, int] = {}
        self._known: frozenset[int] = frozenset()

    def query(self, sql: str, args: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Rows of a read, from the reading connection."""
        self.check()
        return self._query(sql, args)

    def _query(self, sql: str, args: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        with self._read() as db:
            return db.execute(sql, args).fetchall()

    @contextmanager
    def _read(self) -> Iterator[apsw.Connection]:
        """The reading connection, alone; its errors in our words."""
        try:
            with self._reading:
                yield self.file.reader
        except apsw.Error as error:
            raise explain(self.path, error) from error

    def refresh(self) -> None:
        """Read the heads."""
        heads: dict[int, int] = dict(self._query("SELECT gid, next FROM heads"))
        self.heads.update(heads)
        if not heads.keys() <= self._known:
            self._learn()

    def _learn(self) -> None:
        rows = self._query("SELECT gid, topic, partition FROM heads ORDER BY gid")
        self._known = frozenset(row[0] for row in rows)
        parts: dict[str, list[int]] = {}
        for gid, topic, partition in rows:
            if partition == -1:
                self.queue_ids = {**self.queue_ids, topic: gid}
            elif partition >= 0:
                parts.setdefault(topic, []).append(gid)
        self.parts = parts

    def unpack(self, record: int, data: bytes) -> list[Row]:
        """The rows of a stored record. Raises BackendError if it is none."""
        gid, base = record >> SHIFT, record & ((1 << SHIFT) - 1)
        try:
            keys, values, headers, times = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
            places = [f"{name}[{gids.index(gid)}]" for name, gids in self.parts.items() if gid in gids]
            at, how = places[0] if places else gid, "or go on behind it: barnabas reset GROUP --partition N --to OFFSET"
            raise BackendError(f"{self.path}: the record at {at}@{base} is damaged ({error}); restore a backup, {how}") from error
        return list(zip(range(base, base + len(keys)), keys, values, headers or repeat(None), times, strict=False))

    def _find(self, kind: str, name: str) -> int | None:
        rows = self.query("SELECT id FROM names WHERE kind = ? AND name = ?", (kind, name))
        return rows[0][0] if rows else None

    def cell(self, table: str, key: Any) -> bytes | None:
        tbl = self._find("table", table)
        rows = self.query("SELECT value FROM cells WHERE tbl = ? AND key = ?", (tbl, key)) if tbl is not None else []
        return rows[0][0] if rows else None

    def cells(self, table: str) -> Iterable[tuple[Any, bytes]]:
        return self.query("SELECT key, value FROM cells WHERE tbl = ? ORDER BY key", (self._find("table", table),))

    def open_work(self, groups: Mapping[str, Sequence[str]], queues: Sequence[str]) -> int:
        count = 0
        self.check()
        with self._read() as db, db:  # one transaction, one state of the file
            for group, topics in groups.items():
                for topic in topics:
                    for next_, first, offset, open_ in db.execute(
                        "SELECT h.next, h.first, p.offset, p.open FROM heads h LEFT JOIN positions p ON p.gid = h.gid "
                        "AND p.grp = (SELECT id FROM names WHERE kind = 'group' AND name = ?) "
                        "WHERE h.topic = ? AND h.partition >= 0",
                        (group, topic),
                    ):
                        count += max(0, next_ - max(first, offset or 0)) - sum(b - a for a, b in told(open_)[0])
            for queue in queues:
                (gid,) = one(db, "SELECT max(gid) FROM heads WHERE topic = ? AND partition = -1", (queue,))
                for where, args in (("state = 0", ()), ("state = 1 AND owner IS NOT NULL", ()), ("at <= ?", (self.clock.now(),))):
                    found = one(db, f"SELECT 1 FROM jobs WHERE queue = ? AND {where} LIMIT 1", (gid, *args))
                    count += found is not None
        return count

    def topics(self) -> list[TopicState]:
        found: dict[str, list[tuple[int, int, int]]] = {}
        for topic, first, next_, size in self.query(
            "SELECT topic, first, next, bytes FROM heads WHERE partition >= 0 ORDER BY topic, partition"
        ):
            found.setdefault(topic, []).append((first, next_, size))
        return [TopicState(name, partitions) for name, partitions in found.items()]

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Row]:
        gid = self.parts[topic][partition]
        rows, at = list[Row](), offset
        while len(rows) < limit and (found := self.records(gid, at, limit, 1 << 22)):
            for record, data in found:
                rows += [row for row in self.unpack(record, data) if row[0] >= offset]
            at = rows[-1][0] + 1 if rows else at + 1
        return rows[:limit]

    def records(self, gid: int, offset: int, rows: int, size: int) -> list[tuple[int, bytes]]:
        """Stored records of one partition, from the one that holds `offset` on: about `rows` messages, `size` bytes."""
        low = gid << SHIFT
        found = []
        with self._read() as db:
            for id_, count, data in db.execute(
                "SELECT id, count, data FROM records WHERE id >= coalesce((SELECT max(id) FROM records "
                "WHERE id BETWEEN ? AND ?), ?) AND id < ? AND id + count > ? ORDER BY id",
                (low, low | offset, low, low + (1 << SHIFT), low | offset),
            ):
                found.append((id_, data))
                rows, size = rows - count, size - len(data)
                if rows <= 0 or size <= 0:
                    break
        return found
