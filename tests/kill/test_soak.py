"""Ten minutes of steady load with faults: memory, the write-ahead log and the latency stay as they are; nothing is lost."""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_kill import check_room, folder, run

from barnabas import App
from barnabas.killing import read_witness

__all__ = ["folder"]
SECONDS = float(os.environ.get("BARNABAS_SOAK", "600"))
RATE = 500  # messages a second
EVERY = 2.0  # seconds between kills
FREEZE = (5, 4.0)  # every n-th time one is stopped for so many seconds, longer than a session
MB = 1 << 20


def rss(pid: int) -> int:
    """Bytes of memory."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Load:
    """A sender thread in this process, a worker that nobody harms, and one that is frozen now and then."""

    def __init__(self, room: Any, folder: Path, kills: int) -> None:
        self.room, self.folder, self.kills = room, folder, kills
        self.sent = 0
        self.samples: list[dict[str, int]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.ended = 0  # frozen ones that the others ended, as they were in a transaction
        self.end = threading.Event()
        self.sender = threading.Thread(target=self.send)

    def __call__(self, app: App, n: int) -> None:
        if n == 0:
            self.workers = [self.start(app), self.start(app)]
            self.sender.start()
        every, seconds = FREEZE
        frozen = n % every == every - 1
        if frozen:
            self.workers[1].send_signal(signal.SIGSTOP)
        time.sleep(seconds if frozen else EVERY)
        if frozen and self.workers[1].poll() is not None:
            assert self.workers[1].returncode == -signal.SIGKILL
            self.ended += 1
            self.workers[1] = self.start(app)
        self.workers[1].send_signal(signal.SIGCONT)
        wal = (self.folder / "kill.db-wal").stat().st_size
        self.samples.append({"living": rss(self.workers[0].pid), "sender": rss(os.getpid()), "wal": wal})
        if n == self.kills - 1:
            self.close()

    def start(self, app: App) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "barnabas", "run", "barnabas.killing:witnessed"]
        command += ["--events", app.settings.events, "--jobs", app.settings.jobs]
        with (self.folder / "living.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def send(self) -> None:
        began = time.monotonic()
        while not self.end.wait(0.05):
            count = int((time.monotonic() - began) * RATE) - self.sent
            items = (self.room.Item(i, f"k{i % self.room.KEYS}") for i in range(self.sent, self.sent + count))
            assert self.room.items.send_many(items).result(60) == count
            self.sent += count

    def close(self) -> None:
        self.end.set()
        if self.sender.ident is not None:
            self.sender.join()
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
            assert worker.wait(40) == 0


@pytest.mark.soak
def test_ten_minutes_of_steady_load_with_faults(folder: Path) -> None:
    import room

    kills = int(SECONDS / (EVERY + 0.3 + FREEZE[1] / FREEZE[0]))
    load = Load(room, folder, kills)
    try:
        report = run("room:app", folder, load=load, kills=kills)
    finally:
        load.close()
    assert check_room(room, folder, report) == set(range(load.sent))
    third = kills // 3
    first, last = load.samples[third // 3 : third], load.samples[-third:]
    for name in ("living", "sender", "wal"):
        values = [statistics.median(sample[name] for sample in part) / MB for part in (first, last)]
        print(f"{name}: {values[0]:.1f} MB, then {values[1]:.1f} MB, at most {max(s[name] for s in load.samples) / MB:.1f} MB")
        if name != "wal":
            assert values[1] - values[0] < 20
    assert max(sample["wal"] for sample in load.samples) < 64 * MB
    lines = read_witness(folder / "witness")
    took: dict[tuple[int, int], tuple[float, float]] = {}
    for group, _, partition, offset, _, sent, at in lines:
        if group == "kill-step":
            took.setdefault((partition, offset), (sent, at - sent))
    at, ordered = zip(*sorted(took.values()), strict=True)
    p99 = [statistics.quantiles(part, n=100)[98] for part in (ordered[: len(ordered) // 3], ordered[-len(ordered) // 3 :])]
    rate = load.sent / (at[-1] - at[0])
    print(f"latency p99: {p99[0]:.2f} s, then {p99[1]:.2f} s; {load.sent} messages, {rate:.0f}/s; {load.ended} frozen ones ended")
    assert p99[1] < 1.5 * p99[0] + 0.5
