"""The topics of a consumer group in Kafka, as one member sees them: what is fetched, and what there is room for."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import OffsetSpec

from barnabas.backends.kafka_group import BUSY, CAREFUL, Claim, KafkaMember
from barnabas.backends.kafka_words import MOST, TAKEN, as_bare_rows, as_deliveries, as_rows, explain, whole
from barnabas.errors import PositionLost
from barnabas.message import Row, Unread
from barnabas.ports import Part

log = logging.getLogger("barnabas")
COMMIT, QUIET = 1.0, 0.1  # seconds between two commits under load, and when nothing is in flight
SLICE = 0.1  # seconds: the longest wait inside the driver when nothing is in flight
BATCH = 4000  # messages taken at once
PATIENCE = 1.0  # seconds to wait for room before pausing, which throws away what the driver has fetched ahead
KEEP = 3600.0  # seconds between two commits of everything: Kafka forgets what nobody commits for offsets.retention.minutes
FLIGHT_BYTES = 8 * 1024 * 1024  # bytes of one partition in flight, at least one message


class KafkaLog(KafkaMember):
    """A source of deliveries."""

    _limit = 1
    _looked = _kept_at = 0.0
    _gone: frozenset[str] | set[str] = frozenset()  # topics whose end a log line has said
    _rows: Callable[[list[Any]], Any] = staticmethod(as_rows)

    # Fetching.

    def fetch(self, limit: int, timeout: float) -> list[tuple[Part, Sequence[Row]]]:
        self._fetch(limit, timeout)
        found, self._found = self._found, []
        return found

    def _fetch(self, limit: int, timeout: float) -> None:
        if self._error is not None:
            error, self._error = self._error, self._error if self._fatal else None
            if self._broken:
                self._join_anew()
            raise error
        self._limit = limit
        now = self.home.clock.monotonic()
        if self._lapsed or (self._claims and now > self._until - self._session / 20):
            self._lapse()
            return
        if now > self._until - self._session * 0.4:  # about once a second
            self._renew(now)
            self._see_new_topics()
            if now - self._kept_at > KEEP:
                self._kept_at = now
                self._dirty.update(dict.fromkeys(self._claims.values()))
        self._hand_out(now)
        busy = any(claim.part.held for claim in self._claims.values())
        careful = any(claim.ends for claim in self._dirty)
        if self._dirty and (careful or now - self._committed_at >= (COMMIT if busy else QUIET)):
            self._commit()
        careful = careful or any(claim.ends for claim in self._sent)
        wait = 0.0 if self._found else timeout
        choked = self._choked(now)
        if choked is not None:
            if wait > 0:
                self._woken.wait(min(wait, choked, CAREFUL if careful else choked))
            self._woken.clear()
            if careful:  # that a window was committed is told by the driver's poll alone
                self._take(self._poll(0, 0))
            return
        self._woken.clear()
        slice = BUSY if busy or self._dirty else min(self._session / 5, SLICE * max(1, self._many / 5))
        messages = self._poll(min(wait, slice))
        if self._broken:
            return
        if messages:
            self._take(messages)
            now = self.home.clock.monotonic()
            if now > self._until - self._session / 20:  # frozen in between: others may have these by now
                self._lapse()
                return
            self._hand_out(now)
        elif not busy and self._claims:
            self._pass_gaps()
        if self._refused is not None and not self._claims:
            raise self._refused

    def _poll(self, wait: float, more: int = BATCH) -> list[Any]:
        """So many messages, waiting for the first: `consume` of more would wait until it has them all, and `poll` (2.16) wakes up
        every 0.2 s to look for Ctrl-C."""
        try:
            if more and ((found := self._consumer.consume(more, 0)) or not wait):  # to wait lets go of the interpreter: at a
                return found  # type: ignore[no-any-return]                        # backlog, for the handler's turn
            first: list[Any] = self._consumer.consume(1, wait)
            return first + self._consumer.consume(more - 1, 0) if first and more > 1 else first
        except KafkaException as error:
            raise explain(error.args[0], f"group {self.group!r}", self.home) from error

    def _take(self, messages: list[Any]) -> None:
        """Sort messages by partition."""
        if not messages:
            return
        bad: Sequence[Any] = ()
        if any(map(Message.error, messages)):
            bad = [message for message in messages if message.error() is not None]
            messages = [message for message in messages if message.error() is None]
        some = messages[::8]
        weight = 1 + sum(map(len, some)) / max(1, len(some))  # tombstones have no length
        ats: list[Any] = list(map(Message.partition, messages))
        name, topics = self._names[0], list(map(Message.topic, messages)) if len(self._names) + len(self._retries) > 1 else []
        if topics and topics.count(name) < len(topics):  # else it is the same for all, and numbers are compared faster
            ats = list(zip(topics, ats, strict=True))
        start, alone = 0, bool(ats) and ats.count(ats[0]) == len(ats)  # as most are: one partition's
        for at, run in [(ats[0], ats)] if alone else groupby(ats):
            end = start + len(list(run))
            claim = self._claims.get(at if type(at) is tuple else (name, at))
            if claim is not None:
                claim.weight = weight
                rows = (as_rows if claim.part.retries else self._rows)(messages[start:end])
                claim.behind = claim.behind + rows if claim.behind else rows
            start = end
        for message in bad:
            self._safe(self._problem)(message)  # the driver tells of it but once

    def bare(self, handler: Any) -> None:
        """Rows are to have no more than offset and value, from now on, or are left unread; the handler learns to read them."""
        self._rows = Unread if handler.unread else as_bare_rows
        handler.learn(whole, as_deliveries)

    def _hand_out(self, now: float) -> None:
        for claim in self._claims.values():
            rows, account = claim.behind, claim.part.held
            if not rows and claim.full is None:
                continue
            most = min(self._limit, int(FLIGHT_BYTES / claim.weight) + 1)
            if len(account) >= most:
                account.position()  # else what was finished out of order counts until the next commit
            room = most - len(account)
            if claim.kept is not None and len(claim.kept[1]) > MOST * 3 // 4:
                room = 0  # the account is about to outgrow what can be committed
            if claim.ends and rows and room > 0:
                room = min(room, self._within(claim))
            if room <= 0:
                claim.full = claim.full or now
                continue
            if len(rows) > room:
                rows, claim.behind = rows[:room], rows[room:]
            else:
                claim.behind = []
            if rows:
                account.next = rows[-1][0] + 1
                todo = account.add(rows)
                if claim.ends:
                    claim.part.crashes.update({row[0]: sum(end > row[0] for end in claim.ends) for row in todo})
                if todo:
                    self._found.append((claim.part, todo))
                elif not len(account):
                    self._dirty[claim] = None
            claim.full = now if len(account) >= self._limit or claim.behind else None
            if claim.paused and claim.full is None:
                self._resume(claim)

    def _within(self, claim: Claim) -> int:
        """How many rows are within reach; if that is not all, and can be more, the next commit says so."""
        count = bisect_left(claim.behind, claim.reach, key=itemgetter(0))
        if count < len(claim.behind) and claim.window(claim.part.held.position()[0])[2] > claim.reach:
            self._dirty[claim] = None
        return count

    def _choked(self, now: float) -> float | None:
        """Seconds to wait for room before anything is paused; None if there is room, or that wait is over."""
        waits = []
        for claim in self._claims.values():
            if claim.full is not None and not claim.paused:
                left = claim.full + PATIENCE - now
                if left > 0:
                    waits.append(left)
                else:
                    self._consumer.pause([TopicPartition(*claim.at)])
                    claim.paused = True
        return min(waits, default=None)

    def _resume(self, claim: Claim) -> None:
        claim.paused = False
        where = TopicPartition(*claim.at)
        self._consumer.resume([where])
        with suppress(KafkaException):  # without this the driver may wait for up to a second
            self._consumer.get_watermark_offsets(where, timeout=0.001)

    def _pass_gaps(self) -> None:
        """Nothing comes and nothing is in flight: step over what will never come (aborted or compacted messages)."""
        now = self.home.clock.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        for where in self._consumer.position([TopicPartition(*claim.at) for claim in self._claims.values() if not claim.behind]):
            claim = self._claims[where.topic, where.partition]
            if where.offset > claim.part.held.next:
                claim.part.held.next = where.offset
                self._dirty[claim] = None

    # Troubles with a partition.

    def _problem(self, message: Any) -> None:
        error, at = message.error(), (message.topic(), message.partition())
        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE) and at in self._claims:
            self._out_of_range(self._claims[at], error)
        elif code != KafkaError._PARTITION_EOF:
            self._error = explain(error, f"group {self.group!r}", self.home)
            self._refused = None if self._claims else self._error
            self._fatal = code == KafkaError._FATAL  # the driver says it once, and does no more
            if self._fatal and TAKEN in error.str():  # by itself before it was killed: until that session is over
                self._fatal, self._broken = False, True

    def _out_of_range(self, claim: Claim, error: KafkaError) -> None:
        """Its position is no longer stored: the topic's retention was faster, or it was made anew."""
        name, number = claim.part.topic, claim.part.partition
        latest = self._policy in ("latest", "largest") and claim.at == claim.root  # what waits to be retried is not passed over
        if self._policy == "error":
            where = f"{name}[{number}]: the position of {self.group!r}, {claim.part.held.next}"
            how = "set it with `barnabas reset`, or choose kafka={'auto.offset.reset': 'earliest'} or 'latest'"
            self._error = PositionLost(f"{where}, is no longer stored ({error.str()}); {how}")
            return
        target = self.home.ends([(name, number)], OffsetSpec.latest() if latest else OffsetSpec.earliest())[name, number]
        log.error(
            "%s: its position %d in %s[%d] is no longer stored (%s); it goes on at the %s, %d",
            self.group, claim.part.held.next, name, number, error.str(), "latest" if latest else "earliest", target,
        )  # fmt: skip
        self._jump(claim, target)

    def _see_new_topics(self) -> None:
        """Topics that were deleted and made anew: the driver reads on at the old offset, without a word."""
        ids, cut = self.home.ids(self._ids), len(self.home.prefix)
        gone, self._gone = self._gone, self.home.deleted & self._ids.keys()
        for topic in sorted(self._gone - gone):
            log.error("%s: topic %r was deleted; `barnabas topics apply` makes it again, empty", self.group, topic[cut:])
        for topic in [topic for topic, id in self._ids.items() if ids.get(topic, id) != id]:
            self._say_anew(topic)
            self._ids[topic] = ids[topic]
            for claim in [claim for claim in self._claims.values() if claim.at[0] == topic and claim.id != ids[topic]]:
                self._jump(claim, 0)

    def _jump(self, claim: Claim, target: int) -> None:
        """Go on there."""
        self._listener.revoked([claim.part])
        self._forget([claim])
        self._claims[claim.at] = fresh = self._claim(claim.at, claim.root, target, None)
        fresh.part.until = self._until
        self._dirty[fresh] = None
        self.go_to(TopicPartition(*claim.at, target))
        self._listener.assigned([fresh.part])
