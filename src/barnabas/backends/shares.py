"""What backends do alike: fair shares of a group's partitions, the account of a partition in hand, the room in a send buffer."""

import json
import random
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from barnabas.engine.ledger import Intervals, Ledger, Straight
from barnabas.errors import BufferFull, Refused
from barnabas.ports import Part, Position, Result
from barnabas.verdict import Dead

HOST = socket.gethostname()
CONTROL = "barnabas.control"  # the table that keeps what operators have asked for
FAIR = 4  # of jobs that differ in priority, one in so many is the one that waits longest
NOTES = "barnabas.notes"  # the table that keeps notes, each behind eight bytes that say until when
STATES = ("ready", "work", "scheduled", "retry", "dead")
M = TypeVar("M", bound=Hashable)
P = TypeVar("P", bound=Hashable)


def buffer_full(where: str, timeout: float, what: str) -> BufferFull:
    """The error of who found no room in time."""
    how = "send slower" if timeout else "a loop waits for no room: await what was sent before, or send by asyncio.to_thread"
    how += ", or raise buffer_messages, buffer_bytes or send_timeout"
    return BufferFull(f"the send buffer of {where} was full for {timeout} s: {what}; {how}")


class Room(threading.Condition):
    """The room in a send buffer: how many messages or jobs (`count`), of how many bytes (`size`), are not stored yet. Hold it
    to `enter`. trouble: why nothing leaves just now, if anything is known."""

    def __init__(self, where: str, what: str, settings: Any, trouble: Callable[[], Any], lock: Any = None) -> None:
        self._bare = lock or threading.RLock()  # entered in a third of the time
        super().__init__(self._bare)
        self.timeout: float = settings.send_timeout
        self.count = self.size = self._waits = 0
        self._where, self._what, self._trouble = where, what, trouble
        self._most: int = settings.buffer_messages
        self._most_bytes: int = settings.buffer_bytes

    def enter(self, count: int, size: int) -> None:
        """Take room for these. Raises BufferFull when there was none for `send_timeout` seconds."""
        if self.count and (self.count + count > self._most or self.size + size > self._most_bytes):
            self._wait_for(count, size)
        self.count += count
        self.size += size

    def _wait_for(self, count: int, size: int) -> None:
        """On an event-loop thread nobody may block: twice the limit is the end there."""
        import asyncio

        def fits(times: int) -> bool:
            return self.count + count <= times * self._most and self.size + size <= times * self._most_bytes

        timeout = self.timeout
        if asyncio._get_running_loop() is not None:
            if fits(2):
                return
            timeout = 0.0
        if not self._until(lambda: not self.count or fits(1), timeout):
            why = f" (the last try failed: {said})" if (said := self._trouble()) else ""
            raise buffer_full(self._where, timeout, f"{self.count} {self._what}, {self.size} bytes wait{why}")

    def leave(self, count: int, size: int) -> None:
        """Give the room back of what was stored, or is not to be any more."""
        with self._bare:
            self.count -= count
            self.size -= size
            if self._waits:
                self.notify_all()

    def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._waits += 1
        try:
            return self.wait_for(condition, timeout)
        finally:
            self._waits -= 1

    def emptied(self, timeout: float) -> int:
        """Wait until all is stored, at most so many seconds; how many are not."""
        with self:
            if timeout:
                self._until(lambda: not self.count, timeout)
            return self.count


def fair(members: Sequence[M], partitions: Sequence[P], owners: Mapping[P, M]) -> dict[P, M]:
    """Who is to own which partition: shares differ by one at most, and as few as possible change hands."""
    if not members:
        return {}
    least, extra = divmod(len(partitions), len(members))
    owned: dict[M, list[P]] = {m: [] for m in members}
    for p in partitions:
        if owners.get(p) in owned:
            owned[owners[p]].append(p)
    # Those who own most keep the shares that are one larger.
    ranked = sorted(members, key=lambda m: -len(owned[m]))
    share = {m: least + (i < extra) for i, m in enumerate(ranked)}
    target = {p: m for m in members for p in owned[m][: share[m]]}
    free = iter([p for p in partitions if p not in target])
    for m in members:
        target.update((p, m) for p in islice(free, max(0, share[m] - len(owned[m]))))
    return target


def spread(group: str, members: Sequence[M], topics: Mapping[P, str], owners: Mapping[P, M]) -> dict[P, M]:
    """Fair shares of a group's partitions (of which topic each), those of its retry topics apart: nobody is to get only
    what is idle most of the time."""
    kinds: tuple[list[P], list[P]] = ([], [])
    for p, topic in topics.items():
        kinds[topic.endswith(f".retry.{group}")].append(p)
    return fair(members, kinds[0], owners) | fair(members, kinds[1], owners)


def open_account(part: Part, ordered: bool, position: int, done: Intervals, attempts: Mapping[int, int]) -> None:
    """Begin the account of a partition that was assigned, where its last owner left off."""
    part.held = Straight(position, done) if ordered and not part.retries else Ledger(position, done)
    part.attempts.update(attempts)


def close_books(results: Iterable[Result]) -> set[Part]:
    """Enter results into the accounts of their partitions; returns the partitions touched."""
    touched = set()
    for result in results:
        part = result.part
        touched.add(part)
        if not result.rows:  # a failed attempt, to be kept
            continue
        part.held.finish(result.rows)
        if part.attempts or part.crashes:
            for row in result.rows:
                part.attempts.pop(row[0], None)
                part.crashes.pop(row[0], None)
    return touched


def check_offset(at: Position, first: int, end: int) -> None:
    """Refuse a position where nothing is stored and nothing will come next."""
    if at.offset is not None and not first <= at.offset <= end:
        raise Refused(f"{at.topic}[{at.partition}] has no offset {at.offset}: it holds {first} to {end - 1}; {end} is next")


def finished(offset: int, done: Intervals, more: Iterable[int]) -> tuple[list[int], int, Intervals]:
    """A group's position when these offsets are finished, too: which of them were not, the new offset and intervals."""
    known = sorted(done)
    lows = [low for low, _ in known]
    fresh = []
    for each in dict.fromkeys(more):
        at = bisect_right(lows, each) - 1
        if each >= offset and (at < 0 or each >= known[at][1]):
            fresh.append(each)
    spans = [(offset, offset)]
    for low, high in sorted([*known, *((each, each + 1) for each in fresh)]):
        if low <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(high, spans[-1][1]))
        else:
            spans.append((low, high))
    return fresh, spans[0][1], spans[1:]


def by_partition(letters: Iterable[tuple[str, int, int, Any]]) -> dict[tuple[str, int], dict[int, Any]]:
    """What comes with which offset, by topic and partition."""
    found: dict[tuple[str, int], dict[int, Any]] = {}
    for topic, number, offset, what in letters:
        found.setdefault((topic, number), {})[offset] = what
    return found


def by_target(outputs: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Messages and jobs apart."""
    messages, jobs = list[Any](), list[Any]()
    for output in outputs:
        (messages if len(output) == 7 else jobs).append(output)
    return messages, jobs


_until = struct.Struct(">d")


def noted(name: str, value: bytes, until: float) -> tuple[tuple[str, str], bytes | None]:
    """A note as a cell."""
    return (NOTES, name), _until.pack(until) + value if value else None


def over(data: bytes, now: float) -> bool:
    """Whether the time of a note, as it is stored, is over."""
    return _until.unpack_from(data)[0] <= now  # type: ignore[no-any-return]


def unnoted(data: bytes | None, now: float) -> bytes | None:
    """What a note says, None where its time is over."""
    return None if data is None or over(data, now) else data[_until.size :]


class Notes:
    """Notes of a home that has tables, and tells watchers of whatever is stored."""

    def note(self: Any, name: str, timeout: float = 0.0) -> bytes | None:
        news, deadline = threading.Event(), time.monotonic() + timeout
        end = self.watch(news.set) if timeout > 0 else lambda: None
        try:
            while True:
                said = unnoted(self.cell(NOTES, name), self.clock.now())
                left = deadline - time.monotonic()
                if said is not None or left <= 0:
                    return said
                news.wait(min(left, 1.0))
                news.clear()
                time.sleep(min(left, 0.005))  # whatever comes meanwhile is one look
        finally:
            end()


def members_ended(results: Iterable[Result]) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """The members of batches among the jobs that have ended, by how ("done", "dead") and batch: row numbers and ids, the oldest
    first."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for part, rows, _, _, others in results:
        for number in [row[0] for row in rows if row[0] in part.batches] if part.batches else ():
            verdict, (batch, jid) = others.get(number), part.batches[number]
            if verdict is None or isinstance(verdict, Dead):
                found.setdefault(("dead" if verdict is not None else "done", batch), []).append((number, jid))
    return {key: sorted(some) for key, some in found.items()}


def tell(ripe: Callable[[str], None], batches: Iterable[str], results: Iterable[Result]) -> None:
    """After the commit: these batches are worth a look."""
    for part, rows, *_ in results:
        for row in rows if part.batches or part.begun else ():
            part.batches.pop(row[0], None)
            part.begun.discard(row[0])
    for batch in batches:
        ripe(batch)


def state_of(part: Part, done: list[tuple[int, int]]) -> str | None:
    """What a position carries beside its offset; None for nothing."""
    said = {"done": done, "attempts": dict(part.attempts), "crashes": dict(part.crashes)}
    state = {name: what for name, what in said.items() if what}
    return json.dumps(state) if state else None


def told(state: str | None) -> tuple[Intervals, dict[int, int], dict[int, int]]:
    """What `state_of` wrote: the intervals that are finished, failed runs and crashes by offset."""
    said = json.loads(state) if state else {}
    runs, crashes = ({int(at): n for at, n in said.get(name, {}).items()} for name in ("attempts", "crashes"))
    return [(a, b) for a, b in said.get("done", ())], runs, crashes


class QueueOrder:
    """In which order a worker looks at its queues. `["a", "b"]`: strict, the first that has jobs. `{"a": 5, "b": 1}`: at
    random by weight, `a` is looked at first five times out of six."""

    def __init__(self, queues: Sequence[str] | Mapping[str, int], rand: random.Random | None = None) -> None:
        self.names = list(queues)
        self._weights = dict(queues) if isinstance(queues, Mapping) and len(queues) > 1 else None
        self._rand = rand or random.Random()

    def next(self) -> list[str]:
        """The queues in the order for this look."""
        if self._weights is None:
            return self.names
        keys = {name: self._rand.random() ** (1.0 / max(1, weight)) for name, weight in self._weights.items()}
        return sorted(keys, key=lambda name: -keys[name])
