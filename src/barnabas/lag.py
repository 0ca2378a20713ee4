"""How far consumer groups are, and where they are to go on: what `barnabas lag`, `reset` and `top` show and do."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

import msgspec

from barnabas.app import App
from barnabas.backends.shares import check_offset
from barnabas.consumer import Consumer
from barnabas.errors import DeclarationError
from barnabas.inspect import Start, begin
from barnabas.ports import Position, TopicState
from barnabas.processes import ProcessInfo, pauses, processes, state

# From well to worst, as the state of a group is that of its worst partition.
_LIVING = ("ok", "quiet", "stopping", "keys paused", "retrying", "waiting", "not read", "paused", "troubled")
STATES = (*_LIVING, "silent", "stopped", "never ran")


class PartitionLag(msgspec.Struct, frozen=True):
    """A group in one partition.

    position: all before it is finished (None: the group has not begun). open: the messages that are not. seconds: the age
    of the first of these, 0 where there is none. owner: the process that has the partition. state:

    "ok"; "quiet", "stopping" (its process takes no new messages); "keys paused"; "retrying" (the next message has failed
    before); "waiting" (for a process of the group to take it); "not read" (the consumer names the topic no more); "paused";
    "troubled" (its process says of what: `barnabas processes`); "silent" (its process gives no sign of life); "stopped" (the
    group has no process); "never ran".
    """

    group: str
    topic: str
    partition: int
    end: int
    position: int | None
    open: int
    seconds: float
    owner: str | None
    state: str


class GroupLag(msgspec.Struct, frozen=True):
    """A group altogether: the sum of what is open, the most seconds, the worst state; consumer: who declares it, if any."""

    group: str
    consumer: str | None
    topics: list[str]
    open: int
    seconds: float
    processes: list[str]
    state: str
    partitions: list[PartitionLag]


def unfinished(at: Position, start: str = "earliest") -> tuple[int, int]:
    """How many messages are open, and the offset of the first of them. start: of a group that has not begun."""
    offset = at.offset if at.offset is not None else at.end if start == "latest" else at.first
    offset = min(max(offset, at.first), at.end)
    count, following = at.end - offset, offset
    for low, high in sorted(at.done):
        count -= max(0, min(high, at.end) - max(low, offset))
        following = high if low <= following < high else following
    return max(0, count), following


def completed(positions: Iterable[Position], topics: Sequence[TopicState], consumers: Collection[Consumer]) -> list[Position]:
    """The positions, and those that declared consumers have not begun yet; in order of group, topic and partition.

    What an app notes of its dead letters (group `<app>-dead`) is no group's, unless a consumer declares it.
    """
    known = {consumer.group for consumer in consumers}
    own = [at for at in positions if at.group in known or not (at.group.endswith("-dead") and at.topic.endswith(".dead"))]
    begun = {at[:3] for at in own}
    stored = {topic.name: topic.partitions for topic in topics}
    for consumer in consumers:
        for topic in consumer.subscriptions:
            for number, (first, end, _) in enumerate(stored.get(topic.name, ())):
                if (consumer.group, topic.name, number) not in begun:
                    own.append(Position(consumer.group, topic.name, number, first, end, None, [], {}, {}, None))
    return sorted(own, key=lambda at: at[:3])


def state_of(
    at: Position, following: int, reads: Collection[str] | None, paused: Collection[str], owners: Mapping[str, str]
) -> str:
    """The state of a group that has processes, in one partition. following: the first open offset. reads: the topics of the
    consumer, if one declares the group. paused: the kinds of its pauses. owners: the states of processes, by name."""
    if reads is not None and at.owner is None and at.topic not in reads:
        return "not read"
    if "group" in paused:
        return "paused"
    if at.owner is None:
        return "waiting"
    if owners.get(at.owner, "ok") != "ok":
        return owners[at.owner]
    if following in at.attempts:
        return "retrying"
    return "keys paused" if "key" in paused else "ok"


def groups(app: App) -> list[GroupLag]:
    """All groups that are stored or declared, in order."""
    consumers = {consumer.group: consumer for consumer in app.consumers.values()}
    positions = completed(app.events.positions(), app.events.topics(), app.consumers.values())
    running, paused = processes(app), pauses(app)
    owners = {process.name: state(process, app.settings.session_timeout) for process in running}
    found = []
    for group, each in groupby(positions, key=attrgetter("group")):
        own, consumer = list(each), consumers.get(group)
        reads = [topic.name for topic in consumer.subscriptions] if consumer is not None else None
        begun, members = any(at.offset is not None for at in own), members_of(group, own, running)
        kinds = {pause.kind for pause in paused if pause.name == group}
        parts = []
        for at in own:
            count, following = unfinished(at, consumer.start if consumer is not None else "earliest")
            stands = state_of(at, following, reads, kinds, owners) if members else "stopped" if begun else "never ran"
            rows = app.events.read(at.topic, at.partition, following, 1) if count else ()  # none where retention was quicker
            seconds = max(0.0, app.clock.now() - rows[0][4]) if rows and rows[0][4] is not None else 0.0
            parts.append(PartitionLag(group, at.topic, at.partition, at.end, at.offset, count, seconds, at.owner, stands))
        counted = [part for part in parts if part.open or part.state != "not read"] or parts
        found.append(GroupLag(
            group, consumer.name if consumer is not None else None, list(dict.fromkeys(at.topic for at in own)),
            sum(part.open for part in parts), max(part.seconds for part in parts), members,
            max((part.state for part in counted), key=STATES.index), parts,
        ))  # fmt: skip
    return found


def members_of(group: str, own: Iterable[Position], running: Iterable[ProcessInfo]) -> list[str]:
    """The names of the processes that a group lives in; those that are quiet have left it."""
    owners = [at.owner for at in own if at.group == group and at.owner is not None]
    return sorted({*owners, *(process.name for process in running if group in process.groups and not process.quiet)})


def members(app: App, group: str) -> list[str]:
    """The names of the processes that a group lives in now."""
    return members_of(group, app.events.positions(group), processes(app))


def abandoned(app: App) -> list[str]:
    """The stored groups that carry the app's name, but that none of its consumers declares."""
    found = {at.group for at in app.events.positions(f"{app.name}-")} - {each.group for each in app.consumers.values()}
    return sorted(name for name in found if name != f"{app.name}-dead")


def mixed(app: App, consumers: Iterable[Consumer]) -> Iterator[tuple[Consumer, str]]:
    """Consumers that would begin as new groups on a table that another group wrote: what that counted would count again."""
    def new(group: str) -> bool:
        return all(at.group != group for at in app.events.positions(group))

    for each, table in [(one, table.name) for one in consumers for table in one.tables if new(one.group)]:
        if any(True for _ in app.events.cells(table)) and new(each.group):  # its first cells come together with its positions
            yield each, table


class Move(msgspec.Struct, frozen=True):
    """A group's way in one partition: where it goes on, from -> to (None: as a new group), and what is open then."""

    group: str
    topic: str
    partition: int
    position: int | None
    to: int | None
    open: int


def plan(app: App, group: str, to: Start | None, topic: str | None = None, partition: int | None = None) -> list[Move]:
    """Where a group would go on: `to` "earliest", "latest", an offset (of one partition), a time (with the first message
    that is not older), or None: it is forgotten, and begins as a new group does.

    Topics of retries are left out unless `topic` names one: what they hold has its turn in any case. Raises Refused for an
    offset that is not stored, DeclarationError where nothing is so named or an offset is for more than one partition.
    """
    states = app.events.topics()
    stored = {state.name: state for state in states}
    own = [at for at in completed(app.events.positions(group), states, app.consumers.values()) if at.group == group]
    tail = f".retry.{group}"
    chosen = [at for at in own if (at.topic == topic if topic is not None else to is None or not at.topic.endswith(tail))]
    chosen = [at for at in chosen if partition is None or at.partition == partition]
    if not chosen:
        there = ", ".join(dict.fromkeys(f"{at.topic}[{at.partition}]" for at in own))
        raise DeclarationError(f"group {group!r} has no such partition; it has {there or 'none'}")
    if isinstance(to, int) and len(chosen) > 1:
        there = ", ".join(f"{at.topic}[{at.partition}]" for at in chosen)
        raise DeclarationError(f"an offset ({to}) belongs to one partition; say which, by --partition and --topic: {there}")
    moves = []
    for at in chosen:
        if isinstance(to, int):
            check_offset(at._replace(offset=to), at.first, at.end)
        offset = None if to is None else begin(app.events, stored[at.topic], at.partition, to)
        start = next((consumer.start for consumer in app.consumers.values() if consumer.group == group), "earliest")
        after = unfinished(at._replace(offset=offset, done=[]), start)[0]
        moves.append(Move(group, at.topic, at.partition, at.offset, offset, after))
    return moves


def place(app: App, moves: Iterable[Move], clear: Sequence[str] = ()) -> None:
    """Let a group go on where a plan says; failed runs are forgotten, the tables named are emptied, in one step. Raises
    Refused while the group has members."""
    app.events.place([Position(move.group, move.topic, move.partition, 0, 0, move.to, [], {}, {}, None) for move in moves], clear)
