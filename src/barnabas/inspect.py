"""The read side: what is declared, what is stored, what flows where. The command line is a thin skin over it.

Nothing beneath imports this file, and nothing in it writes a message.
"""

import difflib
import heapq
import inspect
import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import msgspec

from barnabas.app import App
from barnabas.codec import misfit
from barnabas.consumer import Consumer
from barnabas.errors import BarnabasError, DeclarationError, UnknownTopic
from barnabas.job import Job
from barnabas.message import Message
from barnabas.ports import Backend, TopicState
from barnabas.topic import Retention
from barnabas.worker import chosen

CHUNK = 1000  # rows of one partition that are read at once

Item = TypeVar("Item")
Stored = Message[bytes | None]  # as it is stored: the value's bytes
Start = str | int | datetime  # "earliest", "latest", an offset, or a time


# What is declared.


class ConsumerInfo(msgspec.Struct, frozen=True):
    """A consumer as it is declared; `kind` is "sync" or "async", with " batch" for a batch handler."""

    name: str
    topics: list[str]
    group: str
    concurrency: int
    order: str
    kind: str


class JobInfo(msgspec.Struct, frozen=True):
    """A job as it is declared."""

    name: str
    queue: str
    retry: bool | int
    kind: str
    signature: str


def consumer_info(consumer: Consumer) -> ConsumerInfo:
    """A consumer in words."""
    route = consumer.routes(consumer.target)[0]
    kind = ("async" if consumer.awaited else "sync") + (" batch" if route.params.batch else "")
    topics = [topic.name for topic in consumer.topics]
    return ConsumerInfo(consumer.name, topics, consumer.group, consumer.concurrency, consumer.order, kind)


def job_info(job: Job) -> JobInfo:
    """A job in words."""
    kind = "async" if job.awaited else "sync"
    return JobInfo(job.name, job.queue, job.retry, kind, str(inspect.signature(job.function)))


def meant(name: str, known: Iterable[str], what: str) -> str:
    """Half a sentence that helps who mistyped a name: the close ones, else all (or that there are none)."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(sorted(names))}" if names else f"there are no {what}"


def check(app: App) -> tuple[list[str], list[str]]:
    """Look at settings and declarations, and whether the backends can be opened and agree with them.

    Returns problems, which keep the app from working, and warnings, which are worth a look.
    """
    problems: dict[str, None] = {}
    for kind in ("events", "jobs"):
        try:
            getattr(app, kind).control()  # a question that only a server in reach answers
        except BarnabasError as error:
            problems[str(error)] = None
    warnings = list(app.settings.warnings)
    if not problems and hasattr(app.events, "plan") and app.events.plan(app.all_topics()):
        warnings.append("the topics are not stored as they are declared: barnabas topics plan")
    strange = [name for name in app.settings.topics if name not in app.topics]
    warnings += [f"[topics.{name}] in the settings has no effect: {meant(name, app.topics, 'topics')}" for name in strange]
    queues = app.settings.queues
    for job in app.job_handlers.values():
        for queue in dict.fromkeys((job.queue, job.retry_queue or job.queue) if queues is not None else ()):
            if queue not in queues:  # type: ignore[operator]
                warnings.append(f"nothing here runs job {job.name!r}: its queue {queue!r} is not in the setting queues")
    for consumer in app.consumers.values():
        for topic, _, params, _ in consumer.routes(consumer.target):
            if lacks := misfit(topic.type, params.value)[1] if topic.codec == "json" else []:
                what = f"{consumer.owner} reads {params.value!r}, which needs {', '.join(lacks)}; topic {topic.name!r} carries"
                warnings.append(f"{what} {topic.type!r}, which has none: messages without are dead")
    used = {table.name for consumer in app.consumers.values() for table in consumer.tables}
    try:
        chosen(app)
        for owner in [job.owner for job in app.job_handlers.values() if job.priority]:
            app.ranks(owner)
        for name in sorted(used):
            app.events.cell(name, "")
    except BarnabasError as error:  # what a worker refuses as it starts; or out of reach, which was said before
        problems[str(error)] = None
    warnings += [f"no consumer names table {name!r}: add it to its tables=[...]" for name in app.tables if name not in used]
    if not app.consumers and not app.job_handlers:
        warnings.append("there is nothing to run: the app has no consumer and no job")
    return list(problems), warnings


# What is stored.


class TopicInfo(NamedTuple):
    """A topic as it is stored; `retention` is None where it is not declared, `declared` says what it is to the app."""

    name: str
    partitions: int
    messages: int
    bytes: int | None
    retention: Retention | None
    declared: str


def topics(app: App) -> list[TopicInfo]:
    """All stored topics, and whether the app declares them or keeps them for itself (dead letters, retries)."""
    known = {topic.name: topic for topic in app.all_topics()}
    found = []
    for name, partitions in app.events.topics():
        topic = known.get(name)
        messages, size = sum(end - first for first, end, _ in partitions), sum(size for _, _, size in partitions)
        retention = topic.retention if topic else None
        what = "Barnabas' own" if name == f"{app.name}.control" else "no" if topic is None else "yes"
        if topic is not None and topic.parent is not None:
            what = f"{'dead letters' if name == topic.parent.dead_topic.name else 'retries'} of {topic.parent.name}"
        known_size = size if size or not messages else None  # Kafka's clients are not told
        found.append(TopicInfo(name, len(partitions), messages, known_size, retention, what))
    return found


def read(
    app: App, name: str, start: Start = "earliest", *, partition: int | None = None, key: str | None = None,
    limit: int | None = None, follow: bool = False,
) -> Iterator[Stored]:
    """The stored messages of a topic: each partition in its order, between partitions the oldest first.

    start: "earliest", "latest", an offset (of `partition`), or a time: of each partition, the first message that is not
    older. key: only messages with this key. follow: go on with what comes, for good. Raises UnknownTopic; no topic is
    changed, no position is moved.
    """
    events = app.events
    states = {state.name: state for state in events.topics()}
    if name not in states:
        raise UnknownTopic(f"no topic {name!r} is stored in {app.settings.shown('events')}; {meant(name, states, 'topics')}")
    partitions = states[name].partitions
    if partition is not None and not 0 <= partition < len(partitions):
        raise UnknownTopic(f"topic {name!r} has no partition {partition}; it has {len(partitions)}, from 0")
    if isinstance(start, int) and partition is None:
        raise DeclarationError(f"an offset ({start}) belongs to one partition; say which (--partition), or give a time")
    numbers = range(len(partitions)) if partition is None else [partition]
    spans = {n: (begin(events, states[name], n, start), partitions[n][1]) for n in numbers}
    streams = [span(events, name, n, *within) for n, within in spans.items()]
    found: Iterator[Stored] = heapq.merge(*streams, key=attrgetter("timestamp"))
    if follow:
        found = itertools.chain(found, _follow(events, name, {n: max(within) for n, within in spans.items()}))
    if key is not None:
        keys = (key, key.encode())
        found = (message for message in found if message.key in keys)
    return itertools.islice(found, limit)


def begin(events: Backend, state: TopicState, number: int, start: Start) -> int:
    first, end, _ = state.partitions[number]
    if isinstance(start, int):
        return max(start, first)
    if isinstance(start, datetime):
        since = start.timestamp()
        if hasattr(events, "since"):
            found: int = events.since(state.name, number, since)
            return max(first, min(end, found))
        # Timestamps may be the sender's own, so they need not rise: no bisection.
        rows = span(events, state.name, number, first, end)
        return next((m.offset for m in rows if m.timestamp is not None and m.timestamp >= since), end)
    return end if start == "latest" else first


def span(events: Backend, topic: str, number: int, offset: int, end: int) -> Iterator[Stored]:
    """The stored messages of one partition from `offset` up to `end`."""
    while offset < end:
        rows = events.read(topic, number, offset, min(CHUNK, end - offset))
        if not rows:
            return
        for at, key, value, headers, time in rows:
            if at >= end:
                return
            yield Message(topic=topic, partition=number, offset=at, key=key, value=value, headers=headers or (), timestamp=time)
        offset = rows[-1][0] + 1


def find(events: Backend, topic: str, partition: int, offset: int) -> Stored | None:
    """The message that is stored at this address, if any."""
    stored = next((state.partitions for state in events.topics() if state.name == topic), [])
    if partition >= len(stored) or not stored[partition][0] <= offset < stored[partition][1]:
        return None
    return next(span(events, topic, partition, offset, offset + 1), None)


def address(text: str) -> tuple[str, int, int] | None:
    """Topic, partition and offset of TOPIC[PARTITION]@OFFSET; None for what is written otherwise."""
    found = re.fullmatch(r"(.+)\[(\d+)\]@(\d+)", text)
    return (found[1], int(found[2]), int(found[3])) if found else None


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`."""
    left = iter(items)
    while some := list(itertools.islice(left, size)):
        yield some


def _follow(events: Backend, topic: str, at: dict[int, int]) -> Iterator[Stored]:
    """What comes from these offsets on, as it comes."""
    ring = threading.Event()
    unwatch = events.watch(ring.set)
    try:
        while True:
            ring.clear()
            quiet = True
            for number, offset in at.items():
                for message in span(events, topic, number, offset, offset + CHUNK):
                    quiet = False
                    at[number] = message.offset + 1
                    yield message
            if quiet:
                ring.wait(1.0)
    finally:
        unwatch()


# What flows where.


class Node(msgspec.Struct, frozen=True):
    """A part of the graph; `kind` is "topic", "consumer", "job" or "table"."""

    kind: str
    name: str


class Edge(msgspec.Struct, frozen=True):
    """What goes from one node to another.

    kind: "reads" (topic to consumer), "answers" (a declared response), "keeps" (consumer to table), or "sends": the
    code of a handler or job names this topic or job, so it may send there.
    """

    kind: str
    source: Node
    target: Node
    required: bool = False
    multiple: bool = False


class Graph(msgspec.Struct, frozen=True):
    """Topics, consumers, jobs and tables of an app, and what goes between them."""

    nodes: list[Node]
    edges: list[Edge]


def flow(app: App) -> Graph:
    """The graph of an app. Sends outside of responders are found where the code names a topic or job of the app."""
    kinds: dict[str, Iterable[str]]
    kinds = {"topic": app.topics, "consumer": app.consumers, "job": app.job_handlers, "table": app.tables}
    nodes = [Node(kind, name) for kind, names in kinds.items() for name in names]
    edges = [edge for consumer in app.consumers.values() for edge in _edges(consumer)]
    for job in app.job_handlers.values():
        own = Node("job", job.name)
        edges += [Edge("sends", own, to) for to in _named(job.function, app) if to != own]
    return Graph(nodes, edges)


def _edges(consumer: Consumer) -> Iterator[Edge]:
    own = Node("consumer", consumer.name)
    for topic in consumer.topics:
        yield Edge("reads", Node("topic", topic.name), own)
    answered = set()
    for name, required, multiple in responses(consumer):
        answered.add(Node("topic", name))
        yield Edge("answers", own, Node("topic", name), required, multiple)
    for table in consumer.tables:
        yield Edge("keeps", own, Node("table", table.name))
    for node in _named(consumer.target, consumer.app):
        if node not in answered and node.name not in [t.name for t in consumer.topics]:
            yield Edge("sends", own, node)


def responses(consumer: Consumer) -> list[tuple[str, bool, bool]]:
    """The topics a consumer answers on, in the order of declaration: name, whether always, whether more than once."""
    routes = consumer.routes(consumer.target)
    optional, batch = any(route.params.returns_none for route in routes), routes[0].params.batch
    return [(r.topic.name, r.required and not optional, r.multiple or batch) for r in consumer.responds]


def _named(target: Any, app: App) -> list[Node]:
    """The app's topics and jobs that this function's (or this class's methods') code names."""
    known: dict[int, Node] = {id(topic): Node("topic", topic.name) for topic in app.topics.values()}
    known |= {id(job): Node("job", job.name) for job in app.job_handlers.values()}
    functions = [target] if not inspect.isclass(target) else vars(target).values()
    found: dict[Node, None] = {}
    for function in [inspect.unwrap(each) for each in functions if callable(each)]:
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for name in _names(code):
            value = cells[name].cell_contents if name in cells else function.__globals__.get(name)
            if id(value) in known:
                found[known[id(value)]] = None
    return list(found)


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


def flow_text(app: App) -> str:
    """What is answered on which topic, in the form of `karafka flow` (facts/karafka.md 5.2), by incoming topic."""
    routes: dict[str, dict[tuple[str, bool, bool], None]] = {}
    for consumer in app.consumers.values():
        for topic in consumer.topics:
            routes.setdefault(topic.name, {}).update(dict.fromkeys(responses(consumer)))
    lines = []
    for name, answers in sorted(routes.items()):
        lines.append(f"{name} =>" if answers else f"{name} => (nothing)")
        for answer, required, multiple in answers:
            when, often = "always" if required else "conditionally", "one or more" if multiple else "exactly once"
            lines.append(f"{f'  - {answer}:':<25} ({when}, {often})")
    return "\n".join(lines)


_SHAPES = {"topic": '[/"{}"/]', "consumer": '("{}")', "job": '[["{}"]]', "table": '[("{}")]'}  # of Mermaid


def flow_mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flowchart: what happens always is solid, what may happen is dotted."""
    ids = {node: f"n{number}" for number, node in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    lines += [f"    {ids[node]}{_SHAPES[node.kind].format(node.name)}" for node in graph.nodes]
    for edge in graph.edges:
        sure = edge.kind in ("reads", "keeps") or edge.required
        label = "|one or more|" if edge.multiple else ""
        lines.append(f"    {ids[edge.source]} {'-->' if sure else '-.->'}{label} {ids[edge.target]}")
    return "\n".join(lines)
