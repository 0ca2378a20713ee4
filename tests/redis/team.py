"""What the kill tests of jobs share: worker processes on a Redis that writes every answer to disk, or on a file of SQLite, and
what befalls them. The rest, a room of jobs that leave lines in a file (the witness) and what these have to say, is each test's.
"""

import importlib
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from servers import RedisServer, free_port

from barnabas import App

HERE = Path(__file__).parent
WORKERS = 3  # processes
QUICK = "LEASE=6 RENEW=0.8 SCAN=1.0 CALM=6.0 TICK=0.2 BLOCK=2"


class Proxy:
    """A line between workers and Redis that can be cut."""

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(), port
        self._listener = socket.create_server(("127.0.0.1", self.port))
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
    """Worker processes, as `barnabas run` makes them, of a room's app, and their server. `times`: constants of redis_life, as
    the room sets them; `line`: what leads to Redis can be cut."""

    def __init__(self, folder: Path, backend: str, room: str, times: str = "", line: bool = False, options: tuple[str, ...] = ()):
        self.seed = int(os.environ.get("BARNABAS_SEED", random.SystemRandom().randrange(1 << 32)))
        print(f"kill test of {room} on {backend}: seed {self.seed}")
        self.dice, self.blows, self.refused = random.Random(self.seed), Counter[str](), 0
        self.folder, self._room, self.workers = folder, room, list["subprocess.Popen[bytes]"]()
        (folder / "witness").touch()
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        self._environment = {**os.environ, "KILL_FOLDER": str(folder), "KILL_TIMES": times, "PYTHONPATH": path}
        self.server = RedisServer(folder, durable=True, options=options) if backend == "redis" else None
        self.url = self.server.url if self.server is not None else f"sqlite:///{folder}/jobs.db"
        self._line = Proxy(self.server.port) if self.server is not None and line else None
        url = self.url if self._line is None else f"redis://127.0.0.1:{self._line.port}/0"
        self._command = [sys.executable, "-m", "barnabas", "run", f"{room}:app", "--jobs", url]

    def room(self) -> Any:
        """The room, to enqueue its jobs from here; the quick times are the workers' alone."""
        sys.modules.pop(self._room, None)
        with patch.dict(os.environ, KILL_FOLDER=str(self.folder)):
            room: Any = importlib.import_module(self._room)
        room.app.settings = room.app.settings.override(jobs=self.url)
        return room

    @contextmanager
    def at_work(self, app: App) -> Iterator[None]:
        """Its processes run, while the app here sends; then all of it ends."""
        app.jobs.queue_states()  # (the file is made before there is a race for it)
        with open(self.folder / "workers.log", "ab") as self._log:
            try:
                self.workers = [self.start() for _ in range(WORKERS)]
                yield
            finally:
                self.end()
                app.close()
                if self._line is not None:
                    self._line.close()
                if self.server is not None:
                    self.server.end(signal.SIGKILL)

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log, env=self._environment)

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

    def blow(self, kind: str, spared: int = 0, within: float = 0.3) -> None:
        """Something befalls a worker (the first ones may be spared), or the server, or the line to it."""
        time.sleep(self.dice.uniform(0.0, within))
        place = self.dice.randrange(spared, WORKERS)
        self.blows[kind] += 1
        self.watch()
        if kind == "worker":
            self.kill(place)
        elif kind == "redis":
            assert self.server is not None
            self.server.end(signal.SIGKILL)
            time.sleep(self.dice.uniform(0.0, 0.5))
            self.server.start()
        elif kind == "cut":
            assert self._line is not None
            self._line.down = True
            time.sleep(self.dice.uniform(0.1, 0.5))
            self._line.down = False
        else:
            with self.frozen(place, self.dice.uniform(0.05, 0.5)):
                pass

    @contextmanager
    def frozen(self, place: int, seconds: float) -> Iterator[None]:
        """A worker stands still, meanwhile."""
        victim = self.workers[place]
        victim.send_signal(signal.SIGSTOP)
        timer = threading.Timer(seconds, victim.send_signal, [signal.SIGCONT])
        timer.start()
        yield
        timer.join()

    def drain(self, left: Callable[[], Any], seconds: float) -> None:
        """Wait until nothing is left, and let the workers end; fail if something still is. (One look may miss a job that moves
        meanwhile: so many in a row do not.)"""
        end, looks = time.monotonic() + seconds, 0
        while (looks := 0 if (found := left()) else looks + 1) < 3 and time.monotonic() < end:
            self.watch()
            time.sleep(0.2)
        self.end()
        assert not found, f"{found} are stuck\n{self.tail}"

    def end(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
        while self.workers:
            worker = self.workers.pop()
            try:
                worker.wait(40)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    @property
    def tail(self) -> str:
        """What a failure is told with."""
        return f"seed {self.seed}\n{(self.folder / 'workers.log').read_text()[-3000:]}"

    def said(self) -> list[list[str]]:
        """The witness's lines, in words."""
        return [line.split() for line in (self.folder / "witness").read_text().splitlines()]


def unfinished(app: App) -> int:
    """Jobs that are neither done nor dead."""
    return sum(job.state != "dead" for job in app.jobs.find_jobs())
