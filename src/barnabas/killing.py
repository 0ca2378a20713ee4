"""The kill test as a tool: real workers of any app are killed at random instants, and nothing may be lost for it.

`barnabas.testing.kill("shop:app", load=send_orders)` starts workers on a fresh file, lets `load` send, kills workers with
SIGKILL meanwhile, then lets the rest finish. Witnesses are lines that hooks write around each handler, with one write a
line: what they say survives any kill, and nobody can settle it away.
"""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from barnabas.app import App
from barnabas.backends.host import holder
from barnabas.cli.loading import load as load_app
from barnabas.dead import told
from barnabas.inspect import span

APP, LEAD = "KILL_APP", "KILL_WITNESS"
T = TypeVar("T")
PAUSE = (0.02, 0.4)  # seconds between kills
START, AIM = 10.0, 1.0  # seconds to wait, at most: until all have started, and for the instant aimed at


class Report(NamedTuple):
    """What a kill test saw. `repeats` counts deliveries that were handled more than once (at-least-once), `kills` the kills
    by the instant they hit; `still` is the longest time (seconds) that a partition with messages in it saw none handled."""

    seed: int
    handled: int
    repeats: int
    jobs: int
    still: float
    kills: dict[str, int]


class Lost(AssertionError):
    """The kill test found something lost, out of order or stuck; the text says what, and the seed."""


def kill(
    app: str, *, load: Callable[[App, int], Any], kills: int = 50, seed: int | None = None, workers: int = 3, processes: int = 1,
    folder: str | os.PathLike[str] | None = None, patience: float = 60.0,
) -> Report:
    """Kill `workers` processes of MODULE:NAME at random instants while `load(app, n)` sends before the n-th kill.

    A third of the kills is aimed at a process that is committing, a third at the time in which others take over from the
    one killed before; a quarter of the time not all have started. load: called in this process; waits for the futures of
    what it sends, or returns one. processes: more than one makes each worker a supervisor with so many children, and all of
    them are killed. folder: where the file lies that is used instead of the app's own (a temporary one by default).
    patience: seconds after the last kill in which nothing gets finished, for work to count as stuck. Prints the seed.
    Raises Lost if a message was not handled, if first handlings of a key are out of order, if work is stuck, or if a worker
    ends by itself or outlives its supervisor.
    """
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"kill test of {app}: seed {seed}", flush=True)
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder).resolve()
        url, witnesses, log = f"sqlite:///{room}/kill.db", room / "witness", room / "workers.log"
        witnesses.touch()
        os.environ |= {APP: app, LEAD: str(witnesses)}
        stack.callback(lambda: [os.environ.pop(name, None) for name in (APP, LEAD)])
        loaded = load_app(app)
        loaded.close()
        stack.enter_context(loaded.lent(settings=loaded.settings.override(events=url, jobs=url)))
        stack.enter_context(closing(loaded))
        command = [sys.executable, "-m", "barnabas", "run", "barnabas.killing:witnessed", "--processes", str(processes)]
        team = _Team([*command, "--events", url, "--jobs", url], workers, processes, log, random.Random(seed))
        stack.callback(team.end)
        try:
            for n in range(kills):
                team.gather(loaded.events)
                future = load(loaded, n)
                if future is not None:
                    future.result(60)
                team.strike(loaded.events, f"{room}/kill.db")
            _drain(loaded, patience)
            team.end()
            if not _until(lambda: _unlocked(witnesses), patience):
                raise Lost(f"a worker still lives, {patience} s after all supervisors ended")
            return check(loaded, witnesses, seed, team.kills)
        except Lost as lost:
            tail = log.read_text(errors="replace")[-2000:]
            raise Lost(f"seed {seed}: {lost}; the workers said:\n{tail}") from None


class _Team:
    """Workers that are killed and started again."""

    def __init__(self, command: list[str], count: int, processes: int, log: Path, dice: random.Random) -> None:
        self.kills: Counter[str] = Counter()
        self._command, self._log, self._dice = command, log, dice
        self._victim, self._size = 0, count * processes
        self._workers = [self._start() for _ in range(count)]

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def gather(self, backend: Any) -> None:
        """Wait until all are there, mostly: who is killed at each start gets nothing done."""
        if self._dice.random() < 0.75:
            _until(lambda: len({p.pid for p in backend.processes()} & set(self._pids())) >= self._size, START)

    def strike(self, backend: Any, path: str) -> None:
        """Kill a process; a worker is started again, a supervisor's child is left to it."""
        dice = self._dice
        time.sleep(dice.uniform(*PAUSE))
        aim = dice.choice(("at random", "in a commit", "in a take-over"))
        victim = 0
        if aim == "in a commit":
            victim = _until(lambda: pid if (pid := holder(path)) in self._pids() else 0, AIM, 0.0)
        elif aim == "in a take-over" and self._victim:
            last = "SELECT 1 FROM processes WHERE pid = ?"
            gone = _until(lambda: not backend.query(last, (self._victim,)), AIM, 0.001)
            time.sleep(dice.uniform(0.0, 0.05))
            victim = dice.choice(self._pids()) if gone else 0
        self.kills[aim if victim else "at random"] += 1
        self._victim = victim or dice.choice(self._pids())
        with suppress(ProcessLookupError):  # a supervisor's child that ends just now
            os.kill(self._victim, signal.SIGKILL)
        for place, worker in enumerate(self._workers):
            if worker.pid == self._victim:
                worker.wait()
                self._workers[place] = self._start()
            elif worker.poll() is not None:
                raise Lost(f"a worker ended by itself, with status {worker.returncode}")

    def _pids(self) -> list[int]:
        """Of all workers, and of a supervisor's children where the system tells them."""
        pids = [worker.pid for worker in self._workers]
        for pid in list(pids):
            with suppress(OSError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids

    def end(self) -> None:
        """Stop all of them."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            try:
                worker.wait(40)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _until(look: Callable[[], T], seconds: float, pause: float = 0.05) -> T:
    """What `look` says at last: when it is true, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(pause)
    return found


def _drain(app: App, patience: float) -> None:
    groups = {c.group: [t.name for t in c.subscriptions] for c in app.consumers.values()}
    queues = sorted({job.queue for job in app.job_handlers.values()})
    least, since = sys.maxsize, time.monotonic()
    while left := app.events.open_work(groups, queues):
        if left < least:
            least, since = left, time.monotonic()
        elif time.monotonic() - since > patience:
            raise Lost(f"{left} messages or jobs are stuck, for {patience} s")
        time.sleep(0.05)


# Witnesses.


@cache
def __getattr__(name: str) -> App:
    """`barnabas.killing:witnessed`: the app that the environment names; every handler leaves a line in a file that stays
    locked while the process lives."""
    if name != "witnessed" or APP not in os.environ:
        raise AttributeError(name)
    app = load_app(os.environ[APP])
    fd = os.open(os.environ[LEAD], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    fcntl.flock(fd, fcntl.LOCK_SH)

    def handled(delivery: Any) -> Generator[None, Any, None]:
        yield
        for d in delivery if isinstance(delivery, list) else [delivery]:
            key = d.key.hex() if isinstance(d.key, bytes) else d.key
            line = json.dumps([d.group, d.topic, d.partition, d.offset, key, d.timestamp, time.time()])
            os.write(fd, line.encode() + b"\n")

    app.hooks.insert(0, handled)
    return app


def _unlocked(path: Path) -> bool:
    """Whether nobody who writes to the file lives any more."""
    with path.open() as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def read_witness(path: Path) -> list[list[Any]]:
    """What the witnesses wrote: group, topic, partition, offset, key, and when it was sent and handled (epoch seconds)."""
    lines = path.read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line[line.rfind('["') :]) for line in lines]  # behind what one wrote who was killed as he did


def check(app: App, path: Path, seed: int, kills: dict[str, int]) -> Report:
    """Compare what is stored with what the witnesses saw. Raises Lost."""
    seen: dict[tuple[str, str, int], dict[int, Any]] = {}
    jids: set[str] = set()
    repeats = handled = 0
    for group, topic, partition, offset, key, *times in read_witness(path):
        if partition < 0:
            repeats += key in jids
            jids.add(key)
        else:
            first = seen.setdefault((group, topic, partition), {})
            repeats += offset in first
            first.setdefault(offset, (key, *times))
    backend = app.events
    stored = {state.name: state.partitions for state in backend.topics()}
    for consumer in app.consumers.values():
        dead = _dead(backend, stored, consumer)
        for name in [topic.name for topic in consumer.topics]:
            for partition, (low, high, _) in enumerate(stored[name]):
                first = seen.get((consumer.group, name, partition), {})
                where = f"{consumer.name} at {name}[{partition}]"
                if missing := [n for n in range(low, high) if n not in first and (name, partition, n) not in dead]:
                    raise Lost(f"{where}: {len(missing)} were never handled: {missing[:10]}")
                handled += high - low
                if consumer.order != "none" and consumer.retry.ordered:
                    _check_order(where, first, consumer.order == "key")
    if not handled and not jids:
        raise Lost("nothing was sent: `load` is to use the app it is given (a script that is run is another module than its app)")
    return Report(seed, handled, repeats, len(jids), max(map(_still, seen.values()), default=0.0), dict(kills))


def _still(first: dict[int, Any]) -> float:
    """The longest time (seconds) in which none was handled for the first time though there was one to handle."""
    waiting = sorted(first, reverse=True)
    done: set[int] = set()
    longest = last = 0.0
    for offset, (_, _, at) in first.items():
        while waiting[-1] in done:
            waiting.pop()
        longest = max(longest, at - max(last, first[waiting[-1]][1]))
        last = at
        done.add(offset)
    return longest


def _check_order(where: str, first: dict[int, Any], by_key: bool) -> None:
    last: dict[Any, int] = {}
    for offset, (key, *_) in first.items():
        if by_key and key is None:
            continue
        lane = key if by_key else None
        if last.get(lane, -1) > offset:
            raise Lost(f"{where}: key {key!r}: offset {offset} was first handled after {last[lane]}")
        last[lane] = offset


def _dead(backend: Any, stored: dict[str, Any], consumer: Any) -> set[tuple[str, int, int]]:
    """The messages that this consumer's group buried."""
    found = set()
    for name in [topic.dead_topic.name for topic in consumer.topics]:
        for partition, (low, high, _) in enumerate(stored.get(name, ())):
            for said in map(told, span(backend, name, partition, low, high)):
                if said.get("group") == consumer.group:
                    found.add((said["topic"], int(said["partition"]), int(said["offset"])))
    return found
