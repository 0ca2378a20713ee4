"""Kafka's words and ours: what the driver's errors mean, messages as rows, and what is kept beside a committed offset."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

from confluent_kafka import KafkaError, Message

from barnabas.engine.ledger import Intervals
from barnabas.errors import BackendError, MessageRefused, NotAuthenticated, NotAuthorised, SendError, UnknownTopic, ValueTooLarge
from barnabas.message import Delivery, Row

_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}  # fmt: skip
STRANGERS = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL}
MISSING = {KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._NOENT}
SOON = {  # nobody leads it just now
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.UNKNOWN_LEADER_EPOCH,  # just created, or just moved
    KafkaError.FENCED_LEADER_EPOCH, KafkaError.OFFSET_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE,
}  # fmt: skip
_NEVER = {
    KafkaError.INVALID_RECORD: "a compacted topic takes no message without a key",
    KafkaError.INVALID_TIMESTAMP: "its timestamp is farther from now than the topic's message.timestamp.after.max.ms allows",
}
TAKEN = KafkaError(KafkaError.UNRELEASED_INSTANCE_ID).str()  # a static member's name, until its last session is over
_AWAY = {KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._MSG_TIMED_OUT}
_AWAY |= {KafkaError._TIMED_OUT_QUEUE, KafkaError._WAIT_COORD, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}


def explain(error: KafkaError, what: str, home: Any, sending: bool = False) -> Exception:
    """The driver's error in our words: what happened, the likely cause, what to touch."""
    code, text = error.code(), error.str()
    own: type[Exception] = SendError if sending else BackendError
    if code in _AWAY and home.denied:  # the driver tries for ever
        how = "see to sasl.username, sasl.password and ssl.ca.location in kafka={...}"
        return NotAuthenticated(f"{what}: {home.servers} refused the connection ({home.denied}); {how}")
    if code in MISSING:
        return UnknownTopic(f"{what}: {text}; create it with `barnabas topics apply` (`barnabas run --create-topics` does too)")
    if code in _DENIED:
        return NotAuthorised(f"{what}: {home.servers} does not allow it ({text}); give its user the right, or change kafka=")
    if code == KafkaError.MSG_SIZE_TOO_LARGE:
        return ValueTooLarge(f"{what} is larger than {home.servers} takes; raise the topic's max.message.bytes above batch.size")
    if code in _NEVER:
        return MessageRefused(f"{what}: {home.servers} refuses it ({text}): {_NEVER[code]}")
    if code in _AWAY:
        away = f" ({home.away})" if home.away else ""
        how = "see that it runs and can be reached" + (", or raise delivery.timeout.ms in kafka={...}" if sending else "")
        return own(f"{what}: {home.servers} did not answer in time{away}; {how}")
    lasts = code == KafkaError._FATAL and not sending and TAKEN not in text
    hint = "; see to this, then start the process again" if lasts else ""
    return own(f"{what}: {text} ({error.name()}){hint}")


def as_key(key: bytes | None) -> str | bytes | None:
    """Kafka keeps a key's bytes; those that are text come back as text."""
    try:
        return None if key is None else key.decode()
    except UnicodeDecodeError:
        return key


def as_rows(messages: Sequence[Any]) -> list[Row]:
    """Messages of the driver as rows. By columns: a call from C costs half of one from Python."""
    headers: Sequence[Any]
    try:
        keys, headers = list(map(bytes.decode, map(Message.key, messages))), list(map(Message.headers, messages))
    except (TypeError, UnicodeDecodeError):  # no key, or not text
        return list(map(as_row, messages))
    if any(headers):
        return list(map(as_row, messages))
    stamps = [stamp / 1000 for _, stamp in map(Message.timestamp, messages)]
    return list(zip(map(Message.offset, messages), keys, map(Message.value, messages), headers, stamps, strict=True))


def as_bare_rows(messages: Sequence[Any]) -> list[Any]:
    """The same with what most handlers ask for, offset and value, as Unread makes them; `whole` makes the rest of it."""
    return list(zip(map(Message.offset, messages), messages, map(Message.value, messages), strict=True))


class LazyDelivery(Delivery[Any], frozen=True, gc=False):
    """A Delivery that reads its fields of the driver's message when somebody asks for them: that is where its offset would be."""

    _message: ClassVar[Any] = Delivery.offset
    offset = property(lambda self: self._message.offset())
    key = property(lambda self: as_key(self._message.key()))
    headers = property(lambda self: as_row(self._message)[3] or [])
    timestamp = property(lambda self: self._message.timestamp()[1] / 1000)

    def _plain(self) -> Delivery[Any]:
        return Delivery(*map(self.__getattribute__, Delivery.__struct_fields__))

    def __eq__(self, other: object) -> bool:
        return self._plain() == (other._plain() if isinstance(other, LazyDelivery) else other)

    def __repr__(self) -> str:
        return repr(self._plain())

    def __reduce__(self) -> Any:
        return self._plain().__reduce__()


def as_deliveries(part: Any, group: str, decode: Any, messages: Sequence[Any]) -> Iterable[Delivery[Any]]:
    """Messages of the driver as deliveries in their first attempt, each when it is asked for."""
    topic, number, nothing, first, name = map(repeat, (part.topic, part.partition, None, 1, group))
    values = map(decode, map(Message.value, messages))
    return map(LazyDelivery, topic, number, messages, nothing, values, nothing, nothing, first, name)


def whole(row: Any) -> Row:
    """A row of all that belongs to it, from a bare one."""
    return row if len(row) == 5 else as_row(row[1])


def as_row(message: Any) -> Row:
    """A message of the driver as a row of its batch."""
    try:
        headers = message.headers()
    except UnicodeDecodeError:  # a foreign sender's; the rest of the message is worth having
        headers = [("barnabas-unreadable-headers", b"")]
    if headers:
        headers = [(name, b"" if value is None else value) for name, value in headers]
    return (message.offset(), as_key(message.key()), message.value(), headers, message.timestamp()[1] / 1000)


# What is committed beside an offset: failed runs of open offsets; how far ahead its owner may have something in work (0: it gave
# the partition back in order); where the stretches end that were in work when an owner was lost; intervals finished beyond it.
# A mark with a version, then numbers of variable length; ASCII, because Kafka counts characters.
FORGOTTEN = "b0:"  # Kafka cannot forget the position in a single partition: this says that it has not begun
MARK = "b2:"
MOST = 4000  # characters; Kafka takes 4,095


def pack(offset: int, done: Intervals, attempts: Mapping[int, int], ends: Sequence[int] = (), ahead: int = 0) -> str:
    """The account beyond `offset` as text; "" if there is nothing to say. What would make it too long is left out: intervals,
    the farthest first (their messages run again if another process takes over), and attempts, the fewest first."""
    if not (done or attempts or ends or ahead):
        return ""
    marks, room = _numbered(ahead, len(ends), *(end - offset for end in ends)), (MOST - len(MARK)) // 4 * 3
    kept: list[bytearray] = []
    left = room - len(marks) - 2  # for how many they are
    for at, count in sorted(attempts.items(), key=lambda each: (-each[1], each[0])):
        kept.append(_numbered(max(0, at - offset), count))
        left -= len(kept[-1])
        if left < 0:
            del kept[-1]
            break
    out, at = _numbered(len(kept)) + b"".join(kept) + marks, offset
    for start, end in done:
        one = _numbered(start - at, end - start)
        if len(out) + len(one) > room:
            break
        out += one
        at = end
    return MARK + b64encode(out).decode()


def unpack(offset: int, text: str | None) -> tuple[Intervals, dict[int, int], list[int], int]:
    """What `pack` wrote: intervals, attempts, ends, ahead; nothing where somebody else wrote something else."""
    if not text or not text.startswith(MARK):
        return [], {}, [], 0
    try:
        numbers = _numbers(b64decode(text[len(MARK) :], validate=True))
        attempts = {offset + next(numbers): next(numbers) for _ in range(next(numbers))}
        ahead = next(numbers)
        ends = [offset + next(numbers) for _ in range(next(numbers))]
        done, at = [], offset
        for gap in numbers:
            start = at + gap
            at = start + next(numbers)
            done.append((start, at))
        return done, attempts, ends, ahead
    except (ValueError, StopIteration, RuntimeError):  # (binascii.Error is a ValueError)
        return [], {}, [], 0


def _numbered(*values: int) -> bytearray:
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return out


def _numbers(data: bytes) -> Any:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0
