"""Dead letters, of topics and of queues alike: what `barnabas dead` shows and does.

A dead letter of a topic is never deleted from its log. What operators have dealt with is kept as the position of the
group `<app>-dead` in the dead topic; a retry is sent, and its letter recorded, in one step.
"""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from operator import attrgetter

import msgspec

from barnabas.app import App
from barnabas.engine.hand import ID
from barnabas.engine.handler import to_retry
from barnabas.inspect import Stored, address, chunks, find, span
from barnabas.message import Outgoing, Row
from barnabas.ports import Position
from barnabas.queues import Entry, jobs, move

MARK = "barnabas-"  # headers with which a message became a dead letter
CHUNK = 500  # letters dealt with at once


class Letter(msgspec.Struct, frozen=True):
    """A message or job that died.

    address: TOPIC[PARTITION]@OFFSET of the dead topic, or the job's id. source: topic or queue. name: its consumer (or
    the group, where nobody declares it) or job. runs: before it died. time: of its death, epoch seconds.
    """

    address: str
    source: str
    name: str
    key: str | bytes | None
    time: float
    runs: int
    reason: str
    exception: str
    stored: Stored | Entry
    group: str = ""


def told(message: Stored) -> dict[str, str]:
    """What a dead letter's headers tell: reason, exception, traceback, attempts, group, topic, partition, offset, ..."""
    return {name.removeprefix(MARK): data.decode(errors="replace") for name, data in message.headers if name.startswith(MARK)}


def letters(
    app: App, addresses: Collection[str] = (), *, topic: str | None = None, group: str | None = None, key: str | None = None,
    queue: str | None = None, name: str | None = None, error: str | None = None, since: datetime | None = None,
) -> Iterator[Letter]:
    """The dead letters that nobody has dealt with: of topics, oldest first in each partition, then of queues.

    addresses: only these. topic: the source, or its dead topic. name: of a job. error: a text in reason or exception.
    """
    keys = (key, key.encode()) if key is not None else ()
    begin = since.timestamp() if since is not None else 0.0
    names = {each.group: each.name for each in app.consumers.values()}
    found = _at(app, addresses) if addresses else _of_topics(app, topic) if queue is name is None else ()
    for letter in filter(None, map(partial(of_message, names), found)):
        fits = group in (None, letter.group) and (key is None or letter.key in keys)
        if fits and (error is None or error in letter.reason or error in letter.exception) and letter.time >= begin:
            yield letter
    jids = [each for each in addresses if address(each) is None]
    if topic is group is key is None and (jids or not addresses):
        for entry in jobs(app, jids, state="dead", queue=queue, name=name, error=error, since=since):
            of, kind = entry.job, entry.error.partition(":")[0]
            yield Letter(of.jid, of.queue, entry.name, None, entry.time, entry.runs, entry.error, kind, entry)


def of_message(names: Mapping[str, str], message: Stored) -> Letter | None:
    """A message of a dead topic; None if it is somebody else's. names: of the groups' consumers."""
    said = told(message)
    try:
        numbers = [int(said[each]) for each in ("partition", "offset", "attempts")]
        reason, source, group = said["reason"], said["topic"], said["group"]
        times = [float(said.get(each, "0")) for each in ("time", "timestamp")]
    except (KeyError, ValueError):
        return None
    if min(numbers) < 0 or not all(abs(each) < 9e15 for each in times):  # milliseconds of 64 bits
        return None
    where = f"{message.topic}[{message.partition}]@{message.offset}"
    time, exception = message.timestamp or 0.0, said.get("exception", "")
    return Letter(where, source, names.get(group, group), message.key, time, numbers[2], reason, exception, message, group)


def _of_topics(app: App, topic: str | None) -> Iterator[Stored]:
    dealt = _dealt(app)
    for state in app.events.topics():
        if not state.name.endswith(".dead") or topic not in (None, state.name, state.name.removesuffix(".dead")):
            continue
        for number, (first, end, _) in enumerate(state.partitions):
            past = dealt.get((state.name, number))
            start = first if past is None else max(first, past.offset or 0)
            for message in span(app.events, state.name, number, start, end):
                if past is None or not _within(past, message.offset):
                    yield message


def _at(app: App, addresses: Iterable[str]) -> Iterator[Stored]:
    dealt = _dealt(app)
    for where in filter(None, map(address, dict.fromkeys(addresses))):
        message, past = find(app.events, *where), dealt.get(where[:2])
        if message is not None and not (past and _within(past, where[2])):
            yield message


def _dealt(app: App) -> dict[tuple[str, int], Position]:
    """What was dealt with, by dead topic and partition."""
    own = [at for at in app.events.positions(_group(app)) if at.group == _group(app)]
    return {(at.topic, at.partition): at._replace(done=sorted(at.done)) for at in own}


def _group(app: App) -> str:
    return f"{app.name}-dead"


def _within(past: Position, offset: int) -> bool:
    at = bisect_right(past.done, (offset, float("inf"))) - 1
    return offset < (past.offset or 0) or (at >= 0 and offset < past.done[at][1])


def missing(app: App, where: str) -> str:
    """Why there is no dead letter at this address."""
    at = address(where)
    if at is None:
        return "no dead job has this id"
    if find(app.events, *at) is None:
        return "nothing is stored there (any more)"
    past = _dealt(app).get(at[:2])
    return "it was dealt with already" if past is not None and _within(past, at[2]) else "this message is no dead letter"


def newest(found: Iterable[Letter], limit: int) -> tuple[list[Letter], Counter[str]]:
    """The letters that died last, newest first, and how many died of what altogether."""
    causes: Counter[str] = Counter()

    def counted() -> Iterator[Letter]:
        for letter in found:
            causes[letter.reason.partition(":")[0][:100]] += 1
            yield letter

    return heapq.nlargest(limit, counted(), key=attrgetter("time")), causes


# Dealing with them.


class Dealt(msgspec.Struct):
    """What came of it: how many were retried or dropped, how many somebody else was quicker with, and each that could
    not be, with the reason."""

    done: int = 0
    gone: int = 0
    refused: list[tuple[str, str]] = []


def original(app: App, letter: Stored) -> Row | str:
    """The message that a dead letter tells of, as a row with its own headers; or why there is none.

    A letter whose value or headers were left out, as too large, gets them from its source topic, if they are still stored there.
    """
    said = told(letter)
    offset, value = int(said["offset"]), letter.value
    if said.keys() & {"value-left-out", "headers-left-out"}:
        source = (said["topic"], int(said["partition"]), offset)
        stored = find(app.events, *source)
        if stored is None:
            what = f"value of {said['value-left-out']} bytes was" if "value-left-out" in said else "headers were"
            return "its {} too large to be kept, and {}[{}]@{} is stored no more".format(what, *source)
        value, letter = stored.value, stored
    headers = [(name, data) for name, data in letter.headers if not name.startswith(MARK) or name == ID]
    return offset, letter.key, value, headers, float(said.get("timestamp", letter.timestamp or 0.0))


def _retried(app: App, letter: Letter) -> Outgoing | str:
    """What a letter's retry sends, or why it cannot be retried."""
    said = told(letter.stored)  # type: ignore[arg-type]
    group = said["group"]
    consumer = next((each for each in app.consumers.values() if each.group == group), None)
    if consumer is None:
        return f"no consumer of app {app.name!r} has the group {group!r}; declare it again, or send the message anew"
    topic = next((each for each in consumer.topics if each.name == said["topic"]), None)
    if topic is None:
        return f"consumer {consumer.name!r} reads topic {said['topic']!r} no more"
    if consumer.tables:
        return (
            f"consumer {consumer.name!r} keeps tables, which are written in the order of the topic alone; send the message anew, "
            f"or let the group begin again: barnabas reset {consumer.name} --to TIME --clear-tables"
        )
    row = original(app, letter.stored)  # type: ignore[arg-type]
    if isinstance(row, str):
        return row
    return to_retry(topic, group, (topic.name, int(said["partition"]), row[0]), 0, app.clock.now(), row, row[3] or ())


def deal(app: App, found: Iterable[Letter], *, retry: bool, dry_run: bool = False) -> Dealt:
    """Retry dead letters, or drop them. A topic's message is sent to the retry topic of its group, due now; a job is made
    ready, as by Sidekiq's "Retry now". Each is dealt with once, also by several at a time. On Kafka the newer goes on, and the
    older is Refused."""
    came = Dealt()
    for some in chunks(found, CHUNK):
        outgoing: list[tuple[str, int, int, Outgoing | None]] = []
        entries = [letter.stored for letter in some if isinstance(letter.stored, Entry)]
        for letter in some:
            if isinstance(letter.stored, Entry):
                continue
            out = _retried(app, letter) if retry else None
            if isinstance(out, str):
                came.refused.append((letter.address, out))
            else:
                outgoing.append((letter.stored.topic, letter.stored.partition, letter.stored.offset, out))
        count = len(outgoing) if dry_run or not outgoing else app.events.finish(_group(app), outgoing)
        moved = move(app, entries, "ready" if retry else None, dry_run=dry_run)
        came.done += count + moved["moved"]
        came.gone += len(outgoing) - count + moved["gone"]
    return came
