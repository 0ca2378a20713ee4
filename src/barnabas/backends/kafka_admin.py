"""Kafka's topics and stored messages, as the admin client and a reader of its own see them."""

import asyncio
import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import confluent_kafka as driver
from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions, NewTopic, OffsetSpec

from barnabas.backends.kafka_options import COMMON, CONSUMER, MEMBERS, check_options, log
from barnabas.backends.kafka_words import FORGOTTEN, MISSING, SOON, STRANGERS, as_row, explain, unpack
from barnabas.errors import BackendError, BarnabasError, DeclarationError, NotAuthenticated, NotAuthorised, UnknownTopic
from barnabas.message import Row
from barnabas.ports import TopicState

T = TypeVar("T")
DEFAULT_PARTITIONS = 6
_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
PATIENCE = 10.0  # seconds an administrative request may take
ASKERS = 20  # groups whose clients are kept for the next time: a client has threads and connections
LOOK = 10.0  # seconds between two looks at the ids of topics
READER = {"enable.partition.eof": True, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 10}  # a fetch tells the end
ROOM = 64 * 1024  # bytes that a stored message may have beyond its topic's limit: key, headers, framing


class Change(NamedTuple):
    """A step between what is stored and what is declared: "create" (partitions; replication and configuration), "raise"
    (partitions; those there are), "keep" (fewer are declared: not done; those there are), "differs" (an option; from, to, what
    changes it: not done), "set" (an option; from, to)."""

    kind: str
    topic: str
    what: Any
    more: Any


class KafkaAdmin:
    """Topics and positions of a cluster."""

    closed: bool
    client: Callable[..., Any]  # makes one of the driver's

    def __init__(self, url: str, servers: str, prefix: str, create: bool) -> None:
        self.url, self.servers, self.prefix, self.create = url, servers, prefix, create
        self.away = ""  # what is the matter with the cluster, if anything is
        self.denied = ""  # that it, or we, cannot be who we say
        self._told: set[str] = set()  # of what is the matter: what a log line has said
        self._blind = 0.0  # until then nobody can say which topics there are
        self.names: dict[str, str] = {}  # of topics that exist: as they are called in Kafka
        self.declared: dict[str, Any] = {}
        self._admin: Any = None
        self._reader: Any = None
        self._askers: dict[str, Any] = {}
        self._doubted = False  # a request was in vain: it is asked anew who answers for a group
        self._alive = servers
        self._admin_lock = threading.RLock()
        self._asking = threading.RLock()  # of clients that only operators wait for: consumers are not to wait with them
        self._ids: dict[str, str] = {}  # of topics, as they are called in Kafka
        self.deleted: set[str] = set()
        self._asked_for: dict[str, Any] = {}
        self._asked_at = 0.0

    def let_go(self) -> None:
        """Close them."""
        with self._admin_lock, self._asking:
            self.forget_askers()
            if self._reader is not None:
                self._reader.close()
            self._admin = self._reader = None

    def forget_askers(self) -> None:
        """Close those of `asker`: each costs a process that has no more to ask as much as a consumer does."""
        with self._asking:
            for client in self._askers.values():
                client.close()
            self._askers = {}

    @property
    def admin(self) -> Any:
        """The admin client."""
        with self._admin_lock:
            if self._admin is None:
                self._admin = self.client(AdminClient, COMMON)
            return self._admin

    # What the driver says of itself.

    def trouble(self, error: KafkaError) -> None:
        """The driver's error callback: one log line a change."""
        if error.code() in {KafkaError._TRANSPORT, *MISSING}:  # one broker, or topic; that all are gone is another error
            log.debug("%s: %s", self.servers, error.str())
            return
        if error.code() in STRANGERS:
            self.denied = error.str()
        kind = error.name().lstrip("_").lower().replace("_", " ")
        self.away = f"{kind}: {error.str()}"
        if kind not in self._told:  # they take turns: one says why, another that now all are gone
            self._told.add(kind)
            log.error("%s: %s%s", self.servers, self.away, "" if error.fatal() else "; trying again")

    def works(self) -> None:
        """The cluster did what it was asked to."""
        self.denied, self._blind = "", 0.0
        if self.away:
            self.away = ""
            self._told.clear()
            log.warning("%s: works again", self.servers)

    def ask(self, what: str, request: Callable[[], Mapping[Any, Any]]) -> dict[Any, Any]:
        """The answers of a request of the admin client. Raises BackendError."""
        return self._until_led(what, lambda: {key: future.result(PATIENCE) for key, future in request().items()})

    def _until_led(self, what: str, request: Callable[[], T]) -> T:
        """Ask again while nobody leads what it is about: it was just created, or a broker has just gone."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = request()
                self.works()
                return found
            except (KafkaException, TimeoutError) as error:  # (the admin client's future goes on waiting longer than we do)
                why = error.args[0] if isinstance(error, KafkaException) else KafkaError(KafkaError._TIMED_OUT)
                if why.code() not in SOON or time.monotonic() > deadline:
                    self._doubted = True
                    raise explain(why, what, self) from error
                time.sleep(0.05)

    def metadata(self, timeout: float = PATIENCE) -> dict[str, int]:
        """The topics of the cluster (with our prefix, which is left out) and their partitions."""
        seconds = min(0.5, timeout)
        while True:
            try:
                found = self.admin.list_topics(timeout=seconds)
                break
            except KafkaException as error:
                self.admin.poll(0)  # it may have heard that it is not let in
                if self.denied or seconds >= timeout:
                    raise explain(error.args[0], "the list of topics", self) from error
                seconds, timeout, self._doubted = min(2 * seconds, timeout - seconds), timeout - seconds, True
        self.denied, self._alive = "", ",".join(f"{broker.host}:{broker.port}" for broker in found.brokers.values())
        cut = len(self.prefix)
        return {name[cut:]: len(topic.partitions) for name, topic in found.topics.items() if name.startswith(self.prefix)}

    def ids(self, names: Iterable[str], wait: bool = False) -> Mapping[str, str]:
        """The ids of topics, those known: a topic that was deleted and made anew has another. Asked for anew every few seconds,
        and without waiting for the answer, unless `wait`. Those that are not there are `deleted`."""
        with self._admin_lock:
            now, missing = time.monotonic(), [name for name in names if name not in self._ids]
            if wait or (not self._asked_for and (missing or now - self._asked_at > LOOK)):
                asked = list(names) if wait else [*self._ids, *missing]
                self._asked_for = self.admin.describe_topics(TopicCollection(asked)) if asked else {}
                self._asked_at = now
            if wait or all(future.done() for future in self._asked_for.values()):
                for name, future in self._asked_for.items():
                    try:
                        self._ids[name] = str(future.result(PATIENCE).topic_id)
                        self.deleted.discard(name)
                    except TimeoutError:  # nobody can say
                        continue
                    except KafkaException as error:
                        if error.args[0].code() in MISSING:
                            self.deleted.add(name)
                self._asked_for = {}
            return self._ids

    # Topics.

    def declare(self, topics: Iterable[Any]) -> None:
        topics = list(topics)
        self.declared.update({topic.name: topic for topic in topics})
        if self.create:
            self.require(topics)

    def missing(self, topics: Iterable[Any], wait: float = PATIENCE) -> tuple[list[tuple[Any, int]], list[tuple[Any, int, int]]]:
        """Those that do not exist, with the partitions they are to have; those whose number differs: (topic, is, declared)."""
        stored = self.metadata(wait)
        self.names.update({name: self.prefix + name for name in stored})
        absent, differ = {}, []
        for topic in topics:
            if not _NAME.fullmatch(self.prefix + topic.name):
                what = "letters, digits, dots, dashes, underscores; where a group is in it, give its consumer a name= of these"
                raise DeclarationError(f"topic {self.prefix + topic.name!r}: Kafka's names: up to 249 {what}")
            if topic.name not in stored:
                parent = topic.parent
                count = topic.partitions or (stored.get(parent.name) if parent is not None else 0)
                absent[topic.name] = (topic, count or DEFAULT_PARTITIONS)
            elif topic.partitions is not None and topic.partitions != stored[topic.name]:
                differ.append((topic, stored[topic.name], topic.partitions))
        return list(absent.values()), differ

    def require(self, topics: Iterable[Any], timeout: float = PATIENCE) -> None:
        """Refuse to go on without these topics, or with another number of partitions than declared."""
        absent, differ = self.missing(topics, timeout)
        if absent and self.create:
            self.create_topics([(topic.name, count, *topic_config(topic)) for topic, count in absent])
        elif absent:
            names = ", ".join(repr(topic.name) for topic, _ in absent)
            self._see([self.prefix + topic.name for topic, _ in absent])
            how = "create what is declared with `barnabas topics apply`, or, in development, run with --create-topics"
            raise UnknownTopic(f"{self.servers} has no topic {names}; {how}")
        for topic, stored, declared in differ:
            how = "leave partitions out, or change it on purpose: barnabas topics apply"
            raise DeclarationError(f"topic {topic.name!r}: partitions={declared}, but {self.servers} has it with {stored}; {how}")

    def _see(self, names: list[str]) -> None:
        """Raise NotAuthorised if these topics may exist, but are not for this user's eyes."""
        for name, future in self.admin.describe_topics(TopicCollection(names)).items():
            try:
                future.result(PATIENCE)
            except KafkaException as error:
                if error.args[0].code() not in SOON:
                    raise explain(error.args[0], f"topic {name!r}", self) from error

    def create_topics(self, topics: Sequence[tuple[str, int, int, dict[str, str]]]) -> None:
        """Create these (name, partitions, replication or -1, configuration), and wait until they are known."""
        new = [NewTopic(self.prefix + name, count, copies, config=config) for name, count, copies, config in topics]
        for name, future in self.admin.create_topics(new).items() if new else ():
            try:
                future.result(PATIENCE)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another process was faster
                    raise explain(error.args[0], f"creating topic {name!r}", self) from error
        self._until_known({name: 1 for name, _, _, _ in topics})
        self.names.update({name: self.prefix + name for name, _, _, _ in topics})

    def _until_known(self, counts: Mapping[str, int]) -> None:
        """Wait until these topics are known, with so many partitions at least, and led: whoever asks next may ask another broker,
        and a broker is known to lead a moment before it does. A send that it refuses then is lost where the next is not: where
        it has none of a producer's, any number is the first, and what comes again with a lower one is taken for old."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            stored = self.metadata()
            if all(stored.get(name, 0) >= count for name, count in counts.items()):
                with suppress(BarnabasError):
                    self.ends([(name, number) for name in counts for number in range(stored[name])])
                return
            time.sleep(0.01)

    def plan(self, topics: Iterable[Any]) -> list[Change]:
        """What is to be done so that these are stored as they are declared. Nothing is ever deleted."""
        topics = list(topics)
        absent, differ = self.missing(topics)
        changes = [Change("create", topic.name, count, topic_config(topic)) for topic, count in absent]
        changes += [Change("raise" if stored < count else "keep", t.name, count, stored) for t, stored, count in differ]
        known = {topic.name: topic for topic in topics if topic not in [topic for topic, _ in absent]}
        there = self.admin.list_topics(timeout=PATIENCE).topics if known else {}
        for name, topic in known.items():
            copies, declared = len(there[self.prefix + name].partitions[0].replicas), topic_config(topic)[0]
            if declared not in (-1, copies):
                changes.append(Change("differs", name, "replication", (copies, declared, "kafka-reassign-partitions")))
        places = {ConfigResource(ConfigResource.Type.TOPIC, self.prefix + name): name for name in known}
        answers = self.ask("the configuration of topics", lambda: self.admin.describe_configs(list(places))) if places else {}
        for place, name in places.items():
            wanted = topic_config(known[name])[1]
            given = {key: entry.value for key, entry in answers[place].items()}
            changes += [Change("set", name, key, (given.get(key), v)) for key, v in wanted.items() if given.get(key) != v]
            if "compact" in given["cleanup.policy"] and "cleanup.policy" not in wanted:
                changes.append(Change("differs", name, "cleanup.policy", (given["cleanup.policy"], "delete", "compact = false")))
        return changes

    def apply(self, changes: Iterable[Change]) -> None:
        """Do what `plan` found."""
        changes = list(changes)
        self.create_topics([(c.topic, c.what, *c.more) for c in changes if c.kind == "create"])
        more = [NewPartitions(self.prefix + c.topic, c.what) for c in changes if c.kind == "raise"]
        if more:
            self.ask("raising partitions", lambda: self.admin.create_partitions(more))
            self._until_known({c.topic: c.what for c in changes if c.kind == "raise"})
        for change in changes:
            if change.kind == "set":
                entry = ConfigEntry(change.what, change.more[1], incremental_operation=AlterConfigOpType.SET)
                place = ConfigResource(ConfigResource.Type.TOPIC, self.prefix + change.topic, incremental_configs=[entry])
                self.ask(f"configuring {change.topic!r}", functools.partial(self.admin.incremental_alter_configs, [place]))

    def find(self, topic: Any) -> str:
        """A topic's name in Kafka. Raises UnknownTopic if it does not exist; if nobody can say, it may (and is not asked for
        again at once: who sends is not to wait each time)."""
        try:
            if time.monotonic() > self._blind:  # (an event loop is not to wait)
                self.require([topic], 2.0 if asyncio._get_running_loop() is None else 0.2)
        except BackendError as error:
            if isinstance(error, (NotAuthorised, NotAuthenticated)):
                raise
            self._blind = time.monotonic() + LOOK
            log.debug("%s", error)
        return f"{self.prefix}{topic.name}"

    # What is stored.

    def ends(self, where: Iterable[tuple[str, int]], spec: Any = None) -> dict[tuple[str, int], int]:
        """The offset after the newest of each partition, or its first with OffsetSpec.earliest()."""
        cut, at = len(self.prefix), OffsetSpec.latest() if spec is None else spec
        asked = {TopicPartition(self.prefix + topic, number): at for topic, number in where}
        if not asked:
            return {}
        found = self.ask("the ends of topics", lambda: self.admin.list_offsets(asked))
        return {(tp.topic[cut:], tp.partition): info.offset for tp, info in found.items()}

    def since(self, topic: str, partition: int, time: float) -> int:
        """The offset of the first message that is not older; that after the newest, if all are."""
        at, spec = (topic, partition), OffsetSpec.for_timestamp(math.ceil(time * 1000))
        found = self.ends([at], spec)[at]
        return found if found >= 0 else self.ends([at])[at]

    def topics(self) -> list[TopicState]:
        ats = {name: [(name, n) for n in range(count)] for name, count in self.metadata().items() if not name.startswith("__")}
        where = [at for own in ats.values() for at in own]
        firsts, ends = self.ends(where, OffsetSpec.earliest()), self.ends(where)
        return [TopicState(name, [(firsts[at], ends[at], 0) for at in own]) for name, own in sorted(ats.items())]

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Row]:
        with self._asking:
            if self._reader is None:
                self._reader = self.outsider("barnabas-read", **READER)
            reader = self._reader
            reader.assign([TopicPartition(self.prefix + topic, partition, offset)])
            rows: list[Row] = []
            deadline = time.monotonic() + PATIENCE
            try:
                while len(rows) < limit and time.monotonic() < deadline:
                    message = reader.poll(0.5)
                    for each in () if message is None else (message, *reader.consume(min(1000, limit - len(rows)), 0)):
                        error = each.error()
                        if error is None:
                            rows.append(as_row(each))
                        elif error.code() == KafkaError._PARTITION_EOF:
                            return rows[:limit]
                        elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:  # it needs no group
                            raise explain(error, f"reading {topic!r}", self)
                if not rows and limit:
                    raise explain(KafkaError(KafkaError._TIMED_OUT), f"reading {topic!r}", self)
                return rows[:limit]
            finally:
                reader.unassign()

    def outsider(self, group: str, **more: Any) -> Any:
        """A consumer that is no member of its group."""
        fixed = {"group.id": group, "enable.auto.commit": False, "group.protocol": "classic"} | dict.fromkeys(MEMBERS)
        return self.client(driver.Consumer, CONSUMER, **fixed, **more)

    def asker(self, group: str) -> Any:
        """A consumer of this group that is no member of it, for its positions. (librdkafka 2.16's admin client ends the whole
        process when a group's coordinator is just moving or loading.) Each finds out for itself, in seconds, that a coordinator
        does not answer: so where one did not, all begin anew, with the brokers that are there."""
        with self._asking:
            while self._askers and (self._doubted or (group not in self._askers and len(self._askers) >= ASKERS)):
                self._askers.popitem()[1].close()
            self._doubted = False
            if group not in self._askers:
                fixed = {"bootstrap.servers": self._alive, "isolation.level": "read_uncommitted"}  # positions of now
                self._askers[group] = self.outsider(self.prefix + group, **fixed)
            return self._askers[group]

    def committed(self, group: str, where: Iterable[tuple[str, int]], us: Any = None) -> dict[tuple[str, int], tuple[int, str]]:
        """A group's positions where it has any: offset and what is kept beside it. us: an outsider, who waits for the outcome of
        a transaction."""
        asked = [TopicPartition(self.prefix + topic, number) for topic, number in where]
        if not asked:
            return {}
        with self._asking:
            found = self._until_led(f"the positions of {group!r}", lambda: (us or self.asker(group)).committed(asked, PATIENCE))
        cut, found = len(self.prefix), [tp for tp in found if tp.offset >= 0 and tp.metadata != FORGOTTEN]
        return {(tp.topic[cut:], tp.partition): (tp.offset, tp.metadata or "") for tp in found}

    def open_work(self, groups: Mapping[str, Sequence[str]], queues: Sequence[str]) -> int:
        stored = self.metadata()
        count = 0
        for group, topics in groups.items():
            where = [(topic, n) for topic in topics for n in range(stored.get(topic, 0))]
            ends, positions = self.ends(where), self.committed(group, where)
            fresh = self.ends([at for at in where if at not in positions], OffsetSpec.earliest())
            for at in where:
                offset, beside = positions.get(at) or (fresh[at], "")
                done = unpack(offset, beside)[0]
                count += max(0, ends[at] - offset - sum(b - a for a, b in done))
        return count


def topic_config(topic: Any) -> tuple[int, dict[str, str]]:
    """How a topic is to be kept, in Kafka's words: its replication (-1: as the broker does), and its configuration."""
    keep, over = topic.retention, topic.app.settings.topics.get((topic.parent or topic).name, {})
    batch = int(check_options(topic.app.settings.kafka).get("batch.size", 1_000_000))
    config = {
        "retention.ms": str(-1 if keep.age is None else round(keep.age * 1000)),
        "retention.bytes": str(-1 if keep.size is None else keep.size),
        # Kafka measures batches: one of many small messages is not to be refused.
        "max.message.bytes": str(max(topic.limit, batch) + ROOM),
    }
    if "compact" in over and topic.parent is None:
        config["cleanup.policy"] = "compact" if over["compact"] else "delete"
    return over.get("replication", -1), config
