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
    Reject,
    RetryAfter,
    until_and_while_executing,
    until_executed,
    until_executing,
    until_expired,
    while_executing,
)
from barnabas.engine.lanes import Run
from barnabas.errors import Conflict
from barnabas.jobs.payload import parse
from barnabas.jobs.unique import held
from barnabas.testing import _isolated
from barnabas.worker import Worker

KINDS = {
    "plain": None,
    "once": until_executed(by="key"),
    "newest": until_executed(by="key", on_conflict="replace"),
    "alone": while_executing(by="key"),
    "begins": until_executing(by="key"),
    "both": until_and_while_executing(by="key"),
    "timed": until_expired(by="key", ttl=30.0),
}
PLANS = (("done",), ("done",), ("raise", "done"), ("later", "done"), ("raise", "raise", "reject"), ("reject",))
SIM: Any = None  # the schedule that is played


class Wrong(BaseException):
    """A promise is broken."""


class Told:
    """A job as its sender knows it, and what came of it."""

    def __init__(self, number: int, kind: str, key: str, plan: tuple[str, ...], refused: bool, clean: bool) -> None:
        self.number, self.kind, self.key, self.plan, self.refused, self.clean = number, kind, key, plan, refused, clean
        self.runs = 0
        self.end = ""  # "done", "dead" or "dropped"


def declare() -> tuple[App, dict[str, Any]]:
    app = App("sim", events="memory:", jobs="memory:", threads=4)
    jobs = {}
    for kind, unique in KINDS.items():

        def act(number: int, key: str) -> None:
            SIM.run(number)

        act.__name__ = kind
        jobs[kind] = app.job(unique=unique, retry=3)(act)
    return app, jobs


APP, JOBS = declare()


class Sim:
    """One schedule."""

    def __init__(self, seed: int, memory: Any) -> None:
        self.dice, self.memory, self.clock = random.Random(seed), memory, APP.clock
        self.calm = self.dice.random() < 0.3  # nobody crashes, fails or interferes: order is looked at
        self.kinds = self.dice.sample([*KINDS], self.dice.randint(1, 3))
        self.told: list[Told] = []
        self.members: list[Worker] = []
        self.begun: dict[tuple[str, str], list[int]] = defaultdict(list)

    # What the jobs do.

    def run(self, number: int) -> None:
        told = self.told[number]
        if told.end == "dropped":
            raise Wrong(f"job {number} runs, but was dropped")
        plan = told.plan[min(told.runs, len(told.plan) - 1)]
        told.runs += 1
        if told.runs == 1 and told.clean:
            self.begun[told.kind, told.key].append(number)
        if plan == "raise":
            raise ValueError("as planned")
        if plan == "later":
            raise RetryAfter(self.dice.uniform(0, 20))
        if plan == "reject":
            raise Reject("as planned")
        told.end = "done"

    # What happens.

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

    def interfere(self) -> None:
        """An operator moves a job."""
        found = list(self.memory.find_jobs())
        if not found:
            return
        job, to = self.dice.choice(found), self.dice.choice([None, "dead", "ready", "queue:default"])
        told = self.told[self.number(job)]
        if self.memory.move_jobs([job.ref], to) and to is None:
            told.end = told.end or "dropped"

    def number(self, job: Any) -> int:
        return int(bytes(parse(job.payload).args).decode().strip("[").split(",")[0])

    def turn(self) -> None:
        dice, worker = self.dice.random(), self.dice.choice(self.members)
        if dice < 0.3:
            self.enqueue()
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
            told = self.told[self.number(job)]
            if job.state != "dead" and told.kind in ("once", "newest"):
                queued[held(job.payload)] += 1
            if job.state == "work" and told.kind in ("alone", "both"):
                running[told.kind, told.key] += 1
            if job.state == "work" and told.kind in ("begins", "both") and job.ref[0] in self.memory.held:
                raise Wrong(f"job {told.number} has begun, and keeps others from being enqueued")
        for what, counts in (("are stored", queued), ("are at work", running)):
            if twice := [key for key, count in counts.items() if count > 1]:
                raise Wrong(f"two of a kind {what}: {twice}")

    def settle_down(self) -> None:
        self.calm = True  # whatever was planned to fail still does
        for _ in range(400):
            for worker in [*self.members]:
                self.fetch(worker)
                self.work(worker, 1 << 20)
                self.fetch(worker)
            self.check()
            if all(job.state == "dead" for job in self.memory.find_jobs()):
                return
            self.clock.advance(30.0)
        raise Wrong(f"stuck: {[(job.state, self.number(job)) for job in self.memory.find_jobs() if job.state != 'dead']}")

    def play(self) -> None:
        self.join()
        for _ in range(self.dice.randint(20, 80)):
            self.turn()
            self.check()
        self.settle_down()
        dead = {self.number(job) for job in self.memory.find_jobs("dead")}
        for told in self.told:
            if told.kind == "newest" and any(t.key == told.key for t in self.told[told.number + 1 :] if t.kind == "newest"):
                continue  # replaced by a later one, perhaps
            if told.refused and (told.runs or KINDS[told.kind] is None):
                raise Wrong(f"job {told.number} was refused, and ran")
            if not told.refused and not told.end and told.number not in dead:
                raise Wrong(f"{told.kind} job {told.number} is lost after {told.runs} runs of {told.plan}")
        for (kind, key), numbers in self.begun.items():
            if KINDS[kind] in (None, KINDS["alone"]) and len(self.members) == 1 and numbers != sorted(numbers):
                raise Wrong(f"{kind} {key}: begun in the order {numbers}")
        left = [key for key, (_, until) in self.memory.locks.items() if until is None]
        if left or self.memory.runs or self.memory.held:
            raise Wrong(f"locks are left: {left} {self.memory.runs} {self.memory.held}")


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
