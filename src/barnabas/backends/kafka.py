"""`kafka://HOST:PORT,...`: topics in Apache Kafka, through confluent-kafka's synchronous client (librdkafka).

`?prefix=NAME` in the URL goes before every topic and group there: several environments in one cluster. An app has one
producer, opened at its first send; librdkafka's own queue is the send buffer. A new producer must wait half a second before
it may send, so that of a closed app is kept for the next.
"""

import functools
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MethodType, SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import confluent_kafka as driver
import msgspec
from confluent_kafka import KafkaError, KafkaException

from barnabas.backends.kafka_doors import KafkaDoors
from barnabas.backends.kafka_options import MEMBERS, PRODUCER, Quiet, check_options
from barnabas.backends.kafka_words import as_key, explain
from barnabas.backends.shares import buffer_full
from barnabas.engine.observe import Statistics
from barnabas.errors import BarnabasError, BufferFull, DeclarationError, SendError, SettingError
from barnabas.future import Future
from barnabas.message import Outgoing
from barnabas.ports import Listener, Source

log = logging.getLogger("barnabas")
SERVE = 64  # sends between two looks at delivery reports and the room
NO_TABLES = "tables cannot be kept on kafka: yet; set events=sqlite:///FILE.db, or keep the state in a store of your own"
_idle: "dict[str, list[_Line]]" = {}  # of apps that were closed, by cluster and options
IDLE = 2  # so many are kept of each
_inherited: list[Any] = []  # a forked child keeps its parent's idle producers untouched, here


class _Line:
    """A producer, its app, and the thread that serves its delivery reports."""

    def __init__(self, key: str, make: Callable[..., Any]) -> None:
        self.key = key
        self.home: KafkaBackend | None = None
        self.fatal = False
        self.producer = make(error_cb=self._trouble, stats_cb=self._statistics)

    def open(self, home: "KafkaBackend") -> None:
        """Be this app's."""
        while self.producer.poll(0):  # what happened while it was nobody's
            pass
        self.home, self.end = home, threading.Event()
        threading.Thread(target=self._serve, args=(home, self.end), name="barnabas-reports", daemon=True).start()

    def close(self, timeout: float) -> int:
        """Wait until all is stored, and drop what is not in time: how many that were."""
        try:
            left: int = self.producer.flush(timeout)
        except KafkaException:  # it is of no use any more, and says so just now
            self.fatal, left = True, len(self.producer)
        if left:
            self.producer.purge()
            self.producer.flush(1.0)
        counts = self.home is not None and self.home.options.get("statistics.interval.ms")  # which would pile up
        self.home = None
        self.end.set()
        others = _idle.setdefault(self.key, [])
        if not left and not self.fatal and not counts and len(others) < IDLE:
            others.append(self)
        return left

    def _trouble(self, error: KafkaError) -> None:
        self.fatal = self.fatal or error.fatal()
        if self.home is not None:
            self.home.trouble(error)

    def _statistics(self, text: str) -> None:
        if self.home is not None:
            self.home.statistics(text)

    def _serve(self, home: "KafkaBackend", end: threading.Event) -> None:
        """Serve delivery reports as they come. Whoever sends a lot serves them too, and is not to be disturbed."""
        seen, looked = 0, 0.0
        while not end.is_set() and (home.line is self or len(self.producer)):
            if home.away and time.monotonic() - looked > 1.0:
                with suppress(KafkaException):  # it is away still
                    self.producer.list_topics(timeout=0.2)
                    home.works()
                looked = time.monotonic()
            busy, seen = home.sent - seen > 2 * SERVE, home.sent
            if busy:
                end.wait(0.005)
                continue
            try:
                self.producer.poll(0.2)
            except KafkaException as error:  # of no use any more: what it has fails, the next send opens another
                self.fatal = True
                home.drop(self)
                log.error("%s: %s; sends go on with a new producer", home.servers, error.args[0].str())
                end.wait(0.05)


class _Chunk:
    """Messages whose last one alone has a future: it resolves when all are stored."""

    __slots__ = ("count", "end", "error", "future", "home", "stored")

    def __init__(self, home: "KafkaBackend", count: int, future: Any) -> None:
        self.home, self.count, self.future = home, count, future
        self.error: Exception | None = None
        self.end: Any = None
        self.stored = itertools.count(1)  # reports are served by several threads: `next` is one step

    def report(self, error: Any, message: Any) -> None:
        """One of them has its outcome."""
        if error is not None or message.offset() is None:
            self.error = self.home.refusal(error, message.topic())
        if next(self.stored) == self.count:
            if self.future is None:
                if self.error is not None:
                    log.error("messages could not be stored: %s", self.error)
            elif self.error is not None:
                self.future.fail(self.error)
            else:
                self.home._stored(*self.end)

    def last(self, out: Outgoing, error: Any, message: Any) -> None:
        """The last of them has."""
        self.end = (out, None, message)
        self.report(error, message)


def _purged(error: Any) -> bool:
    """Whether it was waiting still when its app was closed: one log line says how many were."""
    return isinstance(error, KafkaError) and error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)


def _millis(timestamp: float) -> int:
    """As Kafka keeps it. The driver's 0 is now: 1970 begins a millisecond later."""
    return int(timestamp * 1000 + 0.5) or 1


class _Reported:
    """What heads a row of which somebody may ask for the Message."""

    @staticmethod
    def stored(row: tuple[Any, ...]) -> Any:
        """The Message, as Kafka keeps it."""
        _, topic, partition, offset, key, value, headers, timestamp = row
        key = as_key(key) if type(key) is bytes else key
        return topic.stored((topic, partition, offset, key, value, headers, _millis(timestamp) / 1000))


class KafkaBackend(KafkaDoors):
    """A cluster, as this process sees it."""

    def __init__(self, url: str, settings: Any, clock: Any) -> None:
        self.closed, self.clock = False, clock
        address, _, query = url.partition("//")[2].partition("?")
        given = parse_qs(query, keep_blank_values=True)
        if set(given) - {"prefix"} or len(given.get("prefix", [""])) > 1:
            raise SettingError("events: after the ? of its URL goes prefix=NAME alone; driver options go into kafka={...}")
        # A password in it would be in every line about the cluster. (Possessive: else a wrong one is tried for years.)
        if not re.fullmatch(r"(,?([^/@#\s:,[]++|\[[^/@#\s,]+\])(:\d{1,5}+)?)+,?/?", address):
            raise SettingError("events: give kafka://HOST:PORT,... and nothing else; users and passwords go into kafka={...}")
        super().__init__(url, address.rstrip("/"), given.get("prefix", [""])[0], settings.create_topics)
        self.options = check_options(settings.kafka)
        self.session: float = settings.session_timeout
        self._send_timeout: float = settings.send_timeout
        self._most: int = settings.buffer_messages
        self._some = SERVE if self._most > 10 * SERVE else 0
        self._most_bytes: int = settings.buffer_bytes
        self._lock = threading.RLock()
        self.line: _Line | None = None
        self._producer: Any = None  # the line's
        self.sent = self._served = 0
        self._report = self._stored
        self.sources: list[Any] = []

    # Clients.

    def client(self, kind: Callable[..., Any], own: Mapping[str, Any], **fixed: Any) -> Any:
        """A client of the driver: our defaults, the user's options over them, and what cannot be otherwise.

        Raises SettingError for what the driver refuses.
        """
        config = {**own, **self.options, "bootstrap.servers": self.servers, "error_cb": self.trouble, **fixed}
        if "stats_cb" not in fixed:
            config.pop("statistics.interval.ms", None)
        decides = str(config.get("group.protocol", "classic")).lower() == "consumer"  # the broker, about sessions and shares
        for name in MEMBERS:
            if fixed.get(name, name) is None or (decides and name not in self.options):
                config.pop(name, None)
        try:
            return kind(config, logger=Quiet)
        except KafkaException as error:
            raise SettingError(f"kafka={{...}}: the driver refuses an option: {error.args[0].str()}") from None

    def statistics(self, text: str) -> None:
        """The driver's statistics callback: observers are told."""
        if (app := next((topic.app for topic in self.declared.values()), None)) is not None:
            figures = msgspec.json.decode(text)
            app.observers.tell(Statistics(figures["name"], figures["type"], figures))

    def _start(self) -> Any:
        with self._lock:
            if self.closed:
                raise SendError(f"{self.servers} was closed; the app opens it again at its next use")
            if self._producer is None:
                limits = {"queue.buffering.max.messages": max(2 * self._most, 100_000)}
                limits["queue.buffering.max.kbytes"] = max(1024, 2 * self._most_bytes // 1024)
                key = repr((self.servers, sorted(self.options.items()), limits))
                try:
                    line = _idle.get(key, []).pop()
                except IndexError:
                    line = _Line(key, functools.partial(self.client, driver.Producer, PRODUCER | limits))
                self.line = line
                line.open(self)
                self._producer = line.producer
            return self._producer

    # The sink.

    def send(self, outgoing: Sequence[Outgoing], block: bool = True) -> None:
        producer = self._producer
        if producer is None:  # (its truth is how many messages it has, and asking for that takes its lock)
            producer = self._start()
        count = len(outgoing)
        if self.sent + count - self._served > self._some:
            self._served = self.sent
            producer.poll(0)
            if len(producer) + count > self._most:
                self._wait_for_room(producer, count)
        self.sent += count
        stored, names, produce = self._report, self.names, producer.produce
        done: Any
        out: Any = outgoing[0] if count == 1 else ()
        if out and out[-1] is not None:
            try:
                topic, partition, key, value, headers, timestamp, _ = out
                done, where = MethodType(stored, out), -1 if partition is None else partition  # (a partial costs more)
                millis = int(timestamp * 1000 + 0.5) or 1  # (see `_millis`: a call costs more than the rest of it)
                produce(names[topic.name], value, key, where, done, done, millis, headers or None)
                return
            except (KeyError, ValueError, BufferError, KafkaException):  # not as usual: see below
                pass
        plain: Any = self._unseen
        last: Any = None
        chunk: Any = None
        if count > 1 and (bare := sum([1 for out in outgoing if out[-1] is None])):
            last = outgoing[-1]
            chunk = _Chunk(self, bare + (last[-1] is not None), last[-1])
            plain = chunk.report
        for out in outgoing:
            topic, partition, key, value, headers, timestamp, future = out
            done = plain if future is None else functools.partial(stored if out is not last else chunk.last, out)
            try:
                name, since = names.get(topic.name) or self.find(topic), 0.0
                while True:
                    try:
                        where = -1 if partition is None else partition
                        produce(name, value, key, where, done, done, _millis(timestamp), headers or None)
                        break
                    except BufferError:
                        since = since or time.monotonic()
                        self._wait_for_room(producer, 1, since)
            except BufferFull:
                raise
            except (KafkaException, SendError, DeclarationError) as error:  # becomes the outcome, as if the broker had refused it
                why = error.args[0] if isinstance(error, KafkaException) else error
                done(why, SimpleNamespace(topic=functools.partial(str, topic.name)))

    def _stored(self, out: Outgoing, error: Any, message: Any) -> None:
        """The delivery report of a message with a future."""
        topic, _, key, value, headers, timestamp, future = out
        if error is None and (offset := message.offset()) is not None:
            future.resolve((_Reported, topic, message.partition(), offset, key, value, headers, timestamp))
        else:
            future.fail(self.refusal(error, message.topic()), _purged(error))

    def _unseen(self, error: Any, message: Any) -> None:
        """The delivery report of a message without a future."""
        if (error is not None or message.offset() is None) and not _purged(error):
            log.error("a message could not be stored: %s", self.refusal(error, message.topic()))

    def refusal(self, error: Any, name: str) -> Exception:
        """Why a message could not be stored."""
        name = name.removeprefix(self.prefix)
        if error is None:  # seen where all brokers were killed, and where one by one was restarted: it was not stored
            said = f"{self.servers} says that it has it already, and not where, so it may be stored or not"
            return SendError(f"a message for topic {name!r}: {said}; send it again where once more does no harm")
        if not isinstance(error, KafkaError):
            return error  # type: ignore[no-any-return]
        if error.code() in (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART):
            self.names.pop(name, None)
        if error.code() == KafkaError._FATAL and self.line is not None and self.line.fatal:
            self.drop(self.line)
        return explain(error, f"a message for topic {name!r}", self, sending=True)

    def drop(self, line: _Line) -> None:
        """This one is of no use any more; the next send opens another."""
        with self._lock:
            if self.line is line:
                self.line = self._producer = None

    def _wait_for_room(self, producer: Any, count: int, full: float = 0.0) -> None:
        """On an event-loop thread nobody may block: twice the limit is the end there. full: since when the driver itself has no
        room (monotonic seconds); it is asked again after a short wait."""
        import asyncio

        timeout = self._send_timeout
        if asyncio._get_running_loop() is not None:
            if not full and len(producer) + count <= 2 * self._most:
                return
            timeout = 0.0
        deadline = (full or time.monotonic()) + timeout
        producer.poll(0)
        while full or (len(producer) and len(producer) + count > self._most):
            if time.monotonic() >= deadline:
                raise buffer_full(self.servers, timeout, f"{len(producer)} messages wait{f' ({self.away})' if self.away else ''}")
            producer.poll(0.02)
            if full:
                return

    def deliver(self, sender: Any, outputs: Sequence[Outgoing], errors: list[Exception]) -> None:
        def report(error: Any, message: Any) -> None:
            if error is not None:
                errors.append(self.refusal(error, message.topic()))

        for topic, _, key, value, headers, timestamp, _ in outputs:
            name = self.names.get(topic.name) or self.find(topic)
            sender.produce(name, value, key, -1, report, report, _millis(timestamp), headers or None)
        while len(sender):  # a fatal error in `flush`, which runs callbacks as well, is raised as what nobody can catch
            sender.poll(0.1)

    def store(self, topic: str, key: str, value: bytes | None) -> Future[Any]:
        producer, future = self._producer or self._start(), Future[Any]()

        def report(error: Any, message: Any) -> None:
            future.resolve(True) if error is None else future.fail(self.refusal(error, topic))

        try:
            producer.produce(self.prefix + topic, value, key, 0, report)
        except BufferError:
            future.fail(buffer_full(self.servers, 0.0, f"{len(producer)} messages wait"))
        return future

    def flush(self, timeout: float) -> int:
        producer = self._producer
        if producer is None:
            return 0
        return len(producer) if timeout <= 0 else producer.flush(timeout)

    # What consumers and workers use.

    def log(self, group: str, topics: Sequence[Any], *, start: str, ordered: bool, listener: Listener) -> Source:
        from barnabas.backends.kafka_log import KafkaLog

        self.require([*self.declared.values(), *topics])
        self.forget_askers()
        return KafkaLog(self, group, topics, start, ordered, listener)

    def cell(self, table: str, key: Any = None) -> Any:
        raise DeclarationError(f"table {table!r}: {NO_TABLES}")

    cells = cell

    def box(self, workers: int) -> tuple[Any, int]:
        return None, 0

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        end = threading.Event()

        def loop() -> None:
            while not end.wait(0.2):
                wake()

        threading.Thread(target=loop, name="barnabas-watch", daemon=True).start()
        return end.set

    def close(self) -> None:
        """Store what is still waiting, at most `send_timeout` seconds, say what could not be, and let go."""
        if self.closed:
            return
        with suppress(BarnabasError):
            self.left(True)
        with self._lock:
            self.closed = True
            line, self._producer = self.line, None
        if line is not None and (left := line.close(self._send_timeout)):
            why = f": {self.away}" if self.away else ""
            log.error("%s: %d messages could not be stored before the end%s", self.servers, left, why)
        self.line = None
        self.let_go()


def _in_child() -> None:
    """After a fork: idle producers are the parent's, too."""
    _inherited.append(dict(_idle))
    _idle.clear()


os.register_at_fork(after_in_child=_in_child)
open_backend = KafkaBackend
