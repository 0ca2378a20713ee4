"""`redis://HOST:PORT/DB`: jobs in Sidekiq's keys and bytes (facts: sidekiq.md 1.0 to 1.5), shared with Ruby both ways.

What Sidekiq has no word for stands under `barnabas:`: `work:<process>` (a hash of what the process has in hand, number and
queue -> payload), `landing:<process>:<queue>` (where its blocking moves go), `workers` (process -> its queues),
`alive:<process>` (its sign of life), `alone:<process>` (the number of a job that runs alone), `crashes` (a digest of the
payload -> how often its process died), `control`. A job is in a queue, in a set, or in exactly one process's hands.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from barnabas.backends.redis_admin import RedisAdmin
from barnabas.errors import BackendError, BufferFull, SendError, SettingError
from barnabas.jobs.payload import PayloadError, enqueued
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Listener, Source

try:
    import hiredis
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError
    from redis.retry import Retry
    from redis.sentinel import Sentinel
except ImportError as error:
    raise SettingError(f"redis:// needs redis-py and hiredis ({error}): pip install 'barnabas[redis]'") from None

log = logging.getLogger("barnabas")
GROUP_COUNT, GROUP_BYTES = 1000, 1 << 20  # jobs that leave in one go
PAUSES = (0.02, 1.0)  # seconds between tries while Redis is away: the first, and the longest
# Answers that say "not here, not now": the same command is good a little later, or on another connection.
LATER = (ReadOnlyError, BusyLoadingError)
LATER_WORDS = ("NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED", "TRYAGAIN", "BUSY")
_open: "weakref.WeakSet[RedisBackend]" = weakref.WeakSet()
_inherited: list[Any] = []  # a forked child keeps its parent's connections untouched, here


def open_backend(url: str, settings: Any, clock: Any) -> "RedisBackend":
    """Connect to a URL's server, and refuse what it must not be."""
    backend = RedisBackend(url, settings, clock)
    _open.add(backend)
    return backend


class Where:
    """A URL taken apart: how to connect, and what may be said of it in a log (no user, no password)."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        parts = urlsplit(url)
        query, more = dict(parse_qsl(parts.query)), dict(options)
        own = {name: more.pop(name, query.pop(name, None)) for name in ("prefix", "sentinel", "allow_eviction")}
        self.prefix: str = own["prefix"] or ""
        self.evicts = str(own["allow_eviction"] or "").lower() in ("1", "true", "yes")
        hosts = parts.netloc.rpartition("@")[2]
        self.name = f"redis at {hosts}{parts.path.rstrip('/')}" + (f" ({self.prefix}*)" if self.prefix else "")
        more = {"retry": Retry(NoBackoff(), 0), "protocol": 2, "socket_keepalive": True, **more}  # we repeat what may be
        if own["sentinel"]:
            head = parts.netloc[: len(parts.netloc) - len(hosts)]
            plain = urlunsplit((parts.scheme, f"{head}localhost", parts.path, urlencode(query), ""))
            base = redis.ConnectionPool.from_url(plain).connection_kwargs
            given = {k: v for k, v in base.items() if k in ("username", "password", "db")} | more
            addresses = [(host, int(port or 26379)) for host, _, port in (h.partition(":") for h in hosts.split(","))]
            sentinel: Any = Sentinel  # (it has no types)
            self.pool = sentinel(addresses, **given, ssl=parts.scheme == "rediss").master_for(own["sentinel"]).connection_pool
        else:
            clean = urlunsplit(parts._replace(query=urlencode(query)))
            self.pool = redis.ConnectionPool.from_url(clean, **more)


class RedisBackend(RedisAdmin):
    """One server's jobs, as this process sees them."""

    def __init__(self, url: str, settings: Any, clock: Any) -> None:
        self.url = url
        self.closed = False
        self.clock = clock
        try:
            self.where = Where(url, settings.redis)
        except (ValueError, TypeError) as error:
            raise SettingError(f"the redis URL or an option in [redis] is not one: {error}") from None
        self.prefix: str = self.where.prefix
        self.client = redis.Redis(connection_pool=self.where.pool)
        text = files("barnabas.backends").joinpath("redis.lua").read_text()
        head, *scripts = text.split("\n--- ")
        self._scripts = {name: self.client.register_script(head + body) for name, _, body in (s.partition("\n") for s in scripts)}
        self._send_timeout: float = settings.send_timeout
        self._most = (settings.buffer_messages, settings.buffer_bytes)
        self._room = threading.Condition()
        self._pending: deque[tuple[float, Sequence[OutgoingJob]]] = deque()
        self._split = False  # the first of those is the rest of a call's, the beginning of which has left
        self._waiting = [0, 0]  # jobs and bytes in the buffer
        self._failed: BaseException | None = None
        self._sender: threading.Thread | None = None
        self._number = 0
        self._end = threading.Event()
        self._watchers: list[Callable[[], None]] = []
        self.boxes: list[array[int]] = []
        super().__init__()
        self._check()

    def key(self, name: str) -> str:
        """A key as it is stored."""
        return f"{self.prefix}{name}"

    @contextmanager
    def edge(self) -> Iterator[None]:
        """The driver's errors become ours."""
        try:
            yield
        except RedisError as error:
            if isinstance(error, LATER):
                self.where.pool.disconnect(inuse_connections=False)  # a failover: look for the new master
            raise explain(self.where.name, error) from error

    def script(self, name: str, *args: Any) -> Any:
        """Run a script of redis.lua."""
        with self.edge():
            return self._scripts[name](args=(self.prefix, *args))

    def _check(self) -> None:
        """Refuse a server on which jobs would not be safe; say what might make them so."""
        with self.edge():
            info: dict[str, Any] = self.client.info()
            version = str(info.get("redis_version", "0"))
            if tuple(int(n) for n in version.split(".")[:2]) < (6, 2):
                raise BackendError(f"{self.where.name} is version {version}; jobs need Redis 6.2, or Valkey")
            if info.get("cluster_enabled"):
                raise BackendError(
                    f"{self.where.name} is a Redis Cluster, and jobs cannot move between its nodes in one step; use one "
                    "server, or Sentinel: redis://HOST:26379,HOST:26379/0?sentinel=NAME"
                )
            policy = info.get("maxmemory_policy", "noeviction")
            if policy != "noeviction" and not self.where.evicts:
                raise BackendError(
                    f"{self.where.name} has maxmemory-policy {policy}: it would throw jobs away when memory is short; set it to "
                    "noeviction, or say ?allow_eviction=true in the URL if that may be"
                )
            if not info.get("aof_enabled"):
                saves: Any = None
                with suppress(RedisError):  # a hosted one may not say
                    saves = self.client.config_get("save").get("save")
                how = "keeps nothing on disk: a restart loses all jobs" if saves == "" else "saves from time to time only"
                log.warning("%s %s; set appendonly yes for jobs that must not be lost", self.where.name, how)

    # The sink.

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        if self.closed:
            raise SendError(f"{self.where.name} was closed; the app opens it again at its next use")
        count, size = len(outgoing), 0
        for out in outgoing:
            if len(out) == 7:
                self._refuse_topics()
            size += len(out[1])  # type: ignore[arg-type]
        with self._room:
            waiting, (most, most_bytes) = self._waiting, self._most
            if waiting[0] and (waiting[0] + count > most or waiting[1] + size > most_bytes):
                self._wait_for_room(count, size)
            waiting[0] += count
            waiting[1] += size
            self._pending.append((time.monotonic() + self._send_timeout, outgoing))  # type: ignore[arg-type]
            if self._sender is None:
                self._sender = threading.Thread(target=self._run_sender, name="barnabas-send", daemon=True)
                self._sender.start()
            self._room.notify_all()

    def _refuse_topics(self) -> None:
        raise BackendError(
            f"{self.where.name} keeps jobs, not topics; give topics a home of their own: events=\"sqlite:///FILE.db\" or kafka://"
        )

    def _wait_for_room(self, count: int, size: int) -> None:
        """On an event-loop thread nobody may block: twice the limit is the end there."""
        import asyncio

        timeout, waiting, (most, most_bytes) = self._send_timeout, self._waiting, self._most
        if asyncio._get_running_loop() is not None:
            if waiting[0] + count <= 2 * most and waiting[1] + size <= 2 * most_bytes:
                return
            timeout = 0.0
        room = lambda: not waiting[0] or (waiting[0] + count <= most and waiting[1] + size <= most_bytes)  # noqa: E731
        if not self._room.wait_for(room, timeout):
            why = f" (the last try failed: {self._failed})" if self._failed else ""
            raise BufferFull(
                f"the send buffer of {self.where.name} was full for {timeout} s: {waiting[0]} jobs, {waiting[1]} bytes wait"
                f"{why}; send slower, or raise buffer_messages, buffer_bytes or send_timeout"
            )

    def _run_sender(self) -> None:
        link = self.where.pool.make_connection()
        while True:
            with self._room:
                while not self._pending:
                    if self.closed:
                        link.disconnect()
                        return
                    self._room.wait()
                jobs, deadline = self._take()
            self._deliver(link, jobs, deadline)
            with self._room:
                self._waiting[0] -= len(jobs)
                self._waiting[1] -= sum([len(job[1]) for job in jobs])
                self._room.notify_all()

    def _take(self) -> tuple[list[OutgoingJob], float]:
        """What leaves together, and until when the oldest of it may take. Hold the condition."""
        jobs: list[OutgoingJob] = []
        deadline, size, pending = self._pending[0][0], 0, self._pending
        while pending and len(jobs) < GROUP_COUNT and size < GROUP_BYTES:
            until, batch = pending.popleft()
            room = GROUP_COUNT - len(jobs)
            self._split = len(batch) > room
            if self._split:
                pending.appendleft((until, batch[room:]))
                batch = batch[:room]
            jobs += batch
            size += sum([len(job[1]) for job in batch])
        return jobs, deadline

    def _deliver(self, link: Any, jobs: list[OutgoingJob], deadline: float) -> None:
        """Store these, however often that has to be tried until the deadline."""
        left, pause = self._commands(jobs), PAUSES[0]
        while left:
            error: BaseException | None
            try:
                error = self._attempt(link, left)
            except (RedisError, OSError) as lost:
                error = lost
            if not left:
                if self._failed is not None:
                    self._failed = None
                    log.warning("%s: jobs are stored again", self.where.name)
                return
            link.disconnect()
            if self._failed is None:
                log.error("%s: jobs cannot be stored, trying again: %s", self.where.name, error)
            self._failed = error
            if time.monotonic() > deadline or self._end.is_set():
                why = explain(self.where.name, error) if isinstance(error, RedisError) else error
                for command in left:
                    for job in command[-1]:
                        self._fail(job, SendError(f"the job was not stored within {self._send_timeout} s: {why}"))
                return
            self._end.wait(pause)
            pause = min(PAUSES[1], 2 * pause)

    def _commands(self, jobs: list[OutgoingJob]) -> list[list[Any]]:
        """The commands that store these: [what is sent, answers that it has, the jobs it stores]."""
        now, key = self.clock.now(), self.key
        queues: dict[str, tuple[list[bytes], list[OutgoingJob]]] = {}
        later: tuple[list[Any], list[OutgoingJob]] = ([], [])
        for job in jobs:
            queue, payload, at, _, _ = job
            if at is not None:
                if at > now:
                    later[0].extend((repr(at), payload))
                    later[1].append(job)
                    continue
                with suppress(PayloadError):  # it was built just now
                    payload = enqueued(payload, now)
            found = queues.get(queue)
            if found is None:
                found = queues[queue] = ([], [])
            found[0].append(payload)
            found[1].append(job)
        pack: Any = hiredis.pack_command
        commands = [
            [pack(("SADD", key("queues"), queue)) + pack(("LPUSH", key(f"queue:{queue}"), *payloads)), 2, stored]
            for queue, (payloads, stored) in queues.items()
        ]
        if later[0]:
            commands.append([pack(("ZADD", key("schedule"), *later[0])), 1, later[1]])
            self.due(min(job[2] for job in later[1]))  # type: ignore[type-var, arg-type]
        return commands

    def _attempt(self, link: Any, commands: list[list[Any]]) -> BaseException | None:
        """Send commands and read their answers; returns why those that are still in the list are to be tried again. What is
        done is taken off at once: a lost connection must repeat as little as can be."""
        link.send_packed_command([b"".join([command[0] for command in commands])])
        at, last = 0, None
        while at < len(commands):
            error: BaseException | None = None
            for _ in range(commands[at][1]):
                try:
                    link.read_response()
                except ResponseError as refused:
                    error = refused
            if error is not None and _passing(error):
                last = error
                at += 1
                continue
            for job in commands.pop(at)[2]:
                if error is not None:
                    self._fail(job, SendError(f"the job was not stored: {explain(self.where.name, error)}"))
                elif job[4] is not None:
                    job[4].resolve(job[3])
        return last

    def _fail(self, job: OutgoingJob, error: SendError) -> None:
        """A job is not stored; and then none that was sent after it in the same call, whose future speaks for all."""
        with self._room:
            rest = self._pending.popleft()[1] if self._split else ()
            self._split = False
            self._waiting[0] -= len(rest)
            self._waiting[1] -= sum([len(other[1]) for other in rest])
        for lost in (job, *rest):
            if lost[4] is not None:
                lost[4].fail(error)
            else:
                log.error("job %s for queue %r is not stored: %s", lost[3], lost[0], error)

    def flush(self, timeout: float) -> int:
        with self._room:
            if timeout:
                self._room.wait_for(lambda: not self._waiting[0], timeout)
            return self._waiting[0]

    # What workers use.

    def declare(self, topics: Iterable[Any]) -> None:
        self._refuse_topics()

    def log(self, group: str, topics: Sequence[Any], *, start: str, ordered: bool, listener: Listener) -> Source:
        self._refuse_topics()
        raise AssertionError

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener) -> Source:
        from barnabas.backends.redis_source import RedisQueues

        return RedisQueues(self, queues, listener)

    def box(self, workers: int) -> tuple[Any, int]:
        self.boxes.append(array("q", bytes(8 * 3 * workers)))
        return self.boxes[-1], 0

    def reserve(self, count: int) -> int:
        """That many numbers for jobs, which nobody in this process has had; they follow the one returned."""
        with self._room:
            first, self._number = self._number, self._number + count
        return first

    def due(self, at: float) -> None:
        """A job was stored that is due then (epoch seconds)."""
        for source in self.sources:
            source.life.due(at)

    def in_work(self) -> set[int]:
        """The numbers of the jobs that are running in this process just now."""
        return {box[at + 1] for box in self.boxes for at in range(0, len(box), 3) if box[at]}

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        return lambda: None  # nobody watches topics here

    def close(self) -> None:
        """Store what is still waiting, at most `send_timeout` seconds, say what could not be, and let go."""
        if self.closed:
            return
        left = self.flush(self._send_timeout)
        if left:
            log.error("%s: %d jobs could not be stored before the end: %s", self.where.name, left, self._failed)
        self.closed = True
        self._end.set()
        with self._room:
            self._room.notify_all()
        if self._sender is not None and self._sender is not threading.current_thread():
            self._sender.join(5.0)
        for source in list(self.sources):
            source.leave()
        self.client.close()
        self.where.pool.disconnect()
        _open.discard(self)


def _passing(error: BaseException) -> bool:
    """Whether a refusal will pass by itself."""
    return isinstance(error, LATER) or str(error).startswith(LATER_WORDS)


def explain(where: str, error: BaseException) -> BackendError:
    """A driver's error in our words."""
    text, kinds = str(error), redis.exceptions
    if isinstance(error, kinds.AuthenticationError | kinds.AuthorizationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        hint = "it refuses user or password; see the URL in the setting jobs"
    elif isinstance(error, kinds.NoPermissionError):
        hint = "its user may not do that; Barnabas needs scripts, CLIENT, and all keys under its prefix"
    elif isinstance(error, ReadOnlyError):
        hint = "it is a replica just now, as after a failover; the next try looks for the master again"
    elif isinstance(error, BusyLoadingError):
        hint = "it is loading its data after a start; that passes"
    elif text.startswith("OOM") or isinstance(error, kinds.OutOfMemoryError):
        hint = "it has no memory left (maxmemory)"
    elif isinstance(error, redis.TimeoutError):
        hint = "it did not answer in time; is it overloaded, or the network cut?"
    elif isinstance(error, redis.ConnectionError):
        hint = "it is out of reach; is it running, and are host and port right?"
    else:
        hint = "it refused a command"
    return BackendError(f"{where}: {hint} ({text})")


def _at_exit() -> None:
    for backend in list(_open):
        backend.close()


def _in_child() -> None:
    """After a fork: the parent's connections are its own; the child opens new ones at its next use."""
    for backend in list(_open):
        backend.closed = True
        _inherited.append((backend, backend.where.pool))
    _open.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
