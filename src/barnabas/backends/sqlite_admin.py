"""What operators see and do of a SQLite file: the doors of the port that no message passes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import apsw
import msgspec

from barnabas.backends.host import look
from barnabas.backends.shares import CONTROL, HOST, STATES, by_partition, check_offset, finished, told
from barnabas.backends.sqlite_read import one
from barnabas.backends.sqlite_store import SqliteStore
from barnabas.errors import Refused, UnknownTopic
from barnabas.jobs.beyond import ALL, BATCHES
from barnabas.jobs.payload import enqueued_at, recalled, requeued
from barnabas.jobs.unique import held
from barnabas.message import Outgoing
from barnabas.ports import Position, Process, QueueState, Result, StoredJob
from barnabas.verdict import Again

PAGE = 200  # jobs read at once
MOVED = 1000  # jobs moved in one transaction
REPORTS = 2.0  # seconds between two reports that are stored
# How the jobs of a state are found (each has its index), and in which order they run.
_FOUND = {
    "work": ("j.owner IS NOT NULL", "id"), "ready": ("j.state = 0", "rank"),
    "retry": ("j.at IS NOT NULL AND j.state = 3", "at"), "scheduled": ("j.at IS NOT NULL AND j.state = 2", "at"),
    "dead": ("j.died IS NOT NULL", "died"),
}  # fmt: skip
# Those in work are never touched, and what is there already does not move.
_MOVES = {
    "ready": "UPDATE jobs SET lock = iif(state = 4, :lock, lock), state = 0, at = NULL, died = NULL, note = NULL, crashes = 0, "
    "payload = :payload WHERE state > 1 AND NOT (state = 4 AND EXISTS (SELECT 1 FROM jobs h WHERE h.lock = :lock))",
    "dead": "UPDATE jobs SET state = 4, lock = NULL, at = NULL, died = :now, note = 'buried by an operator' "
    "WHERE state NOT IN (1, 4)",
    None: "DELETE FROM jobs WHERE state <> 1",
}
_REQUEUED = "UPDATE jobs SET queue = :queue, payload = :payload WHERE state <> 1 AND queue <> :queue"
_PLACED = (
    "INSERT INTO positions (grp, gid, offset, open) VALUES (?, ?, ?, ?) "
    "ON CONFLICT DO UPDATE SET offset = excluded.offset, open = excluded.open"
)
_PROCESS = "r.id, r.pid, r.info"
_MEMBERS = (
    f"SELECT DISTINCT {_PROCESS} FROM members m JOIN names n ON n.id = m.grp AND n.kind = 'group' "
    "JOIN processes r ON r.id = m.process WHERE n.name = ? ORDER BY 1"
)


def name_of(number: Any, pid: Any, info: Any) -> str | None:
    """A process's name, from the columns of _PROCESS; None for none."""
    return None if number is None else f"{json.loads(info or '{}').get('host', HOST)}:{pid}:{number}"


class SqliteAdmin(SqliteStore):
    """The operators' half of a SqliteBackend."""

    ranks = True
    neighbours: Any
    write: Callable[[Callable[[apsw.Connection], Any]], Any]
    stir: Callable[..., None]
    settled: Callable[[list[Any]], None]
    _reported: tuple[float, Mapping[str, Any]] = (-REPORTS, {})

    @property
    def name(self) -> str:
        """Of this process among those that own things in the file; "" before it is one."""
        number: int = self.neighbours.number
        return f"{HOST}:{os.getpid()}:{number}" if number else ""

    def positions(self, groups: str = "") -> list[Position]:
        found, living = [], {process.name for process in self.processes()}  # nobody may have noticed yet who is dead
        for group, topic, number, first, end, offset, open_, *process in self.query(
            f"SELECT n.name, h.topic, h.partition, h.first, h.next, p.offset, p.open, {_PROCESS} "
            "FROM positions p JOIN names n ON n.id = p.grp JOIN heads h ON h.gid = p.gid "
            "LEFT JOIN members m ON m.id = p.member LEFT JOIN processes r ON r.id = m.process "
            "WHERE substr(n.name, 1, length(:begins)) = :begins ORDER BY 1, 2, 3", {"begins": groups},
        ):
            owner = name_of(*process)
            found.append(Position(group, topic, number, first, end, offset, *told(open_), owner if owner in living else None))
        return found

    def place(self, positions: Iterable[Position], clear: Sequence[str] = ()) -> None:
        wanted = list(positions)
        self.neighbours.look_around()  # the dead are no members
        self.write(lambda db: self._place(db, wanted, clear))

    def _place(self, db: apsw.Connection, positions: list[Position], clear: Sequence[str]) -> None:
        for group in {at.group for at in positions}:
            rows = db.execute(_MEMBERS, (group,)).fetchall()
            if rows:
                raise Refused(f"group {group!r} has members: {', '.join(str(name_of(*row)) for row in rows)}; stop them first")
        for at in positions:
            where = (self.name_id(db, "group", at.group), self._head(db, at.topic, at.partition)[0])
            check_offset(at, *one(db, "SELECT first, next FROM heads WHERE gid = ?", where[1:]))
            if at.offset is None:
                db.execute("DELETE FROM positions WHERE grp = ? AND gid = ?", where)
                continue
            db.execute(_PLACED, (*where, at.offset, json.dumps({"done": at.done}) if at.done else None))
        for table in clear:
            db.execute("DELETE FROM cells WHERE tbl = (SELECT id FROM names WHERE kind = 'table' AND name = ?)", (table,))

    def finish(self, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]) -> int:
        count, stored = self.write(lambda db: self._finish(db, group, letters))
        self.settled(stored)
        return int(count)

    def _finish(
        self, db: apsw.Connection, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]
    ) -> tuple[int, list[Any]]:
        count, outputs, grp = 0, [], self.name_id(db, "group", group)
        for at, some in by_partition(letters).items():
            gid, first = self._head(db, *at)
            stood, open_ = one(db, "SELECT offset, open FROM positions WHERE grp = ? AND gid = ?", (grp, gid)) or (first, None)
            fresh, offset, done = finished(max(stood, first), told(open_)[0], some)
            db.execute(_PLACED, (grp, gid, offset, json.dumps({"done": done}) if done else None))
            outputs += [out for out in map(some.get, fresh) if out is not None]
            count += len(fresh)
        return count, self.store(db, outputs, {})

    def _head(self, db: apsw.Connection, topic: str, partition: int) -> tuple[int, int]:
        """A partition's number and first offset."""
        found = one(db, "SELECT gid, first FROM heads WHERE topic = ? AND partition = ? AND partition >= 0", (topic, partition))
        if found is None:
            raise UnknownTopic(f"there is no partition {partition} of a topic {topic!r} in {self.path}")
        return found  # type: ignore[no-any-return]

    def queue_states(self) -> list[QueueState]:
        rows = self.query(
            "SELECT queue, 0, count(*) FROM jobs WHERE state = 0 GROUP BY 1 UNION ALL "
            "SELECT queue, 1, count(*) FROM jobs WHERE owner IS NOT NULL GROUP BY 1 UNION ALL "
            "SELECT queue, state, count(*) FROM jobs WHERE at IS NOT NULL GROUP BY 1, 2 UNION ALL "
            "SELECT queue, 4, count(*) FROM jobs WHERE died IS NOT NULL GROUP BY 1"
        )
        counts = {(gid, state): n for gid, state, n in rows}
        heads = self.query(
            "SELECT gid, topic, (SELECT payload FROM jobs WHERE state = 0 AND queue = gid ORDER BY rank, id LIMIT 1) "
            "FROM heads WHERE partition = -1 ORDER BY topic"
        )
        return [
            QueueState(name, *[counts.get((gid, n), 0) for n in range(5)], enqueued_at(first) if first else None)  # type: ignore[call-arg]
            for gid, name, first in heads
        ]

    def find_jobs(self, state: str | None = None, queue: str | None = None) -> Iterator[StoredJob]:
        queues = [r[0] for r in self.query("SELECT gid FROM heads WHERE partition = -1 AND topic = coalesce(?, topic)", (queue,))]
        for kind in _FOUND if state is None else (state,):
            for gid in queues if kind == "ready" or queue is not None else (None,):
                for id_, at, died, _, jid, name, number, crashes, payload, *process in self._pages(kind, gid):
                    when = died if at is None else at
                    yield StoredJob((id_, jid, number), jid, name, STATES[number], when, crashes, name_of(*process), payload)

    def _pages(self, kind: str, gid: int | None) -> Iterator[Any]:
        """The jobs of a state (and queue), a page at a time: the file is not held meanwhile."""
        where, by = _FOUND[kind]
        same, beyond = (
            f"SELECT j.id, at, died, rank, jid, topic, state, crashes, CAST(payload AS BLOB), {_PROCESS} FROM jobs j "
            "CROSS JOIN heads h ON h.gid = j.queue LEFT JOIN processes r ON r.id = j.owner "  # CROSS: jobs are the outer loop
            f"WHERE {where} {'' if gid is None else 'AND j.queue = :queue'} AND {follow} ORDER BY j.{by}, j.id LIMIT {PAGE}"
            for follow in (f"j.{by} = :from AND j.id > :id", f"j.{by} > :from")  # (no index helps with both in one)
        )
        last = {"queue": gid, "from": -1e18, "id": -1}
        while rows := self.query(same, last) or self.query(beyond, last):
            yield from rows
            last |= {"from": rows[-1][("id", "at", "died", "rank").index(by)], "id": rows[-1][0]}

    def requeue(self, db: apsw.Connection, results: Sequence[Result], process: int) -> None:
        """Move the jobs there that are to run again in another queue."""
        for result in results:
            for id_, verdict in result.others.items():
                if isinstance(verdict, Again) and verdict.queue is not None:
                    qid = self.queue_ids.get(verdict.queue) or self._create_queue(db, verdict.queue)
                    db.execute("UPDATE jobs SET queue = ? WHERE id = ? AND owner = ?", (qid, id_, process))

    def move_jobs(self, refs: Sequence[Any], to: str | None) -> int:
        moved = 0
        for start in range(0, len(refs), MOVED):
            moved += self.write(partial(self._move, refs=refs[start : start + MOVED], to=to))
        return moved

    def _move(self, db: apsw.Connection, refs: Sequence[Any], to: str | None) -> int:
        now, queue = self.clock.now(), to[6:] if to and to.startswith("queue:") else None
        qid = None if queue is None else self.queue_ids.get(queue) or self._create_queue(db, queue)
        before = db.total_changes()
        rows = [{"id": id_, "jid": jid, "state": state, "now": now} for id_, jid, state in refs]
        for row in rows if to == "ready" or queue is not None else ():
            data: bytes = (one(db, "SELECT CAST(payload AS BLOB) FROM jobs WHERE id = ?", (row["id"],)) or (b"",))[0]
            fresh = recalled(data, now) if queue is None else requeued(data, queue)
            row |= {"payload": fresh, "queue": qid, "lock": held(data) or None}
        runs = "SELECT run FROM jobs WHERE id = :id AND jid = :jid AND state = 2 AND run IS NOT NULL"
        keys = {(now, *run, now) for row in rows for run in db.execute(runs, row)}
        # Numbers of dropped jobs come again, and what somebody else has moved meanwhile is not what was meant.
        db.executemany(f"{_MOVES[to] if queue is None else _REQUEUED} AND id = :id AND jid = :jid AND state = :state", rows)
        moved = db.total_changes() - before
        if moved:  # (who waits behind one of these for a slot looks anew)
            db.executemany("UPDATE jobs SET at = ? WHERE run = ? AND state = 2 AND at > ?", [*keys])
            self.stir(db, "partition = -1")
        return moved

    # Batches.

    ripe: Callable[[str], None] = staticmethod(lambda id: None)

    def batch(self, id: str) -> tuple[int, int, int]:
        said = self.cell(BATCHES, id)
        return (0, 0, 0) if said is None else msgspec.json.decode(said, type=tuple[int, int, int])

    def batch_members(self, id: str, state: str) -> Iterator[str]:
        last, tbl = f"{id}/", self._find("table", BATCHES)
        sql = "SELECT key FROM cells WHERE tbl = ? AND key > ? AND key < ? AND value = ? ORDER BY key LIMIT 1000"
        while rows := self.query(sql, (tbl, last, f"{id}0", state)):  # ("0" comes after "/")
            last = rows[-1][0]
            yield from (key.partition("/")[2] for (key,) in rows)

    def end(self, id: str, members: Sequence[str], how: str) -> None:
        for each in self.write(lambda db: self.leave(db, how, id, [(0, jid) for jid in members])):
            self.ripe(each)

    def forget(self, id: str, state: str | None = None) -> None:
        tbl, some = self._find("table", BATCHES), "" if state is None else "AND value = :state"
        sql = f"SELECT key FROM cells WHERE tbl = :tbl AND key > :id || '/' AND key < :id || '0' {some} LIMIT {MOVED}"
        args = {"tbl": tbl, "id": id, "state": state}

        def some_of(db: apsw.Connection) -> int:
            db.execute(f"DELETE FROM cells WHERE tbl = :tbl AND key IN ({sql})", args)
            return db.changes()

        while self.write(some_of) == MOVED:  # others have their turns in between
            continue
        if state is None:
            keys = [(tbl, id), (tbl, f"{ALL}/{id}")]
            self.write(lambda db: db.executemany("DELETE FROM cells WHERE tbl = ? AND key = ?", keys))

    def holder(self, key: str) -> str | None:
        sql = (
            "SELECT jid FROM jobs WHERE lock = :key UNION ALL SELECT jid FROM slots WHERE key = :key "
            "UNION ALL SELECT jid FROM locks WHERE key = :key AND until > :now"
        )
        found = self.query(sql, {"key": key, "now": self.clock.now()})
        return found[0][0] if found else None

    def taken(self, needs: Sequence[Any]) -> list[tuple[int, int, float | None]]:
        sql = (
            "SELECT (SELECT count(*) FROM slots WHERE key = :key AND (until IS NULL OR at > :since)), "
            "(SELECT count(*) FROM jobs WHERE run = :key AND state = 2), "
            "(SELECT at + :span FROM slots WHERE key = :key AND at > :since ORDER BY at DESC LIMIT 1 OFFSET :most - 1)"
        )
        said = ({"key": n.key, "since": self.clock.now() - n.span, "span": n.span or None, "most": n.most} for n in needs)
        return [self.query(sql, each)[0] for each in said]

    def processes(self) -> list[Process]:
        found = []
        for number, pid, started, info in self.query("SELECT id, pid, started, info FROM processes ORDER BY id"):
            dead, silent, _ = look(self.path, number)
            if not dead:
                said = json.loads(info or "{}")
                found.append(Process(str(name_of(number, pid, info)), pid, said.pop("host", HOST), started, silent, said))
        return found

    def report(self, info: Mapping[str, Any]) -> None:
        number, now = self.neighbours.number, self.clock.monotonic()
        if number and info != self._reported[1] and now >= self._reported[0] + REPORTS:
            data = json.dumps({**info, "host": HOST})
            self.write(lambda db: db.execute("UPDATE processes SET info = ? WHERE id = ?", (data, number)).fetchall())
            self._reported = (now, dict(info))

    def control(self) -> dict[str, str]:
        return {str(name): value.decode() for name, value in self.cells(CONTROL)}

    def set_control(self, name: str, value: str | None) -> None:
        def act(db: apsw.Connection) -> None:
            if name.startswith("process:") and value is not None:
                rows = db.execute(f"SELECT {_PROCESS} FROM processes r").fetchall()
                if name.removeprefix("process:") not in [name_of(*row) for row in rows]:
                    raise Refused(f"there is no worker process {name.removeprefix('process:')!r} (any more)")
            self.store(db, (), {(CONTROL, name): None if value is None else value.encode()})

        self.write(act)

    def forget_control(self, db: apsw.Connection, number: int) -> None:
        """Inside a write: this process is gone, and with it what was asked of it."""
        of = "tbl = (SELECT id FROM names WHERE kind = 'table' AND name = ?)"
        db.execute(f"DELETE FROM cells WHERE {of} AND key GLOB ?", (CONTROL, f"process:*:{number}"))
