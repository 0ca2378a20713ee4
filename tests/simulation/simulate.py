"""The engine under a seeded random scheduler: real lanes, ledgers, crews, runners and compiled handlers; no threads and
no time. `simulate(seed)` plays one schedule and raises `Wrong` where a promise was broken.

Real: App declarations compiled by `Consumer.compile`, `work`/`work_batches`, `Crew`/`LoopCrew`, `Runner`, tables,
hooks, the accounts of `backends/shares`. Simulated: the clock, the event loop's time, and the home (logs, positions,
cells), whose members crash and lose leases, and whose sources fail before and after a commit. Sync workers are
interleaved by letting a handler (and each look at the clock, each wake of the fetch thread) call back into the
scheduler. The oracle (`Hold`, `Call`) follows every delivery on its own account.
"""

import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import random
import sys
from collections import Counter, deque
from typing import Any

import msgspec

from barnabas import App, Batch, Delivery, Done, Reject, Respond, Retry, RetryAfter, respond_to
from barnabas.backends import shares
from barnabas.clock import FakeClock
from barnabas.engine.alone import CRASHES, Gate
from barnabas.engine.crew import TICK, Crew
from barnabas.engine.crews import LoopCrew
from barnabas.engine.hand import CURRENT
from barnabas.engine.handler import RETRIED, Stop
from barnabas.engine.observe import Observers
from barnabas.engine.runner import Pauses, Runner
from barnabas.engine.work import SLOT
from barnabas.errors import SendError
from barnabas.message import Row, Stretch, Unread, offset_of
from barnabas.ports import Part
from barnabas.state.table import Cells
from barnabas.verdict import Again

LEASE = 5.0
BACKOFF = 0.5
FROZEN = 2.0  # a worker that is interrupted between its look at the clock and the call starts that much late at most
SIM: Any = None  # the simulation that the declared handlers belong to


class Wrong(BaseException):
    """A promise was broken. The engine takes it for a handler's error, so the first one is kept."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        if SIM is not None and SIM.wrong is None:
            SIM.wrong = self


class Crash(BaseException):
    """Unwinds the frames of a process that is no more."""


class Away(Exception):
    """The backend cannot do it now."""


class GiveUp(Exception):
    """An error that the retry policy does not retry."""


class Excused(Exception):
    """An error that a hook declares to be done."""


# What is declared. A declaration is made once per shape; what varies by seed is set on the Consumer before compiling.


def _hooks(awaited: bool, count: int, out: Any) -> list[Any]:
    def outer(delivery: Any) -> Any:
        SIM.before(delivery)
        try:
            yield
        except Excused:
            call = SIM.calling()
            call.tags.append(("out", f"{call.id}/excused"))
            out.send(call.tags[-1][1])
            return Done

    def inner(delivery: Any) -> Any:
        try:
            yield
        except BaseException:  # swallowed: it is no less an error
            return
        if SIM.calling().action == "hook_after":
            raise ValueError("after")

    async def asynchronous(delivery: Any) -> Any:
        SIM.before(delivery)
        yield

    if count == 3:
        return [asynchronous, inner] if awaited else [outer]
    return [[], [outer], [outer, inner]][count]


@functools.cache
def declare(awaited: bool, shape: str, hooks: int, responds: str, table: bool) -> tuple[Any, Any]:
    """An app with one consumer of this shape, and the consumer."""
    app = App("sim", events="memory:", jobs="memory:")
    source, out, reply = app.topic("in", int), app.topic("out", str), app.topic("reply", str)
    seen = app.table("seen", list[int])
    options: dict[str, Any] = {"name": "c", "group": "g", "hooks": _hooks(awaited, hooks, out)}
    if responds:
        options["responds"] = [respond_to(reply, required=responds == "required", multiple=shape == "batch")]
    if table:
        options["tables"] = [seen]
    tools = (out, reply, seen if table else None)

    def act(values: Any, deliveries: Any = None, respond: Any = None) -> Any:
        call = SIM.begin(values, deliveries)
        try:
            for _ in call.script(tools, respond):
                SIM.turn(call.member)
        except BaseException as error:
            call.ended(error)
            raise
        call.ended(None)
        return call.answer

    async def act_async(values: Any, deliveries: Any = None, respond: Any = None) -> Any:
        call = SIM.begin(values, deliveries)
        try:
            for _ in call.script(tools, respond):
                try:
                    await call.member.pause()
                except asyncio.CancelledError:
                    if call.manner == "convert":
                        raise RuntimeError("cancelled, in other words") from None
                    if call.manner == "raise":
                        raise
        except BaseException as error:
            call.ended(error)
            raise
        call.ended(None)
        return call.answer

    app.consumer(source, **options)(_shapes(act_async if awaited else act, awaited)[shape])
    return app, app.consumers["c"]


def _shapes(act: Any, awaited: bool) -> dict[str, Any]:
    """The handler's signatures; all lead to `act`."""

    def value(n: int):
        return act([n])

    def delivery(n: int, d: Delivery):
        return act([n], [d])

    def respond(n: int, r: Respond, d: Delivery):
        return act([n], [d], r)

    def optional(n: int | None, d: Delivery):
        return act([n], [d])

    def batch(ns: list[int], ds: list[Delivery]):
        return act(ns, ds)

    shapes = {f.__name__: f for f in (value, delivery, respond, optional, batch)}
    return {name: _awaiting(f) for name, f in shapes.items()} if awaited else shapes


def _awaiting(function: Any) -> Any:
    @functools.wraps(function)
    async def handler(*args: Any) -> Any:
        return await function(*args)

    return handler


# What is stored.


class Msg:
    """A stored message and what is to become of it."""

    __slots__ = ("base", "due", "fixed", "n", "origin", "outcome", "plan", "readable", "row", "uid", "wipe")

    def __init__(self, row: Any, uid: int, plan: str, n: int, wipe: bool, origin: Any) -> None:
        self.row = row
        self.uid = uid
        self.plan = plan
        self.n = n
        self.wipe = wipe  # its handler deletes the cell
        self.origin = origin  # topic, partition, offset
        self.base = 0  # attempts before it came into a retry topic
        self.due = 0.0
        self.fixed = False  # on_dead="stop": somebody mended what made it dead
        self.outcome: str | None = None
        self.readable = True

    def action(self, attempt: int) -> str:
        if self.fixed or self.plan == "ok":
            return "ok"
        if self.plan in ("fail", "after", "self_cancel", "hook_before", "hook_after"):
            return self.plan if attempt <= self.n else "ok"
        return "fail" if self.plan == "always" else self.plan


class Home:
    """What outlives a process."""

    def __init__(self, sim: "Sim") -> None:
        self.sim = sim
        self.logs: dict[tuple[str, int], list[Msg]] = {}
        self.positions: dict[Any, tuple[int, list[Any], dict[int, int]]] = {}
        self.crashes: dict[Any, dict[int, int]] = {}
        self.epochs: dict[Any, int] = {}
        self.owners: dict[Any, Any] = {}  # (member, epoch, the lease's end)
        self.wanted: dict[Any, Any] = {}
        self.cells: dict[Any, bytes] = {}
        self.model: dict[Any, list[int]] = {}  # what the cells should be
        self.letters: Counter[Any] = Counter()
        self.open = 0

    def cell(self, table: str, key: Any) -> bytes | None:
        return self.cells.get((table, key))

    def add(self, at: Any, msg: Msg) -> None:
        self.logs[at].append(msg)
        self.open += 1


class Letter:
    """A driver's message."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def offset(self) -> int:
        return self.row[0]

    def value(self) -> bytes | None:
        return self.row[2]


class Source:
    """One member's share of the log."""

    def __init__(self, sim: "Sim", member: "Member") -> None:
        self.sim, self.home, self.atomic, self.member = sim, sim.home, sim.home, member
        self.parts: dict[Any, Part] = {}
        self.stored: list[Any] = []  # results of a settlement that was stored and reported as failed
        self.ordered = sim.order == "partition" and sim.retry.ordered
        handler = member.crew.handler
        self.unread = self.ordered and handler.unread
        if self.unread:
            handler.learn(lambda row: row[1].row if len(row) == 3 else row)

    def wake(self) -> None:
        self.sim.look(self.member)

    def close(self) -> None:
        self._give_up(list(self.parts))

    def fetch(self, limit: int, timeout: float) -> list[Any]:
        sim, home, now = self.sim, self.home, self.sim.clock.monotonic()
        if sim.chance(0.03):
            raise Away("fetch")
        late = any(now > p.until for p in self.parts.values())  # we were silent for too long: confirm all, or claim all anew
        ours = all(home.owners.get(at, ())[:2] == (self.member, self._hold(at).epoch) for at in self.parts)
        sure = late and ours and sim.rng.random() < 0.5
        if late and not sure:
            for part in self.parts.values():
                part.until = 0.0
            self._give_up(list(self.parts))
        lost = [at for at in self.parts if home.owners.get(at, ())[:2] != (self.member, self._hold(at).epoch)]
        for at in lost:
            self.parts[at].closed = True
        self._give_up(lost)
        self._give_up([at for at in self.parts if home.wanted[at] is not self.member])
        now = sim.clock.monotonic()
        came = [self._claim(at, now) for at in home.logs if self._free(at, now)]
        if came:
            self.member.runner.assigned(came)
        for at, part in self.parts.items():
            if sure or now <= part.until:
                part.until = self._hold(at).claim = now + LEASE
                home.owners[at] = (*home.owners[at][:2], part.until)
        batches = [found for at, part in self.parts.items() if (found := self._read(at, part, limit))]
        if sim.chance(0.01):  # as Kafka does: within a fetch that has found something
            self._give_up([at for at in self.parts if sim.chance(0.5)])
        return batches

    def _hold(self, at: Any) -> "Hold":
        return self.sim.holds[self.parts[at]]

    def _give_up(self, ats: list[Any]) -> None:
        if not ats:
            return
        for at in ats:
            self._hold(at).leaving = min(self._hold(at).leaving, self.sim.clock.monotonic())
        self.member.runner.revoked([self.parts[at] for at in ats])
        if self.member.dead:
            raise Crash
        for at in ats:
            part = self.parts.pop(at)
            if self.home.owners.get(at, ())[:2] == (self.member, self.sim.holds[part].epoch):
                del self.home.owners[at]
            if part.lanes or not part.closed:
                raise Wrong(f"{at}: a revoked partition keeps its lanes")

    def _free(self, at: Any, now: float) -> bool:
        if at in self.parts or self.home.wanted[at] is not self.member:
            return False
        owner = self.home.owners.get(at)
        return owner is None or now > owner[2]

    def _claim(self, at: Any, now: float) -> Part:
        home = self.home
        home.epochs[at] = epoch = home.epochs.get(at, 0) + 1
        self.parts[at] = part = Part(*at, len(self.sim.holds), "g")
        position, done, attempts = home.positions[at]
        shares.open_account(part, self.ordered, position, list(done), attempts)
        part.crashes.update(home.crashes[at])
        part.until = now + LEASE
        home.owners[at] = (self.member, epoch, part.until)
        self.sim.holds[part] = self.member.latest[at] = Hold(self.sim, self.member, at, epoch, part)
        return part

    def _read(self, at: Any, part: Part, limit: int) -> Any:
        account, hold = part.held, self._hold(at)
        room = min(limit - len(account), self.sim.rng.randint(1, 12))
        msgs = self.home.logs[at]
        if room <= 0 or not msgs or account.next > msgs[-1].row[0] or not part.until:
            return None
        found = [m for m in msgs if m.row[0] >= account.next][:room]
        account.next = found[-1].row[0] + 1
        todo = account.add([m.row for m in found])
        if list(todo) != [m.row for m in found if m.outcome is None]:
            still = [m.row[0] for m in found if m.outcome is None]
            raise Wrong(f"{at}: handed out {[r[0] for r in todo]}, open are {still}")
        todo = [m for m in found if m.outcome is None]
        hold.take(todo)
        flying = sum(msg.readable and offset not in hold.state for offset, msg in hold.open.items())
        if flying > limit:
            raise Wrong(f"{at}: {flying} in flight, the limit is {limit}")
        rows = [m.row for m in todo]
        return (part, Unread([Letter(row) for row in rows]) if self.unread else rows) if todo else None

    def settle(self, results: Any) -> None:
        sim, home = self.sim, self.home
        fault = sim.rng.choice(("before", "books", "after")) if sim.chance(0.08) else ""
        if any(result.part.closed for result in results):
            raise Wrong("results of an older epoch are settled")
        if fault == "before":
            raise Away("settle")
        touched = shares.close_books(results)
        if fault == "books":
            raise Away("settle")
        for part in touched:
            hold = sim.holds[part]
            if home.owners.get(hold.at, ())[:2] != (self.member, hold.epoch):
                part.closed = True
        todo = [r for r in results if not r.part.closed and not any(r.cells is s.cells for s in self.stored)]
        for result in todo:
            sim.holds[result.part].settled(result)
            for cell, data in result.cells.items():
                home.cells[cell] = data
        for part in touched:
            if not part.closed:
                self._store_position(sim.holds[part])
        for result in todo:
            sim.holds[result.part].check_cells(result)
        self.stored = list(results) if fault == "after" else []
        if fault == "after":
            raise Away("settled, but the answer was lost")

    def _store_position(self, hold: "Hold") -> None:
        home, at, part = self.home, hold.at, hold.part
        watermark, done = part.held.position()
        if watermark < home.positions[at][0]:
            raise Wrong(f"{at}: the position went back from {home.positions[at][0]} to {watermark}")
        for msg in home.logs[at]:
            offset = msg.row[0]
            covered = offset < watermark or any(a <= offset < b for a, b in done)
            if covered != (msg.outcome is not None):
                raise Wrong(f"{at}@{offset}: {msg.outcome}, but the position is {watermark}, {done}")
        for offset, msg in hold.open.items():
            kept, failed = part.attempts.get(offset, 0), hold.fails.get(offset, 0)
            if msg.readable and kept != failed and offset not in hold.state:
                raise Wrong(f"{at}@{offset}: {kept} attempts kept, it failed {failed} times")
        home.positions[at] = (watermark, done, dict(part.attempts))
        home.crashes[at] = dict(part.crashes)


# The oracle.


class Hold:
    """The oracle's account of one assignment of a partition."""

    def __init__(self, sim: "Sim", member: "Member", at: Any, epoch: int, part: Part) -> None:
        self.sim, self.member, self.at, self.epoch, self.part = sim, member, at, epoch, part
        self.claim = part.until
        self.leaving = math.inf
        self.gone = False
        self.fails: dict[int, int] = dict(sim.home.positions[at][2])
        self.crashes = dict(sim.home.crashes[at])
        self.open: dict[int, Msg] = {}  # handed out and not settled
        self.state: dict[int, str] = {}  # "done", "dead", "again": has its outcome, unsettled
        self.calls: dict[int, Call] = {}  # the last call of an offset
        self.first: dict[int, Call] = {}  # the last call that had this offset in its box
        self.busy: set[int] = set()
        self.alone: set[int] = set()  # the last run of a batch's messages
        self.released: set[int] = set()
        self.not_before: dict[int, float] = {}
        self.lanes: dict[Any, deque[int]] = {}
        self.seen: dict[Any, list[int]] = {}

    def lane(self, msg: Msg) -> Any:
        """What this message has its order in; None for no order."""
        if self.sim.order == "none" or self.at[0] != "in":
            return None
        return ("whole",) if self.sim.order == "partition" else msg.row[1]

    def take(self, msgs: list[Msg]) -> None:
        for msg in msgs:
            offset = msg.row[0]
            if offset in self.open:
                raise Wrong(f"{self.at}@{offset} was fetched twice")
            self.open[offset] = msg
            if msg.readable and self.crashes.get(offset, 0) <= CRASHES:
                lane = self.lane(msg)
                if lane is not None:
                    self.lanes.setdefault(lane, deque()).append(offset)

    def attempt(self, msg: Msg) -> int:
        return msg.base + self.fails.get(msg.row[0], 0) + 1

    def resolve(self, msg: Msg, state: str) -> None:
        offset, lane = msg.row[0], self.lane(msg)
        self.state[offset] = state
        if lane is not None:
            self.lanes[lane].remove(offset)

    def started(self, call: "Call") -> None:
        now = self.sim.clock.monotonic()
        if now > min(self.claim, self.leaving + TICK) + FROZEN or self.gone:
            raise Wrong(f"{call} starts at {now}, the claim ended at {min(self.claim, self.leaving)}")
        suspects = [m for m in call.msgs if self.crashes.get(m.row[0], 0) >= CRASHES]
        if (suspects and self.member.active) or any(c.suspect for c in self.member.active):
            raise Wrong(f"{call} runs beside {self.member.active}, one of them has crashed processes")
        call.suspect = bool(suspects)
        crashes = max(self.crashes.get(m.row[0], 0) for m in call.msgs)
        if self.sim.batch and len(call.msgs) > max(1, self.sim.consumer.batch.max // 10**crashes):
            raise Wrong(f"{call} was in work at {crashes} crashes and is as large again")
        if suspects and any(self.member.crew.hauls):
            raise Wrong(f"{call} has crashed processes, and other workers have something in hand")
        for msg in call.msgs:
            offset = msg.row[0]
            if offset not in self.open or offset in self.state or offset in self.busy or offset in self.released:
                why = self.state.get(offset) or ("in work" if offset in self.busy else "given back or not fetched")
                raise Wrong(f"{call}: @{offset} is not open: {why}")
            if now < max(self.not_before.get(offset, 0.0), msg.due) - 1e-6:
                raise Wrong(f"{call}: @{offset} runs before its time")
            if len(call.msgs) > 1 and self.apart(call.run, offset):
                raise Wrong(f"{call}: @{offset} was to run alone")
            self.busy.add(offset)
            self.calls[offset] = call
        self.first[call.first] = call
        lane = self.lane(call.msgs[0])
        if lane is not None:
            first = [offset for _, offset in zip(call.msgs, self.lanes[lane], strict=False)]
            if first != [m.row[0] for m in call.msgs] or {self.lane(m) for m in call.msgs} != {lane}:
                raise Wrong(f"{call} is out of order: {lane} begins with {first}")
        slot, crew = self.member.slot_of(call.run), self.member.crew
        box = [crew.box[slot * SLOT], crew.at(slot, call.run)]
        if box != [self.part.id + 1, call.first]:
            raise Wrong(f"{call}: the box says {box}")

    def apart(self, run: Any, offset: int) -> bool:
        """Whether the messages of a batch run as batches of one: it failed as a whole, or hung so to the end."""
        return offset in self.alone or max(self.fails.get(row[0], 0) for row in run.rows) > self.sim.retry.times

    def ended(self, call: "Call", verdict: str) -> None:
        sim, times, call.verdict = self.sim, self.sim.retry.times, verdict
        for msg in call.msgs:
            self.busy.discard(msg.row[0])
            self.crashes.pop(msg.row[0], None)  # it ran alone and did no harm
        now = sim.clock.now()
        wait = 2 * BACKOFF if call.action == "after" and not call.struck else BACKOFF
        if verdict == "release":
            self.released.update(m.row[0] for m in call.msgs)
        elif verdict == "done":
            for msg in call.msgs:
                self.resolve(msg, "done")
                if sim.table and msg.row[1] is not None and not call.excused:
                    self.seen_of(msg.row[1]).append(msg.uid)
                    if msg.wipe:
                        self.seen[msg.row[1]] = []
        elif call.whole:  # the batch's first message speaks for all
            rows = [row[0] for row in call.run.rows]
            last = verdict == "dead" or self.fails.get(rows[0], 0) + 1 + sim.home_of(self.at, rows[0]).base > times
            if last or not sim.retry.ordered:
                self.alone.update(rows)
            for offset in rows:
                if call.hung and (last or not sim.retry.ordered):
                    self.fails[offset] = times + 1
                elif last:
                    self.fails[offset] = max(self.fails.get(offset, 0), times)
                elif sim.retry.ordered:
                    self.fails[offset] = self.fails.get(offset, 0) + 1
                    self.not_before[offset] = now + wait
        else:
            msg = call.msgs[0]
            offset = msg.row[0]
            if verdict == "dead" or self.attempt(msg) > times:
                if sim.on_dead == "stop":
                    msg.fixed = True
                    self.released.add(offset)
                else:
                    self.resolve(msg, "dead")
            elif sim.retry.ordered:
                self.fails[offset] = self.fails.get(offset, 0) + 1
                self.not_before[offset] = now + wait
            else:
                self.not_before[offset] = now + wait
                self.resolve(msg, "again")

    def seen_of(self, key: Any) -> list[int]:
        if key not in self.seen:
            self.seen[key] = list(self.sim.home.model.get(key, ()))
        return self.seen[key]

    # At a settlement.

    def settled(self, result: Any) -> None:
        """Check one result against what happened, and enter it."""
        expected: Counter[Any] = Counter()
        calls: dict[int, Call] = {}
        rows = result.rows
        if type(rows) is Stretch:
            first, last = rows[0][0], rows[-1][0]
            found = [msg.row for offset, msg in sorted(self.open.items()) if first <= offset <= last]
            if len(found) != len(rows):
                raise Wrong(f"{self.at}: {len(rows)} are settled from {first} to {last}, where {len(found)} are open")
            rows = found
        for row in rows:
            offset = row[0]
            msg = self.open.pop(offset, None)
            if msg is None or msg.outcome is not None:
                raise Wrong(f"{self.at}@{offset} is settled twice")
            state, verdict = self.state.pop(offset, None), result.others.get(offset)
            msg.outcome = "done" if verdict is None else "again" if isinstance(verdict, Again) else "dead"
            suspect = self.crashes.get(offset, 0) > CRASHES
            if not suspect and msg.readable and msg.outcome != state:
                raise Wrong(f"{self.at}@{offset} is settled as {msg.outcome}, it was {state or 'not handled'}")
            if (suspect or not msg.readable) and msg.outcome != "dead":
                raise Wrong(f"{self.at}@{offset} is settled as {msg.outcome} and could not be handled")
            if msg.outcome == "done":
                calls[id(self.calls[offset])] = self.calls[offset]
                if self.sim.table and row[1] is not None and not self.calls[offset].excused:
                    model = self.sim.home.model.setdefault(row[1], [])
                    model.append(msg.uid)
                    if msg.wipe:
                        model.clear()
            elif msg.outcome == "again" or self.leaves_letter(msg, suspect):
                expected[msg.outcome, *msg.origin, self.attempt(msg)] += 1
            if offset in self.part.attempts or offset in self.part.crashes:
                raise Wrong(f"{self.at}@{offset} is settled and its counts are kept")
            self.sim.home.open -= 1
        for call in calls.values():
            if any(m.outcome != "done" for m in call.msgs):
                raise Wrong(f"{call} is settled in part")
            for tag in call.tags:
                if not self.sim.away or tag[0] != "out":
                    expected[tag] += 1
                elif not self.sim.elsewhere[tag]:
                    raise Wrong(f"{call} is settled before its output {tag} is stored elsewhere")
        sent = Counter([self.sim.store(out) for out in result.outputs])
        if sent != expected:
            raise Wrong(f"{self.at}: outputs {dict(sent - expected)} too many, {dict(expected - sent)} are missing")

    def leaves_letter(self, msg: Msg, suspect: bool) -> bool:
        """Whether a dead message goes to the dead letters: no null value does, and on_dead="skip" leaves them out."""
        if msg.row[2] is None and not msg.readable and not suspect:
            return False
        return self.sim.on_dead != "skip" or (msg.plan == "undecodable" and not suspect)

    def check_cells(self, result: Any) -> None:
        home = self.sim.home
        if self.sim.table:
            for key in {row[1] for row in result.rows if row[1] is not None}:
                data = home.cells.get(("seen", key))
                have = msgspec.msgpack.decode(data) if data is not None else []
                if have != home.model.get(key, []):
                    raise Wrong(f"the cell {key!r} is {have}, not {home.model.get(key)}")


class Call:
    """One call of the handler."""

    def __init__(self, sim: "Sim", hold: Hold, run: Any, msgs: list[Msg], first: int) -> None:
        self.sim, self.hold, self.run, self.msgs, self.first = sim, hold, run, msgs, first
        self.member = hold.member
        sim.calls += 1
        self.id = sim.calls
        self.whole = sim.batch and not hold.apart(run, msgs[0].row[0])
        self.hung = False
        self.action = next((a for m in msgs if (a := m.action(hold.attempt(m))) != "ok"), "ok")
        self.manner = sim.rng.choice(("raise", "raise", "raise", "convert", "swallow"))
        self.steps = sim.rng.choice((1, 2, 3) if sim.theme == "suspects" else (0, 0, 1, 2))
        self.slow = sim.chance(0.2 if sim.theme == "lapses" else 0.005) and not sim.looking
        self.tags: list[Any] = []
        self.futures: list[Any] = []
        self.answer: Any = None
        self.suspect = False
        self.struck = ""  # "timeout" or "release": what was done to it
        self.over = False
        self.excused = False  # it failed, and a hook says that it is done: nothing of it leaves
        self.verdict = ""

    def __repr__(self) -> str:
        return f"call {self.id} of {self.hold.at}@{[m.row[0] for m in self.msgs]}#{self.hold.epoch} ({self.action})"

    def script(self, tools: Any, respond: Any) -> Any:
        """What the handler does; it yields where others may have their turn."""
        out, reply, table = tools
        steps = iter(range(self.steps))
        for index in range(self.id % 3):
            texts = [f"{self.id}/{index}", f"{self.id}/{index}+"][: index + 1]
            self.tags += [("out", text) for text in texts]
            self.futures.append(out.send_many(texts) if index else out.send(texts[0]))
            for _ in zip(steps, "1", strict=False):
                yield
        if table is not None:
            self.count(table)
        for _ in steps:
            yield
        if self.slow and not self.sim.looking:  # longer than any claim
            self.sim.clock.advance(LEASE + 2 * FROZEN)
        self.fail()
        if self.sim.responds and self.action != "mute" and (self.sim.responds == "required" or self.id % 2):
            self.tags.append(("reply", f"{self.id}/answer"))
            if respond is not None:
                respond(reply, self.tags[-1][1])
            else:
                self.answer = [self.tags[-1][1]] if self.sim.batch else self.tags[-1][1]

    def count(self, table: Any) -> None:
        mine: dict[Any, list[int]] = {}
        for msg in self.msgs:
            key = msg.row[1]
            if key is None:
                continue
            before = mine.get(key)
            if before is None:
                before = list(self.hold.seen_of(key))
            found = table.get(key, [])
            if found != before:
                raise Wrong(f"{self} finds {found} under {key!r}, not {before}")
            table[key] = mine[key] = [*found, msg.uid]
            if msg.wipe:
                del table[key]
                mine[key] = []

    def fail(self) -> None:
        action = self.action
        if action == "fail":
            raise ValueError("fails")
        if action == "reject":
            raise Reject("bad")
        if action == "give_up":
            raise GiveUp("not again")
        if action == "after":
            raise RetryAfter(2 * BACKOFF)
        if action == "excused":
            raise Excused("never mind")
        if action == "self_cancel":
            raise asyncio.CancelledError

    def ended(self, error: BaseException | None) -> None:
        """The handler returned or raised: what is that to mean?"""
        if self.over or self.member.dead or isinstance(error, Crash | Wrong | GeneratorExit):
            return
        self.over = True
        self.member.active.remove(self)
        if isinstance(error, Excused):
            self.excused = True
            self.tags.clear()
        crew = self.member.crew
        if self.struck == "release":  # also if it swallowed that
            verdict = "release"
        elif self.struck == "timeout" or (not self.sim.awaited and (id(self.run), self.first) in crew.late):
            verdict = "fail"
            self.struck = "timeout"
        elif self.action in ("ok", "excused"):
            verdict = "fail" if error is not None and not isinstance(error, Excused) else "done"
        else:
            verdict = "dead" if self.action in ("reject", "give_up", "mute") else "fail"
        self.hold.ended(self, verdict)


class Elsewhere:
    """A home of topics that does not share the transaction: what goes there is stored once or more often."""

    def __init__(self, sim: "Sim") -> None:
        self.sim = sim

    def send(self, outgoing: Any, block: bool = True) -> None:
        if self.sim.chance(0.1):
            raise Away("send")
        for out in outgoing:
            if self.sim.chance(0.05):
                out[6].fail(Away("not stored"))
            else:
                self.sim.elsewhere[self.sim.store(out)] += 1


# The processes.


class Loop(asyncio.AbstractEventLoop):
    """An event loop without time: what is ready runs in its order, one callback a `tick`."""

    def __init__(self) -> None:
        self.ready: deque[asyncio.Handle] = deque()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def create_future(self) -> Any:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def call_exception_handler(self, context: Any) -> None:
        pass

    def tick(self) -> None:
        if self.ready:
            handle = self.ready.popleft()
            if not handle._cancelled:
                before = asyncio._get_running_loop()
                asyncio._set_running_loop(self)
                try:
                    handle._run()
                finally:
                    asyncio._set_running_loop(before)


class Tasks(LoopCrew):
    """A LoopCrew on our loop."""

    def start(self) -> None:
        self._waiters = deque()
        self.tasks = []
        starting = self.loop.create_task(self._begin())
        while not starting.done():
            self.loop.tick()


class Waiting:
    """Stands for the events that the fetch thread waits with: meanwhile time passes and others have their turn."""

    def __init__(self, member: "Member", patience: int) -> None:
        self.member, self.patience = member, patience

    def wait(self, timeout: float) -> None:
        self.patience -= 1
        self.member.sim.clock.advance(timeout)
        for _ in range(3):
            self.member.work()

    def is_set(self) -> bool:
        return self.patience < 0

    def set(self) -> None:
        self.patience = -1


class Member:
    """A process of the group."""

    def __init__(self, sim: "Sim") -> None:
        self.sim = sim
        self.dead = self.fetching = False
        self.active: list[Call] = []
        self.running: set[int] = set()
        self.pauses: list[Any] = []
        self.loop = Loop()
        self.latest: dict[Any, Hold] = {}
        handler = sim.consumer.compile(Observers([self.watch]), sim.consumer.hooks)
        if sim.table:
            handler.tables = Cells(["seen"], False, sim.home.cell)
        crew: Any = (Tasks if sim.awaited else Crew)(handler, sim.order, sim.size, sim.clock)
        self.crew = crew
        crew.pace = sim.rng.choice((0.0, 1e-5, 1e-3, 3e-4))
        crew.monotonic = self.monotonic
        crew.end = self.ended
        if sim.awaited:
            crew.loop = self.loop
        self.runner = Runner(
            "c", [crew], clock=sim.clock, observers=Observers(), sinks=sim.sink_of if sim.away else None, gate=Gate(),
            limit=sim.limit, interval=sim.rng.choice((0.0, 0.1)), grace=sim.rng.choice((0.0, 0.02, 0.1)),
        )  # fmt: skip
        self.runner.finished = Waiting(self, 1 << 30)  # type: ignore[assignment]
        self.runner.overrun = Waiting(self, sim.rng.randint(0, 20))  # type: ignore[assignment]
        if sim.theme in ("suspects", "lapses"):  # hauls, and a look around between their runs
            crew.pace, crew.enough = 1e-5, 1
        self.source = Source(sim, self)
        self.runner.attach(self.source)
        if sim.awaited:
            crew.start()
            for slot, task in enumerate(crew.tasks):
                task._log_destroy_pending = False
                cancel = task.cancel
                crew.tasks[slot] = Cancelling(task, functools.partial(self.strike, slot, cancel))

    def monotonic(self) -> float:
        """The workers' clock: while one looks at it, others may have their turn."""
        self.sim.looks += 1
        if self.sim.looks > 20_000:
            raise Wrong("it goes on for ever")
        if self.sim.rng.random() < self.sim.jitter and not self.crew.lanes.lock.locked():
            self.sim.look(self)
        return self.sim.clock.monotonic()

    def strike(self, slot: int, cancel: Any) -> None:
        for call in self.active:
            if call.run is self.crew.current[slot]:
                call.struck = self.crew.cancelled[slot]
        cancel()

    def watch(self, record: Any) -> None:
        """An observer: a delivery that was given back is not to be reported as failed."""
        call = self.latest[record.topic, record.partition].calls.get(record.offset)
        if call is not None and call.verdict == "release":
            raise Wrong(f"{call} is reported: {record.outcome}, {record.reason}")

    def slot_of(self, run: Any) -> int:
        found = [slot for slot, current in enumerate(self.crew.current) if current is run]
        if len(found) != 1:
            raise Wrong(f"a run is in the hands of the workers {found}")
        return found[0]

    async def pause(self) -> None:
        future = self.loop.create_future()
        self.pauses.append(future)
        await future

    def step(self) -> bool:
        """A turn of the fetch thread."""
        if self.fetching or self.dead:
            return False
        if self.runner.quiet and not self.crew.busy():
            self.stop()
            return True
        self.fetching = True
        try:
            return bool(contextvars.Context().run(self.runner.step, 0.0))
        except (Away, SendError, Crash):
            return True
        except Stop:
            raise Wrong("a stop is taken for a failure of the backend") from None
        finally:
            self.fetching = False
            if self.crew.error is not None:
                self.sim.note(self.crew.error)
                for crashes in self.sim.home.crashes.values():  # somebody has mended what stops us
                    crashes.clear()
                self.stop()

    def work(self, slot: int | None = None) -> None:
        """A turn of the workers."""
        if self.dead:
            return
        if not self.sim.awaited:
            self.drive(self.sim.rng.randrange(self.sim.size) if slot is None else slot)
        elif not self.running:
            self.running.add(0)
            try:
                if self.pauses and (slot is not None or not self.loop.ready or self.sim.rng.random() < 0.4):
                    pause = self.pauses.pop(self.sim.rng.randrange(len(self.pauses)))
                    if not pause.done():
                        pause.set_result(None)
                for _ in range(1 + (self.sim.rng.random() < 0.6) * 5):
                    self.loop.tick()
            finally:
                self.running.discard(0)
            self.sim.note(self.crew.error)

    def drive(self, slot: int) -> None:
        if slot in self.running:
            return
        self.running.add(slot)
        body = self.crew.body(self.crew, slot)
        try:
            contextvars.Context().run(body.send, None)
        except StopIteration:
            pass
        except Crash:
            if not self.dead:
                raise Wrong("a crash of another process came by") from None
        else:
            raise Wrong("a sync worker was suspended")
        finally:
            self.running.discard(slot)

    def timeout(self) -> None:
        """The watchdog finds a delivery that takes too long."""
        if not self.active or not self.sim.timed:
            return
        call = self.sim.rng.choice(self.active)
        slot = self.slot_of(call.run)
        if self.sim.awaited:
            self.crew.cancel(slot, call.run, "timeout")
            return
        self.crew.late.add((id(call.run), call.first))
        if self.sim.rng.random() < 0.5 and not self.fetching:
            call.over = call.hung = True  # it does not return: its process ends without it
            call.whole = call.whole and len(call.run.rows) > 1
            self.active.remove(call)
            call.struck = "timeout"
            call.hold.ended(call, "fail")
            self.crew.abandon(slot, call.run)
            self.stop()

    def asked(self, dice: random.Random) -> None:
        """An operator pauses or resumes something, or wants the process quiet."""
        keys = frozenset(key for key in self.sim.keys if key is not None and dice.random() < 0.4)
        self.runner.pauses = Pauses(dice.random() < 0.2, keys if dice.random() < 0.7 else frozenset())
        if dice.random() < 0.05 and not self.dead:
            with contextlib.suppress(Crash):
                self.runner.hush()

    def stop(self) -> None:
        """An orderly end."""
        if self.fetching or self.dead:
            return
        self.fetching = True
        try:
            self.runner.stop()
        except Crash:
            return
        contextvars.Context().run(self.runner.run)
        self.sim.note(self.runner.error)
        if not self.dead:
            self.end()

    def crash(self) -> None:
        """The process is gone, and with it all that is not settled. The box tells what it had in work."""
        for call in self.active:
            hold, home = call.hold, self.sim.home
            if home.owners.get(hold.at, ())[:2] == (self, hold.epoch) and not hold.gone:
                crashes = home.crashes[hold.at]
                for msg in call.msgs if self.sim.batch else call.msgs[:1]:
                    crashes[msg.row[0]] = max(crashes.get(msg.row[0], 0) + 1, self.sim.rng.choice((1, 1, 3, 4)))
        self.end()

    def end(self) -> None:
        self.dead = True
        for hold in self.sim.holds.values():
            if hold.member is self:
                hold.gone = True
        for at, owner in list(self.sim.home.owners.items()):
            if owner[0] is self:
                del self.sim.home.owners[at]
        if self.sim.awaited and not self.running:
            self.bury()
        if self in self.sim.members:
            self.sim.members.remove(self)
            self.sim.graves.append(self)
        for at, wanted in self.sim.home.wanted.items():
            if wanted is self and self.sim.members:
                self.sim.home.wanted[at] = self.sim.rng.choice(self.sim.members)

    def bury(self) -> None:
        """Close the coroutines of a dead process now, not whenever the garbage collector comes by."""
        for task in getattr(self.crew, "tasks", ()):
            task.task.get_coro().close()

    def ended(self, slot: int, run: Any, done: int, parked: float | None) -> None:
        """A batch that is stopped among the last runs of its messages is called again, as after any assignment."""
        if parked is None and self.crew.current[slot] is run:
            self.sim.holds[run.part].alone.difference_update(row[0] for row in run.rows[done:])
        type(self.crew).end(self.crew, slot, run, done, parked)

    def check_empty(self) -> None:
        """Nothing is left behind when all is settled."""
        crew = self.crew
        lanes, runner = crew.lanes, self.runner
        left = {
            "results": crew.results, "hauls": [*filter(None, crew.hauls)], "ended": [*filter(None, crew.ended)],
            "current": [*filter(None, crew.current)], "late": crew.late, "cancelled": crew.cancelled,
            "solo": crew.solo, "held": crew.held, "ready": lanes.ready, "unsettled": runner._unsettled,
            "suspects": runner._alone._behind, "running": runner._alone._running, "held back": runner._held,
            "active": self.active,
            "parked": [run for at, _, run in lanes._parked if run.ripe == at and not run.part.closed],
        }  # fmt: skip
        for part in self.source.parts.values():
            left |= {"lanes": part.lanes, "account": len(part.held), "attempts": part.attempts, "crashes": part.crashes}
            left |= {"unsettled cells": part.cells[0], "open": self.sim.holds[part].open}
            if any(left.values()):
                break
        found = {name: value for name, value in left.items() if value}
        if found:
            raise Wrong(f"left behind: {found}")


class Cancelling:
    """A task whose `cancel` is noted."""

    def __init__(self, task: Any, cancel: Any) -> None:
        self.task, self.cancel = task, cancel

    def __eq__(self, other: object) -> bool:
        return other is self.task


class Dice(random.Random):
    """Random numbers, quickly."""

    def choice(self, seq: Any) -> Any:
        return seq[int(self.random() * len(seq))]

    def randint(self, a: int, b: int) -> int:
        return a + int(self.random() * (b - a + 1))

    def randrange(self, n: int) -> int:  # type: ignore[override]
        return int(self.random() * n)


class Sim:
    """One schedule: what is declared, what is stored, who runs."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Dice(seed)
        self.operator = random.Random(seed) if seed % 3 == 0 else None
        self.away = rng.random() < 0.15  # the topic "out" lives elsewhere
        self.elsewhere: Counter[Any] = Counter()
        self.clock = FakeClock(1000.0)
        self.faults = True
        # What happens more often than usual.
        self.theme = rng.choice(("", "", "suspects", "lapses", "moves", "history", "unread"))
        self.calls = self.depth = self.looking = self.looks = 0
        self.awaited = rng.random() < 0.4
        self.batch = rng.random() < 0.25
        self.shape = "batch" if self.batch else rng.choice(("value", "value", "delivery", "respond", "optional"))
        self.order = "partition" if self.theme == "history" else rng.choice(("key", "key", "partition", "none"))
        self.table = self.order != "none" and rng.random() < 0.5
        self.retry = Retry(
            rng.randint(0, 3), backoff=BACKOFF, jitter=0, give_up_on=GiveUp, ordered=self.table or rng.random() < 0.7
        )
        hooks = rng.choice((0, 0, 1, 2, 3))
        self.responds = "required" if self.shape == "respond" else rng.choice(("", "", "required", "optional"))
        self.timed = rng.random() < 0.4
        if self.theme == "unread":  # messages that nobody looks at before their turn
            self.shape, self.order, self.responds, hooks = rng.choice(("value", "delivery")), "partition", "", 0
            self.awaited = self.batch = self.table = self.timed = False
            self.retry = Retry(self.retry.times, backoff=BACKOFF, jitter=0, give_up_on=GiveUp)
        self.app, self.consumer = declare(self.awaited, self.shape, hooks, self.responds, self.table)
        self.app.clock = self.clock
        self.hooks = hooks
        self.size = rng.choice((1, 2, 3, 4))
        self.on_dead = rng.choice(("topic", "topic", "topic", "skip", "stop"))
        self.limit = rng.choice((3, 6, 20, 40))
        self.jitter = rng.choice((0.0, 0.02, 0.2))
        consumer = self.consumer
        consumer.retry, consumer.order, consumer.concurrency = self.retry, self.order, self.size
        consumer.on_dead = self.on_dead
        consumer.timeout = 1.0 if self.timed else None
        consumer.batch = Batch(rng.choice((1, 2, 3, 10)), rng.choice((0.0, 0.05, 0.5)))
        self.home, self.sink = Home(self), Elsewhere(self)
        self.holds: dict[Part, Hold] = {}
        self.members: list[Member] = []
        self.graves: list[Member] = []
        self.wrong: Wrong | None = None
        self.uid = 0
        self._fill()

    # Building.

    def _fill(self) -> None:
        rng, home = self.rng, self.home
        for number in range(3 if self.theme in ("suspects", "lapses") else rng.randint(1, 3)):
            for topic in ("in",) if self.retry.ordered else ("in", "in.retry.g"):
                at = (topic, number)
                home.logs[at] = []
                home.positions[at] = (0, [], {})
                home.crashes[at] = {}
                home.wanted[at] = None
        self.partitions = [at for at in home.logs if at[0] == "in"]
        plans = ["ok"] * 10 + ["fail"] * 3 + ["always", "reject", "give_up", "after", "null"]
        plans += ["undecodable"] * (self.on_dead != "stop") + ["self_cancel"] * self.awaited
        if self.responds == "required":
            plans.append("mute")
        if self.hooks in (1, 2) and not self.responds:
            plans.append("excused")
        if self.hooks and not self.batch:
            plans.append("hook_before")
        if self.hooks == 2 or (self.hooks == 3 and self.awaited):
            plans.append("hook_after")
        self.plans = plans if rng.random() < 0.8 else ["ok"]
        self.keys: list[Any] = [f"k{n}" for n in range(rng.choice((1, 2, 3, 8)))] + [None] * (rng.random() < 0.5)
        for _ in range(rng.randint(3, 20)):
            self.send()
        if self.theme == "suspects":  # some were in work when a process crashed
            for _ in range(rng.randint(1, 4)):
                at = rng.choice(self.partitions)
                if home.logs[at]:
                    home.crashes[at][rng.choice(home.logs[at]).row[0]] = rng.choice((2, 3, 3, 4))
        elif self.theme == "history" or rng.random() < 0.2:  # an earlier owner finished some of them
            at, share = self.partitions[0], rng.choice((0.3, 0.8))
            done = [m for m in home.logs[at] if rng.random() < share]
            for msg in done:
                msg.outcome = "before"
            offsets = [m.row[0] for m in home.logs[at]]
            first = next((m.row[0] for m in home.logs[at] if m.outcome is None), offsets[-1] + 1 if offsets else 0)
            home.positions[at] = (first, [(m.row[0], m.row[0] + 1) for m in done if m.row[0] > first], {})
            home.open -= len(done)

    def send(self) -> None:
        """Somebody sends a message."""
        rng, self.uid = self.rng, self.uid + 1
        key = rng.choice(self.keys)
        at = self.partitions[hash_of(key) % len(self.partitions)] if key is not None else rng.choice(self.partitions)
        log = self.home.logs[at]
        offset = (log[-1].row[0] + 1 if log else 0) + (rng.random() < 0.1) * rng.randint(1, 3)
        plan = rng.choice(self.plans)
        data = None if plan == "null" else b"{" if plan == "undecodable" else str(self.uid).encode()
        headers = [("h", b"1")] if rng.random() < 0.1 else None
        n = rng.randint(1, self.retry.times + 1)
        msg = Msg((offset, key, data, headers, 1.0), self.uid, plan, n, rng.random() < 0.1, (*at, offset))
        msg.readable = plan != "undecodable" and (plan != "null" or self.shape == "optional")
        if plan == "null":
            msg.plan = "ok"
        self.home.add(at, msg)

    def store(self, out: Any) -> Any:
        """An output is stored; what it is."""
        topic, _, key, value, headers, _, future = out
        if future is not None:
            future.resolve(1)
        if topic.name in ("out", "reply"):
            return topic.name, value.decode()[1:-1]
        got = dict(headers)
        if topic.name == "in.dead":
            origin = (got["barnabas-topic"].decode(), int(got["barnabas-partition"]), int(got["barnabas-offset"]))
            return "dead", *origin, int(got["barnabas-attempts"])
        if topic.name != "in.retry.g":
            raise Wrong(f"an output for {topic.name}")
        origin = (got[RETRIED + "topic"].decode(), int(got[RETRIED + "partition"]), int(got[RETRIED + "offset"]))
        first = self.home_of(origin[:2], origin[2])
        attempts = int(got[RETRIED + "attempts"])
        at = ("in.retry.g", origin[1])
        offset = len(self.home.logs[at])
        msg = Msg((offset, key, value, headers, 1.0), first.uid, first.plan, first.n, first.wipe, origin)
        msg.base, msg.due, msg.fixed = attempts, float(got[RETRIED + "at"]), first.fixed
        self.home.add(at, msg)
        return "again", *origin, attempts

    def sink_of(self, out: Any) -> Any:
        return self.sink if out[0].name == "out" else self.home

    def home_of(self, at: Any, offset: int) -> Msg:
        return next(m for m in self.home.logs[at] if m.row[0] == offset)

    # Where the handlers and hooks come by.

    def hand(self) -> Any:
        hand: Any = CURRENT.get()
        if hand is None or not hand.open:
            raise Wrong("a handler runs without a hand")
        return hand

    def calling(self) -> Call:
        hand = self.hand()
        return self.holds[hand.run.part].first[offset_of(hand.row)]

    def before(self, delivery: Any) -> None:
        """A hook, before the handler."""
        if type(delivery) is list:
            return
        msg = self.home_of((self.hand().run.part.topic, self.hand().run.part.partition), offset_of(self.hand().row))
        if msg.action(self.holds[self.hand().run.part].attempt(msg)) == "hook_before":
            call = self.begin([delivery.value], [delivery])
            error = ValueError("before")
            call.ended(error)
            raise error

    def begin(self, values: list[Any], deliveries: Any) -> Call:
        """A handler is called."""
        hand = self.hand()
        run, hold = hand.run, self.holds[hand.run.part]
        if hold.member.dead:
            raise Crash
        if self.batch:
            rows = iter(run.rows)
            msgs = []
            for value in values:
                row = next((r for r in rows if r[2] == str(value).encode()), None)
                if row is None:
                    raise Wrong(f"the batch of {run.rows} has no {value}")
                msgs.append(self.home_of(hold.at, row[0]))
            first = msgs[0].row[0] if hold.apart(run, msgs[0].row[0]) else run.rows[0][0]
        else:
            first = offset_of(hand.row)
            msgs = [self.home_of(hold.at, first)]
        call = Call(self, hold, run, msgs, first)
        if [m.uid if m.row[2] is not None else None for m in msgs] != values:
            raise Wrong(f"{call} gets {values}")
        hold.started(call)
        for msg, delivery in zip(msgs, deliveries or (), strict=False):
            if delivery.attempt != hold.attempt(msg):
                raise Wrong(f"{call} is told that this is attempt {delivery.attempt}, it is {hold.attempt(msg)}")
            if (delivery.topic, delivery.partition, delivery.offset) != msg.origin or delivery.key != msg.row[1]:
                raise Wrong(f"{call} gets {delivery}")
        hold.member.active.append(call)
        if self.batch and len(run.rows) > self.consumer.batch.max:
            raise Wrong(f"{call}: {len(run.rows)} messages in a batch of {self.consumer.batch.max}")
        if len(hold.member.active) > self.size:
            raise Wrong(f"{len(hold.member.active)} deliveries are in work, concurrency is {self.size}")
        return call

    # The scheduler.

    def chance(self, share: float) -> bool:
        return self.faults and self.rng.random() < share

    def note(self, error: BaseException | None) -> None:
        """What ended a crew: a stop is as declared, anything else is an error of ours."""
        if error is not None and not isinstance(error, Stop | Crash):
            raise error

    def look(self, member: Member) -> None:
        """One of the engine's own steps is interrupted: the other threads of its process go on, or another process."""
        if not member.crew.lanes.lock.locked():
            self.looking += 1
            try:
                self.turn(member)
            finally:
                self.looking -= 1

    def turn(self, inside: Member | None = None) -> None:
        """Somebody does something."""
        if self.depth >= 3:
            return
        self.depth += 1
        try:
            self._turn()
        finally:
            self.depth -= 1
        if self.wrong is not None:
            raise self.wrong
        if inside is not None and inside.dead:
            raise Crash

    def _turn(self) -> None:
        rng = self.rng
        dice = rng.random()
        if not self.members:
            return
        member = rng.choice(self.members)
        if self.operator is not None and self.faults and self.operator.random() < 0.1:
            member.asked(self.operator)
        if dice < 0.5:
            member.work()
        elif dice < 0.8:
            member.step()
        elif dice < 0.9:
            self.clock.advance(rng.choice((0.001, 0.02, TICK + 0.01, BACKOFF)))
        elif not self.faults:
            pass
        elif dice < 0.93:
            member.timeout()
        elif dice < 0.94 or (dice < 0.97 and self.theme == "history"):
            self.send()
        elif dice < 0.945 or (dice < 0.97 and self.theme in ("moves", "suspects")):
            self.home.wanted[rng.choice(list(self.home.wanted))] = member
        elif dice < 0.947 or (dice < 0.96 and self.theme == "lapses"):
            self.clock.advance(0.0 if self.looking else LEASE + 2 * FROZEN)
        elif dice < 0.955:
            member.crash()
        elif dice < 0.957:
            member.stop()
        elif dice < 0.98 or self.theme in ("suspects", "lapses"):
            member.crew.pace = rng.choice((0.0, 1e-5, 1e-5, 1e-3))

    def join(self) -> None:
        self.members.append(Member(self))
        for at, wanted in self.home.wanted.items():
            if wanted is None or wanted.dead or self.rng.random() < 0.3:
                self.home.wanted[at] = self.members[-1]

    def play(self) -> None:
        self.join()
        for _ in range(self.rng.randint(15, 90)):
            if not self.members or (len(self.members) < 3 and self.rng.random() < 0.02):
                self.join()
            self.turn()
        self.faults = False
        for member in self.members:
            member.runner.pauses = Pauses()
        for _ in range(600):
            if not self.members:
                self.join()
            if not self.home.open and self.settle_down():
                break
            self.settle_down()
        else:
            left = {at: [(m.row[0], m.plan) for m in log if m.outcome is None] for at, log in self.home.logs.items()}
            raise Wrong(f"not done: {left}, members {[(m.active, m.crew.error) for m in self.members]}")
        for _ in range(3):
            self.settle_down()
        for member in self.members:
            member.check_empty()
        if {key: value for key, value in self.home.model.items() if value} != {
            key: msgspec.msgpack.decode(data) for (_, key), data in self.home.cells.items() if data is not None
        }:
            raise Wrong(f"the table is {self.home.cells}, not {self.home.model}")
        for hold in self.holds.values():
            for call in hold.calls.values():
                if call.verdict != "done" and any(self.elsewhere[tag] for tag in call.tags):
                    raise Wrong(f"{call} sent elsewhere and was not done")
                failed = call.over and call.verdict == "fail" and not call.member.dead
                if failed and not all(f.done() for f in call.futures):
                    raise Wrong(f"{call} failed, and its sends are pending for ever")

    def settle_down(self) -> bool:
        """Everybody does what there is to do; True if there was nothing."""
        moved = False
        for member in list(self.members):
            moved |= member.step()
            for slot in range(self.size if not self.awaited else 1 + 2 * len(member.pauses)):
                member.work(slot)
            while self.awaited and member.loop.ready and not member.dead:
                member.work(0)
        if self.wrong is not None:
            raise self.wrong
        self.clock.advance(0.05 if moved else BACKOFF)
        return not moved

    def close(self) -> None:
        for member in [*self.members, *self.graves]:
            member.dead = True
            member.bury()


def hash_of(key: str) -> int:
    return sum(key.encode())


def simulate(seed: int) -> int:
    """Play the schedule of this seed; the number of calls. Raises Wrong, or whatever the engine raised."""
    global SIM
    disabled, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
    sys.tracebacklimit = 0
    SIM = sim = Sim(seed)
    try:
        sim.play()
        if sim.wrong is not None:
            raise sim.wrong
    except BaseException as error:
        raise (sim.wrong or error) from error
    finally:
        try:
            sim.close()
        finally:
            SIM = None
            logging.disable(disabled)
            del sys.tracebacklimit
    return sim.calls
