"""Driver options: our defaults (measured), and what may not be set because a guarantee rests on it."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from barnabas.errors import SettingError

log = logging.getLogger("barnabas.kafka")

COMMON = {
    "enable.metrics.push": False, "socket.keepalive.enable": True, "log.connection.close": False,
    "reconnect.backoff.ms": 10,  # at first, doubled from time to time; 100 costs each new client 50 ms
    "socket.timeout.ms": 7000,  # a frozen broker is asked no longer; the driver's 60,000 keep a group waiting for a minute
}  # fmt: skip
PRODUCER: dict[str, Any] = {
    **COMMON, "enable.idempotence": True, "acks": "all", "linger.ms": 2, "client.id": "barnabas",
    "partitioner": "murmur2_random",  # as Java's
    "sticky.partitioning.linger.ms": 0,  # messages without a key are spread
    "message.max.bytes": 1_000_000_000,  # a topic's own limit decides
    "topic.metadata.propagation.max.ms": 10_000,  # a send to a topic that was deleted is told after that
    "debug": "eos",  # some lines at the start and where a leader moves: `Quiet` looks for one of them
    "socket.timeout.ms": 30_000,  # Kafka waits that long for all replicas in sync; the driver's 60,000 outlast a checkpoint
}  # fmt: skip
TRANSACTION = {  # of operators: what a killed one has begun is undone after that, or by the next at once
    "transaction.timeout.ms": 30_000, "delivery.timeout.ms": 30_000, "message.timeout.ms": 30_000, "socket.timeout.ms": 30_000,
    "queue.buffering.max.kbytes": 2_097_151, "error_cb": lambda error: None,  # the call raises what is the matter
}  # fmt: skip
CONSUMER: dict[str, Any] = {
    **COMMON, "partition.assignment.strategy": "cooperative-sticky", "client.id": "barnabas",
    "fetch.queue.backoff.ms": 10,  # the driver's 1000 costs a factor of six at a backlog
}  # fmt: skip

MEMBERS = (  # options of members: who only reads or asks has none of them
    "session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy", "max.poll.interval.ms", "group.instance.id",
    "group.remote.assignor",
)  # fmt: skip

_COMMITS = ("enable.auto.commit", "auto.commit.enable", "enable.auto.offset.store", "auto.commit.interval.ms")
_ALWAYS = {
    **dict.fromkeys(("bootstrap.servers", "metadata.broker.list"), "the URL says it"), "group.id": "a consumer's group= says it",
    **dict.fromkeys(_COMMITS, "positions are committed when handlers have finished, never before"),
    "transactional.id": "outputs and positions are not settled in Kafka's transactions; a repeat carries the same id instead",
    "enable.partition.eof": "it is Barnabas' own",
    "delivery.report.only.error": "a send's future resolves by its delivery report",
}  # fmt: skip
_UNLESS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("acks", "request.required.acks"), (("all", "-1"), "a send is durable when all replicas in sync have it")),
    "enable.idempotence": (("true",), "without it a send that is tried again can be stored twice or out of order"),
    "allow.auto.create.topics": (("false",), "a mistyped name would become a topic; use `barnabas topics apply`"),
    "auto.offset.reset": (("earliest", "smallest", "latest", "largest", "error"), "it says where to go on when the position is "
                          "no longer stored: earliest, latest, or error to stop"),
}


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, with secrets fetched from where `env:NAME` or `file:PATH` says. Raises SettingError for those
    that would break a guarantee."""
    options = {}
    for name, value in given.items():
        why = _ALWAYS.get(name)
        if name in _UNLESS and str(value).lower() not in _UNLESS[name][0]:
            why = _UNLESS[name][1]
        if why is None and callable(value) and name != "oauth_cb":
            why = "callbacks are Barnabas' own; app.observe(...) tells what happens"
        if why is not None:
            raise SettingError(f"kafka={{{name!r}: ...}} cannot be set: {why}. Remove it.")
        options[name] = _secret(name, value) if isinstance(value, str) else value
        if name in ("batch.size", "session.timeout.ms") and not str(options[name]).isdecimal():  # the driver takes "10s", as 10
            raise SettingError(f"kafka={{{name!r}: {value!r}}}: give a whole number")
    return options


def _secret(name: str, value: str) -> str:
    kind, colon, place = value.partition(":")
    if not colon or kind not in ("env", "file"):
        return value
    if kind == "env":
        if place not in os.environ:
            raise SettingError(f"kafka={{{name!r}: {value!r}}}: the variable {place} is not set; set it, or change the option")
        return os.environ[place]
    try:
        with open(place) as file:
            return file.read().strip()
    except OSError as error:
        raise SettingError(f"kafka={{{name!r}: {value!r}}}: the file cannot be read: {error.strerror}") from None


class Quiet:
    """The driver's own log lines: for who looks for them. What matters comes through its error callback, once a change."""

    @staticmethod
    def log(level: int, text: str, *args: Any) -> None:
        """What the driver calls: with "%s [%s] %s", a sign, its client's name, and what it says."""
        if args[:1] == ("ERRSEQ",):  # it starts to count anew, for all partitions (https://github.com/confluentinc/librdkafka/issues/4953)
            log.warning("as a leader moved, what was on its way to any partition may be stored twice: %s", args[2])
        log.debug(text, *args)
