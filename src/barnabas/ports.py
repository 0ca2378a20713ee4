"""The doors between the engine and the backends: what one needs of the other, and nothing more."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from barnabas.message import Outgoing, OutgoingJob, Row
from barnabas.verdict import Verdict

FOREVER = float("inf")


class Part:
    """One partition (or queue) in this process's hands, from its assignment to its revocation.

    `until` (monotonic seconds) is when the claim on it ends unless renewed: no delivery starts after it. `attempts`
    and `crashes` count failed runs and lost processes of offsets that are still open. `paused`: nothing is to be claimed
    from this queue; `room`: how many may be claimed of it at most. `marked`: what is sent for it carries its id, as it is not
    settled together with it. `done`: how many of it this process has finished. `runner`: who has it in hand.
    """

    __slots__ = (
        "alone", "attempts", "batches", "begun", "cells", "closed", "crashes", "done", "group", "held", "id", "lanes",
        "marked", "partition", "paused", "retries", "room", "runner", "topic", "until",
    )  # fmt: skip

    def __init__(self, topic: str, partition: int, id: int, group: str = "") -> None:
        self.topic, self.partition, self.id, self.group = topic, partition, id, group
        self.retries = topic.endswith(f".retry.{group}")  # of the group's retry topic: without order, each when it is due
        self.until = FOREVER
        self.closed = False
        self.paused = False
        self.room: float = FOREVER  # whoever claims takes off, whoever finishes puts back
        self.marked = False
        self.runner: Any = None
        self.done = 0
        self.attempts: dict[int, int] = {}
        self.batches: dict[int, tuple[str, str]] = {}  # of jobs in hand that are of one: the batch, the job's id
        self.begun = set[int]()  # of jobs in hand with a slot of a Rate those that have begun: that start counts, whatever comes
        self.crashes: dict[int, int] = {}
        # Told the offset of what is about to run alone, and then that nothing does (-1); False: it could not be stored yet.
        self.alone: Callable[[int], bool] | None = None
        self.lanes: dict[Any, Any] = {}
        self.cells: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})  # unsettled, settled
        self.held: Any = None  # the source's own account of this partition

    def claimable(self) -> bool:
        """Whether jobs may be claimed from this queue just now."""
        return not self.paused and self.room > 0


class Result(NamedTuple):
    """What came of a stretch of rows of one partition: all are done but those that `others` names by row number."""

    part: Part
    rows: Sequence[Row]
    outputs: list[Outgoing | OutgoingJob]
    cells: dict[tuple[str, str | bytes | int], bytes | None]
    others: dict[int, Verdict]


class Listener(Protocol):
    """Who is told that partitions come and go: called inside `fetch`, on the fetch thread."""

    size: int  # deliveries that may be in work at once
    dump: Callable[[], None]  # shows an operator what is in work; from any thread

    def assigned(self, parts: list[Part]) -> None:
        """These partitions are ours from now on."""

    def revoked(self, parts: list[Part]) -> None:
        """These are to be given up: finish or drop what is in hand, settle it, then return."""


class Source(Protocol):
    """Where deliveries come from. Touched by exactly one thread (`wake` by any)."""

    atomic: Any  # the home that settles outputs and cells in the same transaction, or None

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        """New rows, at most `limit` unsettled ones per partition; waits up to `timeout` seconds for the first."""

    def settle(self, results: Sequence[Result]) -> None:
        """Make these results, with their outputs and cells, durable in one step. May be called again with the same."""

    def wake(self) -> None:
        """End a waiting `fetch` at once."""

    def close(self) -> None:
        """Leave: whatever is unsettled is given back."""


class Sink(Protocol):
    """Where messages and jobs leave. Safe in any thread."""

    def send(self, outgoing: Sequence[Outgoing | OutgoingJob], block: bool = True) -> None:
        """Take these; each one's future resolves when it is durable. Waits for room, or raises BufferFull."""

    def flush(self, timeout: float) -> int:
        """Wait until all taken is durable, at most `timeout` seconds; the number of those that are not."""


class TopicState(NamedTuple):
    """A topic as it is stored: its partitions' first and next offsets, and the bytes they hold."""

    name: str
    partitions: list[tuple[int, int, int]]  # first offset, next offset, bytes


class Position(NamedTuple):
    """How far a group is in one partition: all before `offset` is finished (None: it has not begun), and so is `done`."""

    group: str
    topic: str
    partition: int
    first: int  # the oldest offset that is stored
    end: int  # the offset after the newest
    offset: int | None
    done: list[tuple[int, int]]  # finished intervals beyond `offset`: from, to (not included)
    attempts: dict[int, int]  # failed runs of offsets that are open
    crashes: dict[int, int]
    owner: str | None  # the name of the process that has it


class QueueState(NamedTuple):
    """A queue: how many jobs are in which state, and since when (epoch seconds) the first of the ready ones waits.

    A backend that keeps waiting or dead jobs of all queues in one place may count them under the name "".
    """

    name: str
    ready: int
    work: int
    scheduled: int
    retry: int
    dead: int
    since: float | None


class StoredJob(NamedTuple):
    """A job as it is stored. `ref` is the backend's own handle on it, for `move_jobs`."""

    ref: Any
    jid: str
    queue: str
    state: str  # "ready", "work", "scheduled", "retry" or "dead"
    at: float | None  # epoch seconds: when it is due, or when it died
    crashes: int
    owner: str | None
    payload: bytes


class Process(NamedTuple):
    """A worker process. `info` is what it last reported of itself (see `Worker.report`)."""

    name: str  # host:pid:number
    pid: int
    host: str
    started: float  # epoch seconds
    silent: float  # seconds since its last sign of life
    info: dict[str, Any]


class Backend(Sink, Protocol):
    """What a URL opens: a place for topics, for jobs, or for both."""

    url: str
    closed: bool
    ranks: bool  # whether its queues know priorities
    name: str  # of this worker process among `processes`; "" before it is one

    def declare(self, topics: Iterable[Any]) -> None:
        """Create the topics that are missing; refuse a partition count that differs from the stored one."""

    def log(self, group: str, topics: Sequence[Any], *, start: str, ordered: bool, listener: Listener) -> Source:
        """A source of these topics for this consumer group, from `start` where the group has no position. `ordered`: each
        partition's rows are finished in the order they come, but for those of the group's retry topics."""

    def queues(self, queues: Sequence[str] | Mapping[str, int], listener: Listener, guard: Any = None) -> Source:
        """A source of jobs: the queues in strict order, or by weight. guard: says of each that is claimed which locks it
        needs (`jobs.unique.Guard`), None where no declared job needs any."""

    def cell(self, table: str, key: Any) -> bytes | None:
        """A table's cell as it was last settled."""

    def cells(self, table: str) -> Iterable[tuple[Any, bytes]]:
        """All cells of a table."""

    def box(self, workers: int) -> tuple[Any, int]:
        """Memory for that many workers to say what they have in work, and where in it they begin, where it is to outlive a
        killed process; else None."""

    def open_work(self, groups: Mapping[str, Sequence[str]], queues: Sequence[str]) -> int:
        """Messages and jobs that are ready or in work for these, in any process; 0 means drained."""

    def topics(self) -> list[TopicState]:
        """All topics that are stored."""

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Row]:
        """Stored rows of one partition from `offset` on."""

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` whenever something may have been stored; returns what ends it."""

    def close(self) -> None:
        """Flush and leave."""

    # What operators see and do.

    def positions(self, groups: str = "") -> list[Position]:
        """How far each group whose name begins so is in each partition it has ever had; in order of group, topic, partition."""

    def place(self, positions: Iterable[Position], clear: Sequence[str] = ()) -> None:
        """Set the `offset` and `done` of these, forget their attempts and crashes, and empty the tables in `clear`, in one
        step. Raises Refused where a group has members."""

    def finish(self, group: str, letters: Sequence[tuple[str, int, int, Outgoing | None]]) -> int:
        """Enter offsets (topic, partition, offset) as finished by a group that nobody runs, and send the message that comes
        with each, in one step. Those that are finished already are left alone, so nothing goes twice. Returns the number of
        the others. Raises UnknownTopic, and on Kafka Refused where another process began the same meanwhile."""

    def queue_states(self) -> list[QueueState]:
        """All queues, by name."""

    def find_jobs(self, state: str | None = None, queue: str | None = None) -> Iterator[StoredJob]:
        """The jobs of a state and queue (None: of all), first to run first; streamed, so that a million do no harm."""

    def move_jobs(self, refs: Sequence[Any], to: str | None) -> int:
        """Make jobs "ready" now (as `payload.recalled` writes them), or "dead"; "queue:NAME" puts them into that queue in the
        state they are in; None drops them. Those in work are left alone. Returns how many were moved."""

    def note(self, name: str, timeout: float = 0.0) -> bytes | None:
        """A note (see `message.note`), None if there is none; waits up to `timeout` seconds for it."""

    def swap(self, name: str, old: bytes | None, new: bytes, until: float, jobs: Sequence[OutgoingJob]) -> bool:
        """Store a note and jobs that are due in one step, if the note still is `old`; whether it was."""

    # Batches: see `jobs.batch`. A member joins with `message.Member`, and leaves "open" as its job is settled, told by
    # `Part.batches`; each is a member once, whatever is repeated.

    ripe: Callable[[str], None]  # told of batches without an open member, or with a new dead one, after the commit

    def batch(self, id: str) -> tuple[int, int, int]:
        """How many members of a batch are open, done and dead."""

    def batch_members(self, id: str, state: str) -> Iterator[str]:
        """The ids of the members in this state; streamed."""

    def end(self, id: str, members: Sequence[str], how: str) -> None:
        """These are "done", or if they were open "dead", whatever they wait for."""

    def forget(self, id: str, state: str | None = None) -> None:
        """Forget the members in this state, or all, and that there ever was such a batch."""

    def holder(self, key: str) -> str | None:
        """The id of the job that holds this lock of unique jobs."""

    def hold(self, token: str, need: Any) -> float:
        """Take a slot of a limit by hand (a `jobs.limit.Need`): 0.0 if there was one, else seconds until it is to be asked for
        again. What a process has it keeps as long as it lives; `let_go` gives it back."""

    def let_go(self, token: str, need: Any, begun: bool = True) -> None:
        """Give a slot taken by hand back, or the wish for one; begun: no start of a rate counts for it otherwise."""

    def taken(self, needs: Sequence[Any]) -> list[tuple[int, int, float | None]]:
        """Of each of these limits (`jobs.limit.Need`): how many slots are taken, how many jobs wait for one, and when a rate
        that has none free has the next (epoch seconds)."""

    def processes(self) -> list[Process]:
        """The worker processes that live (or have not been buried yet)."""

    def report(self, info: Mapping[str, Any]) -> None:
        """Say what this worker process does; called about once a second, stored when it changed, at most every 2 s."""

    def control(self) -> dict[str, str]:
        """What operators have asked for and not taken back, in all processes: {"pause group:NAME": "", "pause queue:NAME": "",
        'pause key:["GROUP", "KEY"]': "", "process:NAME": "quiet" or "stop"}."""

    def set_control(self, name: str, value: str | None) -> None:
        """Ask for it, durably; None takes it back. Processes obey within a second or two."""
