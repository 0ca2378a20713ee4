"""What hands out jobs from a SQLite file: the queues of a worker."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import apsw

from barnabas.backends.shares import FAIR, QueueOrder, members_ended, tell
from barnabas.backends.sqlite_limits import Place, ended, full, take, wake
from barnabas.backends.sqlite_read import one
from barnabas.backends.sqlite_sources import Fetcher
from barnabas.jobs.limit import Need
from barnabas.jobs.payload import PayloadError, enqueued
from barnabas.jobs.unique import MANY, VAIN, marked
from barnabas.message import Row
from barnabas.ports import Listener, Part, Result
from barnabas.verdict import Again, Dead

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

DUE = 500  # jobs moved to their queues in one transaction
NEVER = 1e18
READY = "FROM jobs WHERE state = 0 AND queue = :queue"
WAITERS = 500  # jobs that are put aside in one transaction, as another runs that they have to wait for


class SqliteQueues(Fetcher):
    """The queues of one worker. Claims ride in the transaction that settles what is done."""

    def __init__(self, home: "SqliteBackend", queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any) -> None:
        super().__init__(home, listener)
        self._guard = guard
        self._runs: dict[int, Sequence[Need]] = {}  # whose slots jobs in hand have
        self._order = QueueOrder(queues)
        home.write(lambda db: [home.queue_ids.get(q) or home._create_queue(db, q) for q in self._order.names])
        home.refresh()
        self._parts = {home.queue_ids[q]: Part(q, -1, -home.queue_ids[q] - 1) for q in self._order.names}
        self._seen: dict[int, int] = dict.fromkeys(self._parts, -1)
        self._work: set[int] = set()
        self._claimed: list[tuple[Part, Sequence[Row]]] = []
        self._due = self._since = 0.0  # when the next waiting job is due (epoch seconds); when we claimed last (monotonic)
        self._limit, self._turns, self._more = 0, 0, True
        home.sources.append(self)
        listener.assigned(list(self._parts.values()))

    def lapse(self) -> None:
        """A frozen process keeps its jobs: nobody takes them from a living one."""

    def extend(self, until: float) -> None:
        """Jobs are held by the process's life, not by a lease."""

    def look(self) -> None:
        if self._news():
            self.wake()

    def _news(self) -> bool:
        heads, seen = self.home.heads, self._seen
        return any(heads[gid] != seen[gid] and part.claimable() for gid, part in self._parts.items())

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        self._limit = limit
        found, self._claimed = self._claimed, []
        if not found and self._has_room() and self._may_claim():
            found = self._take()
        if not found and timeout > 0:
            now = self.home.clock.now()
            self._wait((0.0 if self._more else min(timeout, max(0.0, self._due - now))) if self._has_room() else timeout)
            if self._has_room() and self._may_claim():
                found = self._take()
        return found

    def _take(self) -> list[tuple[Part, Sequence[Row]]]:
        try:
            found = self.home.write(self._claim)
        except BaseException:
            self._more = True
            raise
        self._own(found)
        return found

    def _own(self, found: Sequence[tuple[Part, Sequence[Row]]]) -> None:
        for part, rows in found:
            self._work.update([row[0] for row in rows])
            part.room -= len(rows)

    def _has_room(self) -> bool:
        return self._limit > len(self._work)

    def _may_claim(self) -> bool:
        return self._more or self._due <= self.home.clock.now() or self._news()

    def _claim(self, db: apsw.Connection) -> list[tuple[Part, Sequence[Row]]]:
        """Take ready jobs, up to the room there is, and move what is due into its queue. Ours are they after the commit."""
        self._since, now = self.home.clock.monotonic(), self.home.clock.now()  # (we may be frozen before slots are taken)
        self._due = self._next_due(db)
        if self._due <= now:
            self._move_due(db, now)
            self._due = self._next_due(db)
        for gid, part in self._parts.items():
            self._seen[gid] = self.home.heads[gid] if part.claimable() else -1  # news for when it is claimed from again
        found: list[tuple[Part, Sequence[Row]]] = []
        room, more = self._limit - len(self._work), False
        ids = self.home.queue_ids
        for name in self._order.next():
            if room <= 0:
                break
            gid = ids[name]
            part = self._parts[gid]
            if not part.claimable():
                continue
            rows, waited = self._take_ready(db, part, gid, int(min(room, part.room)), now)
            more = more or waited
            if len(rows) == part.room:
                self._seen[gid] = -1
            if rows:
                room -= len(rows)
                found.append((part, rows))
        self._more = more or room <= 0
        return found

    def _take_ready(self, db: apsw.Connection, part: Part, gid: int, room: int, now: float) -> tuple[list[Row], bool]:
        """Take up to `room` jobs of a queue. Those that have to wait for a lock leave their place to others; whether there
        were so many that the turn is over."""
        rows: list[Row] = []
        left = Counter[Place]()
        for _ in range(WAITERS // room + 1):
            mixed = self._mixed(db, gid, room - len(rows))
            said = {"owner": self.home.neighbours.number, "queue": gid, "room": room - len(rows), "mixed": json.dumps(mixed)}
            which = "SELECT value FROM json_each(:mixed)" if mixed else f"SELECT id {READY} ORDER BY rank, id LIMIT :room"
            claim = f"UPDATE jobs SET state = 1, owner = :owner, run = NULL WHERE id IN ({which})"
            claimed: list[Any] = db.execute(f"{claim} RETURNING id, jid, payload, crashes", said).fetchall()
            claimed.sort()  # first come, first served
            if mixed:
                by_id = {row[0]: row for row in claimed}
                claimed = [by_id[id_] for id_ in mixed]
            before, mark = len(rows), None
            for id_, jid, payload, crashes in claimed:
                if self._guard is not None:
                    waits, mark = self._admit(db, id_, payload, now, left)
                    if waits:
                        continue
                rows.append((id_, jid, payload, mark, now))
                if crashes:
                    part.crashes[id_] = crashes
            if left:
                wake(self.home, db, left)
                left.clear()
            if len(rows) - before == len(claimed):  # nobody waits
                return rows, False
        return rows, len(rows) < room

    def _mixed(self, db: apsw.Connection, gid: int, room: int) -> list[int]:
        """Of a queue whose jobs differ in priority the next ones: one in FAIR is the one that waits longest. Else none."""
        said: Any = {"queue": gid, "room": room}
        ends = f"SELECT (SELECT rank {READY} ORDER BY rank LIMIT 1), (SELECT rank {READY} ORDER BY rank DESC LIMIT 1)"
        rank, last = one(db, ends, said)
        if rank == last:
            return []
        first = [row[0] for row in db.execute(f"SELECT id {READY} ORDER BY rank, id LIMIT :room", said)]
        said["count"], self._turns = divmod(self._turns + len(first), FAIR)
        longest: list[int] = []
        while said["count"] and rank is not None:
            said["rank"] = rank
            longest += [row[0] for row in db.execute(f"SELECT id {READY} AND rank = :rank ORDER BY id LIMIT :count", said)]
            rank = one(db, f"SELECT min(rank) {READY} AND rank > :rank", said)[0]
        known = {*first}
        others = [id_ for id_ in sorted(longest)[: said["count"]] if id_ not in known]
        return first[: room - len(others)] + others

    def _admit(self, db: apsw.Connection, id_: int, payload: bytes, now: float, left: Counter[Place]) -> tuple[bool, Any]:
        """Take the slots a claimed job needs; whether it has to wait for one, and what its row is to say. left: counts what it
        leaves that it may have been woken for."""
        ask = self._guard(payload)
        if ask is None:
            return False, None
        if ask.created == VAIN:  # those behind it look anew
            first = "SELECT id FROM jobs WHERE run = ? AND state = 2 ORDER BY id LIMIT ?"
            waits = [(now, now, need.key, MANY) for need in ask.needs]
            db.executemany(f"UPDATE jobs SET at = ? WHERE at > ? AND id IN ({first})", waits)
            self._due = now
            return False, marked(ask)
        for need in ask.needs:
            at = full(db, need, now, id_)
            if at is not None:
                left.update((each.key, each.most) for each in ask.needs if not each.span)
            if at is not None and not need.waits:
                return False, marked(ask, (one(db, "SELECT jid FROM slots WHERE key = ?", (need.key,)) or ("?",))[0])
            if at is not None:
                db.execute("UPDATE jobs SET state = 2, owner = NULL, at = ?, run = ? WHERE id = ?", (at, need.key, id_))
                self._due = min(self._due, at)
                return True, None
        take(db, ask.needs, now, id_, ask.jid, self.home.neighbours.number)
        if ask.needs:
            self._runs[id_] = ask.needs
        if ask.free:
            db.execute("UPDATE jobs SET lock = NULL WHERE id = ?", (id_,))
        return False, marked(ask, since=self._since)

    def _move_due(self, db: apsw.Connection, now: float) -> None:
        due: list[Any] = db.execute(
            "SELECT id, CAST(payload AS BLOB), queue FROM jobs WHERE at IS NOT NULL AND at <= ? ORDER BY at LIMIT ?", (now, DUE)
        ).fetchall()
        for id_, payload, _ in due:
            with suppress(PayloadError):  # rubbish is buried, with its reason, by the worker that meets it
                payload = enqueued(payload, now)
            db.execute("UPDATE jobs SET state = 0, at = NULL, payload = ? WHERE id = ?", (payload, id_))
        for gid in {row[2] for row in due}:
            self.home.stir(db, "gid = ?", (gid,))

    def _next_due(self, db: apsw.Connection) -> float:
        """When the next job that waits for its time is due (epoch seconds)."""
        at = one(db, "SELECT min(at) FROM jobs WHERE at IS NOT NULL")[0]
        return NEVER if at is None else float(at)

    def settle(self, results: Sequence[Result]) -> None:
        """Remove what is done, park or bury what failed, claim what there is room for: one transaction."""
        done, back, later, last, dead, outputs = (list[Any]() for _ in range(6))
        finished, over = set[int](), dict[int, Sequence[Need]]()
        ripe, mine = list[str](), "WHERE id = ? AND owner = ?"
        claimed: list[tuple[Part, Sequence[Row]]] = []
        now, process, batches = self.home.clock.now(), self.home.neighbours.number, members_ended(results)
        for result in results:
            outputs += result.outputs
            others = result.others
            for row in result.rows:
                id_ = row[0]
                finished.add(id_)
                verdict = others.get(id_) if others else None
                if isinstance(verdict, Again) and verdict.payload is None:  # the process is to be quiet, or ends
                    back.append((id_, process))
                elif isinstance(verdict, Again) and not verdict.at:
                    last.append((verdict.payload, id_, process))
                elif isinstance(verdict, Again):
                    later.append((verdict.at, verdict.payload, id_, process))
                elif isinstance(verdict, Dead) and verdict.payload is not None:
                    dead.append((now, verdict.reason, verdict.payload, id_, process))
                else:
                    done.append((id_, process))
            result.part.crashes and [result.part.crashes.pop(row[0], None) for row in result.rows]

        def act(db: apsw.Connection) -> list[tuple[Any, Any]]:
            # At once: what is to run again may be claimed by what follows, or by another thread after the commit.
            self._work.difference_update(finished)
            over.update((id_, self._runs.pop(id_)) for id_ in (finished & self._runs.keys() if self._runs else ()))
            ripe[:] = [id for (how, id), some in batches.items() for id in self.home.leave(db, how, id, some, process)]
            if done:
                db.executemany(f"DELETE FROM jobs {mine}", done)
            if later:
                self.home.requeue(db, results, process)
                db.executemany(f"UPDATE jobs SET state = 3, owner = NULL, crashes = 0, at = ?, payload = ? {mine}", later)
                self._due = min(self._due, min(at for at, _, _, _ in later))
            self._give_back(db, back)
            self._put_last(db, last)
            if dead:
                sql = "UPDATE jobs SET state = 4, owner = NULL, lock = NULL, died = ?, note = ?, payload = ?"
                db.executemany(f"{sql} {mine}", dead)
            if over:
                fresh = {id_ for id_, _ in back}.difference(*(result.part.begun for result in results))
                self._more = ended(self.home, db, [(id_, over[id_], id_ not in fresh) for id_ in over]) or self._more
            if self._has_room() and self._may_claim() and not self._closing:
                claimed.extend(self._claim(db))
            return self.home.store(db, outputs, {})

        try:
            stored = self.home.write(act, whole=bool(outputs))
        except BaseException:
            self._work |= finished
            self._runs |= over
            self._more = True
            raise
        self._own(claimed)
        self._claimed += claimed
        self.home.settled(stored)
        tell(self.home.ripe, ripe, results)

    _closing = False

    def close(self) -> None:
        """Give back what is not settled, to the front of its queue."""
        self._closing = True
        try:
            if self._work:
                mine = [(id_, self.home.neighbours.number) for id_ in self._work]
                self.home.write(lambda db: self._give_back(db, mine, [(*run, True) for run in self._runs.items()]))
        finally:
            self.home.sources.remove(self)
        self._work.clear()
        self._claimed = []

    def _put_last(self, db: apsw.Connection, jobs: Sequence[tuple[bytes | None, int, int]]) -> None:
        sql = "UPDATE jobs SET id = (SELECT max(id) + 1 FROM jobs), state = 0, owner = NULL, crashes = 0, run = NULL, payload = ?"
        if jobs:
            db.executemany(f"{sql} WHERE id = ? AND owner = ?", jobs)
            self.home.stir(db, "partition = -1")
            self._more = True

    def _give_back(self, db: apsw.Connection, ids: Sequence[tuple[int, int]], runs: Sequence[Any] = ()) -> None:
        if ids:
            db.executemany("UPDATE jobs SET state = 0, owner = NULL WHERE id = ? AND owner = ?", ids)
            ended(self.home, db, runs)
            self.home.stir(db, "partition = -1")
