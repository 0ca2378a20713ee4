"""What operators see and do of Redis, and what only topics would need: the doors of the port that no job passes.

Queues, sets and processes are Sidekiq's own, so Ruby's are seen and moved like Python's.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import count
from typing import Any

from barnabas.errors import Refused
from barnabas.jobs.beyond import ALL
from barnabas.jobs.payload import PayloadError, enqueued_at, parse, recalled, requeued
from barnabas.jobs.unique import held
from barnabas.message import Outgoing, Row
from barnabas.ports import Position, Process, QueueState, StoredJob, TopicState

log = logging.getLogger("barnabas")
PAGE = 500  # jobs read or moved in one step
STEP = 0.01  # seconds that a step which moves jobs may take: others wait for it
QUIET = 10.0  # seconds between two heartbeats of a Sidekiq process: so long nobody is silent
REPORTS = 2.0  # seconds between two reports that are stored
SETS = {"scheduled": "schedule", "retry": "retry", "dead": "dead"}
MEMBERS = ("open", "done", "dead")  # of batches
SIGNALS = {"quiet": "TSTP", "stop": "TERM"}  # what Sidekiq's web page sends
KEYS = ("queues", "processes", "paused", "barnabas:workers", "schedule", "retry", "dead")  # beside those of queues


class RedisAdmin:
    """The operators' half of a RedisBackend."""

    client: Any
    clock: Any
    where: Any
    key: Callable[[str], str]
    script: Callable[..., Any]
    edge: Callable[..., AbstractContextManager[None]]

    def __init__(self) -> None:
        self.sources: list[Any] = []
        self._reported = 0.0
        self._paused, self._looking = set[str](), threading.Lock()
        self.strange: dict[str, str] = {}  # keys that are somebody else's, and what is said of them; workers look again

    @property
    def name(self) -> str:
        """Of this process among the workers; "" before it is one."""
        return self.sources[0].name if self.sources else ""

    # Keys that somebody else has taken.

    def look(self, *keys: str) -> bool:
        """Find out which of these keys, and of those that were, are somebody else's: told once. Whether one is no more."""
        with self._looking:
            before, names = self.strange, {*self.strange, *keys}
            found = [map(text, each) for each in self.script("strange", *names)] if names else []
            said = "{} is no {}, but somebody else's {}: what needs it waits"
            self.strange = {key: said.format(self.key(key), wanted, kind) for key, kind, wanted in found}
            for key in self.strange.keys() - before.keys():
                log.error("%s", self.strange[key])
            return bool(before.keys() - self.strange.keys())

    @property
    def away(self) -> str:
        """What is in the way of this process just now."""
        return "; ".join([*self.strange.values()])

    # Topics live elsewhere.

    def cell(self, table: str, key: Any) -> bytes | None:
        return None

    def cells(self, table: str) -> Iterable[tuple[Any, bytes]]:
        return ()

    def topics(self) -> list[TopicState]:
        return []

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Row]:
        return []

    def positions(self, groups: str = "") -> list[Position]:
        return []

    def place(self, positions: Iterable[Position], clear: Sequence[str] = ()) -> None:
        raise Refused(f"{self.where.name} keeps jobs; there are no groups to place")

    def finish(self, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]) -> int:
        raise Refused(f"{self.where.name} keeps jobs; there are no dead letters of topics")

    # Jobs.

    def _hands(self) -> dict[str, int]:
        """How many jobs of each queue that has a worker are in processes' hands, also such as landed and were not looked at."""
        return {text(name): count for name, count in self.script("hands")}

    def open_work(self, groups: Mapping[str, Sequence[str]], queues: Sequence[str]) -> int:
        scheduled, retry, _, sizes, _ = self._sizes(self.clock.now(), queues)  # first: what moves on is seen twice, not never
        return int(scheduled + retry + sum(sizes)) + sum(count for queue, count in self._hands().items() if queue in queues)

    def _sizes(self, now: float | str, queues: Iterable[str]) -> list[Any]:
        """How many jobs are scheduled, to be retried (of either: due by `now`, if that is not ""), dead, and in each of these
        queues; the queues' next ones. Keys among these that are somebody else's are left out: that is said."""
        *found, others = self.script("sizes", now, *queues)
        self.look(*map(text, others))
        return found  # type: ignore[no-any-return]

    def queue_states(self) -> list[QueueState]:
        hands = self._hands()
        with self.edge():
            names = sorted({*map(text, self.client.smembers(self.key("queues"))), *hands})
        scheduled, retry, dead, sizes, nexts = self._sizes("", names)
        states = [QueueState("", 0, 0, scheduled, retry, dead, None)] if scheduled or retry or dead else []
        for name, ready, first in zip(names, sizes, nexts, strict=True):
            states.append(QueueState(name, ready, hands.get(name, 0), 0, 0, 0, enqueued_at(first) if first else None))
        return states

    def find_jobs(self, state: str | None = None, queue: str | None = None) -> Iterator[StoredJob]:
        with self.edge():
            names = sorted(map(text, self.client.smembers(self.key("queues")))) if queue is None else [queue]
            self._sizes("", names)
            if state in (None, "work"):
                yield from self._find_work(queue)
            for name in names if state in (None, "ready") else ():
                if f"queue:{name}" not in self.strange:
                    yield from self._find_ready(name)
            for kind, key in SETS.items():
                if state in (None, kind) and key not in self.strange:
                    yield from self._find_set(kind, key, queue)

    def _find_work(self, queue: str | None) -> Iterator[StoredJob]:
        workers: dict[bytes, bytes] = self.client.hgetall(self.key("barnabas:workers"))
        for name, queues in sorted((text(name), text(names).split()) for name, names in workers.items()):
            pipe = self.client.pipeline(transaction=True).hgetall(self.key(f"barnabas:work:{name}"))
            for each in queues:  # what has landed is as good as claimed
                pipe.lrange(self.key(f"barnabas:landing:{name}:{each}"), 0, -1)
            held, *landed = pipe.execute()
            fresh = [(f"0:{each}".encode(), job) for each, jobs in zip(queues, landed, strict=True) for job in jobs]
            for field, payload in sorted([*held.items(), *fresh], key=lambda item: int(item[0].partition(b":")[0])):
                at = text(field).partition(":")[2]
                if queue in (None, at):
                    yield _stored(("work", at, payload), at, name, payload)
        for name in sorted(map(text, self.client.smembers(self.key("processes")) - workers.keys())):  # Ruby's, as it says itself
            pipe = self.client.pipeline(transaction=False).hgetall(self.key(f"{name}:work")).hgetall(self.key(f"{name}:workers"))
            new, old = pipe.execute()
            for at, payload, _ in _running(new or old):
                if queue in (None, at):
                    yield _stored(("work", at, payload), at, name, payload)

    def _find_ready(self, name: str) -> Iterator[StoredJob]:
        """From the end, where the next one stands; neither what is taken meanwhile nor what comes shifts the rest."""
        start, newest, page = self.script("page", name, "", "", PAGE)
        while page:
            for at, payload in zip(count(start + len(page) - 1, -1), reversed(page), strict=False):
                yield _stored(("ready", name, payload, at), name, None, payload)
            start, newest, page = self.script("page", name, newest, start, PAGE)

    def _find_set(self, kind: str, key: str, queue: str | None) -> Iterator[StoredJob]:
        start, last, same = 0, -math.inf, list[bytes]()
        while members := self.client.zrange(self.key(key), start, start + PAGE - 1, withscores=True):
            if members[-1][1] != last:
                last, same = members[-1][1], []
            same += [payload for payload, at in members if at == last]
            for payload, at in members:
                name, jid = _names(payload)
                if queue in (None, name):
                    yield StoredJob((kind, name, payload), jid, name, kind, at, 0, None, payload)
            start = self._after(self.key(key), last, same)

    def _after(self, key: str, last: float, same: list[bytes]) -> int:
        """Where the stream goes on, though what it gave may have been moved meanwhile: behind the last that is there of those
        with the last score, or where those begin."""
        while same:
            tail = same[-PAGE:]
            for payload, at in zip(reversed(tail), reversed(self.client.zmscore(key, tail)), strict=True):
                rank = self.client.zrank(key, payload) if at == last else None
                if rank is not None:
                    return int(rank) + 1
            del same[-PAGE:]
        return int(self.client.zcount(key, "-inf", f"({last!r}"))

    def move_jobs(self, refs: Sequence[Any], to: str | None) -> int:
        wanted = [ref for ref in refs if ref[0] not in ("work", to) and to != f"queue:{ref[1]}"]
        other = to[6:] if to and to.startswith("queue:") else ""
        moved, now, size = 0, self.clock.now(), 1
        while wanted:
            began, page, wanted, args = time.monotonic(), wanted[:size], wanted[size:], list[Any]()
            for kind, queue, payload, *_ in page:
                fresh = recalled(payload, now) if to == "ready" else requeued(payload, other) if other else payload
                lock = held(payload)
                args += (SETS.get(kind, ""), queue, payload, fresh, lock, parse(payload).jid if lock else "")
            moved += int(self.script("shift", "other" if other else to or "", now, other, len(page), *args))
            # A job in the middle of a long queue is looked for from its end: that takes milliseconds.
            size = max(1, min(PAGE, 2 * size, int(size * STEP / (time.monotonic() - began))))
        return moved

    def holder(self, key: str) -> str | None:
        with self.edge():
            found = self.client.hkeys(self.key(f"{key}:LOCKED"))
        return text(found[0]) if found else None

    def taken(self, needs: Sequence[Any]) -> list[tuple[int, int, float | None]]:
        found = self.script("taken", len(needs), *[need.text for need in needs])
        return [(count, waiting, float(free) if free else None) for count, waiting, free in found]

    # Batches.

    ripe: Callable[[str], None] = staticmethod(lambda id: None)

    def batch(self, id: str) -> tuple[int, int, int]:
        with self.edge():
            pipe = self.client.pipeline(transaction=True)
            for state in MEMBERS:
                pipe.scard(self.key(f"barnabas:batch:{id}:{state}"))
            is_open, done, dead = pipe.execute()
        return is_open, done, dead

    def batch_members(self, id: str, state: str) -> Iterator[str]:
        with self.edge():
            yield from map(text, self.client.sscan_iter(self.key(f"barnabas:batch:{id}:{state}"), count=PAGE))

    def end(self, id: str, members: Sequence[str], how: str) -> None:
        for start in range(0, len(members), PAGE):
            page = members[start : start + PAGE]
            if self.script("leave", id, how, *page):
                self.ripe(id)

    def forget(self, id: str, state: str | None = None) -> None:
        with self.edge():
            self.client.unlink(*[self.key(f"barnabas:batch:{id}:{each}") for each in ([state] if state else MEMBERS)])
            for each in MEMBERS if state is None else ():
                self.client.srem(self.key(f"barnabas:batch:{ALL}:{each}"), id)

    # Processes.

    def processes(self) -> list[Process]:
        with self.edge():
            names = sorted(text(name) for name in self.client.smembers(self.key("processes")))
            pipe = self.client.pipeline(transaction=False)
            for name in names:
                pipe.hgetall(self.key(name)).hgetall(self.key(f"{name}:work")).hgetall(self.key(f"{name}:workers"))
            answers = pipe.execute()
        found = []
        for name, fields, new, old in zip(names, answers[::3], answers[1::3], answers[2::3], strict=True):
            try:
                told, now = json.loads(fields[b"info"]), time.time()
                ours = json.loads(fields.get(b"barnabas", b"null"))
                silent = max(0.0, now - float(fields.get(b"beat", 0)) - QUIET)
                info = _sidekiq(told, fields, new or old, now) if ours is None else ours
                found.append(Process(name, int(told["pid"]), told["hostname"], float(told["started_at"]), silent, info))
            except (KeyError, ValueError, TypeError, AttributeError):
                continue  # it is dead for a minute, or somebody's rubbish
        return found

    def report(self, info: Mapping[str, Any]) -> None:
        now = time.monotonic()
        for source in self.sources:
            hushed = info.get("quiet") and not source.life.info.get("quiet")  # it is about to close
            if hushed or (source.life.info != info and now - self._reported >= REPORTS):
                self._reported = now
                source.life.info = dict(info)
                with self.edge():
                    source.life.beat()

    def paused(self) -> set[str]:
        """The queues that rest; those that did, as long as nobody can tell."""
        with self.edge("paused"):
            self._paused = {text(name) for name in self.client.smembers(self.key("paused"))}
        return self._paused

    def control(self) -> dict[str, str]:
        asked = {f"process:{source.name}": source.life.asked for source in self.sources if source.life.asked}
        return {f"pause queue:{name}": "" for name in sorted(self.paused())} | asked

    def set_control(self, name: str, value: str | None) -> None:
        kind, _, what = name.partition(":")
        with self.edge():
            if kind == "pause queue":  # Sidekiq Pro's set: its processes obey too
                (self.client.srem if value is None else self.client.sadd)(self.key("paused"), what)
            elif kind == "process" and value is None:
                self.client.delete(self.key(f"{what}-signals"))
            elif kind == "process":
                if not self.client.sismember(self.key("processes"), what):
                    raise Refused(f"there is no worker process {what!r}; `barnabas processes` lists them")
                pipe = self.client.pipeline()
                pipe.lpush(self.key(f"{what}-signals"), SIGNALS[value or ""]).expire(self.key(f"{what}-signals"), 60).execute()
            else:
                raise Refused(f"{name!r}: {self.where.name} keeps jobs; groups are paused where the topics are")


def text(name: bytes) -> str:
    """A name as it may be shown: in others' keys there may be any bytes."""
    return name.decode(errors="backslashreplace")


def _sidekiq(told: dict[str, Any], fields: dict[bytes, bytes], works: dict[bytes, bytes], now: float) -> dict[str, Any]:
    """What a Ruby process says of itself, in the words of `Worker.report`."""
    work = []
    for queue, data, since in _running(works):
        job = json.loads(data)
        work.append([str(job.get("wrapped") or job.get("class")), queue, -1, 0, max(0.0, now - since)])
    queues, quiet = dict.fromkeys(told.get("queues", ()), 0), fields.get(b"quiet") == b"true"
    size = 1024 * int(fields.get(b"rss", 0))
    return {"app": told.get("tag") or "sidekiq", "queues": queues, "work": work, "rss": size, "quiet": quiet}


def _running(works: Mapping[bytes, bytes]) -> Iterator[tuple[str, bytes, float]]:
    """What a Ruby process ran at its last heartbeat: queue, job (an object or its text, by Sidekiq's version), since when."""
    for entry in works.values():
        with suppress(ValueError, TypeError, KeyError):  # somebody's rubbish
            job = json.loads(entry)
            data = job["payload"]
            yield str(job["queue"]), (data if isinstance(data, str) else json.dumps(data)).encode(), float(job["run_at"])


def _names(payload: bytes) -> tuple[str, str]:
    """The queue that a job names, and its id."""
    try:
        said = parse(payload)
    except PayloadError:
        return "", ""
    return said.queue, said.jid


def _stored(ref: Any, queue: str, owner: str | None, payload: bytes) -> StoredJob:
    return StoredJob(ref, _names(payload)[1], queue, ref[0], None, 0, owner, payload)
