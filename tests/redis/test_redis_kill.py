"""Real processes and a real Redis that writes every answer to disk; all of them killed, frozen and cut off at random.

No job whose enqueueing was answered is lost, none is stuck, repeats are counted and bounded.
"""

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer, free_port

from barnabas import App

HERE = Path(__file__).parent
WORKERS, LOAD = 3, 200  # processes; jobs before each blow
STUCK = 110.0  # seconds the rest may take: a lease, the calm after a restart, the scan, and the work


class Proxy:
    """A line between workers and Redis that can be cut."""

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(), port
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.down = self.ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        peers: dict[socket.socket, socket.socket] = {}

        def drop(one: socket.socket) -> None:
            for end in (one, peers.pop(one)):
                peers.pop(end, None)
                with suppress(OSError):
                    end.close()

        while not self.ended:
            if self.down:
                for one in list(peers):
                    if one in peers:
                        drop(one)
            for one in select.select([self._listener, *peers], [], [], 0.05)[0]:
                if one is self._listener:
                    near, _ = one.accept()
                    try:
                        if self.down:
                            raise OSError
                        far = socket.create_connection(("127.0.0.1", self._to), 1.0)
                        peers[near], peers[far] = far, near
                    except OSError:
                        near.close()
                elif one in peers:
                    data = b""
                    with suppress(OSError):
                        data = one.recv(1 << 16)
                        peers[one].sendall(data)
                    if not data:
                        drop(one)
        for one in list(peers):
            if one in peers:
                drop(one)
        self._listener.close()

    def close(self) -> None:
        self.ended = True
        self._thread.join(5)


class Team:
    """Worker processes, as `barnabas run` makes them."""

    def __init__(self, url: str, folder: Path, app: str = "room:app") -> None:
        self._log = open(folder / "workers.log", "ab")  # noqa: SIM115
        self._command = [sys.executable, "-m", "barnabas", "run", app, "--jobs", url]
        self.refused = 0
        self.workers = [self.start() for _ in range(WORKERS)]

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log)

    def kill(self, place: int) -> None:
        self.workers[place].kill()
        self.workers[place].wait()
        self.workers[place] = self.start()

    def watch(self) -> None:
        """A worker that meets no Redis when it starts says so and ends; whoever started it starts it again."""
        for place, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.refused += 1
                self.workers[place] = self.start()

    def end(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(40)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._log.close()


@contextmanager
def frozen(team: Team, place: int, seconds: float) -> Iterator[None]:
    """A worker stands still for longer than its lease, meanwhile."""
    victim = team.workers[place]
    victim.send_signal(signal.SIGSTOP)
    timer = threading.Timer(seconds, victim.send_signal, [signal.SIGCONT])
    timer.start()
    yield
    timer.join()


def blow(kind: str, team: Team, server: RedisServer, proxy: Proxy, dice: random.Random) -> None:
    time.sleep(dice.uniform(0.02, 0.3))
    place = dice.randrange(1, WORKERS)  # (the first one is frozen once)
    team.watch()
    if kind == "worker":
        team.kill(place)
    elif kind == "redis":
        server.end(signal.SIGKILL)
        time.sleep(dice.uniform(0.0, 0.5))
        server.start()
    elif kind == "cut":
        proxy.down = True
        time.sleep(dice.uniform(0.1, 0.5))
        proxy.down = False
    else:
        team.workers[place].send_signal(signal.SIGSTOP)
        time.sleep(dice.uniform(0.05, 0.5))
        team.workers[place].send_signal(signal.SIGCONT)


def check(folder: Path, kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("BARNABAS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"kill test on Redis: seed {seed}")
    dice, blows = random.Random(seed), Counter[str]()
    witness = folder / "witness"
    witness.touch()
    monkeypatch.setenv("KILL_WITNESS", str(witness))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    server = RedisServer(folder, durable=True, options=("--auto-aof-rewrite-min-size", "1mb"))  # or it loads for ever longer
    proxy = Proxy(server.port)
    team = Team(f"redis://127.0.0.1:{proxy.port}/0", folder)
    app = App("sender", events="memory:", jobs=server.url, send_timeout=120.0)
    note, task = app.foreign_job("note", queue="notes"), app.foreign_job("task", queue="tasks")
    try:
        with frozen(team, 0, 36.0):
            for number in range(kills):
                first = number * LOAD
                futures: list[Any] = [note.enqueue(n) if n % 3 else task.enqueue(n) for n in range(first, first + LOAD // 2)]
                futures.append(note.enqueue_many((n,) for n in range(first + LOAD // 2, first + LOAD - 20)))
                futures += [task.enqueue_in(dice.uniform(0.1, 3.0), n) for n in range(first + LOAD - 20, first + LOAD)]
                kind = dice.choices(("worker", "redis", "cut", "frozen"), (6, 2, 1, 1))[0]
                blows[kind] += 1
                blow(kind, team, server, proxy, dice)
                for future in futures:
                    future.result(150)
        client, end = app.jobs.client, time.monotonic() + STUCK
        work = lambda: app.jobs.open_work({}, ["notes", "tasks"])  # noqa: E731
        left = lambda: work() or client.zcard("retry") + client.zcard("schedule") or work()  # noqa: E731
        while left() and time.monotonic() < end:
            team.watch()
            time.sleep(0.2)
        stuck = left()
        team.end()
        ran = Counter(int(line.split()[0]) for line in witness.read_text().splitlines())
        buried = {json.loads(job.payload)["args"][0] for job in app.jobs.find_jobs("dead")}
        repeats, total = sum(ran.values()) - len(ran), kills * LOAD
        print(f"{total} jobs, {repeats} repeats, {len(buried)} dead, blows {dict(blows)}")
        tail = (folder / "workers.log").read_text()[-3000:]
        most = 3 * (blows["redis"] + blows["cut"])  # who begins while Redis is away says so and ends, and so does the next
        assert team.refused <= most, f"workers ended by themselves\n{tail}"
        assert stuck == 0, f"seed {seed}: {stuck} jobs are stuck\n{tail}"
        lost = set(range(total)) - ran.keys() - buried
        assert not lost, f"seed {seed}: {len(lost)} jobs were lost: {sorted(lost)[:10]}\n{tail}"
        assert len(buried) <= 3, f"seed {seed}: {buried} were buried\n{tail}"
        assert repeats < total / 2, f"seed {seed}: {repeats} repeats of {total}\n{tail}"
        assert client.keys("barnabas:work:*") + client.keys("barnabas:landing:*") + client.keys("barnabas:alone:*") == []
    finally:
        team.end() if not team._log.closed else None
        app.close()
        proxy.close()
        server.end(signal.SIGKILL)


@pytest.mark.slow
def test_fifty_blows_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, 50, monkeypatch)


@pytest.mark.soak
def test_a_thousand_blows_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, 1000, monkeypatch)
