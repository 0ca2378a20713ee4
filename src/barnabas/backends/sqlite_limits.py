"""The slots of limits in a SQLite file: who has them, who waits for them. Each function is called inside a write."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import apsw

from barnabas.backends.shares import CONTROL
from barnabas.backends.sqlite_read import one
from barnabas.jobs.limit import WANT, Need

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

AHEAD = "FROM jobs WHERE run = ? AND state = 2 AND id < ?"  # who waits in front of a job
MANY = 1 << 40  # slots: their number does not matter
COUNTED = 1000  # of those ahead so many are counted: of a hundred thousand each look would take long
KEPT = 2.0  # seconds that a start is kept beyond its window: the next one's time may count from it


Place = tuple[str, int]  # where slots are: their key, how many there are


def full(db: apsw.Connection, need: Need, now: float, id_: int | None) -> float | None:
    """None if there is a slot for this job (None: by hand), else when it may look again."""
    ahead = wants = 0
    before = None
    if id_ is not None:
        ahead = one(db, f"SELECT count(*) FROM (SELECT 1 {AHEAD} LIMIT ?)", (need.key, id_, max(need.most, COUNTED)))[0]
        wants = one(db, "SELECT count(*) FROM slots WHERE key = ? AND at > ?", (f"{need.key}:wants", now))[0]
    left = need.most - ahead - wants
    oldest = _latest(db, need, need.most)
    if left > 0:
        nth = oldest if left == need.most else _latest(db, need, left)
        if nth is None or (need.span and nth + need.span <= now):
            return None
    if ahead:
        before = one(db, f"SELECT at {AHEAD} ORDER BY id DESC LIMIT 1", (need.key, id_))[0]
    return need.turn(now, oldest, ahead, before)


def _latest(db: apsw.Connection, need: Need, nth: int) -> float | None:
    """Since when the nth last slot is taken; None if so many are not."""
    row = one(db, "SELECT at FROM slots WHERE key = ? ORDER BY at DESC LIMIT 1 OFFSET ?", (need.key, nth - 1))
    return None if row is None else float(row[0])


def take(db: apsw.Connection, needs: Iterable[Need], now: float, job: int | str, jid: str, process: int) -> None:
    """There is a slot of each: they are this one's."""
    for need in needs:
        at = need.nominal(now, _latest(db, need, need.most)) if need.span else now
        owner, until = (None, at + need.span + KEPT) if need.span else (process, None)
        row = (need.key, at, until, job, jid, owner)
        db.execute("INSERT INTO slots (key, at, until, job, jid, owner) VALUES (?, ?, ?, ?, ?, ?)", row)


def ended(home: "SqliteBackend", db: apsw.Connection, runs: Iterable[tuple[int | str, Sequence[Need], bool]]) -> bool:
    """Runs (of this job, with these slots) have ended, or, not begun, give their slots back: whether somebody may begin now."""
    freed = Counter[Place]()
    for job, needs, begun in runs:
        for need in needs:
            if not need.span:
                db.execute("DELETE FROM slots WHERE key = ? AND job = ?", (need.key, job))
                freed[need.key, need.most] += 1
            elif not begun:
                last = "SELECT id FROM slots WHERE key = :key AND job = :job ORDER BY at DESC LIMIT 1"
                db.execute(f"DELETE FROM slots WHERE id = ({last})", {"key": need.key, "job": job})
    return wake(home, db, freed)


def wake(home: "SqliteBackend", db: apsw.Connection, freed: Mapping[Place, int]) -> bool:
    """So many slots have become free, or were left by who could not use them: those who wait first may begin. Who is woken and
    has to wait for something else is to wake the next."""
    taken = "SELECT count(*) FROM slots WHERE key = :key OR (key = :key || ':wants' AND at > :now)"
    first = f"SELECT id FROM jobs WHERE run = :key AND state = 2 ORDER BY id LIMIT max(0, min(:count, :most - ({taken})))"
    sql = f"UPDATE jobs SET state = 0, at = NULL WHERE id IN ({first}) RETURNING queue"
    queues, now, table = set[Any](), home.clock.now(), home._find("table", CONTROL)
    ask = "SELECT 1 FROM cells WHERE tbl = ? AND key = ?"
    shut = [id_ for name, id_ in home.queue_ids.items() if freed and one(db, ask, (table, f"pause queue:{name}"))]
    for (key, most), count in freed.items():
        for gid in shut:  # others need not wait for those
            db.execute("UPDATE jobs SET state = 0, at = NULL WHERE run = ? AND state = 2 AND queue = ?", (key, gid))
        queues.update(gid for (gid,) in db.execute(sql, {"key": key, "most": most, "count": count, "now": now}).fetchall())
    for gid in queues:
        home.stir(db, "gid = ?", (gid,))
    return bool(queues)


def bury(home: "SqliteBackend", db: apsw.Connection, process: int) -> None:
    """A process owns no slots, and wants none, any more. Jobs it had are back in their queues, maybe behind those who wait."""
    rows: list[Any] = db.execute("DELETE FROM slots WHERE owner = ? RETURNING key", (process,)).fetchall()
    wake(home, db, Counter((key.removesuffix(":wants"), MANY) for (key,) in rows))


def hold(home: "SqliteBackend", db: apsw.Connection, token: str, need: Need) -> float:
    """Take a slot by hand: 0 if there was one, else seconds after which to ask again; until then it is wanted."""
    now, wants = home.clock.now(), f"{need.key}:wants"
    db.execute("DELETE FROM slots WHERE key = ? AND job = ?", (wants, token))
    at = full(db, need, now, None)
    if at is None:
        take(db, [need], now, token, "", home.neighbours.number)
        return 0.0
    row = (wants, now + WANT, now + WANT, token, None if need.span else home.neighbours.number)
    db.execute("INSERT INTO slots (key, at, until, job, jid, owner) VALUES (?, ?, ?, ?, '', ?)", row)
    return float(max(0.01, at - now))


def let_go(home: "SqliteBackend", db: apsw.Connection, token: str, need: Need, begun: bool) -> None:
    """Give a slot that was taken by hand back, or the wish for one."""
    db.execute("DELETE FROM slots WHERE key = ? AND job = ?", (f"{need.key}:wants", token))
    ended(home, db, [(token, [need], begun)])
