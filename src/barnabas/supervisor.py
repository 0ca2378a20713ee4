"""Several worker processes under one: started fresh, restarted with back-off, stopped together.

The supervisor opens no backend and runs no user code but what importing the app does. Each child holds one end of a
socket, the lifeline. Its end of file tells a child that the supervisor is gone, however it went, and the child stops as
if asked to. Lines go both ways: a child says "ready" (its sources are open), "failed" (it ends because of an error it
has reported), "recycle" (it wants to end because a handler hangs) and its counts; the supervisor answers "recycle" when
it is that child's turn.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from barnabas.worker import RECYCLE

log = logging.getLogger("barnabas")
BACKOFF = (0.1, 30.0)  # seconds before a restart: the first, and the most
STEADY = 30.0  # seconds of life after which a child's earlier crashes are forgotten
YOUNG = 1.0  # a child that fails within so many seconds of being ready has failed at its start
LIVES = 5  # starts in a row that may fail
GRACE = 10.0  # seconds beyond stop_timeout after which a child that was asked to stop is killed
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPS = ("SIGTERM", "SIGINT", "SIGHUP")


class Process(Protocol):
    """What the supervisor needs of a process: a part of subprocess.Popen."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status (negative: the signal that ended it), None while it lives."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


class Child:
    """One place among the children, and the process that fills it at present."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: Process | None = None
        self.line: socket.socket | None = None
        self.heard = b""  # the beginning of a line
        self.began = 0.0
        self.ready_at: float | None = None
        self.failed = False
        self.asks = False
        self.changing = False  # it was stopped to be started again
        self.crashes = 0  # in a row
        self.stillborn = 0  # failed starts in a row
        self.start_at: float | None = 0.0  # None: it is not to be started
        self.counts: dict[str, float] = {}

    @property
    def name(self) -> str:
        """How log lines call it."""
        return f"process {self.number}" + (f" (pid {self.process.pid})" if self.process is not None else "")


Spawn = Callable[[int], tuple[Process, socket.socket | None]]


class Supervisor:
    """Keeps `count` children alive until they are drained or it is told to stop; `run` returns its exit status.

    spawn: starts the child of a number (from 1). drain: a child that ends with status 0 has nothing left to do.
    reload: a child that fails is left alone until `restart`. patience: seconds a stop may take before it is a kill.
    tell: gets the children's counts, added up, once a second.
    """

    def __init__(
        self,
        spawn: Spawn,
        count: int,
        *,
        drain: bool = False,
        reload: bool = False,
        patience: float = 35.0,
        tell: Callable[[dict[str, float]], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.children = [Child(number) for number in range(1, count + 1)]
        self.stopping = False
        self.status = 0
        self._spawn = spawn
        self._drain = drain
        self._reload = reload
        self._patience = patience
        self._tell = tell
        self._monotonic = monotonic
        self._kill_at = float("inf")
        self._recycling: Child | None = None
        self._past: dict[str, float] = {}  # counts of processes that have ended
        self._told = 0.0
        self._restart = False
        self._signalled: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = socket.socketpair()

    # The loop.

    def run(self) -> int:
        """Supervise until all children have ended for good."""
        with self._signals():
            try:
                while self.alive():
                    self.step()
                    self._wait()
            finally:
                self.close()
        return self.status

    def close(self) -> None:
        """Let go of the lifelines: a child that still lives, after an error of our own, stops by that."""
        for child in self.children:
            self._hang_up(child)
        self._selector.close()
        self._bell.close()
        self._ring.close()

    def alive(self) -> bool:
        """Whether a child lives or is to be started."""
        return any(child.process is not None or child.start_at is not None for child in self.children)

    def step(self) -> None:
        """Look after every child once."""
        now = self._monotonic()
        while self._signalled:
            self.signal(self._signalled.pop(0))
        for child in self.children:
            if child.process is not None and (code := child.process.poll()) is not None:
                self._ended(child, code, now)
        if self._restart and not self.stopping:
            self._restart = False
            self._change()
        for child in self.children:
            if child.process is None and child.start_at is not None and now >= child.start_at:
                self._start(child, now)
        self._take_turns()
        if now >= self._kill_at:
            self._kill_at = float("inf")
            self._kill()
        if self._tell is not None and now >= self._told + 1.0:
            self._told = now
            self._tell(self.counts())

    def _wait(self) -> None:
        """Until a signal, a word from a child, or the time of the next start."""
        now = self._monotonic()
        times = [child.start_at for child in self.children if child.process is None and child.start_at is not None]
        if self._tell is not None:
            times.append(self._told + 1.0)
        wait = min([*times, self._kill_at, now + 5.0]) - now
        for key, _ in self._selector.select(max(0.0, wait)):
            if key.data is None:
                self._bell.recv(4096)
            else:
                self._listen(key.data)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on; every one, and every child's end, ends `_wait`."""
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        numbers = [signal.Signals[name] for name in FORWARDED if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        old = signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
        for number in before:
            # A handler may interrupt anything, also the start of a child: what it means waits for the next step.
            signal.signal(number, lambda number, frame: self._signalled.append(number))
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)

    # What comes from outside.

    def signal(self, number: int) -> None:
        """Pass a signal on to the children; those that end a process begin the stop."""
        first = not self.stopping
        if signal.Signals(number).name in STOPS:
            self.stop()
        for child in self.children:
            # A child that does not listen yet ends without a word by SIGTERM, with a KeyboardInterrupt by SIGINT.
            early = first and child.ready_at is None and number == signal.SIGINT
            self._send(child, signal.SIGTERM if early else number)

    def stop(self) -> None:
        """Start nobody any more; whoever lives longer than `patience` is killed."""
        if not self.stopping:
            self.stopping = True
            self._kill_at = self._monotonic() + self._patience
            for child in self.children:
                child.start_at = None

    def restart(self) -> None:
        """Stop all children and start them afresh: the code has changed. From any thread."""
        self._restart = True
        with contextlib.suppress(OSError):  # full: it wakes up anyhow; closed: it has ended
            self._ring.send(b"r")

    def counts(self) -> dict[str, float]:
        """What the children say they have done, added up; "work" is what they have in work now."""
        total = dict(self._past)
        for child in self.children:
            for name, count in child.counts.items():
                total[name] = total.get(name, 0) + count
        return total

    def heard(self, child: Child, line: str) -> None:
        """A child said something."""
        if line == "ready":
            child.ready_at = self._monotonic()
            if self._recycling is child:
                self._recycling = None
            if child.crashes:
                log.info("%s is up again", child.name)
        elif line == "failed":
            child.failed = True
        elif line == "recycle":
            child.asks = True
        elif line.startswith("{"):
            child.counts = json.loads(line)

    # Children come and go.

    def _start(self, child: Child, now: float) -> None:
        child.start_at = child.ready_at = None
        child.failed = child.asks = child.changing = False
        child.heard = b""
        child.began = now
        child.process, child.line = self._spawn(child.number)
        if child.line is not None:
            child.line.setblocking(False)
            self._selector.register(child.line, selectors.EVENT_READ, child)

    def _ended(self, child: Child, code: int, now: float) -> None:
        name, lived, ready = child.name, now - child.began, child.ready_at
        if child.line is not None:
            self._listen(child)  # its last words
        self._hang_up(child)
        child.process = None
        child.counts.pop("work", None)
        for outcome, count in child.counts.items():
            self._past[outcome] = self._past.get(outcome, 0) + count
        child.counts = {}
        if self.stopping:
            if code not in (0, RECYCLE) and (ready is not None or code > 128):  # else it had not begun anything
                self.status = self.status or (code if code > 0 else 1)
                log.error("%s ended with %s", name, outcome_of(code))
        elif child.changing:
            child.start_at = now
        elif code == 0 and self._drain:
            log.info("%s has nothing left to do", name)
        elif code == RECYCLE and ready is not None:
            log.warning("%s made way for another after %.0f s", name, lived)
            child.start_at = now
        else:
            self._crashed(child, name, code, now, lived)

    def _crashed(self, child: Child, name: str, code: int, now: float, lived: float) -> None:
        if self._recycling is child:
            self._recycling = None
        if lived >= STEADY:
            child.crashes = 0
        child.crashes += 1
        at_start = child.ready_at is None or (child.failed and now - child.ready_at < YOUNG)
        child.stillborn = child.stillborn + 1 if at_start else 0
        what = f"{name} ended with {outcome_of(code)} after {lived:.1f} s"
        if self._reload:
            log.error("%s; it is started again when a file changes", what)
            child.start_at = float("inf")
            return
        if child.stillborn >= LIVES:
            log.error("%s, at its start, %d times in a row: giving up; its own lines above say why", what, LIVES)
            self.status = 1
            self.signal(signal.SIGTERM)
            return
        wait = min(BACKOFF[1], BACKOFF[0] * 2.0 ** min(child.crashes - 1, 20))
        child.start_at = now + wait
        log.error("%s; starting it again in %.1f s", what, wait)

    def _change(self) -> None:
        now = self._monotonic()
        for child in self.children:
            child.crashes = child.stillborn = 0
            if child.process is None:
                child.start_at = now
            else:
                child.changing = True
                self._send(child, signal.SIGTERM)

    def _take_turns(self) -> None:
        """Let at most one child at a time make way; its turn ends when the one after it is ready."""
        if self._recycling is not None or self.stopping:
            return
        for child in self.children:
            if child.asks and child.process is not None:
                self._recycling = child
                if child.line is not None:
                    try:
                        child.line.send(b"recycle\n")
                    except OSError:
                        log.debug("%s is gone already", child.name)
                return

    def _kill(self) -> None:
        for child in self.children:
            if child.process is not None:
                late = f"{child.name} did not stop within {self._patience:.0f} s and is killed"
                log.error("%s; what it had in work runs again", late)
                self.status = 1
                self._send(child, signal.SIGKILL)

    def _send(self, child: Child, number: int) -> None:
        if child.process is not None:
            try:
                child.process.send_signal(number)
            except OSError:
                log.debug("%s is gone already", child.name)

    # Lifelines.

    def _listen(self, child: Child) -> None:
        try:
            data = child.line.recv(65536) if child.line is not None else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # it is ending: `poll` will say how
            self._hang_up(child)
            return
        *lines, child.heard = (child.heard + data).split(b"\n")
        for line in lines:
            self.heard(child, line.decode(errors="replace"))

    def _hang_up(self, child: Child) -> None:
        if child.line is not None:
            self._selector.unregister(child.line)
            child.line.close()
            child.line = None


def outcome_of(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def spawner(command: Sequence[str]) -> Spawn:
    """Start children with this command; each gets `--child N` and `--lifeline FD`.

    They are processes started fresh, in process groups of their own: a terminal's Ctrl-C reaches the supervisor, which
    passes it on, and nobody counts it twice.
    """

    def spawn(number: int) -> tuple[Process, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, "--child", str(number), "--lifeline", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        return process, ours

    return spawn


class Lifeline:
    """A child's end: it hears when its supervisor is gone, and when its turn to recycle has come."""

    def __init__(self, fd: int, lost: Callable[[], Any]) -> None:
        os.set_inheritable(fd, False)  # what a handler starts is not to hold it
        self.turn = threading.Event()
        self._lost = lost
        self._asked = False
        self._socket = socket.socket(fileno=fd)
        self.thread = threading.Thread(target=self._listen, name="barnabas-lifeline", daemon=True)
        self.thread.start()

    def say(self, line: str) -> None:
        """Tell the supervisor; without waiting, should it be stopped."""
        try:
            self._socket.send(line.encode() + b"\n", socket.MSG_DONTWAIT)
        except OSError:
            log.debug("the supervisor does not listen")

    def may_recycle(self) -> bool:
        """Ask once for leave to end; whether it was given."""
        if not self._asked:
            self._asked = True
            self.say("recycle")
        return self.turn.is_set()

    def _listen(self) -> None:
        try:
            while data := self._socket.recv(4096):
                if b"recycle" in data:
                    self.turn.set()
        except OSError:
            log.debug("the lifeline broke")
        self._socket.close()
        self._lost()
