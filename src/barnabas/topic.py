"""The handle that `app.topic(...)` returns: what is sent, and how its values are encoded."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, Never, TypeVar

from barnabas.codec import as_key, make_codec, make_key
from barnabas.engine.hand import CURRENT, id_of
from barnabas.engine.hooks import check_takes
from barnabas.errors import BarnabasError, DeclarationError, SendError, UnknownTopic, ValueTooLarge, must, refuse_unknown, told
from barnabas.future import Future, gathered
from barnabas.message import Headers, Key, Message, Outgoing

T = TypeVar("T")
CHUNK = 2000  # messages that send_many hands over at once
DEAD_EXTRA = 64 * 1024  # bytes that a dead topic allows beyond its source
END = 253402300800.0  # epoch seconds of the year 10000


class Retention:
    """How long a topic keeps its messages: `age` in seconds, `size` in bytes; None: no limit by that measure.

    On `sqlite:` and `memory:` nothing is dropped that a group has not settled, unless `force`.
    """

    __slots__ = ("age", "force", "size")

    def __init__(self, age: float | None = 7 * 86400.0, size: int | None = None, force: bool = False, **unknown: Never) -> None:
        refuse_unknown("Retention", unknown, self.__slots__)
        for name, value in (("age", age), ("size", size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                unit = "seconds" if name == "age" else "bytes"
                raise DeclarationError(f"Retention({name}={value!r}): give {unit} above 0, or None for no limit")
        must(isinstance(force, bool), "Retention", "force", force, "give True to drop even what a group has not read")
        self.age, self.size, self.force = age, size, force


class Topic(Generic[T]):
    """A topic of an app. Sends from any thread or event loop, at any time, with no worker running."""

    def __init__(
        self, app: Any, name: str, type_: Any = None, *, key: str | Callable[[Any], Any] | None = None,
        partitions: int | None = None, codec: str = "json", retention: Retention | None = None, limit: int = 1 << 20,
        rekeyed: bool = False, parent: "Topic[Any] | None" = None, keyed: bool = False,
    ) -> None:
        owner = f"topic {name!r}"
        self.app, self.name, self.type, self.codec = app, name, type_, codec
        self.rekeyed, self.parent = rekeyed, parent
        self.adjust(partitions, retention, limit, keyed)
        self.encode, self.decode = make_codec(owner, type_, codec)
        way_out = 'codec="raw" carries bytes, without fields; give a function of them'
        must(codec != "raw" or not isinstance(key, str), owner, "key", key, way_out)
        if callable(key):
            check_takes(f"{owner}: key", key, "value")
        self._key = make_key(owner, type_, key)

    def __repr__(self) -> str:
        return f"<topic {self.name}>"

    def adjust(self, partitions: int | None, retention: Retention | None, limit: int, keyed: bool) -> None:
        """Follow changed settings; its relatives do too. keyed: a message without a key has no place in it."""
        self.keyed = keyed
        self.partitions = partitions
        self.retention = retention or Retention()
        self.limit = limit
        self._family: dict[str, Topic[Any]] = {}
        self._count = 0  # partitions, as far as somebody asked

    # Relatives: where this topic's failures go.

    @property
    def dead_topic(self) -> "Topic[bytes]":
        """The topic of this one's dead letters, `<topic>.dead`: raw bytes, 64 KiB more than the source allows. What nobody
        has dealt with yet goes with its age as well."""
        return self._relative(f"{self.name}.dead", Retention(self.retention.age, self.retention.size, force=True))

    def retry_name(self, group: str) -> str:
        """The name of the topic through which a group retries out of order."""
        return f"{self.name}.retry.{group}"

    def retry_topic(self, group: str) -> "Topic[bytes]":
        """The topic through which a group retries out of order, read by that group alone."""
        return self._relative(self.retry_name(group), self.retention)

    def _relative(self, name: str, retention: Retention) -> "Topic[bytes]":
        topic = self._family.get(name)
        if topic is None:
            limit = self.limit + DEAD_EXTRA
            topic = Topic(self.app, name, partitions=self.partitions, codec="raw", retention=retention, limit=limit, parent=self)
            self._family[name] = topic
        return topic

    # Sending.

    def outgoing(
        self, value: Any, key: Any = None, headers: Headers | None = None, timestamp: float | None = None,
        partition: int | None = None, future: Any = None,
    ) -> Outgoing:
        """Encode a value for this topic. Raises ValueTooLarge, or SendError if it cannot be encoded."""
        data = None
        try:
            if value is not None:
                data = self.encode(value)
                if key is None and self._key is not None:
                    key = self._key(value)
            elif key is None and self._key is not None:
                raise ValueError("None has no key, and a tombstone needs one: give key=")
            if key is not None:
                if type(key) is not str:
                    key = as_key(key)
                elif not key.isascii():
                    key.encode()  # half a surrogate pair cannot be stored: say so here
            elif self.keyed:  # the broker would refuse all that leaves with it
                raise ValueError("the topic is compacted, it keeps the last message of each key, and this has none: give key=")
        except Exception as error:
            raise SendError(f"a value for topic {self.name!r} cannot be encoded: {type(error).__name__}: {error}") from error
        if data is not None and len(data) > self.limit:
            how = f"send a reference to the data instead, or raise the limit: app.topic({self.name!r}, ..., limit=BYTES)"
            what = f"a value for topic {self.name!r} has {len(data)} bytes, its limit is {self.limit}"
            raise ValueTooLarge(f"{what}; {how} or the setting value_limit")
        if headers:
            headers = _checked_headers(headers)
        if partition is not None:
            self._check_partition(partition)
        if timestamp is None:
            timestamp = self.app.clock.now()
        elif type(timestamp) is not float or not 0 <= timestamp < END:
            timestamp = _checked_time(timestamp)
        return (self, partition, key, data, headers, timestamp, future)

    def _check_partition(self, partition: int) -> None:
        """Refuse one that does not exist while it can still fail the handler: a sink would find out too late."""
        if isinstance(partition, bool) or not isinstance(partition, int):
            raise SendError(f"partition={partition!r}: give a partition's number, from 0 on, or None")
        if not 0 <= partition < self._count:
            states = [state for state in self.app.events.topics() if state.name == self.name]
            self._count = len(states[0].partitions) if states else partition + 1  # to be created: the sink decides
            if not 0 <= partition < self._count:
                raise UnknownTopic(f"topic {self.name!r} has no partition {partition}; it has {self._count}, from 0")

    def send(
        self, value: T | None, *, key: Key = None, headers: Headers | None = None, timestamp: float | None = None,
        partition: int | None = None, now: bool = False,
    ) -> Future[Message[T]]:
        """Send one message; the future gives the stored Message once it is durable. None with a key is a tombstone.

        timestamp: epoch seconds, the present by default. Inside a handler the message leaves when the handler has
        returned, unless `now`. Raises SendError (not encodable), ValueTooLarge, BufferFull (after `send_timeout`).
        """
        hand = CURRENT.get()
        if hand is not None and hand.open and not now:
            if hand.app is not self.app:
                hand.refuse(self)
            hand.sent = index = hand.sent + 1  # what hand.future does, without the call
            held: Future[Message[T]] = Future((id_of, _message_id, hand.run.part, hand.row, index), hand)
            hand.add(self.outgoing(value, key, headers, timestamp, partition, held))
            return held
        future: Future[Message[T]] = Future()
        self.app.events.send((self.outgoing(value, key, headers, timestamp, partition, future),))
        return future

    def send_many(self, values: Iterable[Any]) -> Future[int]:
        """Send many values, or Messages where key, headers or timestamp differ; the future gives the count once all
        are durable. Inside a handler they leave when it has returned."""
        hand = CURRENT.get()
        if hand is not None and hand.open:
            if hand.app is not self.app:
                hand.refuse(self)
            count = 0
            for value in values:
                hand.add(self._from(value))
                count += 1
            return gathered([_last(hand.outputs)] if count else [], hand.future(_message_id), count)
        return self._send_many(values)

    def _send_many(self, values: Iterable[Any]) -> Future[int]:
        count, lasts = 0, list[Future[Any]]()
        chunk: list[Outgoing] = []
        try:
            outgoing = self.outgoing
            for value in values:
                chunk.append(self._from(value) if type(value) is Message else outgoing(value))
                if len(chunk) == CHUNK:
                    some, chunk, count = chunk, [], count + CHUNK
                    lasts.append(_last(some))
                    self.app.events.send(some)
        finally:
            if chunk:
                lasts.append(_last(chunk))
                self.app.events.send(chunk)
        return gathered(lasts, Future(), count + len(chunk))

    def _from(self, value: Any) -> Outgoing:
        if type(value) is Message:
            if value.topic not in ("", self.name):
                raise SendError(f"a Message for topic {value.topic!r} was given to topic {self.name!r}")
            partition = value.partition if value.partition >= 0 else None
            return self.outgoing(value.value, value.key, value.headers or None, value.timestamp, partition)
        return self.outgoing(value)

    def stored(self, row: tuple[Any, ...]) -> Message[T]:
        """The Message of a row that a sink stored: (topic, partition, offset, key, value, headers, timestamp)."""
        _, partition, offset, key, data, headers, timestamp = row
        try:
            value: Any = None if data is None else self.decode(data)
        except Exception as error:
            at = f"stored at {self.name}[{partition}]@{offset}, and no {self.type!r}"
            raise BarnabasError(f"what was sent is {at} ({told(error)}): handlers that read it as one let it die") from error
        return Message(
            topic=self.name, value=value, key=key, headers=headers or (), timestamp=timestamp, partition=partition, offset=offset,
        )  # fmt: skip


def _last(outs: Any) -> Future[Any]:
    """The future of the last of several that leave together: it speaks for all."""
    future: Future[Any] = Future()
    outs[-1] = (*outs[-1][:6], future)
    return future


def _message_id(cause: str, index: int) -> str:
    return f"{cause}/{index}"


def _checked_time(timestamp: Any) -> float:
    """Refuse what no calendar has: one row of it would make its whole record unreadable."""
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not -END < timestamp < END:
        raise SendError(f"timestamp={timestamp!r}: give epoch seconds (not milliseconds, not a datetime), or None for now")
    return float(timestamp)


def _checked_headers(headers: Headers) -> list[tuple[str, bytes]]:
    try:
        checked = []
        for name, value in headers.items() if isinstance(headers, dict) else headers:
            if type(name) is not str or not name.isascii():
                name.encode()  # half a surrogate pair cannot be stored
            if "\0" in name:  # Kafka's driver would end it there
                raise ValueError("a zero in a name")
            if type(value) is not bytes:
                value = value.encode() if isinstance(value, str) else bytes(memoryview(value))
            checked.append((name, value))
        return checked
    except Exception as error:
        raise SendError(f"headers={headers!r}: give pairs of text and bytes ({type(error).__name__}: {error})") from error
