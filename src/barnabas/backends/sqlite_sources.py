"""What hands out deliveries from a SQLite file: the topics of a consumer group."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import apsw

from barnabas.backends.shares import close_books, open_account, spread, state_of, told
from barnabas.backends.sqlite_read import one
from barnabas.errors import BackendError
from barnabas.message import Row
from barnabas.ports import Listener, Part, Result

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

log = logging.getLogger("barnabas")
FETCH_BYTES = 2 * 1024 * 1024  # bytes of one partition per fetch, at least one record
FLIGHT_BYTES = 8 * 1024 * 1024  # bytes of one partition in flight, at least one message


class Fetcher:
    """The wait that both sources share: until the bell says that something is there, or somebody calls `wake`."""

    look: Callable[[], None]  # wakes up if there is something new

    def __init__(self, home: "SqliteBackend", listener: Listener) -> None:
        self.atomic = self.home = home
        self.listener, self.waiting = listener, False
        self._event = threading.Event()
        self.wake = self._event.set

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


class SqliteLog(Fetcher):
    """The topics of one consumer group, as one member sees them."""

    def __init__(
        self, home: "SqliteBackend", group: str, topics: Sequence[Any], start: str, ordered: bool, listener: Listener
    ) -> None:
        super().__init__(home, listener)
        self._group_name, self._start, self._ordered = group, start, ordered
        self._parts: dict[int, Part] = {}
        self._epochs: dict[int, int] = {}
        self._weight: dict[int, float] = {}  # bytes of a stored message of late
        self._topics = [t.name for t in topics]
        self._all = [(gid, t.name, n) for t in topics for n, gid in enumerate(home.parts[t.name])]
        self._generation, self._lapsed, self._lease, self._limit = -1, False, 0.0, 1
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
        row = (self._group, self.home.neighbours.number, json.dumps(self._topics))
        db.execute("INSERT INTO members (grp, process, topics) VALUES (?, ?, ?)", row)
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
        members, owners = self._rows(self.home.query)
        if self._member not in members:  # expelled while we were silent
            self._member = self.home.write(self._join)
            members.append(self._member)
        target = self._target(members, owners)
        lost = [gid for gid in self._parts if owners[gid] != (self._member, self._epochs[gid])]
        gone = [gid for gid in self._parts if gid not in lost and target[gid] != self._member]
        if lost:
            for gid in lost:
                self._parts[gid].closed = True
            what = "%s lost %d partitions to others; what it did and did not settle is discarded"
            log.warning(what, self._group_name, len(lost))
            self._drop(lost)
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
        rows = query("SELECT gid, member, epoch FROM positions WHERE grp = ?", (self._group,))
        return members, {gid: (member, epoch) for gid, member, epoch in rows}

    def _claimable(self, gid: int, owner: int | None, target: dict[int, int]) -> bool:
        """Free and ours by share; or still in our name though we gave it up (a release that failed)."""
        return gid not in self._parts and (owner == self._member or (owner is None and target.get(gid) == self._member))

    def _target(self, members: list[int], owners: dict[int, tuple[int, int]]) -> dict[int, int]:
        held = {gid: owners[gid][0] for gid, _, _ in self._all if owners[gid][0] is not None}
        return spread(self._group_name, members, {gid: topic for gid, topic, _ in self._all}, held)

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
            taken = (self._member, self._group, gid)
            db.execute("UPDATE positions SET member = ?, epoch = epoch + 1 WHERE grp = ? AND gid = ?", taken)
            id_, offset, open_, epoch = one(
                db,
                "SELECT p.id, max(p.offset, h.first), p.open, p.epoch FROM positions p JOIN heads h ON h.gid = p.gid "
                "WHERE p.grp = ? AND p.gid = ?",
                (self._group, gid),
            )
            done, attempts, crashes = told(open_)
            part = Part(topic, number, id_, self._group_name)
            part.until = self._lease or self.home.clock.monotonic() + self.home.neighbours.session * 0.7
            open_account(part, self._ordered, offset, done, attempts)
            part.crashes.update(crashes)
            came[gid] = part, epoch
        if came and any(owner is None and gid not in self._parts and gid not in came for gid, (owner, _) in owners.items()):
            # Who gets the larger share depends on who has what: with our claim it may be somebody else's turn to take it.
            self.home.stir(db, "gid = ?", (self._signal,))
        return came

    # Deliveries.

    def look(self) -> None:
        if self._stale() or any(self._room(gid, part) > 0 for gid, part in [*self._parts.items()]):
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
                epoch = self._epochs[self.home.parts[part.topic][part.partition]]
                row = (watermark, state_of(part, done), part.id, self._member, epoch)
                db.execute("UPDATE positions SET offset = ?, open = ? WHERE id = ? AND member = ? AND epoch = ?", row)
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
