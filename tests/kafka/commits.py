"""What a group has committed, and how often it was rebalanced, by Kafka's own account: its topic `__consumer_offsets`."""

import struct
from collections import defaultdict

import confluent_kafka as driver
from confluent_kafka import KafkaError, TopicPartition

from barnabas.backends.kafka_options import COMMON

Place = tuple[str, int]


class _Bytes:
    """Kafka's encoding of a record, from its definition (`OffsetCommitValue.json`, ...); `flexible`: of its newer versions."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.flexible = False

    def number(self, kind: str) -> int:
        [value] = struct.unpack_from(f">{kind}", self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        if self.flexible:
            length, shift, byte = 0, 0, 128
            while byte & 128:
                byte = self.number("B")
                length |= (byte & 127) << shift
                shift += 7
            length -= 1
        else:
            length = self.number("h")
        self.at += length
        return self.data[self.at - length : self.at].decode()


def history(servers: str) -> tuple[dict[str, int], dict[str, dict[Place, list[tuple[int, str]]]]]:
    """How many rebalances each group has had; (offset, metadata) of each commit of each partition, in their order."""
    config = {**COMMON, "bootstrap.servers": servers, "group.id": "witness", "enable.partition.eof": True}
    reader = driver.Consumer({**config, "enable.auto.commit": False, "auto.offset.reset": "earliest"})
    rebalances: dict[str, int] = defaultdict(int)
    commits: dict[str, dict[Place, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    try:
        left = set(reader.list_topics("__consumer_offsets", timeout=10).topics["__consumer_offsets"].partitions)
        reader.assign([TopicPartition("__consumer_offsets", n, 0) for n in left])
        while left:
            for message in reader.consume(1000, 0.5):
                if message.error() is not None:
                    assert message.error().code() == KafkaError._PARTITION_EOF
                    left.discard(message.partition())  # (its end comes again when more is written)
                elif message.value() is not None:
                    _enter(_Bytes(message.key()), _Bytes(message.value()), rebalances, commits)
    finally:
        reader.close()
    return rebalances, commits


def _enter(key: _Bytes, value: _Bytes, rebalances: dict[str, int], commits: dict) -> None:
    kind, group, version = key.number("h"), key.text(), value.number("h")
    if kind in (0, 1):
        place = (key.text(), key.number("i"))
        value.flexible = version >= 4
        offset = value.number("q")
        value.at += 4 if version >= 3 else 0  # the leader's epoch
        commits[group][place].append((offset, value.text()))
    elif kind == 2:  # a group of the classic protocol: its generation
        value.flexible = version >= 4
        value.text()
        rebalances[group] = max(rebalances[group], value.number("i"))
    elif kind == 3:  # of the consumer protocol: its epoch
        rebalances[group] = max(rebalances[group], value.number("i"))
