"""A member of a consumer group in Kafka: its claims on partitions, their accounts, commits and rebalances.

Every call of the driver's consumer is made by the fetch thread: calls from several threads starve each other.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import confluent_kafka as driver
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from barnabas.backends.kafka_admin import PATIENCE
from barnabas.backends.kafka_options import CONSUMER
from barnabas.backends.kafka_words import FORGOTTEN, explain, pack, unpack
from barnabas.backends.shares import close_books, open_account
from barnabas.engine.alone import CRASHES, NOTHING
from barnabas.message import Row
from barnabas.ports import Listener, Part, Result

if TYPE_CHECKING:
    from barnabas.backends.kafka import KafkaBackend

log = logging.getLogger("barnabas")
BUSY = 0.02  # seconds: the longest wait inside the driver, which nothing ends early, while something is in flight
_AGAIN = {  # a commit that a rebalance was in the way of
    KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.STALE_MEMBER_EPOCH, KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError._WAIT_COORD,
    KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.FENCED_MEMBER_EPOCH,
}  # fmt: skip


FAR = 1_000_000  # offsets beyond what was committed that may be in work where nothing was ever lost
WINDOW = (FAR, 1000, 50)  # ... and where that may have been in work when an owner was lost, once and twice
CAREFUL = 0.005  # seconds: the longest wait inside the driver while such a window is to be moved


class Claim:
    """A partition in hand: its Part and account, and the rows there was no room for yet.

    Who crashes cannot say what it had in work. So what is committed says how far that may reach, until the partition is given
    back in order; whoever finds it still said counts a crash for all up to there (`ends`: a stretch from the position for each),
    and then keeps within narrow windows that are committed first (`reach`), so that the next crash has few suspects. What was in
    work at three crashes is committed on its own when it runs alone.
    """

    __slots__ = ("at", "behind", "ends", "full", "id", "kept", "part", "paused", "reach", "root", "weight")

    def __init__(self, part: Part, at: tuple[str, int], root: tuple[str, int], id: str | None) -> None:
        self.part = part
        self.id = id  # the topic's, whose offsets these are
        self.at = at  # its name in Kafka, and number
        self.root = root  # the partition that the group gave us, with which it came
        self.behind: list[Row] = []
        self.full: float | None = None  # since when it has no room
        self.paused = False
        self.weight = 1.0  # bytes of a message of late
        self.kept: Any = None  # what was committed last, or is on its way: offset, metadata, the reach that comes with it
        self.ends: list[int] = []  # the farthest first
        self.reach = 0  # with `ends`: nothing from here on is handed out

    def window(self, offset: int) -> tuple[list[int], int, int]:
        """At this position: the ends that are left, how far ahead something may be in work, and the reach."""
        ends = [end for end in self.ends if end > offset]
        if len(ends) >= CRASHES:  # only what runs alone is in work, and that says so itself
            return ends, 0, ends[CRASHES - 1]
        gap = self.behind[0][0] + 1 - offset if self.behind and not self.part.held else 0
        ahead = max(WINDOW[len(ends)], gap)
        return ends, ahead, offset + ahead


def _is_retry(topic: Any, group: str) -> bool:
    return topic.parent is not None and topic.name == topic.parent.retry_name(group)


class KafkaMember:
    """A member of a consumer group."""

    atomic = None

    def __init__(
        self, home: "KafkaBackend", group: str, topics: Sequence[Any], start: str, ordered: bool, listener: Listener
    ) -> None:
        self.home, self.group, self._listener = home, group, listener
        self._start, self._ordered = start, ordered
        # The partitions of a retry topic go with those of its topic: an assignor that mixes them would give somebody only
        # what is idle most of the time.
        self._retries = {home.prefix + t.parent.name: home.prefix + t.name for t in topics if _is_retry(t, group)}
        self._names = [home.prefix + t.name for t in topics if not _is_retry(t, group)]
        self._policy = str(home.options.get("auto.offset.reset", "earliest"))
        self._session = float(home.options.get("session.timeout.ms", 1000 * home.session)) / 1000
        self._claims: dict[tuple[str, int], Claim] = {}
        self._many = max(1, len(topics[0].app.consumers))  # consumers of this process, which share out memory and wake-ups
        self._ids: dict[str, str] = {}  # of the topics whose offsets ours are
        self._numbers = 0
        self._dirty: dict[Claim, None] = {}
        self._sent: list[Claim] = []  # a commit is on its way
        self._found: list[tuple[Part, Sequence[Row]]] = []  # to be handed out, whatever fails beside it
        self._committed_at = self._until = 0.0
        self._lapsed = self._closing = False
        self._error: BaseException | None = None
        self._refused: BaseException | None = None  # why it is in no group
        self._broken = self._fatal = False
        self._woken = threading.Event()
        self.wake: Callable[[], None] = self._woken.set
        self._join()
        home.sources.append(self)

    def _join(self) -> None:
        home = self.home
        fixed = {
            "group.id": home.prefix + self.group, "enable.auto.commit": False, "enable.auto.offset.store": False,
            "auto.offset.reset": "error", "allow.auto.create.topics": False,
            "on_commit": self._on_commit, "stats_cb": home.statistics,
        }  # fmt: skip
        home.join()
        fixed["client.id"] = home.name
        if instance := home.options.get("group.instance.id"):
            fixed["group.instance.id"] = f"{instance}-{self.group}"
        # Members hear of a rebalance by their next heartbeat, and most take two rounds; where many wait, all that is rarer.
        beat = self._session * min(300, max(100, 3 * self._many))
        own = {"session.timeout.ms": round(self._session * 1000), "heartbeat.interval.ms": round(beat)}
        own["queued.max.messages.kbytes"] = min(16384, max(1024, 65536 // self._many))
        own["fetch.wait.max.ms"] = min(2000, max(100, self._many**2 // 5, 10 * len(self._names)))  # of a fetch that finds nothing
        self._consumer = home.client(driver.Consumer, CONSUMER | own, **fixed)
        strategy = str(home.options.get("partition.assignment.strategy", "cooperative"))
        classic = str(home.options.get("group.protocol", "classic")).lower() == "classic"
        self._eager = classic and not strategy.startswith("cooperative")
        on_assign, on_revoke, on_lost = map(self._safe, (self._on_assign, self._on_revoke, self._on_lost))
        self._consumer.subscribe(self._names, on_assign=on_assign, on_revoke=on_revoke, on_lost=on_lost)

    def _safe(self, callback: Any) -> Any:
        """The driver crashes where a callback raises: the error waits for the next fetch, which makes a new consumer."""

        def call(*args: Any) -> None:
            try:
                callback(*args)
            except BaseException as error:
                self._error, self._broken = error, True

        return call

    def _join_anew(self) -> None:
        """This consumer is of no use any more: leave, and begin again."""
        self._broken = False
        claims = [claim for claim in self._claims.values() if not claim.part.closed]
        self._listener.revoked([claim.part for claim in claims])
        if (error := self._commit_now(claims, NOTHING)) is not None:
            log.warning("%s: what was done since the last commit may run again: %s", self.group, error.str())
        self._forget(list(self._claims.values()))
        self._closing = True
        self._consumer.close()
        self._closing, self._lapsed, self._sent = False, False, []
        self._join()

    # Settling.

    def settle(self, results: Sequence[Result]) -> None:
        """Enter them into the accounts; the positions are committed in the background."""
        for part in close_books(results):
            claim = self._claims.get((self.home.prefix + part.topic, part.partition))
            if claim is not None and claim.part is part:
                self._dirty[claim] = None

    def _offsets(self, claims: Sequence[Claim], only: int | None = None) -> list[TopicPartition]:
        """What is to be committed of these."""
        found = []
        for claim in claims:
            part = claim.part
            offset, done = part.held.position()
            claim.ends, ahead, reach = claim.window(offset)
            if only is not None:
                ahead = max(0, only + 1 - offset)
            claim.kept = (offset, pack(offset, done, part.attempts, claim.ends, ahead), reach)
            found.append(TopicPartition(*claim.at, offset, metadata=claim.kept[1]))
        return found

    def _commit(self) -> None:
        """Send what is to be committed; one request at a time, for all partitions."""
        if self._sent:
            return
        self._committed_at = self.home.clock.monotonic()
        claims = list(self._dirty)
        self._dirty.clear()
        try:
            self._consumer.commit(offsets=self._offsets(claims), asynchronous=True)
            self._sent = claims
        except KafkaException as error:
            self._dirty.update(dict.fromkeys(claims))
            log.debug("%s: %s", self.group, error)

    def _on_commit(self, error: KafkaError | None, where: list[TopicPartition]) -> None:
        """The driver's answer: what could not be committed is tried again with the next."""
        sent, self._sent = self._sent, []
        failed = {(tp.topic, tp.partition) for tp in where if error is not None or tp.error is not None}
        self._dirty.update({claim: None for claim in sent if claim.at in failed and self._claims.get(claim.at) is claim})
        if not failed:
            for claim in sent:
                claim.reach = claim.kept[2]
            self.home.works()
        elif error is None or error.code() not in _AGAIN:
            why = error or next(tp.error for tp in where if tp.error is not None)
            log.warning("%s: positions could not be committed, trying again: %s", self.group, why.str())

    def _commit_now(self, claims: Sequence[Claim], only: int | None = None) -> KafkaError | None:
        """Commit these and wait; the error, if any. `only`: what is in work, and nothing else (NOTHING: not even that)."""
        offsets = self._offsets(claims, only)
        for claim in claims:
            self._dirty.pop(claim, None)
        if not offsets:
            return None
        try:
            answers = self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            return error.args[0]
        for claim in claims:
            claim.reach = claim.kept[2]
        return next((tp.error for tp in answers if tp.error is not None), None)

    # Rebalances: called by the driver inside poll or close, on the fetch thread.

    def _on_assign(self, consumer: Any, where: list[TopicPartition]) -> None:
        began, self._refused = self.home.clock.monotonic(), None
        roots = {(tp.topic, tp.partition): (tp.topic, tp.partition) for tp in where}
        roots |= self._with_retries(where)
        where = [TopicPartition(*at) for at in roots]
        came = self._begin(where, roots) if where and not self._closing else []
        (consumer.assign if self._eager else consumer.incremental_assign)(where)
        consumer.resume(where)  # the driver keeps a pause that was made before they went
        if came:
            self._claims.update({claim.at: claim for claim in came})
            self._tell(came, began)

    def _tell(self, came: list[Claim], since: float) -> None:
        """These came, and hold since then at least. A user's hook may take long, so Kafka is asked once more: before anything is
        in work, so that from now on a crash leaves its mark."""
        self._listener.assigned([claim.part for claim in came])
        asked = self.home.clock.monotonic()
        if self._commit_now(came) is None:
            since = asked
        else:
            self._dirty.update(dict.fromkeys(came))
        self._renew(since)

    def _with_retries(self, where: list[TopicPartition]) -> dict[tuple[str, int], tuple[str, int]]:
        """The partitions of retry topics that go with these, and with which."""
        stored = self.home.metadata() if where and self._retries else {}
        cut, found = len(self.home.prefix), {}
        for tp in where:
            retry = self._retries.get(tp.topic, "")
            step = max(stored.get(tp.topic[cut:], 1), tp.partition + 1)
            for number in range(tp.partition, stored.get(retry[cut:], 0), step):
                found[retry, number] = (tp.topic, tp.partition)
        return found

    def _begin(self, where: list[TopicPartition], roots: dict[tuple[str, int], tuple[str, int]]) -> list[Claim]:
        """Open the accounts of partitions where their last owner left off; their offsets are set."""
        try:
            kept = {(tp.topic, tp.partition): tp for tp in self._consumer.committed(where, timeout=PATIENCE)}
            for failed in (tp for tp in kept.values() if tp.error is not None):
                raise KafkaException(failed.error)
        except KafkaException as error:
            raise explain(error.args[0], f"the positions of {self.group!r}", self.home) from error
        ids = self.home.ids({tp.topic for tp in where}, wait=True)
        anew = {tp.topic for tp in where if self._ids.get(tp.topic, ids.get(tp.topic)) != ids.get(tp.topic)}
        for topic in sorted(anew):
            self._say_anew(topic)
        for tp in where:
            last = kept[tp.topic, tp.partition]
            tp.offset = driver.OFFSET_INVALID if last.metadata == FORGOTTEN or tp.topic in anew else last.offset
        self._ids.update({tp.topic: ids[tp.topic] for tp in where if tp.topic in ids})
        cut = len(self.home.prefix)
        fresh = {(tp.topic[cut:], tp.partition) for tp in where if tp.offset < 0}
        hit = {  # whoever had these did not give them back
            (tp.topic[cut:], tp.partition): tp.offset + ahead
            for tp in where
            if tp.offset >= 0 and (ahead := unpack(tp.offset, kept[tp.topic, tp.partition].metadata)[3])
        }
        tops = self.home.ends(hit)
        begins = self.home.ends(fresh, OffsetSpec.earliest())
        if self._start == "latest":  # but for what came to the group's own retry topics
            begins |= self.home.ends([at for at in fresh if self.home.prefix + at[0] in {*self._names} - anew])
        claims = []
        for tp in where:
            at = (tp.topic[cut:], tp.partition)
            if at in fresh:
                tp.offset = begins[at]
            place = (tp.topic, tp.partition)
            claims.append(claim := self._claim(place, roots[place], tp.offset, kept[place].metadata))
            if at in hit and (end := min(hit[at], tops[at])) > tp.offset:
                claim.ends = sorted([*claim.ends, end], reverse=True)[: CRASHES + 1]
        return claims

    def _say_anew(self, topic: str) -> None:
        name = topic[len(self.home.prefix) :]
        log.error("%s: topic %r was deleted and made anew; it is read from its beginning", self.group, name)

    def _claim(self, at: tuple[str, int], root: tuple[str, int], offset: int, beside: str | None) -> Claim:
        self._numbers += 1
        part = Part(at[0][len(self.home.prefix) :], at[1], self._numbers, self.group)
        done, attempts, ends, _ = unpack(offset, beside)
        open_account(part, self._ordered, offset, done, attempts)
        claim = Claim(part, at, root, self._ids.get(at[0]))
        claim.ends = ends
        part.alone = lambda offset: self._commit_now([claim], offset) is None
        return claim

    def _on_revoke(self, consumer: Any, where: list[TopicPartition]) -> None:
        claims = self._going(where)
        if claims:
            self._listener.revoked([claim.part for claim in claims])
            asked = self.home.clock.monotonic()
            error = self._commit_now(claims, NOTHING)
            if error is not None:
                log.warning("%s: what was done of revoked partitions may run again: %s", self.group, error.str())
            else:
                self._renew(asked)  # however long the grace took, we are members
        self._let_go(where, claims)

    def _on_lost(self, consumer: Any, where: list[TopicPartition]) -> None:
        claims = self._going(where)
        if claims:
            log.warning("%s lost %d partitions; what it did since its last commit may run again", self.group, len(claims))
            for claim in claims:
                claim.part.closed = True
            self._listener.revoked([claim.part for claim in claims])
        self._let_go(where, claims)

    def _going(self, where: list[TopicPartition]) -> list[Claim]:
        """What we have of these, and of what came with them."""
        roots = {(tp.topic, tp.partition) for tp in where}
        return [claim for claim in self._claims.values() if claim.root in roots]

    def _let_go(self, where: list[TopicPartition], claims: Sequence[Claim]) -> None:
        self._forget(claims)
        if self._eager:
            self._consumer.unassign()
            return
        gone = {(tp.topic, tp.partition) for tp in where} | {claim.at for claim in claims}
        mine = {(tp.topic, tp.partition) for tp in self._consumer.assignment()}
        self._consumer.incremental_unassign([TopicPartition(*at) for at in (mine if self._closing else mine & gone)])

    def _forget(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            del self._claims[claim.at]
            self._dirty.pop(claim, None)

    # Doubts about the claim.

    def _renew(self, since: float) -> None:
        """The claims hold for half a session from `since`, when they were known to hold (what comes after it may be a freeze)."""
        self._until = since + self._session / 2
        for claim in self._claims.values():
            if not claim.part.closed:  # what a worker still has in its haul of those that go is not to begin
                claim.part.until = self._until

    def _lapse(self) -> None:
        """The loop stood still for half a session: nothing goes on until the group has confirmed that the claims hold."""
        if not self._lapsed:
            self._lapsed = True
            self._listener.revoked([claim.part for claim in self._claims.values()])
        self._consumer.poll(BUSY)  # may say that they are lost; whatever else comes will come again
        claims, asked = list(self._claims.values()), self.home.clock.monotonic()
        if came := [claim.part for claim in claims if not claim.part.closed]:  # just now: they are taken anew as well
            self._listener.revoked(came)
        error = self._commit_now(claims)
        if error is not None:
            if error.code() in _AGAIN:  # it will say, or take the claims away
                return
            raise explain(error, f"group {self.group!r}", self.home)
        self._lapsed = False
        if claims:
            self._tell([self._again(old) for old in claims], asked)

    def _again(self, old: Claim) -> Claim:
        """The claim holds: go on from its position."""
        offset, beside, reach = old.kept
        self._claims[old.at] = claim = self._claim(old.at, old.root, offset, beside)
        claim.reach = reach
        self.go_to(TopicPartition(*old.at, offset))
        return claim

    def go_to(self, where: TopicPartition) -> None:
        """Fetch from there. (The driver's `seek` fails on a partition that it does not fetch at the time.)"""
        if self._eager:
            others = [TopicPartition(*at) for at in self._claims if at != (where.topic, where.partition)]
            self._consumer.assign([where, *self._consumer.position(others)])
        else:
            self._consumer.incremental_unassign([where])
            self._consumer.incremental_assign([where])
        self._consumer.resume([where])

    # Leaving.

    def close(self) -> None:
        """Commit what is settled and leave the group. A commit waits behind a rebalance, so polling goes on until it is
        through."""
        self.home.sources.remove(self)
        consumer, monotonic = self._consumer, self.home.clock.monotonic
        deadline = monotonic() + PATIENCE
        self._listener.revoked([claim.part for claim in self._claims.values()])
        for claim in self._claims.values():
            claim.behind = []
        if self._claims:
            consumer.pause([TopicPartition(*at) for at in self._claims])
        self._closing = True
        while self._claims and (error := self._commit_now(list(self._claims.values()), NOTHING)) is not None:
            if error.code() not in _AGAIN or monotonic() > deadline:
                log.error("%s: what was done since the last commit may run again: %s", self.group, error.str())
                break
            consumer.poll(0.05)
        self._claims = {}
        consumer.close()
        self.home.left()
