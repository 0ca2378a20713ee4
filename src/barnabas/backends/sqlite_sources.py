"""What hands out deliveries from a SQLite file: the topics of a consumer group, and the queues of a worker."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import apsw

from barnabas.backends.queues import QueueOrder
from barnabas.backends.shares import close_books, numbers, open_account, spread, state_of
from barnabas.backends.sqlite_read import one
from barnabas.errors import BackendError
from barnabas.jobs.payload import PayloadError, enqueued
from barnabas.message import Row
from barnabas.ports import Listener, Part, Result
from barnabas.verdict import Again, Dead

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

log = logging.getLogger("barnabas")
FETCH_BYTES = 2 * 1024 * 1024  # bytes of one partition per fetch, at least one record
FLIGHT_BYTES = 8 * 1024 * 1024  # bytes of one partition in flight, at least one message
DUE = 500  # jobs moved to their queues in one transaction
NEVER = 1e18


class _Fetcher:
    """The wait that both sources share: until the bell says that something is there, or somebody calls `wake`."""

    def __init__(self, home: "SqliteBackend", listener: Listener) -> None:
        self.atomic = home
        self.home = home
        self.listener = listener
        self.waiting = False
        self._event = threading.Event()

    def wake(self) -> None:
        """End a waiting fetch."""
        self._event.set()

    def _wait(self, timeout: float) -> None:
        self.waiting = True
        try:
            self.look()  # what came between the read and `waiting` rang no bell for us
            self._event.wait(timeout)
        finally:
            self.waiting = False
            self._event.clear()
        self.home.check()
        if self.home.blind is not None:
            raise BackendError(self.home.blind)

    def look(self) -> None:
        """Wake up if there is something new."""
        raise NotImplementedError


class SqliteLog(_Fetcher):
    """The topics of one consumer group, as one member sees them."""

    def __init__(
        self, home: "SqliteBackend", group: str, topics: Sequence[Any], start: str, ordered: bool, listener: Listener
    ) -> None:
        super().__init__(home, listener)
        self._group_name = group
        self._start = start
        self._ordered = ordered
        self._parts: dict[int, Part] = {}
        self._epochs: dict[int, int] = {}
        self._weight: dict[int, float] = {}  # bytes of a stored message of late
        self._topics = [t.name for t in topics]
        self._all = [(gid, t.name, n) for t in topics for n, gid in enumerate(home.parts[t.name])]
        self._generation = -1
        self._lapsed = False
        self._lease = 0.0
        self._limit = 1
        home.write(self._enter)
        home.sources.append(self)

    def _enter(self, db: apsw.Connection) -> None:
        """Become a member; positions begin for partitions that the group has not seen."""
        self._group = self.home.name_id(db, "group", self._group_name)
        db.execute("INSERT OR IGNORE INTO heads (topic, partition) VALUES (?, -2)", (self._group_name,))
        self._signal: int = one(db, "SELECT gid FROM heads WHERE topic = ? AND partition = -2", (self._group_name,))[0]
        self._member = self._join(db)
        latest = [self._start == "latest" and not topic.endswith(f".retry.{self._group_name}") for _, topic, _ in self._all]
        db.executemany(
            "INSERT OR IGNORE INTO positions (grp, gid, offset) SELECT ?, gid, iif(?, next, first) FROM heads WHERE gid = ?",
            [(self._group, new, gid) for new, (gid, _, _) in zip(latest, self._all, strict=True)],
        )

    def _join(self, db: apsw.Connection) -> int:
        db.execute(
            "INSERT INTO members (grp, process, topics) VALUES (?, ?, ?)",
            (self._group, self.home.neighbours.number, json.dumps(self._topics)),
        )
        member = db.last_insert_rowid()
        self.home.stir(db, "gid = ?", (self._signal,))
        return member

    # Membership.

    def lapse(self) -> None:
        """The process was frozen: stop, and claim everything anew."""
        self._lapsed = True
        for part in list(self._parts.values()):
            part.until = 0.0
        self.wake()

    def extend(self, until: float) -> None:
        """The process lives: its claims hold until then (monotonic seconds)."""
        if not self._lapsed:
            self._lease = until
            for part in list(self._parts.values()):
                if part.until:
                    part.until = until

    def _balance(self) -> None:
        """Give up what is another's by now or by fair share, take what is free and ours."""
        generation = self.home.heads[self._signal]
        if self._lapsed:
            self._drop(list(self._parts))
            self._lapsed = False
            self._lease = self.home.clock.monotonic() + self.home.neighbours.session * 0.7
        gone, lost = self._plan()
        if lost:
            for gid in lost:
                self._parts[gid].closed = True
            log.warning(
                "%s lost %d partitions to others; what it did and did not settle is discarded", self._group_name, len(lost)
            )
            self._drop(lost)
        if gone:
            self._drop(gone)
        members, owners = self._rows(self.home.query)
        target = self._target(members, owners)
        if any(self._claimable(gid, owners[gid][0], target) for gid, _, _ in self._all):
            came = self.home.write(self._claim)
            for gid, (part, epoch) in came.items():
                self._parts[gid], self._epochs[gid] = part, epoch
            if came:
                self.listener.assigned([part for part, _ in came.values()])
        self._generation = generation

    def _rows(self, query: Any) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """The group's members, and who has which of its partitions: {gid: (member, epoch)}."""
        members = [r[0] for r in query("SELECT id FROM members WHERE grp = ? ORDER BY id", (self._group,))]
        owners = {
            gid: (member, epoch)
            for gid, member, epoch in query("SELECT gid, member, epoch FROM positions WHERE grp = ?", (self._group,))
        }
        return members, owners

    def _claimable(self, gid: int, owner: int | None, target: dict[int, int]) -> bool:
        """Free and ours by share; or still in our name though we gave it up (a release that failed)."""
        return gid not in self._parts and (owner == self._member or (owner is None and target.get(gid) == self._member))

    def _target(self, members: list[int], owners: dict[int, tuple[int, int]]) -> dict[int, int]:
        held = {gid: owners[gid][0] for gid, _, _ in self._all if owners[gid][0] is not None}
        return spread(self._group_name, members, {gid: topic for gid, topic, _ in self._all}, held)

    def _plan(self) -> tuple[list[int], list[int]]:
        members, owners = self._rows(self.home.query)
        if self._member not in members:  # expelled while we were silent
            self._member = self.home.write(self._join)
            members.append(self._member)
        lost = [gid for gid in self._parts if owners[gid] != (self._member, self._epochs[gid])]
        target = self._target(members, owners)
        return [gid for gid in self._parts if gid not in lost and target[gid] != self._member], lost

    def _drop(self, gids: list[int]) -> None:
        parts = [self._parts[gid] for gid in gids]
        if parts:
            self.listener.revoked(parts)
            for gid in gids:
                del self._parts[gid]
            self.home.write(lambda db: self._release(db, gids))

    def _release(self, db: apsw.Connection, gids: list[int]) -> None:
        db.executemany(
            "UPDATE positions SET member = NULL WHERE grp = ? AND gid = ? AND member = ? AND epoch = ?",
            [(self._group, gid, self._member, self._epochs[gid]) for gid in gids],
        )
        self.home.stir(db, "gid = ?", (self._signal,))

    def _claim(self, db: apsw.Connection) -> dict[int, tuple[Part, int]]:
        members, owners = self._rows(db.execute)
        target = self._target(members, owners)
        came: dict[int, tuple[Part, int]] = {}
        for gid, topic, number in self._all:
            if not self._claimable(gid, owners[gid][0], target):
                continue
            if target.get(gid) != self._member:
                db.execute("UPDATE positions SET member = NULL WHERE grp = ? AND gid = ?", (self._group, gid))
                self.home.stir(db, "gid = ?", (self._signal,))
                continue
            db.execute(
                "UPDATE positions SET member = ?, epoch = epoch + 1 WHERE grp = ? AND gid = ?", (self._member, self._group, gid)
            )
            id_, offset, open_, epoch = one(
                db,
                "SELECT p.id, max(p.offset, h.first), p.open, p.epoch FROM positions p JOIN heads h ON h.gid = p.gid "
                "WHERE p.grp = ? AND p.gid = ?",
                (self._group, gid),
            )
            state = json.loads(open_) if open_ else {}
            part = Part(topic, number, id_, self._group_name)
            part.until = self._lease or self.home.clock.monotonic() + self.home.neighbours.session * 0.7
            open_account(
                part, self._ordered, offset, [(a, b) for a, b in state.get("done", ())], numbers(state.get("attempts", {}))
            )
            part.crashes.update(numbers(state.get("crashes", {})))
            came[gid] = part, epoch
        if came and any(owner is None and gid not in self._parts and gid not in came for gid, (owner, _) in owners.items()):
            # Who gets the larger share depends on who has what: with our claim it may be somebody else's turn to take it.
            self.home.stir(db, "gid = ?", (self._signal,))
        return came

    # Deliveries.

    def look(self) -> None:
        if self._stale() or any(self._room(gid, part) > 0 for gid, part in self._parts.items()):
            self.wake()

    def _stale(self) -> bool:
        """Whether it is to be looked at anew who owns what."""
        return self._lapsed or self.home.heads[self._signal] != self._generation

    def _room(self, gid: int, part: Part) -> int:
        """How many more messages may come into flight: bounded in messages and, by the weight of the last, in bytes."""
        account = part.held
        if account.next >= self.home.heads[gid] or not part.until:
            return 0
        return min(self._limit, int(FLIGHT_BYTES / self._weight.get(gid, 1.0)) + 1) - len(account)

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        self._limit = limit
        found = self._read()
        if not found and timeout > 0:
            self._wait(timeout)
            found = self._read()
        return found

    def _read(self) -> list[tuple[Part, Sequence[Row]]]:
        if self._stale():
            self._balance()
        found: list[tuple[Part, Sequence[Row]]] = []
        for gid, part in self._parts.items():
            account, head = part.held, self.home.heads[gid]
            if (room := self._room(gid, part)) <= 0:
                continue
            rows: list[Row] = []
            size = 0
            try:
                for record, data in self.home.records(gid, account.next, room, FETCH_BYTES):
                    rows += self.home.unpack(record, data)
                    size += len(data)
            except BackendError:
                if not rows and not found:
                    raise
                if not rows:  # what others gave is in their accounts already: hand it over, and meet the error next time
                    return found
            if not rows:  # retention was faster than we
                account.next = head
                continue
            if rows[0][0] < account.next:
                rows = [row for row in rows if row[0] >= account.next]
            self._weight[gid] = size / len(rows)
            account.next = rows[-1][0] + 1
            todo = account.add(rows)
            if todo:
                found.append((part, todo))
        return found

    def settle(self, results: Sequence[Result]) -> None:
        """Positions, outputs and cells in one transaction; results of partitions that others own by now are discarded."""
        touched = close_books(results)

        def act(db: apsw.Connection) -> list[tuple[Any, Any]]:
            for part in touched:
                watermark, done = part.held.position()
                db.execute(
                    "UPDATE positions SET offset = ?, open = ? WHERE id = ? AND member = ? AND epoch = ?",
                    (watermark, state_of(part, done), part.id, self._member, self._epochs[self._gid(part)]),
                )
                if not db.changes():
                    part.closed = True
            outputs: list[Any] = []
            cells: dict[Any, bytes | None] = {}
            for result in results:
                if not result.part.closed:
                    outputs += result.outputs
                    cells.update(result.cells)
            return self.home.store(db, outputs, cells)

        stored = self.home.write(act, whole=any(result.outputs for result in results))  # in the order of sending
        self.home.settled(stored)
        if any(part.closed for part in touched):
            self._generation = -1  # look again who owns what

    def _gid(self, part: Part) -> int:
        return self.home.parts[part.topic][part.partition]

    def close(self) -> None:
        """Leave the group."""
        try:
            self._drop(list(self._parts))
        finally:
            try:
                self.home.write(self._leave)
            finally:  # not before: while it is there, nothing of ours gets into a file that was put in the place of ours
                self.home.sources.remove(self)

    def _leave(self, db: apsw.Connection) -> None:
        db.execute("UPDATE positions SET member = NULL WHERE member = ?", (self._member,))  # where giving them up failed
        db.execute("DELETE FROM members WHERE id = ?", (self._member,))
        self.home.stir(db, "gid = ?", (self._signal,))


class SqliteQueues(_Fetcher):
    """The queues of one worker. Claims ride in the transaction that settles what is done."""

    def __init__(self, home: "SqliteBackend", queues: Sequence[str] | Mapping[str, int], listener: Listener) -> None:
        super().__init__(home, listener)
        self._order = QueueOrder(queues)
        home.write(lambda db: [home.queue_ids.get(q) or home._create_queue(db, q) for q in self._order.names])
        home.refresh()
        self._parts = {home.queue_ids[q]: Part(q, -1, -home.queue_ids[q] - 1) for q in self._order.names}
        self._seen: dict[int, int] = dict.fromkeys(self._parts, -1)
        self._work: set[int] = set()
        self._claimed: list[tuple[Part, Sequence[Row]]] = []
        self._due = 0.0  # when the next waiting job is due (epoch seconds)
        self._limit = 0
        self._more = True
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
        return any(heads[gid] != seen[gid] and not part.paused for gid, part in self._parts.items())

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        self._limit = limit
        found, self._claimed = self._claimed, []
        if not found and self._has_room() and self._may_claim():
            found = self._take()
        if not found and timeout > 0:
            now = self.home.clock.now()
            self._wait(min(timeout, max(0.0, self._due - now)) if self._has_room() else timeout)
            if self._has_room() and self._may_claim():
                found = self._take()
        return found

    def _take(self) -> list[tuple[Part, Sequence[Row]]]:
        try:
            found = self.home.write(self._claim)
        except BaseException:
            self._more = True
            raise
        self._work.update([row[0] for _, rows in found for row in rows])
        return found

    def _has_room(self) -> bool:
        return self._limit > len(self._work)

    def _may_claim(self) -> bool:
        return self._more or self._due <= self.home.clock.now() or self._news()

    def _claim(self, db: apsw.Connection, freed: int = 0) -> list[tuple[Part, Sequence[Row]]]:
        """Take ready jobs, up to the room there is, and move what is due into its queue. Ours are they after the commit."""
        now = self.home.clock.now()
        self._due = self._next_due(db)
        if self._due <= now:
            self._move_due(db, now)
            self._due = self._next_due(db)
        for gid, part in self._parts.items():
            self._seen[gid] = -1 if part.paused else self.home.heads[gid]  # news for whoever resumes it
        found: list[tuple[Part, Sequence[Row]]] = []
        room = self._limit - len(self._work) + freed
        ids = self.home.queue_ids
        for name in self._order.next():
            if room <= 0:
                break
            gid = ids[name]
            part = self._parts[gid]
            if part.paused:
                continue
            rows: list[Row] = []
            claimed: list[Any] = db.execute(
                "UPDATE jobs SET state = 1, owner = ? WHERE id IN (SELECT id FROM jobs WHERE state = 0 AND queue = ? ORDER BY id "
                "LIMIT ?) RETURNING id, jid, payload, crashes",
                (self.home.neighbours.number, gid, room),
            ).fetchall()
            for id_, jid, payload, crashes in claimed:
                rows.append((id_, jid, payload, None, now))
                if crashes:
                    part.crashes[id_] = crashes
            if rows:
                rows.sort()
                room -= len(rows)
                found.append((part, rows))
        self._more = room <= 0
        return found

    def _move_due(self, db: apsw.Connection, now: float) -> None:
        due: list[Any] = db.execute(
            "SELECT id, payload, queue FROM jobs WHERE at IS NOT NULL AND at <= ? ORDER BY at LIMIT ?", (now, DUE)
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
        done: list[tuple[int, int]] = []
        later: list[tuple[float, bytes | None, int, int]] = []
        dead: list[tuple[float, str, bytes, int, int]] = []
        outputs: list[Any] = []
        cells: dict[Any, bytes | None] = {}
        finished: set[int] = set()
        claimed: list[tuple[Part, Sequence[Row]]] = []
        now, process = self.home.clock.now(), self.home.neighbours.number
        for result in results:
            outputs += result.outputs
            cells.update(result.cells)
            others = result.others
            for row in result.rows:
                id_ = row[0]
                finished.add(id_)
                verdict = others.get(id_) if others else None
                if isinstance(verdict, Again):
                    later.append((verdict.at, verdict.payload, id_, process))
                elif isinstance(verdict, Dead) and verdict.payload is not None:
                    dead.append((now, verdict.reason, verdict.payload, id_, process))
                else:
                    done.append((id_, process))
            result.part.crashes and [result.part.crashes.pop(row[0], None) for row in result.rows]

        def act(db: apsw.Connection) -> list[tuple[Any, Any]]:
            if done:
                db.executemany("DELETE FROM jobs WHERE id = ? AND owner = ?", done)
            if later:
                self.home.requeue(db, results, process)
                db.executemany(
                    "UPDATE jobs SET state = 3, owner = NULL, crashes = 0, at = ?, payload = coalesce(?, payload) "
                    "WHERE id = ? AND owner = ?",
                    later,
                )
                self._due = min(self._due, min(at for at, _, _, _ in later))
            if dead:
                db.executemany(
                    "UPDATE jobs SET state = 4, owner = NULL, died = ?, note = ?, payload = ? WHERE id = ? AND owner = ?", dead
                )
            if self._limit > len(self._work) - len(finished) and self._may_claim() and not self._closing:
                claimed.extend(self._claim(db, len(finished)))
            return self.home.store(db, outputs, cells)

        try:
            stored = self.home.write(act, whole=bool(outputs))
        except BaseException:
            self._more = True
            raise
        self._work.difference_update(finished)
        self._work.update([row[0] for _, rows in claimed for row in rows])
        self._claimed += claimed
        self.home.settled(stored)

    _closing = False

    def close(self) -> None:
        """Give back what is not settled, to the front of its queue."""
        self._closing = True
        try:
            if self._work:
                self.home.write(self._give_back)
        finally:
            self.home.sources.remove(self)
        self._work.clear()
        self._claimed = []

    def _give_back(self, db: apsw.Connection) -> None:
        ids = [(id_, self.home.neighbours.number) for id_ in self._work]
        db.executemany("UPDATE jobs SET state = 0, owner = NULL WHERE id = ? AND owner = ?", ids)
        self.home.stir(db, "partition = -1")
