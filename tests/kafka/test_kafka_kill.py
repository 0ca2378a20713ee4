"""Worker processes on a real Kafka are killed, frozen, stopped and joined by others, at random: nothing is lost, the order of
each key holds."""

import importlib
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from servers import shared_kafka

HERE = Path(__file__).parent
SESSION = 3.0
KEYS = 40
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM}  # the last: asked to stop before it could listen


class Herd:
    """The worker processes, and what is done to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.frozen: dict[subprocess.Popen[bytes], float] = {}
        self.ever_frozen: set[int] = set()
        self.done = Counter[str]()

    def start(self) -> None:
        command = [sys.executable, "-m", "barnabas", "run", "herd:app"]
        self.workers.append(subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL))

    def strike(self) -> None:
        """One blow: mostly a kill."""
        awake = [worker for worker in self.workers if worker not in self.frozen]
        for worker, until in list(self.frozen.items()):
            if time.monotonic() > until:
                worker.send_signal(signal.SIGCONT)
                del self.frozen[worker]
        what = self.random.choices(["kill", "freeze", "leave", "join"], [6, 1, 1, 1])[0]
        if what == "join" and len(self.workers) >= 5:
            what = "leave"
        if what == "freeze" and (self.frozen or len(awake) < 2):
            what = "kill"
        victim = self.random.choice(awake)
        self.done[what] += 1
        if what == "join":
            self.start()
        elif what == "freeze":
            victim.send_signal(signal.SIGSTOP)
            self.frozen[victim] = time.monotonic() + SESSION + 2
            self.ever_frozen.add(victim.pid)
        else:
            self.workers.remove(victim)
            victim.send_signal(signal.SIGKILL if what == "kill" else signal.SIGTERM)
            assert victim.wait(30) in ENDS
            while len(self.workers) < 3:
                self.start()

    def end(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.send_signal(signal.SIGTERM)
        codes = [worker.wait(40) for worker in self.workers]
        self.workers = []
        assert set(codes) <= ENDS, codes


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize(
    "kills", [pytest.param(25, marks=pytest.mark.slow), pytest.param(250, marks=pytest.mark.soak)]
)
def test_a_herd_under_fire(protocol: str, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, seed = tmp_path / "lines", secrets.randbits(32)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HERD_PROTOCOL", protocol)
    monkeypatch.setenv("HERD_LINES", str(lines))
    monkeypatch.setenv("HERD_URL", f"kafka://{shared_kafka()}?prefix={secrets.token_hex(4)}-")
    sys.modules.pop("herd", None)
    room = importlib.import_module("herd")
    herd, numbers, sent = Herd(seed), Counter[str](), []
    try:
        app = room.app
        app.events  # noqa: B018 - opens it: the topics are there before the workers
        for _ in range(3):
            herd.start()
        while herd.done["kill"] < kills:
            for key in [f"k{herd.random.randrange(KEYS)}" for _ in range(100)]:
                numbers[key] += 1
                sent.append(room.items.send({"key": key, "n": numbers[key]}))
            time.sleep(herd.random.uniform(0.2, 1.6))
            herd.strike()
        where = {(m.partition, m.offset): (m.key, m.value["n"]) for m in (future.result(30) for future in sent)}
        assert len(where) == len(sent)
        groups = {name: ["items"] for name in ("herd-straight", "herd-lanes")}
        deadline = time.monotonic() + 60
        while app.events.open_work(groups, []):
            assert time.monotonic() < deadline, f"stuck: {app.events.positions()} (seed {seed})"
            time.sleep(0.2)
        witness(app, groups)
    finally:
        herd.end()
        room.app.close()
    for name in ("straight", "lanes"):
        judge(name, lines, where, herd, seed)


def witness(app, groups) -> None:
    """Kafka's own tool sees the positions that we see."""
    events = app.events
    for group in groups:
        tool = [sys.executable, str(HERE.parents[1] / "dev" / "kafka"), "tool", "consumer.group.ConsumerGroupCommand"]
        tool += ["--bootstrap-server", events.servers, "--describe", "--offsets", "--group", events.prefix + group]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in told.splitlines() if line.startswith(events.prefix + group)]
        theirs = {(row[1], int(row[2])): (int(row[3]), int(row[4])) for row in rows if row[1] == events.prefix + "items"}
        ours = {
            (events.prefix + p.topic, p.partition): (p.offset, p.end)
            for p in events.positions()
            if (p.group, p.topic) == (group, "items")
        }
        assert theirs == ours and len(ours) == 6 and all(offset == end for offset, end in ours.values())


def judge(name: str, lines: Path, where: dict, herd: Herd, seed: int) -> None:
    """Nothing lost, first handlings of a key in order (but what a frozen process had in hand), repeats counted."""
    handled: Counter[tuple[int, int]] = Counter()
    first: dict[str, list[int]] = defaultdict(list)
    last: dict[int, float] = {}
    gaps = []
    for line in lines.read_text().splitlines():
        what, pid, at, partition, offset, key, n = line.split()
        if what != name:
            continue
        place = (int(partition), int(offset))
        handled[place] += 1
        if handled[place] == 1 and int(pid) not in herd.ever_frozen:
            first[key].append(int(n))
        gaps.append(float(at) - last.get(place[0], float(at)))
        last[place[0]] = float(at)
    lost = set(where) - set(handled)
    assert not lost, f"{name}: lost {sorted(lost)[:20]} (seed {seed})"
    for key, numbers in first.items():
        assert numbers == sorted(numbers), f"{name}: order of {key} (seed {seed})"
    repeats = sum(handled.values()) - len(handled)
    blows = sum(herd.done.values())
    print(f"\n{name}: {len(where)} sent, {repeats} repeats in {dict(herd.done)}, longest gap of a partition {max(gaps):.1f} s")
    assert repeats < 300 * blows
