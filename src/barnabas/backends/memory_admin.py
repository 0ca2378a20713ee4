"""What operators see and do of `memory:`: the doors of the port that no message passes."""

import heapq
import os
import threading
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from barnabas.backends.shares import FAIR, HOST, STATES, by_partition, check_offset, finished
from barnabas.errors import Refused, UnknownTopic
from barnabas.jobs.beyond import ALL
from barnabas.jobs.limit import WANT, Need
from barnabas.jobs.payload import enqueued_at, recalled, requeued
from barnabas.jobs.unique import MANY, VAIN, Ask, held, marked
from barnabas.message import Member, Outgoing, OutgoingJob, Row
from barnabas.ports import Position, Process, QueueState, StoredJob


class Partition:
    """A partition's rows, and how many bytes they hold."""

    __slots__ = ("first", "rows", "size")

    def __init__(self) -> None:
        self.first = 0
        self.rows: list[Row] = []
        self.size = 0

    @property
    def next(self) -> int:
        """The offset after the newest."""
        return self.first + len(self.rows)


class MemoryAdmin:
    """What a MemoryBackend keeps, and the operators' half of it."""

    name = ""
    ranks = True
    ranked = False  # whether a job with a priority was ever stored
    _turns = 0
    store: Callable[[Iterable[Any]], None]
    ring: Callable[[], None]  # something was stored: wake whoever waits

    def __init__(self, url: str, clock: Any) -> None:
        self.url, self.closed, self.clock = url, False, clock
        self.lock = threading.RLock()
        self.logs: dict[str, list[Partition]] = {}
        self.marks: dict[tuple[str, str, int], tuple[int, list[tuple[int, int]], dict[int, int]]] = {}
        self.owners: dict[str, dict[tuple[str, int], Any]] = {}
        self.members: dict[str, list[Any]] = {}
        self.tables: dict[str, dict[Any, bytes]] = {}
        self.ready: dict[str, deque[tuple[int, OutgoingJob]]] = {}
        self.later: list[tuple[float, int, str, OutgoingJob]] = []  # due at, number, "scheduled" or "retry"
        self.buried: dict[int, OutgoingJob] = {}
        self.workers: list[Any] = []
        self.locks: dict[str, tuple[str, float | None]] = {}  # of unique jobs: who has it, until when (None: until he is done)
        self.held: dict[int, str] = {}  # the lock that a stored job took as it was enqueued
        self.batches: dict[str, dict[str, set[str]]] = {}  # the members of each by how they stand
        self.slots: dict[str, list[tuple[float, Any, str]]] = {}  # of limits: since when, by number or token, the job's id
        self.has: dict[Any, Sequence[Need]] = {}  # whose slots a job in work has
        self.wants: dict[str, dict[str, float]] = {}  # until when who waits by hand is to have the next slot
        self.parked: dict[str, list[tuple[int, float]]] = {}  # jobs that wait for a slot, and when they are due, in order
        self.runs: dict[int, str] = {}  # whose slot a job waits for
        self.turns: dict[int, str] = {}  # and the next slots of which are for jobs that are ready
        self._asked: dict[str, str] = {}
        self._info: dict[str, Any] = {}
        self._started = self._beat = 0.0

    def join(self) -> None:
        """Be a worker process."""
        if not self.name:
            self.name = f"{HOST}:{os.getpid()}:1"
            self._started, self._beat = self.clock.now(), time.monotonic()

    def _works(self) -> bool:
        return bool(self.workers or any(self.members.values()))

    def left(self) -> None:
        """A source was closed: with the last one, what was asked of this process is past."""
        if not self._works():
            self._asked.pop(f"process:{self.name}", None)

    def positions(self, groups: str = "") -> list[Position]:
        with self.lock:
            found = []
            marks = sorted(mark for mark in self.marks.items() if mark[0][0].startswith(groups))
            for (group, topic, number), (offset, done, attempts) in marks:
                log = self.logs[topic][number]
                owner = self.name if (topic, number) in self.owners.get(group, ()) else None
                found.append(Position(group, topic, number, log.first, log.next, offset, list(done), dict(attempts), {}, owner))
            return found

    def place(self, positions: Iterable[Position], clear: Sequence[str] = ()) -> None:
        with self.lock:
            wanted = list(positions)
            for at in wanted:
                if self.members.get(at.group):
                    raise Refused(f"group {at.group!r} has members: {self.name}; stop them first")
                if at.partition >= len(self.logs.get(at.topic, ())):
                    raise UnknownTopic(f"there is no partition {at.partition} of a topic {at.topic!r}")
                log = self.logs[at.topic][at.partition]
                check_offset(at, log.first, log.next)
            for at in wanted:
                if at.offset is None:
                    self.marks.pop((at.group, at.topic, at.partition), None)
                else:
                    self.marks[at.group, at.topic, at.partition] = (at.offset, list(at.done), {})
            for table in clear:
                self.tables.pop(table, None)

    def finish(self, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]) -> int:
        count = 0
        with self.lock:
            for (topic, number), some in by_partition(letters).items():
                if number >= len(self.logs.get(topic, ())):
                    raise UnknownTopic(f"there is no partition {number} of a topic {topic!r}")
                log = self.logs[topic][number]
                offset, done, attempts = self.marks.get((group, topic, number), (log.first, [], {}))
                fresh, offset, done = finished(max(offset, log.first), done, some)
                self.store([out for out in map(some.get, fresh) if out is not None])
                self.marks[group, topic, number] = (offset, done, attempts)
                count += len(fresh)
        self.ring()
        return count

    def queue_states(self) -> list[QueueState]:
        with self.lock:
            names = {*self.ready, *(name for worker in self.workers for name in worker.parts)}
            names |= {job.queue for _, _, _, job in self.later} | {job.queue for job in self.buried.values()}
            counts = {name: dict.fromkeys(STATES, 0) for name in names}
            for job in self.find_jobs():
                counts[job.queue][job.state] += 1
            first = {name: enqueued_at(ready[0][1].payload) for name, ready in self.ready.items() if ready}
            return [QueueState(name, **n, since=first.get(name)) for name, n in sorted(counts.items())]

    def find_jobs(self, state: str | None = None, queue: str | None = None) -> Iterator[StoredJob]:
        with self.lock:
            found: list[tuple[int, str, float | None, OutgoingJob]]
            found = [(n, "work", None, job) for worker in self.workers for n, job in sorted(worker.work.items())]
            found += [(n, "ready", None, job) for _, ready in sorted(self.ready.items()) for n, job in ready]
            found += [(n, kind, at, job) for at, n, kind, job in sorted(self.later, key=lambda each: each[:2])]
            found += [(n, "dead", job.at, job) for n, job in self.buried.items()]
        for number, kind, at, job in found:
            if state in (None, kind) and queue in (None, job.queue):
                owner = self.name if kind == "work" else None
                yield StoredJob((number, kind), job.jid, job.queue, kind, at, 0, owner, job.payload)

    def move_jobs(self, refs: Sequence[Any], to: str | None) -> int:
        with self.lock:
            wanted, now = {ref for ref in refs if ref[1] != to}, self.clock.now()
            states, queue = dict(wanted), (to or "").removeprefix("queue:")
            moved: dict[int, OutgoingJob] = {}
            for name, ready in self.ready.items():
                moved.update((n, job) for n, job in ready if (n, "ready") in wanted)
                self.ready[name] = deque((n, job) for n, job in ready if (n, "ready") not in wanted)
            moved.update((n, job) for _, n, kind, job in self.later if (n, kind) in wanted)
            keys = {self.runs[n] for n, _ in wanted if n in self.runs}  # who waits behind these for a slot looks anew
            later = [entry for entry in self.later if entry[1:3] not in wanted]
            self.later = [(now, *entry[1:]) if self.runs.get(entry[1]) in keys else entry for entry in later]
            heapq.heapify(self.later)
            dead = [n for n, kind in wanted if kind == "dead" and n in self.buried]
            moved.update({n: self.buried.pop(n) for n in dead if to != "ready" or self._locked_again(n)})
            for number, job in sorted(moved.items()):
                self.unpark(number)
                if to in (None, "dead"):
                    self.free(number)
                if to == "ready":
                    job = job._replace(payload=recalled(job.payload, now), at=None)
                    self.ready.setdefault(job.queue, deque()).append((number, job))
                elif to == "dead":
                    self.buried[number] = job._replace(at=now)
                elif to is not None:
                    put = job._replace(queue=queue, payload=requeued(job.payload, queue))
                    if states[number] == "ready":
                        self.ready.setdefault(queue, deque()).append((number, put))
                    elif states[number] == "dead":
                        self.buried[number] = put
                    else:
                        heapq.heappush(self.later, (job.at or 0.0, number, states[number], put))
        self.ring()
        return sum(to != f"queue:{job.queue}" for job in moved.values())

    def next_of(self, ready: deque[tuple[int, OutgoingJob]]) -> tuple[int, OutgoingJob]:
        """The next of a queue's jobs, by their priority; but one in FAIR is the one that waits longest."""
        ranks = [getattr(job, "priority", 0) for _, job in ready]
        self._turns += min(ranks) != max(ranks)
        at = 0 if self._turns % FAIR == 0 else ranks.index(max(ranks))
        entry = ready[at]
        del ready[at]
        return entry

    # Locks of unique jobs.

    def holder(self, key: str) -> str | None:
        if self.slots.get(key):
            return self.slots[key][0][2]
        jid, until = self.locks.get(key, (None, None))
        return None if until is not None and until <= self.clock.now() else jid

    def free(self, number: int) -> None:
        """This job has no right to its lock any more. Hold the lock."""
        self.locks.pop(self.held.pop(number, ""), None)

    def admit(self, ask: Ask | None, number: int, job: OutgoingJob) -> tuple[bool, Any]:
        """Take the slots a claimed job needs; whether it has to wait for one, and what its row is to say. Hold the lock."""
        if ask is None:
            return False, None
        now, since = self.clock.now(), self.clock.monotonic()
        self.turns.pop(number, None)
        if ask.created == VAIN:
            first = {n for need in ask.needs for n, _ in self.parked.get(need.key, [])[:MANY]}
            self.later = [(min(now, entry[0]), *entry[1:]) if entry[1] in first else entry for entry in self.later]  # look anew
            heapq.heapify(self.later)
            return False, marked(ask)
        for need in ask.needs:
            at = self.full(need, now, number)
            if at is None:
                continue
            if need.waits:
                self.park(number, need.key, at, job)
            for each in ask.needs:  # it may have been woken for one that it leaves
                if not each.span:
                    self._wake(each)
            return need.waits, None if need.waits else marked(ask, self.holder(need.key))
        self.take(ask.needs, now, number, job.jid)
        if ask.free:
            self.free(number)
        return False, marked(ask, since=since)

    def full(self, need: Need, now: float, number: int | None) -> float | None:
        """None if there is a slot for this job, else when it may look again. number: None by hand. Hold the lock."""
        slots, waiting = self.slots.setdefault(need.key, []), self.parked.get(need.key, [])
        ahead = 0 if number is None else bisect_left(waiting, (number,))
        wants = 0 if number is None else sum(until > now for until in self.wants.get(need.key, {}).values())
        if need.span:
            slots[:] = [slot for slot in slots if slot[0] > now - need.span - 2]
            slots.sort(key=lambda slot: slot[0])
        left = need.most - ahead - wants
        if left > 0 and (len(slots) < left or (need.span and slots[-left][0] + need.span <= now)):
            return None
        oldest = slots[-need.most][0] if len(slots) >= need.most else None
        return need.turn(now, oldest, ahead, waiting[ahead - 1][1] if ahead else None)

    def take(self, needs: Sequence[Need], now: float, number: Any, jid: str) -> None:
        """There is a slot of each: they are this one's. Hold the lock."""
        for need in needs:
            slots = self.slots[need.key]
            oldest = slots[-need.most][0] if need.span and len(slots) >= need.most else None
            slots.append((need.nominal(now, oldest), number, jid))
        self.has[number] = needs

    def park(self, number: int, key: str, at: float, job: OutgoingJob) -> None:
        """This job waits for a slot. Hold the lock."""
        self.runs[number] = key
        insort(self.parked.setdefault(key, []), (number, at))
        heapq.heappush(self.later, (at, number, "scheduled", job))

    def unpark(self, number: int) -> None:
        """It waits no more. Hold the lock."""
        self.turns.pop(number, None)
        waiting = self.parked.get(self.runs.pop(number, ""), [])
        at = bisect_left(waiting, (number,))
        if at < len(waiting) and waiting[at][0] == number:
            del waiting[at]

    def ended(self, number: Any, begun: bool = True, wake: bool = True) -> None:
        """A run has, or (not begun) gives its slots back: those who wait first for them may begin. Hold the lock."""
        for need in self.has.pop(number, ()):
            slots = self.slots[need.key]
            mine = [slot for slot in slots if slot[1] == number] if not need.span or not begun else ()
            if mine:
                slots.remove(max(mine))  # those before it, from before a crash, are of runs that began
            if not need.span and wake:
                self._wake(need)

    def _wake(self, need: Need) -> None:
        now, waiting = self.clock.now(), self.parked.get(need.key, [])
        while waiting:
            left = need.most - sum(key == need.key for key in self.turns.values())
            if left < 1 or self.full(need._replace(most=left), now, waiting[0][0]) is not None:
                return
            first = next(entry for entry in self.later if entry[1] == waiting[0][0])
            self.later.remove(first)
            heapq.heapify(self.later)
            _, number, _, job = first
            self.unpark(number)
            if f"pause queue:{job.queue}" not in self._asked:  # else others need not wait for it
                self.turns[number] = need.key
            self.line_up(number, job)

    def line_up(self, number: int, job: OutgoingJob) -> None:
        """One that waited for a slot is ready again: those that came after it are not to pass it. Hold the lock."""
        ready = self.ready.setdefault(job.queue, deque())
        ready.insert(next((at for at, (other, _) in enumerate(ready) if other > number), len(ready)), (number, job))

    def hold(self, token: str, need: Need) -> float:
        with self.lock:
            now = self.clock.now()
            at = self.full(need, now, None)
            if at is None:
                self.wants.get(need.key, {}).pop(token, None)
                self.take([need], now, token, "")
                return 0.0
            self.wants.setdefault(need.key, {})[token] = now + WANT
            return float(max(0.01, at - now))

    def let_go(self, token: str, need: Need, begun: bool = True) -> None:
        with self.lock:
            self.ended(token, begun)
            if self.wants.get(need.key, {}).pop(token, None) is not None:
                self._wake(need)
        self.ring()

    def taken(self, needs: Sequence[Need]) -> list[tuple[int, int, float | None]]:
        found, now = list[tuple[int, int, float | None]](), self.clock.now()
        with self.lock:
            for need in needs:
                all_ = [slot[0] + need.span for slot in self.slots.get(need.key, ())]
                ends = sorted(end for end in all_ if not need.span or end > now)
                free = ends[-need.most] if need.span and len(ends) >= need.most else None
                found.append((len(ends), len(self.parked.get(need.key, ())), free))
        return found

    def _locked_again(self, number: int) -> bool:
        """A dead job takes its lock again; False where another one has it."""
        key, jid = held(self.buried[number].payload), self.buried[number].jid
        if key and self.locks.setdefault(key, (jid, None))[0] != jid:
            return False
        if key:
            self.held[number] = key
        return True

    # Batches.

    ripe: Callable[[str], None] = staticmethod(lambda id: None)

    def enter(self, job: Member) -> None:
        """It becomes a member, if it never was one. Hold the lock."""
        sets = self.batches.setdefault(job.batch, {"open": set(), "done": set(), "dead": set()})
        if not any(job.jid in ids for ids in sets.values()):
            sets["open"].add(job.jid)

    def leave(self, how: str, id: str, *members: str) -> list[str]:
        """These have ended; the batch, if that is worth a look. Hold the lock."""
        sets, died = self.batches.get(id), False
        if sets is None:
            return []
        for each in members:
            before = "open" if each in sets["open"] else "dead" if how == "done" and each in sets["dead"] else ""
            if before:
                sets[before].remove(each)
                sets[how].add(each)
                died = died or how == "dead"
        return [id] if died or not sets["open"] else []

    def batch(self, id: str) -> tuple[int, int, int]:
        with self.lock:
            sets = self.batches.get(id, {})
            return len(sets.get("open", ())), len(sets.get("done", ())), len(sets.get("dead", ()))

    def batch_members(self, id: str, state: str) -> Iterator[str]:
        with self.lock:
            return iter(sorted(self.batches.get(id, {}).get(state, ())))

    def end(self, id: str, members: Sequence[str], how: str) -> None:
        with self.lock:
            ripe = self.leave(how, id, *members)
        for each in ripe:
            self.ripe(each)

    def forget(self, id: str, state: str | None = None) -> None:
        with self.lock:
            if state is not None:
                self.batches.get(id, {}).get(state, set()).clear()
                return
            self.batches.pop(id, None)
            for ids in self.batches.get(ALL, {}).values():
                ids.discard(id)

    def processes(self) -> list[Process]:
        if not self._works():
            return []
        return [Process(self.name, os.getpid(), HOST, self._started, time.monotonic() - self._beat, dict(self._info))]

    def report(self, info: Mapping[str, Any]) -> None:
        self._info, self._beat = dict(info), time.monotonic()

    def control(self) -> dict[str, str]:
        return dict(self._asked)

    def set_control(self, name: str, value: str | None) -> None:
        with self.lock:
            if name.startswith("process:") and value is not None and not (self._works() and name == f"process:{self.name}"):
                raise Refused(f"there is no worker process {name.removeprefix('process:')!r}")
            if value is None:
                self._asked.pop(name, None)
            else:
                self._asked[name] = value
