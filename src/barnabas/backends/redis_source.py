"""The queues of one worker on Redis: a claim moves jobs into this process's hands and settles what it has finished, in one
step of the server; idle, it waits in blocking moves on all its queues at once."""

import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha1
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec
from redis.exceptions import RedisError

from barnabas.backends.redis_admin import text
from barnabas.backends.redis_life import BLOCK, Life
from barnabas.backends.shares import HOST, QueueOrder, members_ended, tell
from barnabas.engine.alone import CRASHES
from barnabas.errors import BackendError
from barnabas.jobs.unique import VAIN, marked
from barnabas.message import Row
from barnabas.ports import FOREVER, Listener, Part, Result
from barnabas.verdict import Again, Dead

if TYPE_CHECKING:
    from barnabas.backends.redis import RedisBackend

log = logging.getLogger("barnabas")
MOST = 1000  # jobs of one claim: more would delay other clients by more than 2 ms (facts: redis-jobs.md)
PAGE = 50  # jobs that are asked for slots at once: the next are made ready meanwhile
NOTHING = (0,) * 9  # settled


class _Name(msgspec.Struct):
    jid: str = ""
    lock_digest: Any = ""


_name = msgspec.json.Decoder(_Name).decode
Found = list[tuple[Part, Sequence[Row]]]


class Landing:
    """Blocking moves on several queues at once, each on a connection of its own into a list that only this process takes
    from. They end before the lease does, so that what lands there is never out of sight."""

    def __init__(self, home: "RedisBackend", name: str) -> None:
        self._home, self._name = home, name
        self._links: dict[str, tuple[Any, int]] = {}
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rung = False
        self.waiting: dict[int, str] = {}  # the socket's number -> its queue

    def wake(self) -> None:
        """End the wait, from any thread."""
        if not self._rung:
            self._rung = True
            with suppress(OSError):  # closed: nobody waits
                self._rope.send(b"!")

    def block(self, queues: Sequence[str]) -> None:
        """Begin a blocking move on each of these where none is under way."""
        key = self._home.key
        busy = set(self.waiting.values())
        for queue in queues:
            land = f"barnabas:landing:{self._name}:{queue}"
            if queue in busy or {f"queue:{queue}", land} & self._home.strange.keys():
                continue
            link, _ = self._links.get(queue, (None, 0))
            if link is None:
                link = self._home.where.pool.make_connection()
                link.connect()
                link.send_command("CLIENT", "ID")
                self._links[queue] = (link, link.read_response())
            link.send_command("BLMOVE", key(f"queue:{queue}"), key(land), "RIGHT", "LEFT", BLOCK)
            self.waiting[link._sock.fileno()] = queue

    def wait(self, timeout: float) -> bool:
        """Wait for a wake or the end of a move; True if a move ended."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        for number in self.waiting:
            poll.register(number, select.POLLIN)
        ended = False
        for number, _ in poll.poll(max(0.0, timeout) * 1000):
            if number == self._bell.fileno():
                self._bell.recv(4096)
                self._rung = False  # after the reading: a wake in between finds us awake anyway
            else:
                self._answer(number)
                ended = True
        return ended

    def _answer(self, number: int) -> None:
        queue = self.waiting.pop(number)
        with self._home.edge(f"queue:{queue}", f"barnabas:landing:{self._name}:{queue}"):
            self._links[queue][0].read_response()

    def end(self) -> None:
        """End all moves that are under way; what has just come stays in its landing list."""
        if not self.waiting:
            return
        pipe = self._home.client.pipeline(transaction=False)
        for queue in self.waiting.values():
            pipe.client_unblock(self._links[queue][1])
        pipe.execute()
        for number in list(self.waiting):
            self._answer(number)

    def drop(self) -> None:
        """Let go of all connections."""
        for link, _ in self._links.values():
            link.disconnect()
        self._links, self.waiting = {}, {}

    def close(self) -> None:
        """Let go of everything."""
        self.drop()
        self._bell.close()
        self._rope.close()


def _target(result: Result, number: int) -> str:
    """The key that a job goes to which has ended so; "" for none."""
    verdict = result.others.get(number)
    if isinstance(verdict, Again):
        return "retry" if verdict.at and verdict.payload is not None else f"queue:{result.part.topic}"
    return "dead" if isinstance(verdict, Dead) and verdict.payload is not None else ""


class RedisQueues:
    """The queues of one worker. What a process has in hand, it has in Redis too: nothing is lost with it."""

    atomic = None

    def __init__(
        self, home: "RedisBackend", queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any = None
    ) -> None:
        self.home = home
        self.runs: set[int] = set()  # jobs in hand that hold a slot as long as they run
        self._locked: dict[int, tuple[str, str]] = {}  # of those that hold any: the lock they took as they were enqueued, and id
        self._guard = guard
        self.weights = dict(queues) if isinstance(queues, Mapping) else dict.fromkeys(queues, 1)
        self.name = f"{HOST}:{os.getpid()}:{os.urandom(6).hex()}"  # as Sidekiq names its processes
        self.work: dict[int, tuple[str, bytes]] = {}  # what is in hand: number -> queue, payload
        self.landing = Landing(home, self.name)
        self.parts: dict[str, Part] = {}
        self.life = Life(home, self)
        self.wake, self.listener = self.landing.wake, listener
        self._order = QueueOrder(queues)
        self._claimed: Found = []
        self._ripe: list[str] = []  # batches that are worth a look
        self._limit = 0
        self._sure = True  # that we know what we have in hand; not after an answer that did not come
        self._shut: set[str] = set()
        self._crashes: dict[int, int] = {}  # of what is in hand
        self._suspects: list[tuple[Part, Row]] = []  # each is to run with nothing beside it
        self._alone: int | None = None
        self._closing = False
        self._left: list[Result] = []  # what has ended and cannot go where it belongs yet: somebody else's key is there
        try:
            self.life.join()
            self._assign()
            self.life.start()
        except BaseException:
            self.landing.close()
            with suppress(BackendError):  # what was begun may be known there
                home.recover(self.name)
            raise
        home.sources.append(self)

    def _assign(self) -> None:
        self.parts = {queue: Part(queue, -1, at) for at, queue in enumerate(self._order.names)}
        self.life.extend()
        self.listener.assigned(list(self.parts.values()))

    # Fetching.

    def fetch(self, limit: int, timeout: float) -> Found:
        self._limit = limit
        with self.home.edge():
            try:
                return self._fetch(timeout)
            except (RedisError, OSError, BackendError):
                self.landing.drop()
                self._sure = False
                raise

    def _fetch(self, timeout: float) -> Found:
        if self.life.lost():
            self._begin_anew()
        if not self._sure:
            self._look_up()
        if any(_target(r, row[0]) not in self.home.strange for r in self._left for row in r.rows):
            self.settle([])
        self._claimed += self._next_suspect()
        room, landing = self._room(), self.landing
        if not room and landing.waiting:  # what comes now is for others
            landing.end()
            self._claim(0, True)
        if self._claimed or not room:
            if not self._claimed:
                landing.wait(timeout)
            found, self._claimed = self._claimed, []  # only now: the server may go away at each of the lines above
            return found
        found = [] if landing.waiting else self._claim(room, True) or []
        if not found and not self._suspects and timeout > 0:
            landing.block([queue for queue in self._order.names if queue not in self._shut and self.parts[queue].room > 0])
            if landing.wait(min(timeout, BLOCK)):
                found = self._claim(room, True) or []
        return found or self._next_suspect()

    def _room(self) -> int:
        if self._closing or self._suspects or self._alone is not None or len(self._crashes) >= self.listener.size:
            return 0
        left = sum(len(result.rows) for result in self._left)
        return min(MOST, max(0, self._limit + left - len(self.work))) if left < MOST else 0

    def reopen(self, shut: set[str]) -> None:
        """These queues are paused, and no others (told by `life`)."""
        if shut != self._shut:
            self._shut = shut
            self.wake()

    def _claim(self, room: int, landed: bool, settled: Any = NOTHING, finished: Any = (), back: int = 0) -> Found | None:
        """Settle, and take up to `room` jobs (of those that landed first): one step of the server. None, and nothing is done,
        where a key that settled jobs go to is somebody else's."""
        home, names, now = self.home, self._order.next(), self.home.clock.now()
        today, first = time.strftime("%Y-%m-%d", time.gmtime(now)), home.reserve(room)
        free = {name: 0 if name in self._shut else max(0, min(room, self.parts[name].room)) for name in names}
        few = max(0, self.listener.size - len(self._crashes))
        sure, self._sure = self._sure, False
        alive, count, shut, jobs, crashes, ripe = home.script(
            "turn", self.name, now, today, *settled, room, first, int(landed), few, len(names), *chain(*free.items())
        )
        self._sure = sure
        if alive < 0:
            home.look(*map(text, count))
            return None
        for mine in (self.work, self._crashes) if self._crashes else (self.work,):
            for number in finished:
                mine.pop(number, None)
        if self._locked and finished:
            self._unlock(finished)
        self._ripe += map(text, ripe)
        if (overtaken := len(finished) - back - count) > 0:
            home.overtaken += overtaken
            log.warning("%d jobs were no longer ours when they had ended, and run again", overtaken)
        if not alive:
            self.life.forget()
            return []
        self._shut = {text(name) for name in shut} & self.parts.keys() if shut is not None else self._shut
        self._crashes.update(zip(crashes[::2], crashes[1::2], strict=True))
        found: Found = []
        for queue, payloads in zip(names, jobs, strict=True):
            if payloads:
                try:
                    found += self._take(queue, enumerate(payloads, first + 1), now)
                except BackendError:  # (of `_admit`) what we have of these is to be looked up
                    self._sure = False
                first += len(payloads)
        return found

    def _take(self, queue: str, jobs: Iterable[tuple[int, bytes]], now: float, since: float = 0.0) -> Found:
        part, rows, crashed, before = self.parts[queue], [], self._crashes, len(self.work)
        asks = marks = dict[int, Any]()
        if self._guard is not None:
            jobs, asks, marks = self._admit(queue, list(jobs), since or time.monotonic())
        for number, payload in jobs:
            self.work[number] = (queue, payload)
            try:
                said = _name(payload)
                jid = said.jid
                if said.lock_digest or number in asks:
                    self._locked[number] = (str(said.lock_digest), jid)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the handler says what is wrong with it
                jid = ""
            row: Row = (number, jid, payload, marks.get(number) if marks else None, now)
            if crashed and (count := crashed.get(number)):
                part.crashes[number] = count
                if count == CRASHES:
                    self._suspects.append((part, row))
                    continue
            rows.append(row)
        part.room -= len(self.work) - before
        return [(part, rows)] if rows else []

    def _admit(self, queue: str, jobs: list[tuple[int, bytes]], since: float) -> tuple[Any, dict[int, Any], dict[int, Any]]:
        """Take the slots that claimed jobs need, in one step: those jobs that may go on, what they have, and what their rows
        are to say. since: when that was (monotonic seconds), or may have been."""
        asked, marks, has = deque[list[tuple[int, Any]]](), dict[int, Any](), dict[int, Any]()
        gone, runs, soonest = set[int](), set[int](), list[float]()

        def page(some: list[tuple[int, bytes]]) -> list[Any]:
            asks: list[tuple[int, Any]] = []
            args: list[Any] = [self.name, queue, 0]
            for number, payload in some:
                if (ask := self._guard(payload)) is None:
                    continue
                if ask.fault:
                    marks[number] = marked(ask)
                    continue
                asks.append((number, ask))
                args += (number, ask.jid, ask.free, repr(ask.created), len(ask.needs), *[need.text for need in ask.needs])
            if asks:
                args[2] = len(asks)
                asked.append(asks)
            return args

        pages = filter(itemgetter(2), (page(jobs[first : first + PAGE]) for first in range(0, len(jobs), PAGE)))
        told = self.home.scripts("admit", pages) if len(jobs) > PAGE else [self.home.script("admit", *args) for args in pages]
        for soon, answers in told:
            soonest += [float(soon)] if soon else ()
            for (number, ask), answer in zip(asked.popleft(), answers, strict=True):
                if answer == 0:
                    gone.add(number)
                elif answer != 1 or ask.created == VAIN:
                    marks[number] = marked(ask, None if answer == 1 else text(answer))
                elif ask.needs:
                    has[number] = ask
                    for need in ask.needs:
                        if need.span:
                            marks[number] = marked(ask, since=since)
                        else:
                            runs.add(number)
        for number in gone if self._crashes else ():
            self._crashes.pop(number, None)
        if runs:
            self.runs |= runs
            self.life.watch()
        self.home.due(self.home.clock.now() + min(soonest, default=FOREVER))
        return [job for job in jobs if job[0] not in gone] if gone else jobs, has, marks

    def _unlock(self, numbers: Iterable[int]) -> None:
        """These are no longer in our hands."""
        for number in numbers:
            self._locked.pop(number, None)
        if self.runs:
            self.runs.difference_update(numbers)
            if not self.runs:
                self.life.watch()

    def _locks(self, over: Sequence[int], again: Sequence[int], back: Iterable[int]) -> list[Any]:
        """What a script is to know of the locks and slots of those that have them: jobs that are over, or to run again, or that
        go back, begun or not."""
        if not self._locked:
            return [0, 0]
        mine = [part for n in over if self._locked[n][0] for part in (f"{n}:{self.work[n][0]}", *self._locked[n])]
        runs = [n for n in back if n in self._locked]
        begun = set[int]().union(*(part.begun for part in self.parts.values())) if runs else ()
        fresh, torn = [n for n in runs if n not in begun], [n for n in runs if n in begun]
        said: list[Any] = [len(mine) // 3, *mine, 3, "back", len(fresh), *fresh, "front", len(torn), *torn]
        return [*said, "end", len(over) + len(again), *over, *again]

    def _next_suspect(self) -> Found:
        """A job that was in hand at three crashes, once nothing else is; Redis is told that it runs alone."""
        if not self._suspects or self._alone is not None or len(self.work) > len(self._suspects):
            return []
        part, row = self._suspects[0]
        self.home.client.set(self.home.key(f"barnabas:alone:{self.name}"), row[0])
        self._alone = row[0]
        del self._suspects[0]
        return [(part, [row])]

    def _look_up(self) -> None:
        """After an answer that did not come: what is in our hands, by Redis's account."""
        held = self.home.client.hgetall(self.home.key(f"barnabas:work:{self.name}"))
        missed: dict[str, list[tuple[int, bytes]]] = {}
        for field, payload in held.items():
            number, _, queue = text(field).partition(":")
            if int(number) not in self.work:
                missed.setdefault(queue, []).append((int(number), payload))
        for queue, jobs in missed.items():
            self._claimed += self._take(queue, sorted(jobs), self.home.clock.now(), float("-inf"))
        self._sure = True

    def _begin_anew(self) -> None:
        """Our claim on what we hold ended, or we were taken for dead: settle what we still can, give back the rest."""
        self.life.join()  # raises while Redis is away
        log.warning("%s: this process was silent for too long; what it has not finished goes back to its queues", self.name)
        self._closing = True
        try:
            self.listener.revoked(list(self.parts.values()))
            if self.runs & self.home.in_work():  # others are to have its lock only when it has ended
                log.critical("%s: the locks of unique jobs could not be renewed while they ran; this process ends", self.name)
                os._exit(1)
            self.landing.drop()
            _, self._sure = self.home.recover(self.name)
        finally:
            self._closing = False
        self.work, self._claimed, self._suspects, self._crashes, self._alone, self._left = {}, [], [], {}, None, []
        self._unlock([*self._locked])
        self.life.join()
        self._assign()

    # Settling.

    def settle(self, results: Sequence[Result]) -> None:
        """Take what is finished out of our hands, to nowhere or into a set, and claim what there is room for."""
        given, results, left = results, [*self._left, *results], list[Result]()
        done, later, dead = list[str](), list[Any](), list[Any]()
        last: dict[int, bytes | None] = {}  # goes behind all others, as this
        back, finished, over, again = (list[int]() for _ in range(4))  # over: of those with locks, or slots, for good; or again
        batches, targets = members_ended(results), set[str]()
        ended: list[Any] = [len(batches)]  # what a script is to know of those that are of batches
        for (how, batch), some in batches.items():
            some = [each for each in some if each[0] in self.work]
            ended += (batch, how, len(some), *(f"{n}:{self.work[n][0]}" for n, _ in some), *(jid for _, jid in some))
        soonest = FOREVER
        for result in results:
            others, tail = result.others, f":{result.part.topic}"
            if not others:
                numbers = [row[0] for row in result.rows]
                finished += numbers
                done += [f"{number}{tail}" for number in numbers]
                over += [number for number in numbers if number in self._locked] if self._locked else ()
                continue
            ways, strange = {row[0]: _target(result, row[0]) for row in result.rows}, self.home.strange
            if stay := [row for row in result.rows if ways[row[0]] in strange]:
                left.append(result._replace(rows=stay))
            for number, target in ways.items():
                if target in strange:
                    continue
                verdict: Any = others.get(number)
                finished.append(number)
                if number in self._locked and not (isinstance(verdict, Again) and verdict.payload is None):
                    (again if isinstance(verdict, Again) else over).append(number)
                targets |= {target} if target else set()
                if target == "retry":
                    later += (f"{number}{tail}", repr(float(verdict.at)), verdict.payload)
                    soonest = min(soonest, verdict.at)
                elif target == "dead":
                    dead += (f"{number}{tail}", verdict.payload)
                elif not target:
                    done.append(f"{number}{tail}")
                elif verdict.payload is None:  # the process is to be quiet, or ends
                    back.append(number)
                else:
                    last[number] = verdict.payload
        counted = [sha1(self.work[n][1]).hexdigest() for n in finished if n in self._crashes and n in self.work and n not in back]
        fields = self._fields([*back, *last], last)
        settled = [len(targets), *targets, *ended, *self._locks(over, again, back), len(done), *done, len(later) // 3, *later]
        settled += (len(dead) // 2, *dead, len(fields) // 3, *fields, len(counted), *counted)
        room = 0 if self._room() == 0 else min(MOST, max(0, self._limit - len(self.work) + len(finished)))
        with self.home.edge():
            found = self._claim(room, False, settled, finished, len(back) + len(last))
        if found is None:
            return self.settle(given)
        self._claimed += found
        self._left = left
        tell(self.home.ripe, self._ripe, results)
        self._ripe = []
        if self._alone in finished:
            self._alone = None
        self.home.due(soonest)

    def close(self) -> None:
        """Give back what has not begun, to the front of its queue. What a handler is still in goes back last of all, when
        the process ends (`leave`): nobody else is to begin it meanwhile."""
        self._closing = True
        running = self.home.in_work() & self.work.keys()
        back = self.work.keys() - running
        try:
            with self.home.edge():
                self.landing.end()
                self._claim(0, True, (0, 0, *self._locks((), (), back), 0, 0, 0, len(back), *self._fields(back), 0))
                if not running and not self.life.quiet():  # a quiet process is still to be seen, and to be stopped
                    self.leave()
        finally:
            self.landing.close()

    def _fields(self, numbers: Iterable[int], last: Mapping[int, bytes | None] = {}) -> list[Any]:
        """Where these stand in Redis's account of what we have, their queues, and as what those go to the end that do: the
        youngest first."""
        mine = sorted((n for n in numbers if n in self.work), reverse=True)
        return [part for n in mine for part in (f"{n}:{self.work[n][0]}", self.work[n][0], last.get(n, b""))]

    def leave(self) -> None:
        """Be no longer a process that has anything."""
        if self in self.home.sources:
            self.home.sources.remove(self)
            self.life.stop()
            stays = bool(self.runs & self.home.in_work())  # what others may not begin before we have ended
            for tries in (1, 2):  # a line that was cut is no reason to keep others waiting
                try:
                    self.home.recover(self.name, stays=stays)
                    break
                except BackendError as error:
                    if tries == 2:
                        log.warning("leaving was not possible; others take back what is left within 45 s: %s", error)
            if not stays:
                self._unlock([*self._locked])
