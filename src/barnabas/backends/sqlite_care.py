"""Care for a SQLite file: check it, copy it while it is in use, give its free space back; drop what retention no longer covers,
in steps so small that nobody waits for them."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import apsw

from barnabas.backends.host import Turn, look
from barnabas.backends.shares import NOTES, over
from barnabas.backends.sqlite_file import SCHEMA, living
from barnabas.backends.sqlite_read import SHIFT, connect, explained, one
from barnabas.errors import BackendError, Refused

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

PAGES = 2_000  # copied between two looks at how far a backup has come
SHOWN = 3  # of many alike
WAL_LARGE = 64 * 1024 * 1024
SPARE = 16 * 1024 * 1024  # free bytes that are worth a word
STEP, STEP_BYTES = 50, 4 << 20  # dropped in one transaction: a few milliseconds
EVERY = 10.0  # seconds between two looks

# What must never be there, and how it is found.
ODD = {
    "positions beyond the end of their partition": "SELECT n.name || ' at ' || h.topic || '[' || h.partition || ']' FROM "
    "positions p JOIN heads h ON h.gid = p.gid JOIN names n ON n.id = p.grp WHERE p.offset > h.next OR h.first > h.next",
    "positions of partitions or groups that do not exist": "SELECT 'position ' || id FROM positions "
    "WHERE gid NOT IN (SELECT gid FROM heads) OR grp NOT IN (SELECT id FROM names)",
    "partitions owned by nobody": "SELECT 'position ' || id FROM positions WHERE member <> 0 AND member NOT IN "
    "(SELECT id FROM members)",
    "members of processes that do not exist": "SELECT 'member ' || id FROM members "
    "WHERE process NOT IN (SELECT id FROM processes)",
    "jobs owned by nobody": "SELECT jid FROM jobs WHERE (owner IS NULL) = (state = 1) OR owner <> 0 AND owner NOT IN "
    "(SELECT id FROM processes)",
    "jobs of queues that do not exist": "SELECT jid FROM jobs WHERE queue NOT IN (SELECT gid FROM heads WHERE partition = -1)",
    "jobs in a state that is none": "SELECT jid FROM jobs WHERE state NOT BETWEEN 0 AND 4 "
    "OR (state IN (2, 3)) <> (at IS NOT NULL) OR (state = 4) <> (died IS NOT NULL)",
    "records of partitions that do not exist": f"SELECT 'record ' || id FROM records WHERE id >> {SHIFT} NOT IN "
    "(SELECT gid FROM heads WHERE partition >= 0)",
}
# Records must be what their partition promises: from the first offset to the last, without gaps.
KEPT = f"""
SELECT h.topic || '[' || h.partition || ']', h.next - h.first, total(r.count), h.bytes, total(length(r.data)),
    coalesce(min(r.id) = (h.gid << {SHIFT} | h.first) AND max(r.id + r.count) = (h.gid << {SHIFT} | h.next), h.next = h.first)
FROM heads h LEFT JOIN records r ON r.id >= h.gid << {SHIFT} AND r.id < (h.gid + 1) << {SHIFT}
WHERE h.partition >= 0 GROUP BY h.gid
"""


class Check(NamedTuple):
    """The state of a file; sizes in bytes. problems: what must be mended; notes: what is good to know."""

    file: str
    ok: bool
    sqlite: str
    schema: int
    size: int
    free: int
    wal: int
    messages: int
    jobs: int
    processes: int
    problems: list[str]
    notes: list[str]


@contextmanager
def _snapshot(path: str) -> Iterator[apsw.Connection]:
    """A read-only connection that sees one state of the file, whatever others write meanwhile."""
    if not os.path.exists(path):
        raise BackendError(f"{path}: there is no such file (yet); look at the settings events and jobs")
    with explained(path), closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)) as db:
        db.set_busy_timeout(10_000)
        db.execute("BEGIN; SELECT count(*) FROM sqlite_schema").fetchall()
        yield db


def check(path: str) -> Check:
    """Look through the whole file; what cannot be read is a problem too. Workers may go on meanwhile."""
    found: dict[str, int] = dict.fromkeys(("schema", "free", "messages", "jobs", "processes"), 0)
    problems: list[str] = []
    notes: list[str] = []
    size, wal = (os.path.getsize(name) if os.path.exists(name) else 0 for name in (path, f"{path}-wal"))
    try:
        with _snapshot(path) as db:
            found["schema"] = schema = db.pragma("user_version")
            found["free"] = db.pragma("freelist_count") * db.pragma("page_size")
            problems += [f"integrity: {row[0]}" for row in db.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
            if schema == SCHEMA:
                problems += _oddities(db)
                found["messages"] = one(db, "SELECT coalesce(sum(next - first), 0) FROM heads WHERE partition >= 0")[0]
                found["jobs"] = one(db, "SELECT count(*) FROM jobs")[0]
                found["processes"] = len(living(db, path))
                notes += _dead(db, path)
            elif 0 < schema < SCHEMA:
                notes.append(f"it has schema {schema}; the next start brings it to {SCHEMA}")
            else:
                problems.append(f"it has schema {schema}, this Barnabas knows {SCHEMA}" if schema else "Barnabas has not made it")
    except BackendError as error:
        problems.append(str(error))
    if found["free"] > max(SPARE, size // 4):
        notes.append(f"{found['free'] >> 20:,} MiB of it are free: barnabas db compact gives them back")
    if wal > WAL_LARGE:
        notes.append(f"its -wal file has {wal >> 20:,} MiB: a reader (an outside tool, a backup) holds it, or did a while ago")
    return Check(path, not problems, apsw.sqlitelibversion(), size=size, wal=wal, **found, problems=problems, notes=notes)


def _oddities(db: apsw.Connection) -> list[str]:
    found = []
    for what, sql in ODD.items():
        rows = [row[0] for row in db.execute(sql)]
        if rows:
            found.append(f"{len(rows):,} {what}: {', '.join(rows[:SHOWN])}{', ...' if len(rows) > SHOWN else ''}")
    for where, promised, stored, size, counted, whole in db.execute(KEPT):
        if promised != stored or not whole:
            found.append(f"{where} has {stored:,.0f} messages in its records, but {promised:,} by its first and last offset")
        elif size != counted:
            found.append(f"{where} has {counted:,.0f} bytes, but counts {size:,}")
    return found


def _dead(db: apsw.Connection, path: str) -> list[str]:
    dead = [number for (number,) in db.execute("SELECT id FROM processes") if look(path, number)[0]]
    owned = one(db, f"SELECT count(*) FROM jobs WHERE owner IN ({', '.join(map(str, dead))})")[0]
    return [f"{len(dead)} processes have died; the next worker takes over what they had ({owned:,} jobs)"] if dead else []


def backup(path: str, to: str, tell: Callable[[int, int], Any] = lambda done, total: None) -> int:
    """Copy the file as it is at this instant to a new one, while others work on, and check the copy; returns its bytes.

    tell(done, total) hears how many bytes are copied. Refused where `to` exists.
    """
    part = f"{to}.part"
    if os.path.exists(to):
        raise Refused(f"{to} exists, and nothing is overwritten; name another file, or remove it")
    with _snapshot(path) as source:
        size: int = source.pragma("page_size")
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 | os.stat(path).st_mode & 0o777))
        except FileExistsError:
            raise Refused(f"{part} exists: a backup is being made, or was broken off; if none is, remove it") from None
        except OSError as error:
            raise BackendError(f"{part} cannot be made: {error.strerror}; name a file in a folder that can be written") from error
        try:
            # Nobody else knows the copy: it needs no locks, which a network file system may not have.
            with explained(part), closing(apsw.Connection(part, vfs="unix-none")) as copy:
                copy.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
                with copy.backup("main", source, "main") as pages:
                    while not pages.done:
                        pages.step(PAGES)
                        tell((pages.page_count - pages.remaining) * size, pages.page_count * size)
                copy.execute("PRAGMA journal_mode = DELETE").fetchall()  # one file that stands alone
                if (found := one(copy, "PRAGMA integrity_check(1)")[0]) != "ok":
                    raise BackendError(f"the copy of {path} is damaged ({found}), so most likely the file is: barnabas db check")
            os.rename(part, to)
        finally:
            for name in (part, f"{part}-journal"):
                with suppress(OSError):
                    os.unlink(name)
    return os.path.getsize(to)


def compact(path: str) -> tuple[int, int]:
    """Give free space back to the system; the file's bytes before and after. Refused while workers live, senders wait.

    Needs as much room again as the file will have.
    """
    if not os.path.exists(path):
        raise BackendError(f"{path}: there is no such file (yet); look at the settings events and jobs")
    with closing(Turn(path)) as turn, explained(path), turn.take(), closing(connect(path)) as db:
        if db.pragma("user_version") != SCHEMA:
            raise Refused(f"{path} has another schema than {SCHEMA}: barnabas db check")
        if users := living(db, path):
            raise Refused(f"{path} is in use by {', '.join(users)}; stop them first: barnabas stop NAME")
        before = os.path.getsize(path)
        db.execute("VACUUM").fetchall()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return before, os.path.getsize(path)


def expire(home: "SqliteBackend", now: float) -> None:
    """Drop records that their topic's retention no longer covers. `now` in epoch seconds.

    Nothing goes that the slowest group has not settled, unless the topic's retention says `force`.
    """
    for name, keep in list(home.retention.items()):
        for gid in home.parts.get(name, ()):
            while _expired(home, gid, keep, now):
                home.write(partial(_step, home=home, gid=gid, keep=keep, now=now))
    _forget(home, now)


def _forget(home: "SqliteBackend", now: float) -> None:
    """Drop notes whose time is over: a page at each look, the whole table in turn."""
    tbl: int = home._find("table", NOTES) or 0
    rows = home.query("SELECT key, value FROM cells WHERE tbl = ? AND key > ? ORDER BY key LIMIT 5000", (tbl, home.swept))
    home.swept = rows[-1][0] if len(rows) == 5000 else ""
    past: list[tuple[str, bytes]] = [(key, data) for key, data in rows if over(data, now)]
    for start in range(0, len(past), 500):
        drop = [(tbl, *row) for row in past[start : start + 500]]  # its value, too: it may have been written anew
        home.write(partial(_drop, notes=drop))
    past_slots = "SELECT id FROM slots WHERE until < ? LIMIT 1000"
    while home.query(past_slots, (now,)):
        home.write(lambda db: db.execute(f"DELETE FROM slots WHERE id IN ({past_slots})", (now,)).fetchall())


def _drop(db: apsw.Connection, notes: list[tuple[int, str, bytes]]) -> None:
    db.executemany("DELETE FROM cells WHERE tbl = ? AND key = ? AND value = ?", notes)


def _expired(home: "SqliteBackend", gid: int, keep: object, now: float) -> list[tuple[int, int, int]]:
    """The records that may go, oldest first: (id, count, bytes)."""
    age, size, force = keep.age, keep.size, keep.force  # type: ignore[attr-defined]
    first, next_, held = home.query("SELECT first, next, bytes FROM heads WHERE gid = ?", (gid,))[0]
    slowest = home.query("SELECT coalesce(min(offset), ?) FROM positions WHERE gid = ?", (next_, gid))[0][0]
    floor = next_ if force else slowest
    low, most = gid << SHIFT, held - STEP_BYTES
    found = []
    for id_, count, length, time in home.query(
        "SELECT id, count, length(data), time FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (low | first, low | floor, STEP),
    ):
        old = age is not None and time < now - age
        much = size is not None and held > size
        if not (old or much) or held < most or (id_ & ((1 << SHIFT) - 1)) + count > floor:
            break
        held -= length
        found.append((id_, count, length))
    return found


def _step(db: apsw.Connection, home: "SqliteBackend", gid: int, keep: object, now: float) -> None:
    found = _expired(home, gid, keep, now)  # again: a reader sees what was committed, and we have the turn
    if found:
        last, count, _ = found[-1]
        db.execute("DELETE FROM records WHERE id BETWEEN ? AND ?", (found[0][0], last))
        kept = ((last & ((1 << SHIFT) - 1)) + count, sum(length for _, _, length in found), gid)
        db.execute("UPDATE heads SET first = ?, bytes = bytes - ? WHERE gid = ?", kept)
