"""One stored message through a consumer's handler, with its hooks, and nothing kept: what `barnabas replay` does.

The engine runs it as a worker would, in this thread, on backends that read what is stored and keep what is to be stored to
themselves. What a handler does elsewhere, in a database or by a call, it does.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from barnabas.app import App
from barnabas.consumer import Consumer
from barnabas.dead import of_message, original, told
from barnabas.engine.handler import origin
from barnabas.engine.observe import Failed, Observers
from barnabas.errors import DeclarationError, UnknownTopic
from barnabas.inspect import Stored, find, meant
from barnabas.message import Message, Outgoing, OutgoingJob, Row
from barnabas.ports import FOREVER, Listener, Part, Result, StoredJob
from barnabas.queues import Entry, entry
from barnabas.worker import Worker


class Output(msgspec.Struct, frozen=True):
    """A message that would be sent. answer: on a topic of the consumer's `responds`; now: by `send(..., now=True)`."""

    message: Stored
    answer: bool
    now: bool


class Write(msgspec.Struct, frozen=True):
    """A table's cell, before and after; None: there is none."""

    table: str
    key: Any
    before: Any
    after: Any


class Replay(msgspec.Struct, frozen=True):
    """What came of it.

    verdict: "done", "again", "retry topic", "dead", "skipped" or "stop" (the process would end); `wait`: seconds until it
    would run again. outputs, jobs and writes are those that would be kept, or that left at once: `send(..., now=True)`.
    """

    consumer: str
    address: str
    verdict: str
    reason: str
    wait: float | None
    error: BaseException | None
    outputs: list[Output]
    jobs: list[Entry]
    writes: list[Write]


def replay(app: App, topic: str, partition: int, offset: int, consumer: str | None = None) -> Replay:
    """Run the message at this address (of a topic, of its dead letters or of retries) through a consumer: that of the dead
    letter, or the only one of the topic, where none is named. Tables are read as they are now; attempt 1 is run.

    Raises UnknownTopic where nothing is stored, DeclarationError where no consumer fits, and what on_start and set_up raise.
    """
    stored = find(app.events, topic, partition, offset)
    if stored is None:
        raise UnknownTopic(f"nothing is stored at {topic}[{partition}]@{offset} (any more)")
    group: str | None = None
    row: Row = (offset, stored.key, stored.value, stored.headers, stored.timestamp or 0.0)
    if topic.endswith(".dead") and (letter := of_message({}, stored)) is not None:
        told_of, topic, partition, group = original(app, stored), letter.source, int(told(stored)["partition"]), letter.group
        if isinstance(told_of, str):
            raise UnknownTopic(told_of)
        row = told_of
    elif ".retry." in topic:
        first, own = origin(stored.headers)
        with suppress(KeyError, ValueError):  # another program's message: no consumer reads its topic
            row = (int(first["offset"]), stored.key, stored.value, own, stored.timestamp or 0.0)
            partition, group, topic = int(first["partition"]), topic.rpartition(".retry.")[2], first["topic"].decode()
    chosen = _consumer(app, topic, consumer, group)
    glass, seen = _Glass(app, Part(topic, partition, 0, chosen.group), row), _Seen()
    with app.lent(_events=glass, _jobs=glass, observers=seen):
        try:
            at = _run(app, chosen)
        except SystemExit as error:
            seen.records, at = [Failed(chosen.name, topic, partition, row[0], 1, "stop", f"it exits: {error!r}", error)], None
    return _told(app, chosen, glass, seen.records[-1] if seen.records else None, at)


def _consumer(app: App, topic: str, name: str | None, group: str | None) -> Consumer:
    readers = [each for each in app.consumers.values() if topic in [own.name for own in each.topics]]
    if name is not None and name not in app.consumers:
        raise DeclarationError(f"app {app.name!r} has no consumer {name!r}; {meant(name, app.consumers, 'consumers')}")
    fits = [each for each in readers if name == each.name or (name is None and group in (None, each.group))]
    if len(fits) == 1:
        return fits[0]
    names = ", ".join(each.name for each in readers)
    if name is None and fits:
        raise DeclarationError(f"topic {topic!r} is read by {names}; say which: --consumer NAME")
    who = f"consumer {name!r}" if name is not None else f"its consumer (group {group!r})" if group else "a consumer"
    others = f"these do: {names} (--consumer NAME)" if names else "none does"
    raise DeclarationError(f"{who} of app {app.name!r} that reads topic {topic!r} is not there; {others}")


class _Glass:
    """Backends, and a source of one message: what is stored can be seen, and nothing gets through."""

    url, name, closed = "replay:", "", False

    def __init__(self, app: App, part: Part, row: Row) -> None:
        self.atomic = self
        self.results: list[Result] = []
        self.sent: list[Outgoing | OutgoingJob] = []
        self.cell, self.cells, self.topics, self.read = app.events.cell, app.events.cells, app.events.topics, app.events.read
        self.where = f"{part.topic}[{part.partition}]@{row[0]}"
        self._part: Part | None = part
        self._row: Row | None = row

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        self.sent += outgoing
        for out in outgoing:
            if out[-1] is not None:
                out[-1].resolve((out[0], -1, -1, *out[2:6]) if len(out) == 7 else out.jid)

    def flush(self, timeout: float) -> int:
        return 0

    def box(self, workers: int) -> tuple[Any, int]:
        return None, 0

    def control(self) -> Mapping[str, str]:
        return {}

    def log(self, group: str, topics: Any, *, start: str, ordered: bool, listener: Listener) -> "_Glass":
        self._listener = listener
        return self

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        row, self._row = self._row, None
        if row is None or self._part is None:
            return []
        self._listener.assigned([self._part])
        return [(self._part, [row])]

    def settle(self, results: Sequence[Result]) -> None:
        self.results += results

    def wake(self) -> None:
        pass

    def close(self) -> None:
        part, self._part = self._part, None
        if part is not None and self._row is None:
            self._listener.revoked([part])


class _Seen(Observers):
    """Failures are kept, neither logged nor shown to the app's observers."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Failed] = []

    def failed(self, record: Failed) -> None:
        self.records.append(record)


def _run(app: App, consumer: Consumer) -> float | None:
    """Run what there is; when it would run again (seconds from now)."""
    with asyncio.Runner() as loop:
        worker = Worker(app, only=[consumer.name], inline=True)
        worker.drive = loop.run
        worker.start()
        try:
            (runner,) = worker.runners
            (crew,) = runner.crews
            while runner.step(0.0) or crew.lanes.ready:
                crew.step()
            wait = crew.lanes.next_parked() - app.clock.monotonic()
            return None if wait == FOREVER else wait
        finally:
            worker.stop(0.0)


def _told(app: App, consumer: Consumer, glass: _Glass, failed: Failed | None, wait: float | None) -> Replay:
    outputs, jobs, cells = [], [], dict[tuple[str, Any], bytes | None]()
    answers = [each.topic for each in consumer.responds]
    kept = [(out, False) for result in glass.results for out in result.outputs] + [(out, True) for out in glass.sent]
    for out, now in kept:
        if len(out) != 7:
            state = "ready" if out.at is None else "scheduled"
            jobs.append(entry(StoredJob(None, out.jid, out.queue, state, out.at, 0, None, out.payload)))
        elif out[0].parent is None:  # else what the engine itself sends: a dead letter, a retry
            topic, partition, key, value, headers, time, _ = out
            at = -1 if partition is None else partition
            message = Message(topic=topic.name, partition=at, key=key, value=value, headers=headers or (), timestamp=time)
            outputs.append(Output(message, not now and topic in answers, now))
    for result in glass.results:
        cells.update(result.cells)
    writes = [Write(table, key, _value(app.events.cell(table, key)), _value(data)) for (table, key), data in cells.items()]
    outcome = (failed.outcome, failed.reason, wait, failed.error) if failed is not None else ("done", "", wait, None)
    return Replay(consumer.name, glass.where, *outcome, outputs, jobs, writes)


def _value(data: bytes | None) -> Any:
    return None if data is None else msgspec.msgpack.decode(data)
