"""Retention: what is old or too much goes in the background, in steps so small that nobody waits for them."""

from functools import partial
from typing import TYPE_CHECKING

import apsw

from barnabas.backends.shares import NOTES, over
from barnabas.backends.sqlite_read import SHIFT

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

STEP = 50  # records in one transaction: a few milliseconds
EVERY = 10.0  # seconds between two looks


def expire(home: "SqliteBackend", now: float) -> int:
    """Drop records that their topic's retention no longer covers; returns how many. `now` in epoch seconds.

    Nothing goes that the slowest group has not settled, unless the topic's retention says `force`.
    """
    dropped = 0
    for name, keep in list(home.retention.items()):
        for gid in home.parts.get(name, ()):
            while _expired(home, gid, keep, now):
                count = home.write(partial(_step, home=home, gid=gid, keep=keep, now=now))
                dropped += count
                if count < STEP:
                    break
    _forget(home, now)
    return dropped


def _forget(home: "SqliteBackend", now: float) -> None:
    """Drop notes whose time is over: a page at each look, the whole table in turn."""
    tbl: int = home._find("table", NOTES) or 0
    rows = home.query("SELECT key, value FROM cells WHERE tbl = ? AND key > ? ORDER BY key LIMIT 5000", (tbl, home.swept))
    home.swept = rows[-1][0] if len(rows) == 5000 else ""
    past: list[tuple[str, bytes]] = [(key, data) for key, data in rows if over(data, now)]
    for start in range(0, len(past), 500):
        drop = [(tbl, *row) for row in past[start : start + 500]]  # its value, too: it may have been written anew
        home.write(partial(_drop, notes=drop))


def _drop(db: apsw.Connection, notes: list[tuple[int, str, bytes]]) -> None:
    db.executemany("DELETE FROM cells WHERE tbl = ? AND key = ? AND value = ?", notes)


def _expired(home: "SqliteBackend", gid: int, keep: object, now: float) -> list[tuple[int, int, int]]:
    """The records that may go, oldest first: (id, count, bytes)."""
    age, size, force = keep.age, keep.size, keep.force  # type: ignore[attr-defined]
    first, next_, held = home.query("SELECT first, next, bytes FROM heads WHERE gid = ?", (gid,))[0]
    slowest = home.query("SELECT coalesce(min(offset), ?) FROM positions WHERE gid = ?", (next_, gid))[0][0]
    floor = next_ if force else slowest
    low = gid << SHIFT
    found = []
    for id_, count, length, time in home.query(
        "SELECT id, count, length(data), time FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (low | first, low | floor, STEP),
    ):
        old = age is not None and time < now - age
        much = size is not None and held > size
        if not (old or much) or (id_ & ((1 << SHIFT) - 1)) + count > floor:
            break
        held -= length
        found.append((id_, count, length))
    return found


def _step(db: apsw.Connection, home: "SqliteBackend", gid: int, keep: object, now: float) -> int:
    found = _expired(home, gid, keep, now)  # again: a reader sees what was committed, and we have the turn
    if found:
        last, count, _ = found[-1]
        db.execute("DELETE FROM records WHERE id BETWEEN ? AND ?", (found[0][0], last))
        db.execute(
            "UPDATE heads SET first = ?, bytes = bytes - ? WHERE gid = ?",
            ((last & ((1 << SHIFT) - 1)) + count, sum(length for _, _, length in found), gid),
        )
    return len(found)
