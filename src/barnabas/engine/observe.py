"""What watchers get: frozen records, one per settled batch and one per failure. They may look, never change."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from barnabas.errors import own_part


class Settled(msgspec.Struct, frozen=True):
    """One settlement: how many rows of this consumer (or job queue) were settled, and how long that took (seconds)."""

    name: str
    count: int
    outputs: int
    seconds: float


# Levels of logging; else it is an error, 40.
_LEVELS = {"again": 30, "retry topic": 30, "expired": 30, "waits": 10, "superseded": 10, "cancelled": 10}


class Failed(msgspec.Struct, frozen=True):
    """One failed run, and what became of it: "again", "retry topic", "dead", "skipped", "stop"; or a job that was not to run:
    "expired", "superseded", "cancelled" (its batch was), "waits" (for a worker that knows it)."""

    name: str
    topic: str
    partition: int
    offset: int
    attempt: int
    outcome: str
    reason: str
    error: BaseException | None = None
    job: str = ""  # its id; the partition is -1 then, and the topic its queue


class Statistics(msgspec.Struct, frozen=True):
    """What a backend's client counts, as its driver tells it (Kafka: librdkafka's STATISTICS.md); only if asked for by
    kafka={"statistics.interval.ms": ...}. kind: "producer" or "consumer"."""

    client: str
    kind: str
    figures: dict[str, Any]


Observer = Callable[[Any], None]


class Observers:
    """All watchers of an app. One that raises is logged once and goes on being called."""

    def __init__(self, watchers: Iterable[Observer] = ()) -> None:
        self.watchers = list(watchers)
        self.counts: dict[tuple[str, str], int] = {}
        self._blamed: set[int] = set()

    def count(self, name: str, outcome: str, n: int = 1) -> None:
        """Count an outcome of a consumer or queue: "done", "again", "dead", "skipped", ..."""
        self.counts[name, outcome] = self.counts.get((name, outcome), 0) + n

    def tell(self, record: Any) -> None:
        """Hand a record to every watcher."""
        for watcher in self.watchers:
            try:
                watcher(record)
            except (Exception, SystemExit):  # it may end nothing
                if id(watcher) not in self._blamed:
                    self._blamed.add(id(watcher))
                    import logging

                    logging.getLogger("barnabas").exception("the observer %r failed (said once)", watcher)

    def failed(self, record: Failed) -> None:
        """Count a failure, log it, tell the watchers."""
        self.count(record.name, record.outcome)
        import logging  # 3 ms that `import barnabas` need not pay

        log = logging.getLogger("barnabas")
        level = _LEVELS.get(record.outcome, 40)
        shown = level == 40 and not record.reason.startswith("undecodable")  # that went through no code but ours
        if log.isEnabledFor(level):
            what = f"job {record.job}" if record.job else f"{record.topic}[{record.partition}]@{record.offset}"
            trace = (type(record.error), record.error, own_part(record.error)) if shown and record.error else None
            told = (record.name, what, record.attempt, record.outcome, record.reason)
            log.log(level, "%s: %s, attempt %d: %s (%s)", *told, exc_info=trace)
        self.tell(record)
