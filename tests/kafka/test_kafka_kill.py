"""Worker processes on a real Kafka are killed, frozen, stopped and joined by others, at random: nothing is lost, the order of
each key holds, what is settled stays settled, and no partition is stuck for longer than a session and a little."""

import importlib
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from commits import history
from servers import shared_kafka

from barnabas.backends.kafka_words import unpack

HERE = Path(__file__).parent
SESSION = 3.0
STUCK = SESSION + 3.0  # seconds after the last blow in which every partition moves again, four times in five:
AT_MOST = 20.0  # a machine that has other things to do may take so long
# Seconds that something handled may wait for its commit, as the group waits for one it has lost: up to a volley's first blow,
# since they may come so fast that there always is one.
UNCOMMITTED = SESSION + 3.0
BUSY = 4 * (os.cpu_count() or 1)  # where its load is above this, more may take longer than STUCK
RATE, KEYS, PARTITIONS = 100, 40, 6  # messages a second
BURST = 600  # so many at once now and then: who is killed in the middle of them has committed some, and has others in hand
NAMES = ("straight", "lanes")
GROUPS = {f"herd-{name}": ["items"] for name in NAMES}
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM}  # the last: asked to stop before it could listen
SOAK = float(os.environ.get("BARNABAS_SOAK", "600"))
protocols = pytest.mark.parametrize("protocol", ["classic", "consumer"])


class Herd:
    """The worker processes, what is done to them, a steady sender, and what the handlers wrote."""

    def __init__(self, room: SimpleNamespace, lines: Path, seed: int) -> None:
        self.room, self.lines, self.seed = room, lines, seed
        self.random = random.Random(seed)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.frozen: dict[subprocess.Popen[bytes], float] = {}
        self.hit: dict[int, list[tuple[float, float]]] = defaultdict(list)  # when each was killed or frozen, and its volley began
        self.began = 0.0
        self.ever_frozen: set[int] = set()
        self.logs: dict[int, Path] = {}  # of each process, by its pid
        self.done = Counter[str]()
        self.calm: list[float] = []  # seconds that the slowest partition took to move after a volley
        self.where: dict[tuple[int, int], tuple[str, int, float]] = {}  # what is stored: key, its number, when
        self.sent = self.untold = self.rebalances = self.more = 0
        self.end_sending = threading.Event()
        self.sender = threading.Thread(target=self.send)

    def send(self) -> None:
        began, numbers = time.monotonic(), Counter[str]()

        def stored(future) -> None:
            message = future.result()
            if message.offset < 0:  # the broker had it from an earlier try, and does not say where
                self.untold += 1
                return
            self.where[message.partition, message.offset] = (message.key, message.value["n"], time.monotonic())

        while not self.end_sending.wait(0.02):
            while self.sent < (time.monotonic() - began) * RATE + self.more:
                key = f"k{self.random.randrange(KEYS)}"
                numbers[key] += 1
                self.sent += 1
                self.room.items.send({"key": key, "n": numbers[key], "at": time.monotonic()}).add_done_callback(stored)

    def start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "barnabas", "run", "herd:app"]
        with open(f"{self.lines}.{len(self.logs)}", "wb") as log:
            self.workers.append(subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=log))
        self.logs[self.workers[-1].pid] = Path(log.name)
        return self.workers[-1]

    def handled(self) -> Iterator[tuple[str, int, float, tuple[int, int], str, int]]:
        """Consumer, process, when, (partition, offset), key, number: one for each handling, in their order."""
        for line in self.lines.read_text().rpartition("\n")[0].splitlines():  # the last may be in the making
            what, pid, at, partition, offset, key, n = line.split()
            yield what, int(pid), float(at), (int(partition), int(offset)), key, int(n)

    def strike(self, spared: "subprocess.Popen[bytes] | None" = None) -> None:
        """One blow: mostly a kill."""
        self.thaw(time.monotonic())
        victims = [worker for worker in self.workers if worker not in self.frozen and worker is not spared]
        what = self.random.choices(["kill", "freeze", "leave", "join"], [6, 1, 1, 1])[0]
        if what == "join" and len(self.workers) >= 5:
            what = "leave"
        if what == "freeze" and (self.frozen or len(victims) < 2):
            what = "kill"
        self.done[what] += 1
        if what == "join":
            self.start()
            return
        victim = self.random.choice(victims)
        if self.random.random() < 0.3:
            self.more += BURST
            time.sleep(self.random.uniform(0.2, 0.6))
        if what == "freeze":
            victim.send_signal(signal.SIGSTOP)
            self.frozen[victim] = time.monotonic() + SESSION + 2
            self.ever_frozen.add(victim.pid)
            self.hit[victim.pid].append((time.monotonic(), self.began))
            return
        self.workers.remove(victim)
        victim.send_signal(signal.SIGKILL if what == "kill" else signal.SIGTERM)
        if what == "kill":
            self.hit[victim.pid].append((time.monotonic(), self.began))
        assert victim.wait(30) in ENDS
        while len(self.workers) < 3:
            self.start()

    def thaw(self, now: float) -> None:
        """Let those go on that were frozen for longer than a session: others have their partitions."""
        for worker, until in list(self.frozen.items()):
            if now > until:
                worker.send_signal(signal.SIGCONT)
                del self.frozen[worker]

    def volley(self, spared: "subprocess.Popen[bytes] | None" = None) -> None:
        """Some blows, one soon after another; then every partition moves again: of each, something is handled that was sent
        after the last blow."""
        self.began = time.monotonic()
        for _ in range(self.random.randint(1, 5)):
            self.strike(spared)
            time.sleep(self.random.uniform(0.1, 1.5))
        self.strike(spared)
        blow = time.monotonic()
        still = {(name, number) for name in NAMES for number in range(PARTITIONS)}
        while still:
            for what, _, at, place, _, _ in self.handled():
                if at > blow and place in self.where and self.where[place][2] > blow:
                    still.discard((what, place[0]))
            waited = time.monotonic() - blow
            assert waited < AT_MOST, f"stuck for {waited:.1f} s: {sorted(still)} (seed {self.seed})"
            time.sleep(0.1)
        self.calm.append(waited)
        self.thaw(time.monotonic())

    def wait_until_at_work(self, worker: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + 60
        while worker.pid not in {pid for _, pid, *_ in self.handled()}:
            assert time.monotonic() < deadline and worker.poll() is None, f"it gets nothing to do (seed {self.seed})"
            time.sleep(0.1)

    def settle(self) -> None:
        """Send no more, and wait until all is done."""
        self.end_sending.set()
        self.sender.join()
        assert self.room.app.events.flush(30) == 0 and len(self.where) + self.untold == self.sent
        deadline = time.monotonic() + 60
        while self.room.app.events.open_work(GROUPS, []):
            assert time.monotonic() < deadline, f"stuck: {self.room.app.events.positions()} (seed {self.seed})"
            time.sleep(0.2)

    def end(self) -> None:
        self.end_sending.set()
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.send_signal(signal.SIGTERM)
        codes = [worker.wait(40) for worker in self.workers]
        self.workers = []
        assert set(codes) <= ENDS, codes

    # What came of it.

    def witness(self) -> int:
        """Kafka's own tool sees the positions that we see. By its own records of them nothing that was settled was ever taken
        back, by a process that came back from the dead or otherwise; the number of rebalances it counted."""
        events = self.room.app.events
        rebalances, commits = history(events.servers)
        for group in (events.prefix + group for group in GROUPS):
            tool = [sys.executable, str(HERE.parents[1] / "dev" / "kafka"), "tool", "consumer.group.ConsumerGroupCommand"]
            tool += ["--bootstrap-server", events.servers, "--describe", "--offsets", "--group", group]
            told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            rows = [line.split() for line in told.splitlines() if line.startswith(group)]
            theirs = {(row[1], int(row[2])): (int(row[3]), int(row[4])) for row in rows if row[1] == events.prefix + "items"}
            ours = {
                (events.prefix + p.topic, p.partition): (p.offset, p.end)
                for p in events.positions()
                if (events.prefix + p.group, p.topic) == (group, "items")
            }
            assert theirs == ours and len(ours) == PARTITIONS and all(offset == end for offset, end in ours.values())
            for place, stages in commits[group].items():
                finished: set[int] = set()
                for offset, beside in stages:
                    now = {n for low, high in unpack(offset, beside)[0] for n in range(low, high)} | set(range(offset))
                    assert finished <= now, f"{group} {place}: {sorted(finished - now)[:9]} taken back (seed {self.seed})"
                    finished = now
        return min(rebalances[events.prefix + group] for group in GROUPS)

    def lost(self, pid: int) -> list[float]:
        """When this process said that Kafka took partitions from it (having had no sign of it for a session, or a freeze)."""
        lines = [line for line in self.logs[pid].read_text().splitlines() if "may run again" in line]
        return [datetime.fromisoformat(line[:23]).timestamp() - time.time() + time.monotonic() for line in lines]

    def judge(self, name: str) -> int:
        """Nothing lost, first handlings of a key in order (but what a frozen process had in hand); the number of repeats, all
        of them of what a process had in work, or not committed yet, when it was hit."""
        handled: dict[tuple[int, int], tuple[int, float]] = {}
        first: dict[str, list[int]] = defaultdict(list)
        repeats, excused, oldest = 0, 0, 0.0
        for what, pid, at, place, key, n in self.handled():
            if what != name:
                continue
            if place in handled:
                before, when = handled[place]
                hit = min((hit for hit in self.hit[before] if hit[0] > when - 0.1), default=None)
                if hit is None and any(when < lost < when + SESSION + UNCOMMITTED for lost in self.lost(before)):
                    excused += 1
                    continue
                repeats += 1
                assert hit is not None, f"{name}: {place} again, though process {before} was not harmed (seed {self.seed})"
                oldest = max(oldest, hit[1] - when)
            elif pid not in self.ever_frozen:
                first[key].append(n)
            handled[place] = (pid, at)
        lost = set(self.where) - set(handled)
        assert not lost, f"{name}: lost {sorted(lost)[:20]} (seed {self.seed})"
        assert len(handled) == self.sent, f"{name}: {len(handled)} of {self.sent} (seed {self.seed})"
        for key, numbers in first.items():
            assert numbers == sorted(numbers), f"{name}: order of {key} (seed {self.seed})"
        assert oldest < UNCOMMITTED, f"{name}: what was handled {oldest:.1f} s before the blows came again (seed {self.seed})"
        told = f"{name}: {self.sent} sent, {repeats} repeats, of handlings up to {oldest:.1f} s before blows"
        print(f"{told}, and {excused} of what was taken away")
        return repeats


@pytest.fixture
def room(request, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The app, imported afresh, with topics of its own."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HERD_PROTOCOL", protocol)
    monkeypatch.setenv("HERD_LINES", str(tmp_path / "lines"))
    monkeypatch.setenv("HERD_URL", f"kafka://{shared_kafka()}?prefix={secrets.token_hex(4)}-")
    name = getattr(request, "param", "herd")
    sys.modules.pop(name, None)
    room = importlib.import_module(name)
    room.app.events  # noqa: B018 - opens it: the topics are there before the workers
    yield room
    room.app.close()


@pytest.fixture
def herd(room: SimpleNamespace, tmp_path: Path) -> Iterator[Herd]:
    """Three workers and a sender."""
    herd = Herd(room, tmp_path / "lines", secrets.randbits(32))
    try:
        for _ in range(3):
            herd.start()
        herd.sender.start()
        yield herd
    finally:
        herd.end()


def check(herd: Herd) -> int:
    """All that is to hold at the end; the number of repeats."""
    herd.settle()
    rebalances = herd.witness()
    late = [waited for waited in herd.calm if waited > STUCK]
    calm = [f"{waited:.1f}" for waited in sorted(herd.calm)[-5:]]
    told = f"{dict(herd.done)}, {rebalances} rebalances, after {len(herd.calm)} volleys partitions moved, the last in {calm} s"
    print(f"\n{herd.room.app.settings.kafka['group.protocol']}: {told}")
    herd.rebalances = rebalances
    dead = [part for state in herd.room.app.events.topics() for part in state.partitions if state.name == "items.dead"]
    assert len(dead) == PARTITIONS and not any(end for _, end, _ in dead)
    repeats = sum(herd.judge(name) for name in NAMES)
    assert len(late) <= len(herd.calm) / 5 or os.getloadavg()[0] > BUSY, f"slow to move: {late} (seed {herd.seed})"
    return repeats


@protocols
@pytest.mark.parametrize("kills", [pytest.param(25, marks=pytest.mark.slow), pytest.param(250, marks=pytest.mark.soak)])
def test_a_herd_under_fire(herd: Herd, kills: int) -> None:
    while herd.done["kill"] < kills:
        herd.volley()
    assert check(herd) < 100 * sum(herd.done.values()) and herd.rebalances >= len(herd.calm)  # (blows in a row are one)


@protocols
@pytest.mark.slow
def test_a_stop_while_others_join_repeats_nothing(herd: Herd) -> None:
    for _ in range(8):
        herd.wait_until_at_work(herd.workers[-1])
        herd.start()
        time.sleep(herd.random.uniform(0.2, 1.5))
        oldest = herd.workers.pop(0)
        oldest.send_signal(signal.SIGTERM)
        assert oldest.wait(30) == 0
    assert check(herd) == 0 and herd.rebalances >= 8


@pytest.mark.soak
@pytest.mark.parametrize("protocol", ["classic"])
def test_ten_minutes_of_faults_leave_memory_as_it_is(herd: Herd) -> None:
    """Of a worker that nobody harms: it sees partitions come and go."""
    living, sizes, end = herd.workers[0], [], time.monotonic() + SOAK
    while time.monotonic() < end:
        herd.volley(spared=living)
        sizes.append(int(Path(f"/proc/{living.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert living.poll() is None
    check(herd)
    warm = sizes[len(sizes) // 5 :]
    print(f"the living one has {min(warm) >> 20} to {max(warm) >> 20} MB")
    assert max(warm) - min(warm) < 20 << 20


@protocols
@pytest.mark.slow
@pytest.mark.parametrize("room", ["poison"], indirect=True)
def test_what_kills_its_process_is_dead_after_four_crashes_and_nothing_else_is(room: SimpleNamespace, tmp_path: Path) -> None:
    """Whoever takes over knows of the crashes from Kafka alone: here, two workers that share nothing else."""
    count, workers, crashes = 2000, [], 0
    room.items.send_many(range(count)).result(30)
    groups = {f"poison-{name}": ["items"] for name in room.POISON}
    deadline = time.monotonic() + 240
    try:
        while room.app.events.open_work(groups, []):
            assert time.monotonic() < deadline, room.app.events.positions()
            for worker in [worker for worker in workers if worker.poll() is not None]:
                assert worker.returncode == -signal.SIGKILL
                workers.remove(worker)
                crashes += 1
            while len(workers) < 2:
                workers.append(subprocess.Popen([sys.executable, "-m", "barnabas", "run", "poison:app"], cwd=HERE))
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.terminate()
        assert {worker.wait(30) for worker in workers} <= ENDS
    events = room.app.events
    dead = [int(row[2]) for number in range(3) for row in events.read("items.dead", number, 0, 100)]
    print(f"\n{crashes} crashes")
    assert sorted(dead) == sorted(room.POISON.values())
    handled = {tuple(line.split()) for line in (tmp_path / "lines").read_text().splitlines()}
    assert handled == {(name, str(n)) for name in room.POISON for n in range(count)}
    assert crashes <= 5 * len(dead)
