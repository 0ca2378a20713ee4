"""What operators see and do of Kafka: the doors of the port that no message passes.

What they ask for, and what worker processes report, is kept in the compacted topic `<app>.control`.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import confluent_kafka as driver
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from barnabas.backends.kafka_admin import PATIENCE, KafkaAdmin
from barnabas.backends.kafka_options import COMMON, PRODUCER, TRANSACTION
from barnabas.backends.kafka_words import FORGOTTEN, MARK, explain, pack, unpack
from barnabas.backends.shares import HOST, by_partition, check_offset, finished
from barnabas.errors import BarnabasError, NotYetDurable, Refused, UnknownTopic
from barnabas.future import Future
from barnabas.message import Outgoing
from barnabas.ports import Position, Process

REPORTS, SIGNS = 2.0, 5.0  # seconds between two reports that are stored: changed ones, and signs of life
GONE = 30.0  # seconds of silence after which a process is taken for dead
FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
_COMPACT = {"cleanup.policy": "compact", "segment.bytes": str(4 << 20), "min.cleanable.dirty.ratio": "0.1"}


class KafkaDoors(KafkaAdmin):
    """The operators' half of a KafkaBackend."""

    name = ""
    clock: Any
    session: float
    sources: list[Any]
    store: Callable[[str, str, bytes | None], Future[Any]]  # send a message of our own
    deliver: Callable[[Any, Sequence[Outgoing], list[Exception]], None]  # send some with this producer; why some could not be

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._asked: dict[str, tuple[str, float]] = {}  # the control topic: value and time by key
        self._watcher: Any = None
        self._seen = 0
        self._control_lock = threading.RLock()
        self._reported: tuple[float, Mapping[str, Any]] = (0.0, {})
        self._started = 0.0

    def let_go(self) -> None:
        with self._control_lock:
            if self._watcher is not None:
                self._watcher.close()
                self._watcher = None
        super().let_go()

    # Positions.

    def positions(self, groups: str = "") -> list[Position]:
        cut, stored = len(self.prefix), self.metadata()  # first: it hears at once that we are not let in
        listed = self._until_led("the list of groups", self._groups)
        names = sorted(each.group_id for each in listed if each.group_id.startswith(self.prefix + groups))
        everywhere = [(topic, number) for topic, count in stored.items() for number in range(count)]
        answers = {group: self.committed(group[cut:], everywhere) for group in names}
        owners = {
            (group, tp.topic, tp.partition): member.client_id
            for group, about in self._describe(names).items() for member in about.members if member.assignment
            for tp in member.assignment.topic_partitions
        }  # fmt: skip
        found = []
        where = {at for answer in answers.values() for at in answer}
        firsts, ends = self.ends(where, OffsetSpec.earliest()), self.ends(where)
        for group, answer in answers.items():
            for at, (offset, beside) in answer.items():
                done, attempts, hits, _ = unpack(offset, beside)
                crashes = {offset: len(hits)} if hits else {}
                topic = self.prefix + at[0].removesuffix(f".retry.{group[cut:]}")  # its partitions go with those of its parent
                owner = owners.get((group, topic, at[1]))
                found.append(Position(group[cut:], *at, firsts[at], ends[at], offset, done, attempts, crashes, owner))
        return sorted(found, key=lambda position: position[:3])

    def _groups(self) -> list[Any]:
        found = self.admin.list_consumer_groups().result(PATIENCE)
        if found.errors:  # of brokers that did not answer: theirs would be left out
            raise KafkaException(found.errors[0])
        return found.valid  # type: ignore[no-any-return]

    def _describe(self, groups: Sequence[str]) -> dict[str, Any]:
        """(A client that has asked a coordinator before ends the process where that one froze: librdkafka's issue 4605.)"""
        found, admin = {}, self.client(AdminClient, COMMON, **{"bootstrap.servers": self._alive}) if groups else None
        for group, future in admin.describe_consumer_groups(list(groups)).items() if admin is not None else ():
            with suppress(KafkaException):  # it has never been, or is gone since it was listed
                found[group] = future.result(PATIENCE)
        return found

    def place(self, positions: Iterable[Position], clear: Sequence[str] = ()) -> None:
        wanted: dict[str, list[TopicPartition]] = {}
        positions = list(positions)
        firsts, ends = self._bounds([(at.topic, at.partition) for at in positions])
        for at in positions:
            check_offset(at, firsts[at.topic, at.partition], ends[at.topic, at.partition])
            beside = FORGOTTEN if at.offset is None else pack(at.offset, at.done, {})
            tp = TopicPartition(self.prefix + at.topic, at.partition, at.offset or 0, metadata=beside or MARK)
            wanted.setdefault(at.group, []).append(tp)
        for group, about in self._describe([self.prefix + group for group in wanted]).items():
            if about.members:
                names = ", ".join(sorted({member.client_id for member in about.members}))
                raise Refused(f"group {group[len(self.prefix) :]!r} has members: {names}; stop them first")
        for group, where in wanted.items():
            self._alter(group, where)

    def _alter(self, group: str, where: list[TopicPartition]) -> None:
        what = f"setting the positions of {group!r}"
        with self._asking:
            for tp in self._until_led(what, lambda: self.asker(group).commit(offsets=where, asynchronous=False)):
                if tp.error is not None:
                    raise explain(tp.error, what, self)

    def finish(self, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]) -> int:
        """In one transaction, by one process at a time: whoever comes next takes over, and what was begun is undone."""
        what, errors, by = f"finishing letters as {group!r}", list[Exception](), by_partition(letters)
        sender = self.client(driver.Producer, PRODUCER, **TRANSACTION, **{"transactional.id": self.prefix + group})
        us = self.outsider(self.prefix + group, **{"isolation.level": "read_committed"})
        with self._control_lock, self._asking:
            try:
                sender.init_transactions(PATIENCE)
                where, outputs, count = self._finished(group, by, us)
                sender.begin_transaction()
                self.deliver(sender, outputs, errors)
                sender.send_offsets_to_transaction(where, us.consumer_group_metadata(), PATIENCE)
                sender.commit_transaction(PATIENCE)
                with suppress(BarnabasError):  # done is done
                    self.committed(group, by, us)  # answered when written: then whoever asks sees it
                return count
            except KafkaException as error:
                if error.args[0].code() not in FENCED:
                    raise next(iter(errors), None) or explain(error.args[0], what, self) from error
                raise Refused(f"{what}: another dead retry or dead drop took over; see barnabas dead list") from error
            finally:
                us.close()
                with suppress(KafkaException):  # what was committed stays; who waits for the outcome of the rest has it
                    sender.abort_transaction(1.0)

    def _finished(self, group: str, by: Mapping[Any, Mapping[int, Any]], us: Any) -> tuple[list[Any], list[Any], int]:
        """The positions when these are finished, what is to be sent, and how many were not finished before."""
        count, where, outputs = 0, [], []
        firsts, known = self._bounds(by)[0], self.committed(group, by, us)
        for at, some in by.items():
            offset, beside = known.get(at) or (firsts[at], "")
            fresh, offset, done = finished(max(offset, firsts[at]), unpack(offset, beside)[0], some)
            outputs += [out for out in map(some.get, fresh) if out is not None]
            if unpack(offset, beside := pack(offset, done, {}))[0] != done:
                what = f"{at[0]}[{at[1]}]: what {group!r} has finished are {len(done):,} stretches, more than can be kept"
                raise Refused(f"{what}; finish what is between them first, the oldest: without a filter, or by addresses")
            where.append(TopicPartition(self.prefix + at[0], at[1], offset, metadata=beside or MARK))
            count += len(fresh)
        return where, outputs, count

    def _bounds(self, where: Collection[tuple[str, int]]) -> tuple[Mapping[Any, int], Mapping[Any, int]]:
        """The first and the next offset of each of these partitions. Raises UnknownTopic."""
        stored = self.metadata()
        for topic, number in where:
            if number >= stored.get(topic, 0):
                raise UnknownTopic(f"there is no partition {number} of a topic {topic!r}")
        return self.ends(where, OffsetSpec.earliest()), self.ends(where)

    # Processes, and what is asked of them.

    @property
    def _control(self) -> str:
        """The name of the control topic."""
        app = next((topic.app.name for topic in self.declared.values()), "barnabas")
        return f"{app}.control"

    def join(self) -> None:
        """Be a worker process."""
        if not self.name:
            self.name, self._started = f"{HOST}:{os.getpid()}:1", self.clock.now()

    def left(self, end: bool = False) -> None:
        """A source was closed: with the last one, the process is none any more, unless it is quiet: it is still to be seen,
        and to be stopped, until its end."""
        if not self.sources and self.name and (end or not self._reported[1].get("quiet")):
            for key in self._asked.keys() & {f"report:{self.name}", f"process:{self.name}"}:
                self.store(self._control, key, None).result(PATIENCE)
                self._asked.pop(key, None)

    def _look(self) -> dict[str, tuple[str, float]]:
        """What the control topic says now."""
        with self._control_lock:
            name = self.prefix + self._control
            if self._watcher is None:
                if self._control not in self.metadata():
                    return {}
                self._watcher = self.outsider("barnabas-control", **{"auto.offset.reset": "earliest"})
                self._watcher.assign([TopicPartition(name, 0, 0)])
                self._asked, self._seen = {}, 0
            try:
                end = self.ends([(self._control, 0)])[self._control, 0]
            except UnknownTopic:
                end = -1
            if end < self._seen:  # it was deleted, and perhaps made anew
                self._watcher.close()
                self._watcher, self._seen = None, 0
                self.names.pop(self._control, None)
                return self._look() if end >= 0 else {}
            deadline = time.monotonic() + PATIENCE
            while self._seen < end and time.monotonic() < deadline:
                first = self._watcher.poll(0.05)
                for message in () if first is None else (first, *self._watcher.consume(1000, 0)):
                    if message.error() is None:
                        self._enter(message)
                self._seen = max(self._seen, self._watcher.position([TopicPartition(name, 0)])[0].offset)
            return self._asked

    def _enter(self, message: Any) -> None:
        with suppress(AttributeError, UnicodeDecodeError):  # of somebody else
            key, value = message.key().decode(), message.value()
            if value is None:
                self._asked.pop(key, None)
            else:
                self._asked[key] = (value.decode(), message.timestamp()[1] / 1000)

    def _say(self, key: str, value: str | None) -> Future[Any]:
        if self._control not in self.names:
            if self._control not in self.metadata():
                self.create_topics([(self._control, 1, -1, _COMPACT)])
            self.names[self._control] = self.prefix + self._control
        return self.store(self._control, key, None if value is None else value.encode())

    def processes(self) -> list[Process]:
        found, now = [], time.time()
        for key, (value, stamp) in sorted(self._look().items()):
            if key.startswith("report:") and now - stamp < GONE:
                with suppress(ValueError, KeyError, TypeError):  # of somebody else
                    said = json.loads(value)
                    host, pid, _ = key.removeprefix("report:").rsplit(":", 2)
                    info, silent = said["info"], max(0.0, now - stamp)
                    found.append(Process(key.removeprefix("report:"), int(pid), host, said["started"], silent, info))
        return found

    def report(self, info: Mapping[str, Any]) -> None:
        now, said = time.monotonic(), self._reported[1]
        hushed = info.get("quiet") and not said.get("quiet")  # its sources close at once
        if not (self.name if info.get("quiet") else self.sources):
            return
        if not hushed and now - self._reported[0] < min(REPORTS if info != said else SIGNS, self.session / 4):
            return
        self._reported = (now, dict(info))
        future = self._say(f"report:{self.name}", json.dumps({"started": self._started, "info": info}))
        future.add_done_callback(Future.exception)  # one that cannot be stored is no reason to end; the next says more
        with suppress(NotYetDurable):
            future.exception(1.0)

    def control(self) -> dict[str, str]:
        return {key: value for key, (value, _) in self._look().items() if not key.startswith("report:")}

    def set_control(self, name: str, value: str | None) -> None:
        process = name.removeprefix("process:")
        if process != name and value is not None and process != self.name and f"report:{process}" not in self._look():
            raise Refused(f"there is no worker process {process!r}")
        if value is not None or name in self._look():
            self._say(name, value).result(PATIENCE)
