"""What is carried: messages as they are stored, deliveries as they are handed to a handler."""

from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
Key: TypeAlias = str | bytes | None
Headers: TypeAlias = Sequence[tuple[str, bytes]]

# On the hot path a stored message is a plain row of its batch: offset (or job number), key, value, headers,
# timestamp. A tuple costs 1 ns where an object costs 140 and more.
Row: TypeAlias = tuple[int, Key, bytes | None, Headers | None, float]


class Unread(Sequence[Any]):
    """Rows that nobody has looked at: a driver's own messages, with `offset()` and `value()`. Each becomes a row (of its offset,
    itself and its value) when somebody asks for it, and most are never asked for."""

    __slots__ = ("messages",)

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages

    def __len__(self) -> int:
        return len(self.messages)

    def values(self) -> Iterable[Any]:
        """The values of all, of which there is one at least."""
        return map(type(self.messages[0]).value, self.messages)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is slice:
            return Unread(self.messages[index])
        message = self.messages[index]
        return (message.offset(), message, message.value())

    def __add__(self, more: Sequence[Any]) -> Sequence[Any]:
        return Unread(self.messages + more.messages) if type(more) is Unread else [*self, *more]


class Stretch(Sequence[Any]):
    """Rows of a partition in its order, of which no more is kept than how many they are, and the first and the last offset:
    those two are all that it gives."""

    __slots__ = ("_count", "_ends")

    def __init__(self, rows: Sequence[Any]) -> None:
        self._count, self._ends = len(rows), ((offset_of(rows[0]),), (offset_of(rows[-1]),))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._ends[index]


def offset_of(row: Any) -> int:
    """The offset of a row in hand, or of the message that nobody has made one of."""
    return row[0] if isinstance(row, tuple) else row.offset()  # type: ignore[no-any-return]


class Message(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One message of a topic; partition and offset are -1 until it is stored. Timestamp in epoch seconds."""

    topic: str = ""
    value: T
    key: Key = None
    headers: Headers = ()
    timestamp: float | None = None
    partition: int = -1
    offset: int = -1


class Delivery(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """One message in hand: its fields, the attempt (from 1) and the consumer group.

    For a job: the topic is its queue, the key its job id, the value the tuple of its arguments, the group its name.
    """

    topic: str
    partition: int
    offset: int
    key: Key
    value: T
    headers: Headers
    timestamp: float
    attempt: int
    group: str


# A message on its way into a topic, again a plain tuple (40 ns where a NamedTuple costs 180): the Topic handle,
# partition (None: by key), key, value, headers, timestamp, and the future to resolve (if any).
Outgoing: TypeAlias = tuple[Any, int | None, Key, bytes | None, Headers | None, float, Any]


class OutgoingJob(NamedTuple):
    """A job on its way into a queue: Sidekiq's JSON, due time in epoch seconds (None: now), its future (if any).

    Without a queue ("") it is a note: `payload` is to be known to all processes under the name `jid` until `at`."""

    queue: str
    payload: bytes
    at: float | None
    jid: str
    future: Any


def note(name: str, value: bytes, until: float, future: Any = None) -> OutgoingJob:
    """A note on its way, stored where the jobs are and with them; b"" forgets it. `until`: epoch seconds."""
    return OutgoingJob("", value, until, name, future)


class LockedJob(OutgoingJob):
    """One that takes a lock as it is stored (`jobs.unique.Claim`), or that has a priority."""

    lock: Any = None
    priority = 0

    def _replace(self, /, **changes: Any) -> Any:
        new: Any = super()._replace(**changes)
        new.__dict__.update(self.__dict__)
        return new


def ranked(priority: int, job: OutgoingJob) -> OutgoingJob:
    """A job of that priority."""
    if not priority:
        return job
    out = LockedJob(*job)
    out.priority = priority
    return out


class Member(LockedJob):
    """One that joins a batch as it is stored; without a queue its id alone does."""

    batch = ""


def member(batch: str, job: OutgoingJob) -> Member:
    """A job as a member of that batch."""
    out = tuple.__new__(Member, job)  # a third of the price
    out.__dict__.update(getattr(job, "__dict__", {}))
    out.batch = batch
    return out
