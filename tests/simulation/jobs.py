"""Jobs that need each other (locks, limits, batches) on `memory:`: workers of one app fetch, run, settle, crash and stop in an
order that a seed decides, beside operators who move what they find. Time is the test's.

After each step what must always hold is looked at; at the end all is worked off, and nothing may be left or lost.
"""

import contextlib
import logging
import random
from collections import Counter, defaultdict
from typing import Any

from barnabas import (
    App,
    Concurrent,
    Rate,
    Reject,
    RetryAfter,
    until_and_while_executing,
    until_executed,
    until_executing,
    until_expired,
    while_executing,
)
from barnabas.engine.lanes import Run
from barnabas.errors import BackendError, Conflict
from barnabas.jobs.payload import parse
from barnabas.jobs.unique import held
from barnabas.queues import entry, move
from barnabas.testing import _isolated
from barnabas.worker import Worker

PER = 20.0  # seconds
KINDS = {
    "plain": None,
    "once": until_executed(by="key"),
    "newest": until_executed(by="key", on_conflict="replace"),
    "alone": while_executing(by="key"),
    "begins": until_executing(by="key"),
    "both": until_and_while_executing(by="key"),
    "timed": until_expired(by="key", ttl=30.0),
}
LIMITS = {
    "few": Concurrent(2, by="key"),
    "rated": Rate(2, per=PER, by="key"),
    "several": [Concurrent(1, by="key"), Rate(3, per=PER)],
}
AT_ONCE = {"alone": 1, "both": 1, "few": 2, "several": 1}
IN_ORDER = ("plain", "alone", "few")
PLANS = (("done",), ("done",), ("raise", "done"), ("later", "done"), ("raise", "raise", "reject"), ("reject",))
TURNS = ("on_death", "on_complete", "on_success")  # of a batch: its callbacks
IN_BATCHES = ("plain", "alone")
SIM: Any = None  # the schedule that is played


class Wrong(GeneratorExit):
    """A promise is broken. (Almost anything else would be the failure of a handler.)"""


class Told:
    """A job as its sender knows it, and what came of it."""

    def __init__(self, number: int, kind: str, key: str, plan: tuple[str, ...], refused: bool, clean: bool) -> None:
        self.number, self.kind, self.key, self.plan, self.refused, self.clean = number, kind, key, plan, refused, clean
        self.runs = 0
        self.end = ""  # "done", "dead" or "dropped"
        self.batch = -1
        self.child: Told | None = None  # a job that it adds to its batch
        self.revived = False  # it was dead, and counted as that
        self.phantom = False  # it is not stored yet, and may never be


class Batch:
    """A batch as its maker knows it."""

    def __init__(self, id: str, parent: int) -> None:
        self.id, self.parent = id, parent
        self.turns = Counter[str]()


def declare() -> tuple[App, dict[str, Any]]:
    app = App("sim", events="memory:", jobs="memory:", threads=4)
    jobs = {}
    for kind, unique in (KINDS | dict.fromkeys(LIMITS)).items():

        def act(number: int, key: str) -> None:
            SIM.run(number)

        act.__name__ = kind
        jobs[kind] = app.job(unique=unique, limit=LIMITS.get(kind, []), retry=3)(act)
    for turn in TURNS:

        def told(id: str, turn: str = turn) -> None:
            SIM.turned(turn, id)

        jobs[turn] = app.job(name=turn)(told)
    return app, jobs


APP, JOBS = declare()


class Sim:
    """One schedule."""

    def __init__(self, seed: int, memory: Any) -> None:
        self.dice, self.memory, self.clock = random.Random(seed), memory, APP.clock
        self.calm = self.dice.random() < 0.3  # nobody crashes, fails or interferes: order is looked at
        self.kinds = self.dice.sample([*KINDS, *LIMITS], self.dice.randint(1, 3))
        self.batching = self.dice.random() < 0.5
        self.told: list[Told] = []
        self.members: list[Worker] = []
        self.begun: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.batches: list[Batch] = []
        self.starts: dict[tuple[str, str], list[float]] = defaultdict(list)  # of rated jobs
        self.memory.end = self.end

    def end(self, *args: Any) -> None:
        """What a keeper says of members; now and then it cannot."""
        if not self.calm and self.dice.random() < 0.2:
            raise BackendError("as planned")
        type(self.memory).end(self.memory, *args)

    # What the jobs do.

    def run(self, number: int) -> None:
        told = self.told[number]
        if told.end == "dropped":
            raise Wrong(f"job {number} runs, but was dropped")
        if told.kind in ("rated", "several"):
            most, starts = (2, self.starts["rated", told.key]) if told.kind == "rated" else (3, self.starts["several", ""])
            starts.append(self.clock.now())
            if len(starts) > most and starts[-1] < starts[-1 - most] + PER:
                raise Wrong(f"{most + 1} {told.kind} jobs of {told.key} began within {starts[-1] - starts[-1 - most]} s")
        plan = told.plan[min(told.runs, len(told.plan) - 1)]
        told.runs += 1
        if told.child is not None and self.batches[told.batch].turns["on_complete"] == 0:
            APP.current_batch().enqueue(JOBS[told.child.kind], told.child.number, told.child.key)
        if told.runs == 1 and told.clean:
            self.begun[told.kind, told.key].append(number)
        if plan == "raise":
            raise ValueError("as planned")
        if plan == "later":
            raise RetryAfter(self.dice.uniform(0, 20))
        if plan == "reject":
            raise Reject("as planned")
        told.end = "done"

    def turned(self, turn: str, id: str) -> None:
        """A batch's callback runs."""
        number = next(number for number, batch in enumerate(self.batches) if batch.id == id)
        self.batches[number].turns[turn] += 1
        members = self.members_of(number)
        living = [job for job in self.memory.find_jobs() if job.state != "dead" and self.number(job) in members]
        left = [job for job in living if not self.told[self.number(job)].revived]
        if turn != "on_death" and left:
            raise Wrong(f"{turn} of batch {number}, and job {self.number(left[0])} is not settled")
        ends = {self.told[member].end for member in members}
        if turn == "on_success" and "dead" in {self.told[member].end or "dead" for member in members}:
            raise Wrong(f"{turn} of batch {number} with {ends}")

    def members_of(self, batch: int) -> set[int]:
        """Its jobs, and those of the batches inside it."""
        inside = {batch}
        for number, each in enumerate(self.batches):
            if each.parent in inside:
                inside.add(number)
        return {told.number for told in self.told if told.batch in inside and not told.phantom}

    # What happens.

    def gather(self, parent: int = -1) -> None:
        """Make a batch, perhaps with another inside it."""
        callbacks = {turn: JOBS[turn] for turn in TURNS}
        with contextlib.suppress(BackendError), APP.batch(**callbacks) as batch:
            self.batches.append(Batch(batch.id, parent))
            number = len(self.batches) - 1
            for _ in range(self.dice.randint(0, 4)):
                told = self.tell(self.dice.choice(IN_BATCHES), number)
                batch.enqueue(JOBS[told.kind], told.number, told.key)
                if self.dice.random() < 0.2:
                    told.child = self.tell(self.dice.choice(IN_BATCHES), number)
                    told.child.phantom = True  # until it is stored
            if parent < 0 and self.dice.random() < 0.3:
                self.gather(number)

    def tell(self, kind: str, batch: int) -> Told:
        plan = ("done",) if self.calm else self.dice.choice(PLANS)
        told = Told(len(self.told), kind, f"b{self.dice.randrange(3)}", plan, False, False)
        told.batch = batch
        self.told.append(told)
        return told

    def enqueue(self) -> None:
        kind, key = self.dice.choice(self.kinds), f"k{self.dice.randrange(3)}"
        plan, delay = ("done",) if self.calm else self.dice.choice(PLANS), 0.0
        job, number = JOBS[kind], len(self.told)
        if not self.calm and self.dice.random() < 0.2:
            delay = self.dice.uniform(0, 30)
        clean = self.calm
        future = job.enqueue_in(delay, number, key) if delay else job.enqueue(number, key)
        self.told.append(Told(number, kind, key, plan, isinstance(future.exception(0), Conflict), clean))

    def join(self) -> None:
        worker = Worker(APP, inline=True)
        worker.start()
        self.members.append(worker)

    def fetch(self, worker: Worker) -> None:
        worker.runners[0].step(0.0)
        phantoms = [told for told in self.told if told.phantom and self.batches[told.batch].id in self.memory.batches]
        stored = {self.number(job) for job in self.memory.find_jobs()} if phantoms else ()
        for told in phantoms:  # if so, who added it has been settled
            told.phantom = told.number not in stored

    def work(self, worker: Worker, most: int) -> None:
        (crew,) = worker.runners[0].crews
        ready = crew.lanes.ready
        runs = [Run(run.part, run.key, [row]) for run in ready for row in run.rows]
        ready.clear()
        ready.extend(runs[:most])
        crew.step()
        ready.extend(runs[most:])

    def crash(self, worker: Worker) -> None:
        """What it had in work is taken up by others; what it had not settled is as if it had not been."""
        runner = worker.runners[0]
        runner._collect()
        runner._unsettled = []
        runner.source.close()
        self.members.remove(worker)
        self.memory.ripe = self.members[-1].batches.ripe if self.members else (lambda id: None)

    def interfere(self) -> None:
        """An operator moves a job."""
        found = list(self.memory.find_jobs())
        if not found:
            return
        job, to = self.dice.choice(found), self.dice.choice([None, "dead", "ready", "queue:default"])
        if parse(job.payload).name in TURNS:
            return
        told = self.told[self.number(job)]
        ours = self.dice.random() < 0.5  # else as Sidekiq's web page does
        with contextlib.suppress(BackendError):  # the batch is to be told again, but the job is gone
            _ = move(APP, [entry(job)], to) if ours else self.memory.move_jobs([job.ref], to)
        told.revived = told.revived or job.state == "dead"
        if job.state != "work":  # what was done before a crash, and not settled, was not done
            told.end = "dropped" if to is None else "" if to == "dead" or job.state != "dead" else told.end

    def number(self, job: Any) -> int:
        """-1 for a callback."""
        payload = parse(job.payload)
        return -1 if payload.name in TURNS else int(bytes(payload.args).decode().strip("[]").split(",")[0])

    def turn(self) -> None:
        dice, worker = self.dice.random(), self.dice.choice(self.members)
        if dice < 0.05 and self.batching:
            self.gather()
        elif dice < 0.3:
            self.enqueue()
        elif dice < 0.35:
            worker.batches.step()
        elif dice < 0.55:
            self.fetch(worker)
        elif dice < 0.75:
            self.work(worker, self.dice.randint(1, 5))
        elif dice < 0.85:
            self.clock.advance(self.dice.choice([0.01, 1.0, 10.0, 40.0]))
        elif dice < 0.88 and len(self.members) < 3:
            self.join()
        elif self.calm:
            return
        elif dice < 0.93:
            self.interfere()
        elif dice < 0.97:
            self.crash(worker)
        elif dice < 0.98:
            worker.stop(0.0)
            self.members.remove(worker)
        if not self.members:
            self.join()

    # What must hold.

    def check(self) -> None:
        queued, running = Counter[str](), Counter[tuple[str, str]]()
        for job in self.memory.find_jobs():
            if (number := self.number(job)) < 0:
                continue
            told = self.told[number]
            if job.state != "dead" and told.kind in ("once", "newest"):
                queued[held(job.payload)] += 1
            if job.state == "work" and told.kind in AT_ONCE:
                running[told.kind, told.key] += 1
            if job.state == "work" and told.kind in ("begins", "both") and job.ref[0] in self.memory.held:
                raise Wrong(f"job {told.number} has begun, and keeps others from being enqueued")
        if twice := [key for key, count in queued.items() if count > 1]:
            raise Wrong(f"two of a kind are stored: {twice}")
        if many := {kind: count for kind, count in running.items() if count > AT_ONCE[kind[0]]}:
            raise Wrong(f"too many of a kind are at work: {many}")

    def settle_down(self) -> None:
        self.calm = True  # whatever was planned to fail still does
        rest = 4  # rounds without work: keepers look around
        for _ in range(400):
            for worker in [*self.members]:
                self.fetch(worker)
                self.work(worker, 1 << 20)
                worker.runners[0].settle()
                worker.batches.step()
            self.check()
            ended = all(batch.turns["on_complete"] for batch in self.batches)
            if ended and all(job.state == "dead" for job in self.memory.find_jobs()):
                rest -= 1
            if not rest:
                return
            self.clock.advance(30.0)
        open = [APP.batch_status(batch.id) for batch in self.batches if not batch.turns["on_complete"]]
        raise Wrong(f"stuck: {open} {[(job.state, self.number(job)) for job in self.memory.find_jobs() if job.state != 'dead']}")

    def play(self) -> None:
        self.join()
        for _ in range(self.dice.randint(20, 80)):
            self.turn()
            self.check()
        self.settle_down()
        dead = {self.number(job) for job in self.memory.find_jobs("dead")}
        for number, batch in enumerate(self.batches):
            failed = [n for n in self.members_of(number) if self.told[n].end != "done"]
            if bool(batch.turns["on_success"]) is bool(failed):
                raise Wrong(f"batch {number}: {batch.turns}, and {failed} failed")
        for told in self.told:
            if told.phantom:
                continue
            if told.kind == "newest" and any(t.key == told.key for t in self.told[told.number + 1 :] if t.kind == "newest"):
                continue  # replaced by a later one, perhaps
            if told.refused and (told.runs or KINDS.get(told.kind) is None):
                raise Wrong(f"job {told.number} was refused, and ran")
            if not told.refused and not told.end and told.number not in dead:
                raise Wrong(f"{told.kind} job {told.number} is lost after {told.runs} runs of {told.plan}")
        for (kind, key), numbers in self.begun.items():
            if kind in IN_ORDER and len(self.members) == 1 and numbers != sorted(numbers):
                raise Wrong(f"{kind} {key}: begun in the order {numbers}")
        left = [key for key, (_, until) in self.memory.locks.items() if until is None]
        slots = [slots for key, slots in self.memory.slots.items() if ":RUN" in key and slots]
        if left or slots or self.memory.runs or self.memory.held or self.memory.has:
            raise Wrong(f"locks are left: {left} {slots} {self.memory.runs} {self.memory.held} {self.memory.has}")


def simulate(seed: int) -> int:
    """Play the schedule of this seed; the number of jobs. Raises Wrong."""
    global SIM
    disabled, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
    try:
        with _isolated(APP):
            SIM = sim = Sim(seed, APP.jobs)
            sim.play()
            for worker in sim.members:
                with contextlib.suppress(Exception):
                    worker.stop(0.0)
            return len(sim.told)
    finally:
        SIM = None
        logging.disable(disabled)
