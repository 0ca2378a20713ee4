# ruff: noqa: E501  (one bug, one line)
"""Bugs to plant: each changes one spot in the source of one real function. The simulation must find every one.

A bug whose spot is no longer in the source fails its test: it is to be planted anew.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from barnabas import queues
from barnabas.backends import shares
from barnabas.backends.memory import MemoryBackend, MemoryQueues
from barnabas.backends.memory_admin import MemoryAdmin
from barnabas.engine import checkpoint, crew, handler, hooks, runner, work
from barnabas.engine.alone import Alone
from barnabas.engine.crew import Crew
from barnabas.engine.crews import LoopCrew
from barnabas.engine.hand import Hand
from barnabas.engine.handler import Handler
from barnabas.engine.lanes import Lanes
from barnabas.engine.ledger import Ledger, Straight
from barnabas.engine.runner import Runner
from barnabas.jobs import batch
from barnabas.jobs import work as jobs_work
from barnabas.jobs.batch import Keeper
from barnabas.message import Stretch
from barnabas.state.table import Cells


class Bug(NamedTuple):
    """What is wrong, and the change that makes it so: in `owner.name` (a class or the module that calls it by name)."""

    what: str
    owner: Any
    name: str
    old: str
    new: str


BUGS = [
    # Lanes.
    Bug("give() forgets the run that waits", Lanes, "give", "rest += behind.rows", "pass"),
    Bug("the rest of a failed run goes behind, not ahead", Lanes, "give", "rest += behind.rows", "rest = behind.rows + rest"),
    Bug("an idle lane is never removed", Lanes, "give", "lanes.pop(key, None)", "pass"),
    Bug("a taken lane counts as idle", Lanes, "take", "part.lanes[run.key] = None", "part.lanes.pop(run.key, None)"),
    Bug("a batch is larger than its most", Lanes, "take", "if len(rows) > most:", "if False:"),
    Bug("a batch that was in work at a crash comes again as large", Lanes, "take", "10 ** max", "1 ** max"),
    Bug("a batch that fills up overtakes the one in work", Lanes, "_by_key", "run.fills and", ""),
    Bug("so in partition order", Lanes, "_extend", "run.fills and", "self.wait and"),
    Bug("a parked run is not made ready", Lanes, "unpark", "self.ready.append(run)", "pass"),
    Bug("a retry topic's message runs before its time", Lanes, "put_later", "[row]), at)", "[row]), 0.0)"),
    Bug("a revoked partition keeps its lanes", Lanes, "drop", "part.lanes = {}", "pass"),
    # The ledger.
    Bug("the watermark is one too high", Ledger, "position", "next(iter(opened))", "next(iter(opened)) + 1"),
    Bug("intervals are not stored", Ledger, "position", "_intervals(sorted(done)) + ", ""),
    Bug("intervals are dropped at the next assignment", shares, "open_account", "Ledger(position, done)", "Ledger(position)"),
    Bug("what an earlier owner finished is handed out", Ledger, "add", "if self.done_before:", "if False:"),
    Bug("the watermark stops at the first row", Straight, "finish", "rows[-1][0] + 1", "rows[0][0] + 1"),
    Bug("a repeated settlement counts twice", Straight, "finish", "if rows[0][0] < self._watermark:", "if False:"),
    Bug("a position goes back", Straight, "position", "self._watermark = max(self.next, self._watermark)", "return max(self.next, self._watermark), []"),
    # What a handler has in hand.
    Bug("a failure does not drop the hand", Hand, "drop", "self.forget()", "pass"),
    Bug("a failure keeps the cells", Hand, "forget", "self.cells = {}", "pass"),
    Bug("what a failure sent and wrote is kept", crew, "work", "hand.drop()", "hand.keep()"),
    Bug("so in a batch", work, "_call", "hand.drop()", "hand.keep()"),
    Bug("a lane does not see its predecessor's writes", Crew, "_give", "self.handler.tables.give(run.part, run.cells)", "pass"),
    Bug("cells are not settled", Hand, "keep", "written[cell] = data", "pass"),
    Bug("a settlement hides newer cells", Cells, "settled", "if unsettled.get(cell, _ABSENT) is data:", "if cell in unsettled:"),
    Bug("a dropped send is pending for ever", Hand, "forget", "output[-1].resolve(None)", "pass"),
    # Decisions.
    Bug("attempts count double", Handler, "failed", "part.attempts.get(failed[0], 0) + 1", "part.attempts.get(failed[0], 0) + 2"),
    Bug("the attempt is told wrong", Handler, "delivery", "part.attempts.get(offset, 0) + 1", "part.attempts.get(offset, 0)"),
    Bug("attempts of settled messages are kept", shares, "close_books", "part.attempts.pop(row[0], None)", "pass"),
    Bug("one retry too few", handler, "decide", "if attempt > policy.times:", "if attempt >= policy.times:"),
    Bug("a rejected message is retried", handler, "decide", "if isinstance(error, Reject):", "if False:"),
    Bug("an undecodable message is retried", Handler, "failed", "reason = self._undecodable(part, data)", "pass"),
    Bug("a retry topic forgets earlier attempts", handler, "to_retry", "attempts, repr", "1, repr"),
    Bug("a retry runs at once", Crew, "failed", "self.monotonic() + max(0.0, at - now)", "self.monotonic()"),
    Bug("a hook's error is swallowed", hooks, "_fail", "    raise error\n", "    return None\n"),
    Bug("a hook that swallows makes it done", hooks, "_forgives", "(said is Done or isinstance(said, Done))", "True"),
    Bug("a failure that a hook forgives sends", hooks, "_fail", "_forget()", "pass"),
    Bug("a missing answer is no failure", handler, "make_answer", "if topic not in uses and", "if False and"),
    Bug("a cancellation counts as done", crew, "work", "parked = crew.failed(", "parked = None if isinstance(error, asyncio.CancelledError) else crew.failed("),
    Bug("a cancellation counts as a failure", Crew, "failed", 'if why == "release":', "if False:"),
    Bug("a cancellation by another name hits the next", Crew, "failed", "(slot in self.cancelled or isinstance(error, asyncio.CancelledError))", "isinstance(error, asyncio.CancelledError)"),
    Bug("a cancellation that was swallowed is none", Crew, "overdue", "if slot in self.cancelled:", "if False:"),
    Bug("a late success is done", Crew, "overdue", "if (id(run), row[0]) in self.late:", "if False:"),
    Bug("a cancellation hits who comes next", LoopCrew, "cancel", "self.current[slot] is run and self.box[at] == offset != -1", "self.current[slot] is not None"),
    # Batches.
    Bug("a failed batch is dead as a whole", crew, "work_batches", "error = await _call(crew, slot, run, [rows[done]])", "pass"),
    Bug("what cannot be decoded in a batch is done", work, "_call", "for row, why in bad:", "for row, why in ():"),
    Bug("a failed batch goes through the retry topic and runs again", Handler, "failed", "if whole:  # each", "if False:  # each"),
    Bug("a batch starts after the claim's end", crew, "work_batches", "monotonic() > crew.begin(slot, run) and", "crew.begin(slot, run) < 0 and"),
    Bug("a batch that hangs costs its first message only", Crew, "abandon", "self.box[at + 1] > 1", "False"),
    Bug("a batch that hung to its end is called again", crew, "work_batches", "attempts.get(row[0], 0) > times", "attempts.get(row[0], 0) > times + 1"),
    # Workers and settlement.
    Bug("the claim's end is ignored", Crew, "begin", "if part.until < until or self.stopping:", "if self.stopping:"),
    Bug("what stopped at a claim's end is lost", Lanes, "give", "stopped = at is None", "stopped = at is None\n        if stopped:\n            return False"),
    Bug("what was revoked as it was fetched is handed over", Runner, "step", "if not batch[0].closed", "if batch"),
    Bug("a haul is returned twice", Crew, "_hauled", "return haul.popleft()", "return haul[0]"),
    Bug("a haul that is given back is lost", Crew, "_unload", "*((run, 0, now) for run in haul)", ""),
    Bug("what is done is given twice", Crew, "_give", "else run.rows[start:done]", "else run.rows[:done]"),
    Bug("outputs are left out", Crew, "_give", "if run.outputs or run.cells or run.others:", "if run.cells or run.others:"),
    Bug("an unread message fails in another's name", work, "_work_unread", "run.rows[at], error)", "run.rows[0], error)"),
    Bug("an unread message that is dead runs again", work, "_work_unread", "messages[at + 1 :]", "messages[at:]"),
    Bug("unread messages behind a dead one are left out", work, "_work_unread", "messages[at + 1 :]", "[]"),
    Bug("what is done of unread ones is said too short", Stretch, "__init__", "offset_of(rows[-1])", "offset_of(rows[0])"),
    Bug("the box lags behind", crew, "work", "box[at_box] = row[0]  # before", "box[at_box] = run.rows[0][0]  # before"),
    Bug("what is rescued runs twice", Crew, "rescue", "del run.rows[behind:]", "pass"),
    Bug("what is rescued is lost", Crew, "rescue", "self.lanes.give(haul.pop(), 0, now)", "haul.pop()"),
    Bug("what is rescued of a run is lost", Crew, "rescue", "self.lanes.give(Run(run.part, LOOSE, rest), 0, now)", "pass"),
    Bug("what is in hand is rescued", Crew, "rescue", "behind = 1 + next(", "behind = next("),
    Bug("a failed settlement forgets its results", Runner, "settle", "outputs = checkpoint(", "self._unsettled = []; outputs = checkpoint("),
    Bug("results of a revoked partition are settled", Runner, "settle", "if not r.part.closed", "if r.part is not None"),
    Bug("what was done is not settled at a revocation", Runner, "settle", "self._collect()", "[c.collect() for c in self.crews]"),
    Bug("a revocation leaves the lanes", Runner, "revoked", "crew.lanes.drop(part)", "pass"),
    Bug("outputs for elsewhere are left out", runner, "checkpoint", "refused += flush(sink, outputs)", "pass"),
    Bug("nobody waits for outputs elsewhere", checkpoint, "flush", "future.exception(FLUSH)", "None"),
    Bug("outputs for elsewhere are sent twice, here too", runner, "checkpoint", "result.outputs[:] = own +", "_ = own +"),
    # Pauses.
    Bug("what was held back is forgotten", Runner, "_heed", "held, self._held = self._held, {}", "held, self._held = {}, {}"),
    Bug("what is behind a paused key overtakes it", Runner, "_hold", " if part not in self._held else 0", ""),
    Bug("what is held back changes its order", Runner, "_hold", "self._held.setdefault(part, []).extend(stay)", "self._held.setdefault(part, [])[0:0] = stay"),
    Bug("a pause holds only what is fetched alone", Runner, "_hold", "[row for row in rows if row[1] in keys]", "[row for row in rows[:1] if row[1] in keys]"),
    # Suspects.
    Bug("a suspect does not run alone", Alone, "sift", ">= CRASHES", "> CRASHES"),
    Bug("a suspect runs beside a haul", Crew, "busy", "and any(self.hauls)", "and False"),
    Bug("what waits behind a suspect is lost", Alone, "_next", "self._behind.pop(part)[1:]", "self._behind.pop(part)[2:]"),
    Bug("what waits behind a suspect goes first", Alone, "sift", "self._behind[part] += rows", "self._behind[part][1:1] = rows"),
    Bug("a revoked suspect keeps the gate closed", Alone, "forget", "if self._running is None:", "if False:"),
]  # fmt: skip


JOB_BUGS = [
    # Locks.
    Bug("the lock of a run is not taken", MemoryAdmin, "take", "slots.append((need.nominal(now, oldest), number, jid))", "pass"),
    Bug("who waits for a lock runs", MemoryAdmin, "admit", "return need.waits, None if", "return False, None if"),
    Bug("the lock of a run is kept", MemoryAdmin, "ended", "slots.remove(max(mine))", "pass"),
    Bug("a slot of before a crash is free", MemoryAdmin, "ended", "slots.remove(max(mine))", "slots[:] = [s for s in slots if s not in mine]"),
    Bug("a process that ends keeps its locks", MemoryQueues, "close", "self.home.ended(number, wake=False)", "pass"),
    Bug("a lock ends with the first run", MemoryQueues, "settle", "if not isinstance(verdict, Again):", "if True:"),
    Bug("a lock outlives its job", MemoryQueues, "settle", "home.free(row[0])", "pass"),
    Bug("a lock outlives its job's beginning", MemoryAdmin, "admit", "self.free(number)", "pass"),
    Bug("a lock outlives a job that an operator removes", MemoryAdmin, "move_jobs", "if to in (None, \"dead\"):", "if False:"),
    Bug("a dead job comes back without its lock", MemoryAdmin, "move_jobs", "or self._locked_again(n)", "or True"),
    Bug("a second one is taken", MemoryBackend, "_lock", "self.holder(job.lock.key)", "None"),
    Bug("a lock is not noted with its job", MemoryBackend, "_lock", "self.held[self._number] = claim.key", "pass"),
    Bug("a refused job is stored", MemoryBackend, "_push", "not self._lock(job)", "self._lock(job) is None"),
    # Limits.
    Bug("one more than the limit", MemoryAdmin, "full", "left = need.most - ahead - wants", "left = need.most + 1 - ahead - wants"),
    Bug("a rate forgets what began", MemoryAdmin, "full", "now - need.span - 2", "now - 2"),
    Bug("a job begins long after it had its slot", jobs_work, "refused", "now > float(text)", "False"),
    # Batches of jobs.
    Bug("a batch is complete before its last job", batch, "look", "not is_open and", ""),
    Bug("a batch with dead jobs is a success", batch, "look", "ended and not dead", "ended"),
    Bug("a member's end is not noted", MemoryQueues, "settle", "members_ended(results)", "{}"),
    Bug("a dead member is forgotten", MemoryAdmin, "leave", "sets[how].add(each)", "pass"),
    Bug("a member is open for ever", MemoryAdmin, "leave", "sets[before].remove(each)", "pass"),
    Bug("what an operator drops counts as done", queues, "bury", '"dead"', '"done"'),
    Bug("what others delete keeps a batch open", Keeper, "_reconcile", "while some := list(islice(lost, 1000)):", "while False:"),
    Bug("what is stored counts as lost", Keeper, "_lost", "if jid in stored:", "if False:"),
    Bug("a job that is added comes too late", MemoryAdmin, "enter", 'sets["open"].add(job.jid)', "pass"),
    Bug("a success that comes late is nobody's", Keeper, "_reconcile", "if not home.batch(id)[2]:", "if False:"),
    Bug("a batch that was left in its middle stays so", Keeper, "_lost", 'if jid.startswith("b-") and', "if False and"),
]  # fmt: skip


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug is in the code meanwhile."""
    real = vars(bug.owner)[bug.name]
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(bug.old) == 1, f"{bug.what}: {source.count(bug.old)} times {bug.old!r} in {bug.name}"
    scope: dict[str, Any] = {}
    exec(compile(source.replace(bug.old, bug.new), f"<{bug.what}>", "exec"), real.__globals__, scope)
    setattr(bug.owner, bug.name, scope[bug.name])
    try:
        yield
    finally:
        setattr(bug.owner, bug.name, real)
