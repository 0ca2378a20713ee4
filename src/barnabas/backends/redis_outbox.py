"""Jobs on their way to Redis. Who waits for a future sends what is pending himself, in his own thread: that is a third of
the time that handing it to another thread takes; a thread of its own sends what nobody waits for, many at a time."""

import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import hiredis
import msgspec
from redis.exceptions import ConnectionError, ResponseError

from barnabas.backends.redis_admin import SETS
from barnabas.backends.shares import Room
from barnabas.errors import SendError, told
from barnabas.jobs.payload import PayloadError, enqueued
from barnabas.jobs.unique import answer, ousted
from barnabas.message import LockedJob, Member, OutgoingJob

if TYPE_CHECKING:
    from barnabas.backends.redis import RedisBackend

log = logging.getLogger("barnabas")
GROUP_COUNT, GROUP_BYTES = 1000, 1 << 20  # jobs that leave in one go
PAUSES = (0.02, 1.0)  # seconds between tries while Redis is away: the first, and the longest
LINGER = 0.001  # seconds that sends gather while they come thick
NEAR = 0.0001  # seconds in which a server may answer that is worth looking out for
DOZE = 0.005  # seconds between its looks while whoever sends waits for it, and so stores it himself
AWAKE = 0.05  # seconds without a send after which the thread has to be woken
_pack: Callable[[tuple[str | bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
_queue_at = itemgetter(0, 2)
# Refusals that pass: the same command is good a little later, or on another connection.
PASSING = ("READONLY", "LOADING", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED", "TRYAGAIN", "BUSY", "NOSCRIPT")


class Command(msgspec.Struct, gc=False):
    """One command that stores jobs: its bytes, the number of its answers, and when the first of the jobs is due."""

    data: bytes
    answers: int
    jobs: Sequence[OutgoingJob]
    due: float | None = None
    args: tuple[Any, ...] = ()  # of the script that takes a lock


class Wire:
    """A connection that redis-py makes and checks (TLS, Sentinel, user, database), and its bare socket for the answers: to
    use it by redis-py takes longer than the server does. A lost one is made anew with the next `send`."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self._sock: Any = None
        self.said: Any = None  # the last answer

    def send(self, data: bytes) -> None:
        """Send packed commands."""
        if self._sock is None:
            self.link.connect()  # (a Sentinel's connection finds its master here only)
            self._sock, self._reader = self.link._sock, hiredis.Reader()
            self._plain, self._misses = type(self._sock) is socket.socket, 0  # no TLS
            self._skip = int(not self._plain)
            if self._plain and (within := self._sock.gettimeout()):
                # The system keeps the time then: Python would look with a call of its own before each one.
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(within), int(within % 1 * 1e6)))
                self._sock.settimeout(None)
        self.write(data)

    def write(self, data: bytes) -> None:
        """Send packed commands on the connection there is."""
        try:
            self._sock.sendall(data)
        except BlockingIOError:
            raise TimeoutError("timeout writing to socket") from None

    def refused(self, count: int) -> ResponseError | None:
        """Read so many answers; why the last of those was refused that were."""
        reader, error = self._reader, None
        while count:
            answer = reader.gets()
            if answer is False:
                data = self._receive()
                if not data:
                    raise ConnectionError("the server closed the connection")
                reader.feed(data)
            else:
                count -= 1
                self.said = answer
                if type(answer) is hiredis.ReplyError:
                    error = ResponseError(str(answer))
        return error

    def _receive(self) -> bytes:
        """Something of an answer. A server that is near gives one sooner than a thread falls asleep and is woken again (on a
        virtual machine that takes 100 us): look for it, and let others go first meanwhile. Where that was in vain, look ever
        less often: over a network, or where other threads keep the interpreter busy."""
        sock, now = self._sock, time.monotonic
        if not self._skip:
            end = now() + NEAR
            while now() < end:
                try:
                    data: bytes = sock.recv(65536, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    os.sched_yield()
                else:
                    self._misses = 0
                    return data
            self._misses = self._skip = min(2 * self._misses + 1, 255)
        elif self._plain:
            self._skip -= 1
        try:
            return sock.recv(65536)  # type: ignore[no-any-return]
        except BlockingIOError:
            raise TimeoutError("timeout reading from socket") from None

    def drop(self) -> None:
        """Let go of it; it may be in the middle of something."""
        self.link.disconnect()
        self._sock = None


class Outbox:
    """What waits to be stored. `send` from any thread; one connection, which one thread at a time uses."""

    def __init__(self, home: "RedisBackend", settings: Any) -> None:
        self._home = home
        self._lock = lock = threading.Lock()
        self._room = Room(home.where.name, "jobs", settings, lambda: self._failed, lock)
        self._bell = threading.Condition(lock)  # what the thread waits for
        self._last = 0.0  # when somebody sent last
        self._pending: deque[tuple[float, Sequence[OutgoingJob]]] = deque()  # until when they may take, jobs
        self._gone = 0  # so many of the first of those have left
        self._asleep = self._hurry = self._dozes = self._helped = False  # the thread; and what it is told
        self._closed = False
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        # What only the holder of the line touches:
        self._line = threading.Lock()
        self._wire: Wire | None = None
        self._batch: tuple[list[Command], float, int, int] = ([], 0.0, 0, 0)  # to be stored, until when, of jobs, bytes
        self._failed: BaseException | None = None

    def send(self, jobs: Sequence[OutgoingJob]) -> None:
        """Take these. Raises BufferFull when there was no room for them for `send_timeout` seconds."""
        if self._closed or self._home.closed:
            raise SendError(f"{self._home.where.name} was closed; the app opens it again at its next use")
        size = len(jobs[0][1]) if len(jobs) == 1 else sum([len(job[1]) for job in jobs])
        with self._lock:
            self._room.enter(len(jobs), size)
            future = jobs[-1][4]
            if future is not None and future._hand is None:
                future._hand = self
            self._last = now = time.monotonic()
            self._pending.append((now + self._room.timeout, jobs))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="barnabas-send", daemon=True)
                self._thread.start()
            elif self._asleep or (self._dozes and now - self._pending[0][0] + self._room.timeout >= LINGER):
                self._dozes = False
                self._bell.notify()

    def awaited(self, future: Any, blocking: bool) -> None:
        """Somebody is about to wait for this future: store what is pending in his thread, after whoever is at it."""
        if blocking and self._failed is None and (self._line.acquire(False) or self._line.acquire(timeout=0.05)):
            try:
                while not future.done() and self._push() is None and self._pending:
                    pass
            finally:
                self._line.release()
            self._helped = True
        if not future.done():
            self._wake()

    def _wake(self) -> None:
        """Let the thread go at once, as somebody waits."""
        with self._lock:
            self._hurry = True
            self._bell.notify()

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._bell:
                while not self._batch[0] and not self._hurry and not (self._closed and self._pending):
                    if self._closed:
                        break
                    now = time.monotonic()
                    age = now - self._pending[0][0] + self._room.timeout if self._pending else 0.0
                    if (self._asleep and self._pending) or age >= LINGER:
                        break
                    self._asleep = not self._pending and now > self._last + AWAKE
                    # Where each sends what he waits for, to look every millisecond is in their way.
                    self._dozes, self._helped = self._helped and not self._pending, False
                    self._bell.wait(None if self._asleep else DOZE if self._dozes else LINGER - age)
                self._asleep = self._hurry = self._dozes = False
                if self._closed and not self._pending and not self._batch[0]:
                    break
            with self._line:
                error = self._push()
            pause = 0.0 if error is None else min(PAUSES[1], max(PAUSES[0], 2 * pause))
            if pause:
                self._end.wait(pause)
        if self._wire is not None:
            self._wire.drop()

    def _push(self) -> BaseException | None:
        """Store the next of what is pending; the error if it has to be tried again. Hold the line."""
        commands, deadline, count, size = self._batch
        if not commands:
            with self._lock:
                if not self._pending:
                    return None
                jobs, deadline, size = self._take()
            count, commands = len(jobs), self._made(jobs)
            self._batch = (commands, deadline, count, size)
        error: Any
        wire = self._wire
        try:
            if wire is None:
                wire = self._wire = Wire(self._home.where.pool.make_connection())
            error = self._attempt(wire, commands)
        except Exception as lost:
            error = lost
        except BaseException:  # Ctrl-C: answers are still to come
            if wire is not None:
                wire.drop()
            raise
        if commands:
            self._again(commands, deadline, error)
        elif error is None and self._failed is not None:
            self._failed = None
            log.warning("%s: jobs are stored again", self._home.where.name)
        if not commands:
            self._room.leave(count, size)
            return None
        return error  # type: ignore[no-any-return]

    def _again(self, commands: list[Command], deadline: float, error: BaseException) -> None:
        """Not all was stored: look for the server anew; too late, give up."""
        where = self._home.where.name
        if self._wire is not None:
            self._wire.drop()
        if self._failed is None:
            log.error("%s: jobs cannot be stored, trying again: %s", where, error)
        self._failed = error
        if time.monotonic() > deadline or self._end.is_set():
            why = self._home.explain(error)
            for command in commands:
                for job in command.jobs:
                    self._lose(job, SendError(f"the job was not stored within {self._room.timeout} s: {why}"))
            commands.clear()

    def _take(self) -> tuple[Sequence[OutgoingJob], float, int]:
        """What leaves together, until when the oldest of it may take, its bytes. Hold the lock."""
        pending, gone = self._pending, self._gone
        deadline, jobs = pending[0]
        size = 0
        if len(jobs) == 1 == len(pending):
            pending.popleft()
            return jobs, deadline, len(jobs[0][1])
        taken: list[OutgoingJob] = []
        while pending and len(taken) < GROUP_COUNT and size < GROUP_BYTES:
            jobs = pending[0][1]
            batch = jobs[gone : gone + GROUP_COUNT - len(taken)]
            taken += batch
            size += sum([len(job[1]) for job in batch])
            gone += len(batch)
            if gone == len(jobs):
                pending.popleft()
                gone = 0
        self._gone = gone
        return taken, deadline, size

    def _made(self, jobs: Sequence[OutgoingJob]) -> list[Command]:
        """The commands that store these; a job of which none can be made is lost by that, and no other."""
        try:
            return self._commands(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._lose(jobs[0], SendError(f"the job was not stored: {told(error)}"))
                return []
        return [command for job in jobs for command in self._made([job])]

    def _commands(self, jobs: Sequence[OutgoingJob]) -> list[Command]:
        """The commands that store these."""
        first = jobs[0]
        if len(jobs) == 1 and first[2] is None and type(first) is OutgoingJob:
            return [Command(_push_command(self._home.prefix, first[0], [first[1]]), 2, jobs)]
        if set(map(_queue_at, jobs)) == {(first[0], None)} and set(map(type, jobs)) == {OutgoingJob}:
            return [Command(_push_command(self._home.prefix, first[0], [job[1] for job in jobs]), 2, jobs)]
        now, key = self._home.clock.now(), self._home.key
        queues: dict[str, tuple[list[bytes], list[OutgoingJob]]] = {}
        later: list[OutgoingJob] = []
        notes: list[Command] = []
        commands: list[Command] = []
        joining: dict[str, list[OutgoingJob]] = {}

        def pushing(queue: str, payloads: list[bytes], stored: list[OutgoingJob]) -> Command:
            return Command(_push_command(self._home.prefix, queue, payloads), 2, stored)

        for job in jobs:
            queue, payload, at, name, _ = job
            if type(job) is Member:
                joining.setdefault(job.batch, []).append(job)
                continue
            if at is not None:
                if not queue:
                    notes.append(Command(self._home.noting(name, payload, at), 2, [job]))
                    continue
                if at > now and type(job) is not LockedJob:
                    later.append(job)
                    continue
                with suppress(PayloadError):  # it was built just now
                    payload = enqueued(payload, now) if at <= now else payload
            if type(job) is LockedJob:
                if queue in queues:  # in the order of sending
                    commands.append(pushing(queue, *queues.pop(queue)))
                commands.append(self._locking(job, payload, now))
                continue
            found = queues.get(queue)
            if found is None:
                found = queues[queue] = ([], [])
            found[0].append(payload)
            found[1].append(job)
        commands += [pushing(queue, payloads, stored) for queue, (payloads, stored) in queues.items()]
        commands += [self._joining(batch, members, now) for batch, members in joining.items()]
        if later:
            pairs = [part for job in later for part in (repr(float(job[2] or 0)), job[1])]
            data = _pack(("ZADD", key("schedule"), *pairs))
            commands.append(Command(data, 1, later, min(job[2] or 0 for job in later)))
        return commands + notes

    def _joining(self, batch: str, jobs: list[OutgoingJob], now: float) -> Command:
        """The command that stores the jobs of a batch, their ids first: it may not end before them."""
        key, queues, later = self._home.key, dict[str, list[bytes]](), list[Any]()
        for queue, payload, at, _, _ in jobs:
            if at is not None and at > now:
                later += (repr(float(at)), payload)
            elif queue:
                queues.setdefault(queue, []).append(payload if at is None else enqueued(payload, now))
        data = [_pack(("SADD", key(f"barnabas:batch:{batch}:open"), *(job[3] for job in jobs)))]
        data += [_push_command(self._home.prefix, queue, payloads) for queue, payloads in queues.items()]
        data += [_pack(("ZADD", key("schedule"), *later))] if later else []
        answers = 1 + 2 * len(queues) + bool(later)
        return Command(b"".join(data), answers, jobs, min(map(float, later[::2]), default=None))

    def _locking(self, job: LockedJob, payload: bytes, now: float) -> Command:
        """The command that stores a job and takes its lock, if that is free."""
        claim, due = job.lock, job.at if job.at is not None and job.at > now else None
        ends = "" if claim.until is None else str(int(1000 * claim.until))
        args: tuple[Any, ...] = (claim.key, job.jid, repr(now), ends, claim.on_conflict, job.queue)
        args = (*args, "" if due is None else repr(float(due)), payload, claim.buried)
        return Command(self._storing(job, args), 1, [job], due, args)

    def _storing(self, job: Any, args: tuple[Any, ...]) -> bytes:
        told = self._told(ousted(job, self._home.clock.now()) if job.lock.buried else ())
        return _pack(self._home.eval("store", *args, "", "", "", "", "", *told))

    def _told(self, notes: Sequence[OutgoingJob]) -> list[Any]:
        """Notes as the script takes them."""
        return [len(notes), *(part for name in notes for part in (name.jid, name.payload, self._home.left(name.at or 0.0)))]

    def _replace(self, command: Command, holder: bytes) -> bytes:
        """Store a job in the place of the one that holds its lock, wherever that waits; the id of one that could not be replaced.
        To look for it in the script would keep all others waiting."""
        for _ in range(3):  # it may move meanwhile
            found = next((job for job in self._home.find_jobs() if job.jid == holder.decode()), None)
            if found is not None and found.state in ("work", "dead"):
                break
            if found is not None:
                kind, queue, payload, *at = found.ref
                told = self._told(ousted(command.jobs[0], self._home.clock.now(), found.payload))  # type: ignore[arg-type]
                where = (SETS.get(kind, ""), queue, payload, (*at, "")[0])
                holder = self._home.script("store", *command.args, holder, *where, *told)
                if not holder:
                    break
        return holder

    def _attempt(self, wire: Wire, commands: list[Command]) -> BaseException | None:
        """Send commands and read their answers; returns why those that are still in the list are to be tried again. What is
        done is taken off at once: a lost connection must repeat as little as can be."""
        wire.send(commands[0].data if len(commands) == 1 else b"".join([command.data for command in commands]))
        at, last = 0, None
        while at < len(commands):
            command = commands[at]
            error = wire.refused(command.answers)
            if error is not None and str(error).startswith(PASSING):
                last = error
                if command.args:  # the server may have lost the script
                    self._home.known.discard("store")
                    command.data = self._storing(command.jobs[0], command.args)
                at += 1
                continue
            said = wire.said
            if error is None and command.args:
                self._home.known.add("store")
                if said and command.args[4] == "replace":
                    said = self._replace(command, said)
            del commands[at]
            for job in command.jobs:
                if error is not None:
                    self._lose(job, SendError(f"the job was not stored: {self._home.explain(error)}"))
                elif job[4] is None:
                    continue
                elif type(job) is LockedJob and said:
                    job[4].settle(answer(job, said.decode()))
                else:
                    job[4].resolve(job[3])
            if command.due is not None:
                self._home.due(command.due)
        return last

    def _lose(self, job: OutgoingJob, error: SendError) -> None:
        """A job is not stored; and then none that was sent after it in the same call, whose future speaks for all."""
        with self._lock:
            rest = self._pending.popleft()[1][self._gone :] if self._gone else ()
            self._gone = 0
            self._room.count -= len(rest)
            self._room.size -= sum([len(other[1]) for other in rest])
        for lost in (job, *rest):
            if lost[4] is not None:
                lost[4].fail(error)
            else:
                log.error("job %s for queue %r is not stored: %s", lost[3], lost[0], error)

    def flush(self, timeout: float) -> int:
        """Wait until all is stored, at most so many seconds; the number of jobs that are not."""
        if timeout:
            self._wake()
        return self._room.emptied(timeout)

    def close(self) -> None:
        """Store what is waiting, at most `send_timeout` seconds, and say what could not be."""
        left = self.flush(self._room.timeout)
        if left:
            log.error("%s: %d jobs could not be stored before the end: %s", self._home.where.name, left, self._failed)
        self._end.set()
        with self._lock:
            self._closed = True
            self._bell.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)


def _push_command(prefix: str, queue: str, payloads: list[bytes]) -> bytes:
    """LPUSH, in half the time that hiredis.pack_command takes, and SADD before it: a queue that somebody deleted is to be
    seen again."""
    seen, push = _heads(prefix, queue)
    if len(payloads) == 1:
        return b"%b*3%b$%d\r\n%b\r\n" % (seen, push, len(payloads[0]), payloads[0])
    return b"".join([seen, b"*%d" % (2 + len(payloads)), push, *[b"$%d\r\n%b\r\n" % (len(job), job) for job in payloads]])


@lru_cache(1000)
def _heads(prefix: str, queue: str) -> tuple[bytes, bytes]:
    return _pack(("SADD", f"{prefix}queues", queue)), _pack(("LPUSH", f"{prefix}queue:{queue}")).removeprefix(b"*2")
