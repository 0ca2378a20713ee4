"""`redis://HOST:PORT/DB`: jobs in Sidekiq's keys and bytes (facts: sidekiq.md 1.0 to 1.5), shared with Ruby both ways.

What Sidekiq has no word for stands under `barnabas:`: `work:<process>` (a hash of what the process has in hand, number and
queue -> payload), `landing:<process>:<queue>` (where its blocking moves go), `workers` (process -> its queues),
`alive:<process>` (its sign of life), `alone:<process>` (the number of a job that runs alone), `crashes` (a digest of the
payload -> how often its process died), `note:<name>` (what all are to know for a time), `batch:<id>:<state>` (its members),
`control`. A job is in a queue, in a
set, or in exactly one process's hands.
"""

import logging
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import hiredis  # without it redis-py takes ten times as long, and says nothing
import redis
from redis import exceptions as kinds
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, NoScriptError, ReadOnlyError, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from barnabas.backends.redis_admin import KEYS, RedisAdmin, text
from barnabas.backends.redis_limits import Hands
from barnabas.backends.redis_outbox import Outbox
from barnabas.errors import BackendError, SettingError
from barnabas.jobs.limit import Need
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Listener, Source

log = logging.getLogger("barnabas")
LATER = (ReadOnlyError, BusyLoadingError)  # answers that say "not here, not now"


class Where:
    """A URL taken apart: how to connect, and what may be said of it in a log (no user, no password)."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:  # it may quote the password
            raise ValueError("it cannot be taken apart; in a password, what is not ASCII is written %XX") from None
        query, more = dict(parse_qsl(parts.query)), dict(options)
        own = {name: more.pop(name, query.pop(name, None)) for name in ("prefix", "sentinel", "allow_eviction")}
        self.prefix: str = own["prefix"] or ""
        self.evicts = str(own["allow_eviction"] or "").lower() in ("1", "true", "yes")
        hosts = parts.netloc.rpartition("@")[2]
        ports = [port for _, colon, port in (h.rpartition("]")[2].partition(":") for h in hosts.split(",")) if colon]
        if "@" in parts.path + parts.fragment + parts.query.partition("=")[0] or not all(map(str.isdigit, ports)):
            # what the driver would say of it quotes a part of the password
            raise ValueError("its port is no number; in a password, / ? # and @ are written %2F %3F %23 and %40")
        if not re.fullmatch(r"/?\d*/?", parts.path):  # the driver would take 0
            raise ValueError(f"after host and port comes the number of a database, as in /0, not {parts.path!r}")
        self.name = f"redis at {hosts}{parts.path.rstrip('/')}" + (f" ({self.prefix}*)" if self.prefix else "")
        # We repeat what may be; no answer is waited for longer.
        more = {"retry": Retry(NoBackoff(), 0), "protocol": 2, "socket_keepalive": True, "socket_timeout": 5.0} | more
        if own["sentinel"]:
            head = parts.netloc[: len(parts.netloc) - len(hosts)]
            plain = urlunsplit((parts.scheme, f"{head}localhost", parts.path, urlencode(query), ""))
            base = redis.ConnectionPool.from_url(plain).connection_kwargs
            given = more | {k: v for k, v in base.items() if k in {"username", "password", "db", *query}}
            addresses = [(at.hostname, at.port or 26379) for at in (urlsplit(f"//{host}") for host in hosts.split(","))]
            sentinel: Any = Sentinel  # (it has no types)
            self.pool = sentinel(addresses, **given, ssl=parts.scheme == "rediss").master_for(own["sentinel"]).connection_pool
        else:
            clean = urlunsplit(parts._replace(query=urlencode(query)))
            self.pool = redis.ConnectionPool.from_url(clean, **more)


class RedisBackend(RedisAdmin):
    """One server's jobs, as this process sees them."""

    ranks = False

    def __init__(self, url: str, settings: Any, clock: Any) -> None:
        self.url, self.closed, self.clock = url, False, clock
        try:
            self.where = Where(url, settings.redis)
            self.where.pool.connection_class(**self.where.pool.connection_kwargs)  # it knows which options there are
        except (ValueError, TypeError) as error:
            raise SettingError(f"the redis URL or an option in [redis] is not one: {error}") from None
        self.prefix: str = self.where.prefix
        self.client = redis.Redis(connection_pool=self.where.pool)
        (head, *scripts), (more, *others) = (
            files("barnabas.backends").joinpath(name).read_text().split("\n--- ") for name in ("redis.lua", "redis_limits.lua")
        )
        self._scripts = {
            name: self.client.register_script(head + more + body)
            for name, _, body in (s.partition("\n") for s in [*scripts, *others])
        }
        self.known = set[str]()  # scripts that the server has
        self.outbox, self.hands = Outbox(self, settings), Hands(self)
        self._numbers, self._number = threading.Lock(), 0
        self.boxes: list[array[int]] = []
        self.overtaken = 0  # jobs that others had taken back when they had ended here
        super().__init__()
        self._danger = ""  # what a worker's log says once
        self._check()

    def key(self, name: str) -> str:
        """A key as it is stored."""
        return f"{self.prefix}{name}"

    @contextmanager
    def edge(self, *keys: str) -> Iterator[None]:
        """The driver's errors become ours. What fails because one of these keys is somebody else's, of another type, is left."""
        try:
            yield
        except (RedisError, BackendError, UnicodeEncodeError) as error:
            if keys and "WRONGTYPE" in str(error):
                self.look(*keys)
                return
            if isinstance(error, BackendError):
                raise
            if isinstance(error, LATER):
                self.where.pool.disconnect(inuse_connections=False)  # a failover: look for the new master
            raise explain(self.where.name, error) from error

    def explain(self, error: BaseException) -> BaseException:
        """A driver's error in our words."""
        return explain(self.where.name, error) if isinstance(error, RedisError | OSError) else error

    def eval(self, name: str, *args: Any) -> tuple[Any, ...]:
        """A script of redis.lua as a command, which carries it whole (14 kB or more) where the server may not have it."""
        script = self._scripts[name]
        head = ("EVALSHA", script.sha) if name in self.known else ("EVAL", script.script)
        return (*head, "0", self.prefix, *args)

    def script(self, name: str, *args: Any) -> Any:
        """Run a script of redis.lua."""
        with self.edge():
            return self._scripts[name](args=(self.prefix, *args))

    def scripts(self, name: str, pages: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Run a script with each of these; while Redis is at one, the next is made ready, and the last one's answer is read."""
        with self.edge():
            link = self.where.pool.get_connection()
            sent: Sequence[Any] = ()

            def answer() -> Any:
                try:
                    return link.read_response()
                except NoScriptError:  # the server was started anew
                    self.known.discard(name)
                    link.send_command(*self.eval(name, *sent))
                    return link.read_response()

            try:
                for page in pages:
                    last = sent and answer()
                    link.send_command(*self.eval(name, *page))
                    if sent:
                        yield last
                    sent = page
                if sent:
                    yield answer()
                    self.known.add(name)
            except BaseException:
                link.disconnect()
                raise
            finally:
                self.where.pool.release(link)

    def recover(self, name: bytes | str, crashed: bool = False, stays: bool = False) -> tuple[int, bool]:
        """Put what a process holds back to its queues: how many jobs (-1: it lives), and whether that is all."""
        count, strange = self.script("recover", name, int(crashed), int(stays))
        self.look(*(f"queue:{text(queue)}" for queue in strange))
        return count, not strange

    def _check(self) -> None:
        """Refuse a server on which jobs would not be safe; keep a warning for workers."""
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
            for key, kind, wanted in self.script("strange", *KEYS):
                if wanted != b"zset":  # without those, commands show the rest
                    raise BackendError(
                        f"{self.where.name} has a {text(kind)} under the key {self.key(text(key))!r}, not a {text(wanted)}: "
                        "somebody else uses this database; use another, or a prefix: redis://HOST:PORT/0?prefix=NAME:"
                    )
            policy = info.get("maxmemory_policy", "noeviction")
            if policy != "noeviction" and not self.where.evicts:
                raise BackendError(
                    f"{self.where.name} has maxmemory-policy {policy}: it would throw jobs away when memory is short; set it to "
                    "noeviction, or say ?allow_eviction=true in the URL if that may be"
                )
            if not info.get("aof_enabled") and not info.get("loading"):  # (while it loads it says no to both)
                saves: Any = None
                with suppress(RedisError):  # a hosted one may not say
                    saves = self.client.config_get("save").get("save")
                how = "keeps nothing on disk: a restart loses all jobs" if saves == "" else "saves from time to time only"
                self._danger = f"{self.where.name} {how}; set appendonly yes for jobs that must not be lost"

    # The sink.

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        for out in outgoing:
            if len(out) == 7:
                self._refuse_topics()
        self.outbox.send(outgoing)  # type: ignore[arg-type]

    def flush(self, timeout: float) -> int:
        return self.outbox.flush(timeout)

    def left(self, until: float) -> int:
        """Milliseconds that a note is kept until then (epoch seconds)."""
        return max(1, min(int((until - self.clock.now()) * 1000), 1 << 50))

    def noting(self, name: str, value: bytes, until: float) -> bytes:
        """The commands that store a note, and tell who waits for it."""
        pack: Any = hiredis.pack_command
        key = self.key(f"barnabas:note:{name}")
        return pack(("SET", key, value, "PX", self.left(until)) if value else ("DEL", key)) + pack(("PUBLISH", key, ""))  # type: ignore[no-any-return]

    def note(self, name: str, timeout: float = 0.0) -> bytes | None:
        key, deadline = self.key(f"barnabas:note:{name}"), time.monotonic() + timeout
        with self.edge():
            value = self.client.get(key)
            if value is not None or timeout <= 0:
                return value  # type: ignore[no-any-return]
            with self.client.pubsub() as news:
                news.subscribe(key)
                while (left := deadline - time.monotonic()) > 0:
                    news.get_message(timeout=min(left, 5.0))  # (that we are subscribed is the first)
                    if (value := self.client.get(key)) is not None:
                        return value  # type: ignore[no-any-return]
        return None

    def swap(self, name: str, old: bytes | None, new: bytes, until: float, jobs: Sequence[OutgoingJob]) -> bool:
        pairs = [part for job in jobs for part in (job.queue, job.payload)]
        return bool(self.script("swap", f"barnabas:note:{name}", old or b"", new, self.left(until), len(jobs), *pairs))

    def hold(self, token: str, need: Need) -> float:
        return self.hands.hold(token, need)

    def let_go(self, token: str, need: Need, begun: bool = True) -> None:
        self.hands.let_go(token, need, begun)

    def _refuse_topics(self) -> None:
        home = 'give topics a home of their own: events="sqlite:///FILE.db" or kafka://'
        raise BackendError(f"{self.where.name} keeps jobs, not topics; {home}")

    # What workers use.

    def declare(self, topics: Iterable[Any]) -> None:
        self._refuse_topics()

    def log(self, group: str, topics: Sequence[Any], *, start: str, ordered: bool, listener: Listener) -> Source:
        self._refuse_topics()
        raise AssertionError

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any = None) -> Source:
        from barnabas.backends.redis_source import RedisQueues

        if self._danger:
            log.warning(self._danger)
            self._danger = ""
        return RedisQueues(self, queues, listener, guard)

    def box(self, workers: int) -> tuple[Any, int]:
        self.boxes.append(array("q", bytes(8 * 3 * workers)))
        return self.boxes[-1], 0

    def reserve(self, count: int) -> int:
        """That many numbers for jobs, which nobody in this process has had; they follow the one returned."""
        with self._numbers:
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
        self.outbox.close()
        self.hands.end.set()
        self.closed = True
        for source in list(self.sources):
            source.leave()
        self.client.close()
        self.where.pool.disconnect()


_HINTS: tuple[tuple[Any, tuple[str, ...], str], ...] = (  # by an error's kind, or how what the server says begins
    ((kinds.AuthenticationError, kinds.AuthorizationError), ("NOAUTH", "WRONGPASS"),
     "it refuses user or password; see the URL in the setting jobs"),
    (kinds.NoPermissionError, ("NOPERM",), "its user may not do this: Barnabas needs scripts, CLIENT, all keys of its prefix"),
    (ReadOnlyError, ("READONLY",), "it is a replica just now, as after a failover; the next try looks for the master again"),
    (UnicodeEncodeError, (), "half a surrogate pair is no text, so no name has one"),
    ((), ("WRONGTYPE",), "one of its keys holds something of somebody else's (barnabas queues names it)"),
    (BusyLoadingError, (), "it is loading its data after a start; that passes"),
    (kinds.OutOfMemoryError, ("OOM",), "it has no memory left (maxmemory)"),
    (TimeoutError | kinds.TimeoutError, (), "it did not answer in time; is it overloaded, or the network cut?"),
    (OSError | kinds.ConnectionError, (), "it is out of reach; is it running, and are host and port right?"),
)  # fmt: skip


def explain(where: str, error: BaseException) -> BackendError:
    """A driver's error in our words."""
    text = str(error)
    said = text.rpartition(" of pipeline caused error: ")[2]
    hints = (hint for kind, heads, hint in _HINTS if isinstance(error, kind) or said.startswith(heads))
    return BackendError(f"{where}: {next(hints, 'it refused a command')} ({text})")


open_backend = RedisBackend
