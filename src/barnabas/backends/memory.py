"""`memory:`: topics, queues and tables in this process alone. The reference for the conformance suite, and unit tests'.

Everything is done under one lock, at once; what is settled together becomes visible together.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from barnabas.backends.memory_admin import MemoryAdmin, Partition
from barnabas.backends.shares import NOTES, Notes, QueueOrder, close_books, members_ended, noted, open_account, over, spread, tell
from barnabas.errors import DeclarationError, UnknownTopic
from barnabas.jobs.unique import answer, ousted
from barnabas.message import LockedJob, Member, Outgoing, OutgoingJob, Row, note
from barnabas.ports import Listener, Part, Result, TopicState
from barnabas.verdict import Again, Dead

DEFAULT_PARTITIONS = 6
SWEEP = 20_000  # sends between two looks at what retention no longer covers
FETCH = 500  # rows of one partition per fetch


def open_backend(url: str, settings: Any, clock: Any) -> "MemoryBackend":
    """A fresh, empty backend."""
    return MemoryBackend(url, clock)


class MemoryBackend(Notes, MemoryAdmin):
    """A place for topics, queues and tables that ends with the process."""

    def __init__(self, url: str, clock: Any) -> None:
        super().__init__(url, clock)
        self.retention: dict[str, Any] = {}
        self._number = self._spin = self._unswept = 0
        self._watchers: list[Callable[[], None]] = []

    # Topics and sends.

    def declare(self, topics: Iterable[Any]) -> None:
        with self.lock:
            for topic in topics:
                known = self.logs.get(topic.name)
                if known is None:
                    self.logs[topic.name] = [Partition() for _ in range(topic.partitions or DEFAULT_PARTITIONS)]
                elif topic.partitions is not None and topic.partitions != len(known):
                    what = f"topic {topic.name!r}: partitions={topic.partitions}"
                    raise DeclarationError(f"{what}, but it is stored with {len(known)}")
                self.retention[topic.name] = topic.retention

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        with self.lock:
            self.store(outgoing)
            self._unswept += len(outgoing)
            if self._unswept > SWEEP:
                self._unswept = 0
                self.expire(self.clock.now())
        self.ring()

    def store(self, outgoing: Iterable[Outgoing | OutgoingJob]) -> None:
        """Take messages and jobs. Hold the lock."""
        for out in outgoing:
            if len(out) == 7:
                self._append(out)
            else:
                self._push(out)

    def _push(self, job: OutgoingJob) -> None:
        self._number += 1
        self.ranked = self.ranked or (type(job) is not OutgoingJob and job.priority != 0)  # type: ignore[attr-defined]
        if type(job) is Member:
            self.enter(job)
        if not job.queue and type(job) is not Member:
            self._keep(dict([noted(job.jid, job.payload, job.at or 0.0)]))
        elif type(job) is LockedJob and job.lock is not None and not self._lock(job):
            return
        elif job.at is not None and job.at > self.clock.now():
            heapq.heappush(self.later, (job.at, self._number, "scheduled", job))
        elif job.queue:
            self.ready.setdefault(job.queue, deque()).append((self._number, job))
        if job.future is not None:
            job.future.resolve(job.jid)

    def _lock(self, job: LockedJob) -> bool:
        """Take its lock; False: another job has it, and what becomes of this one is done."""
        claim, holder = job.lock, self.holder(job.lock.key)
        if holder is not None and holder != job.jid and claim.on_conflict == "replace":
            held = [job for job in self.find_jobs() if self.held.get(job.ref[0]) == claim.key]
            if self.move_jobs([job.ref for job in held], None):
                self.store(ousted(job, self.clock.now(), held[0].payload))
                holder = None
        if holder is not None:
            if holder != job.jid and claim.on_conflict == "reject":
                self.buried[self._number] = job._replace(payload=claim.buried, at=self.clock.now(), future=None)
                self.store(ousted(job, self.clock.now()))
            if job.future is not None:
                job.future.settle(job.jid if holder == job.jid else answer(job, holder))
            return False
        self.locks[claim.key] = (job.jid, claim.until)
        if claim.until is None:
            self.held[self._number] = claim.key
        return True

    def _append(self, out: Outgoing) -> tuple[int, int] | None:
        """Store a message; its partition and offset, None if it could not be."""
        topic, partition, key, value, headers, timestamp, future = out
        parts = self.logs.get(topic.name)
        if parts is None:
            self.declare([topic])
            parts = self.logs[topic.name]
        if partition is None:
            if key is None:
                self._spin += 1
                partition = self._spin % len(parts)
            else:
                partition = crc32(key.encode() if type(key) is str else key) % len(parts)  # type: ignore[arg-type]
        elif not 0 <= partition < len(parts):
            error = UnknownTopic(f"topic {topic.name!r} has no partition {partition}; it has {len(parts)}")
            if future is None:
                raise error
            future.fail(error)
            return None
        log = parts[partition]
        rows = log.rows
        offset = log.first + len(rows)
        rows.append((offset, key, value, headers, timestamp))
        if value is not None:
            log.size += len(value)
        if future is not None:
            future.resolve((topic, partition, offset, key, value, headers, timestamp))
        return partition, offset

    def flush(self, timeout: float) -> int:
        return 0

    def ring(self) -> None:
        """Something was stored: wake whoever waits."""
        for wake in [*self._watchers]:
            wake()

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        self._watchers.append(wake)
        return lambda: self._watchers.remove(wake)

    def expire(self, now: float) -> None:
        """Drop what is older or larger than its topic's retention allows, and no group still needs."""
        with self.lock:
            self.locks = {key: lock for key, lock in self.locks.items() if lock[1] is None or lock[1] > now}
            for name, parts in self.logs.items():
                keep = self.retention[name]
                for number, log in enumerate(parts):
                    groups = [p[0] for (g, t, n), p in self.marks.items() if (t, n) == (name, number)]
                    slowest = log.next if keep.force or not groups else min(groups)
                    count = 0
                    while count < len(log.rows) and log.first + count < slowest:
                        row = log.rows[count]
                        old = keep.age is not None and row[4] < now - keep.age
                        if not old and (keep.size is None or log.size <= keep.size):
                            break
                        log.size -= len(row[2] or b"")
                        count += 1
                    del log.rows[:count]
                    log.first += count
            self.tables[NOTES] = {key: data for key, data in self.tables.get(NOTES, {}).items() if not over(data, now)}

    # What consumers and workers use.

    def log(self, group: str, topics: Sequence[Any], *, start: Any, ordered: bool, listener: Listener) -> "MemoryLog":
        self.declare(topics)
        self.join()
        return MemoryLog(self, group, [t.name for t in topics], start, ordered, listener)

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any = None) -> "MemoryQueues":
        self.join()
        return MemoryQueues(self, queues, listener, guard)

    def settle(self, results: Iterable[Result]) -> None:
        """Store outputs and cells of results."""
        for result in results:
            self.store(result.outputs)
            self._keep(result.cells)

    def _keep(self, cells: Mapping[tuple[str, Any], bytes | None]) -> None:
        for (table, key), data in cells.items():
            if data is None:
                self.tables.setdefault(table, {}).pop(key, None)
            else:
                self.tables.setdefault(table, {})[key] = data

    def swap(self, name: str, old: bytes | None, new: bytes, until: float, jobs: Sequence[OutgoingJob]) -> bool:
        with self.lock:
            same = self.note(name) == old
            if same:
                self.store([note(name, new, until), *jobs])
        self.ring()
        return same

    def cell(self, table: str, key: Any) -> bytes | None:
        return self.tables.get(table, {}).get(key)

    def cells(self, table: str) -> Iterable[tuple[Any, bytes]]:
        with self.lock:
            return sorted(self.tables.get(table, {}).items(), key=lambda cell: str(cell[0]))

    def open_work(self, groups: Mapping[str, Sequence[str]], queues: Sequence[str]) -> int:
        with self.lock:
            count = sum(len(worker.work) for worker in self.workers) + sum(len(self.ready.get(q, ())) for q in queues)
            now = self.clock.now()
            count += sum(1 for at, _, _, job in self.later if at <= now and job.queue in queues)
            for group, topics in groups.items():
                for topic in topics:
                    for number, log in enumerate(self.logs.get(topic, ())):
                        at, done, _ = self.marks.get((group, topic, number), (log.first, [], {}))
                        count += max(0, log.next - max(at, log.first)) - sum(b - a for a, b in done)
            return count

    def topics(self) -> list[TopicState]:
        with self.lock:
            return [TopicState(name, [(p.first, p.next, p.size) for p in parts]) for name, parts in sorted(self.logs.items())]

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Row]:
        with self.lock:
            log = self.logs[topic][partition]
            start = max(0, offset - log.first)
            return log.rows[start : start + limit]

    def box(self, workers: int) -> tuple[Any, int]:
        return None, 0

    def move_due(self, now: float) -> float | None:
        """Put jobs that are due into their queues; when the next one is due (epoch seconds)."""
        with self.lock:
            while self.later and self.later[0][0] <= now:
                _, number, _, job = heapq.heappop(self.later)
                if number in self.runs:
                    self.unpark(number)
                    self.line_up(number, job)
                else:
                    self.ready.setdefault(job.queue, deque()).append((number, job))
            return self.later[0][0] if self.later else None

    def close(self) -> None:
        self.closed = True


class _Source:
    """What both kinds have: their home, and the wait of a fetch thread, which a wake ends."""

    def __init__(self, home: MemoryBackend, listener: Listener) -> None:
        self.atomic = self.home = home
        self._listener, self._event = listener, threading.Event()
        self.wake = self._event.set
        self._unwatch = home.watch(self.wake)

    def _wait(self, timeout: float) -> None:
        self._event.wait(timeout)
        self._event.clear()


class MemoryLog(_Source):
    """The topics of one consumer group, as one member sees them."""

    def __init__(self, home: MemoryBackend, group: str, topics: list[str], start: str, ordered: bool, listener: Listener) -> None:
        super().__init__(home, listener)
        self.group, self._start, self._ordered = group, start, ordered
        self._parts: dict[tuple[str, int], Part] = {}
        self._all = [(topic, n) for topic in topics for n in range(len(home.logs[topic]))]
        with home.lock:
            home.members.setdefault(group, []).append(self)
            self._nudge()

    def _nudge(self) -> None:
        self._stale = True
        for member in self.home.members[self.group]:
            member._stale = True
            member.wake()

    def _balance(self) -> None:
        self._stale = False
        owners = self.home.owners.setdefault(self.group, {})
        with self.home.lock:
            target = spread(self.group, self.home.members[self.group], {at: at[0] for at in self._all}, owners)
        gone = [part for at, part in self._parts.items() if target[at] is not self]
        if gone:
            self._listener.revoked(gone)
            with self.home.lock:
                for part in gone:
                    del self._parts[part.topic, part.partition]
                    del owners[part.topic, part.partition]
                self._nudge()
        with self.home.lock:
            mine = [at for at in self._all if target[at] is self and at not in self._parts]
            free = [at for at in mine if at not in owners]
            self._stale |= len(free) < len(mine)
            came = [self._take(at, owners) for at in free]
            if came and any(at not in owners for at in self._all):  # whose turn it is may have changed with our claim
                self._nudge()
        if came:
            self._listener.assigned(came)

    def _take(self, at: tuple[str, int], owners: dict[tuple[str, int], "MemoryLog"]) -> Part:
        owners[at] = self
        log = self.home.logs[at[0]][at[1]]
        part = Part(at[0], at[1], len(self._parts), self.group)
        first = log.next if self._start == "latest" and not part.retries else log.first
        position, done, attempts = self.home.marks.setdefault((self.group, *at), (first, [], {}))
        open_account(part, self._ordered, max(position, log.first), done, attempts)
        self._parts[at] = part
        return part

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        if self._stale:
            self._balance()
        found = self._read(limit)
        if not found and timeout > 0:
            self._wait(timeout)
            found = self._read(limit)
        return found

    def _read(self, limit: int) -> list[tuple[Part, Sequence[Row]]]:
        found: list[tuple[Part, Sequence[Row]]] = []
        logs = self.home.logs
        for (topic, number), part in self._parts.items():
            account = part.held
            log = logs[topic][number]
            room = limit - len(account)
            if room > 0 and account.next < log.next:
                start = max(0, account.next - log.first)
                rows = log.rows[start : start + min(room, FETCH)]
                account.next = rows[-1][0] + 1
                rows = account.add(rows)
                if rows:
                    found.append((part, rows))
        return found

    def settle(self, results: Sequence[Result]) -> None:
        home = self.home
        with home.lock:
            for part in close_books(results):
                home.marks[self.group, part.topic, part.partition] = (*part.held.position(), dict(part.attempts))
            home.settle(results)
        if any(result.outputs for result in results):
            home.ring()

    def close(self) -> None:
        self._unwatch()
        if self._parts:
            self._listener.revoked(list(self._parts.values()))
        with self.home.lock:
            for at in self._parts:
                del self.home.owners[self.group][at]
            self._parts = {}
            self.home.members[self.group].remove(self)
            if self.home.members[self.group]:
                self._nudge()
            self.home.left()


class MemoryQueues(_Source):
    """The queues of one worker."""

    def __init__(self, home: MemoryBackend, queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any) -> None:
        super().__init__(home, listener)
        self._guard, self._order = guard, QueueOrder(queues)
        self.parts = {name: Part(name, -1, i) for i, name in enumerate(self._order.names)}
        self.work: dict[int, OutgoingJob] = {}
        home.workers.append(self)
        listener.assigned(list(self.parts.values()))

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        found = self._claim(limit)
        if not found and timeout > 0:
            due = self.home.move_due(self.home.clock.now())
            if due is not None:
                timeout = min(timeout, max(0.0, due - self.home.clock.now()))
            self._wait(timeout)
            found = self._claim(limit)
        return found

    def _claim(self, limit: int) -> list[tuple[Part, Sequence[Row]]]:
        found: list[tuple[Part, Sequence[Row]]] = []
        home = self.home
        home.move_due(home.clock.now())
        room = limit - len(self.work)
        with home.lock:
            for name in self._order.next():
                part = self.parts[name]
                ready = home.ready.get(name) if part.claimable() else None
                rows: list[Row] = []
                while ready and room > 0 and part.room > 0:
                    number, job = home.next_of(ready) if home.ranked else ready.popleft()
                    mark = None
                    if self._guard is not None:
                        waits, mark = home.admit(self._guard(job.payload), number, job)
                        if waits:
                            continue
                    self.work[number] = job
                    rows.append((number, job.jid, job.payload, mark, home.clock.now()))
                    room -= 1
                    part.room -= 1
                if rows:
                    found.append((part, rows))
        return found

    def settle(self, results: Sequence[Result]) -> None:
        home, batches = self.home, members_ended(results)
        with home.lock:
            mine = {key: [jid for number, jid in some if number in self.work] for key, some in batches.items()}
            ripe = [id for (how, batch), jids in mine.items() for id in home.leave(how, batch, *jids)]
            for result in results:
                for row in result.rows:
                    job = self.work.pop(row[0], None)
                    if job is None:
                        continue
                    verdict = result.others.get(row[0])
                    unbegun = isinstance(verdict, Again) and verdict.payload is None
                    home.ended(row[0], not unbegun or row[0] in result.part.begun)
                    if not isinstance(verdict, Again):
                        home.free(row[0])
                    if unbegun:
                        home.line_up(row[0], job)
                    elif isinstance(verdict, Again) and not verdict.at:
                        last = job._replace(payload=verdict.payload or job.payload, future=None)
                        home.ready.setdefault(job.queue, deque()).append((row[0], last))
                    elif isinstance(verdict, Again):
                        again = job._replace(payload=verdict.payload or job.payload, at=verdict.at, future=None)
                        again = again._replace(queue=verdict.queue or job.queue)
                        heapq.heappush(home.later, (verdict.at, row[0], "retry", again))
                    elif isinstance(verdict, Dead) and verdict.payload is not None:
                        home.buried[row[0]] = job._replace(payload=verdict.payload, at=home.clock.now(), future=None)
            home.settle(results)
        home.ring()
        tell(home.ripe, ripe, results)

    def close(self) -> None:
        self._unwatch()
        with self.home.lock:
            for number, job in reversed(self.work.items()):
                self.home.ended(number, wake=False)
                self.home.ready.setdefault(job.queue, deque()).appendleft((number, job))
            self.work = {}
            self.home.workers.remove(self)
            self.home.left()
        self.home.ring()
