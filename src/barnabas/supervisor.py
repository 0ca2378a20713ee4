"""Several worker processes under one: started fresh, restarted with back-off, stopped together.

The supervisor opens no backend and runs no user code but what importing the app does. Each child holds one end of a
socket, the lifeline: its end of file tells a child that the supervisor is gone, however it went, and the child stops as if
asked to. A child says "ready" (its sources are open), why it ends ("failed": of an error it has reported; "drained";
"stopped" by an operator), "recycle" (it wants to make way: a handler hangs, or it uses too much memory) and its counts; the
supervisor answers "recycle" when it is that child's turn.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from barnabas.worker import RECYCLE

log = logging.getLogger("barnabas")
BACKOFF = (0.1, 30.0)  # seconds before a restart: the first, and the most
STEADY = 30.0  # seconds of life after which a child's earlier crashes are forgotten
YOUNG = 1.0  # a child that fails within so many seconds of being ready has failed at its start
LIVES = 5  # starts in a row that may fail
GRACE = 10.0  # seconds beyond stop_timeout after which a child that was asked to stop is killed
TICK = 0.05  # seconds between looks at the children
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORWARDED = (*STOPS, signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2)
NEVER = float("inf")

Spawn = Callable[[int], tuple["subprocess.Popen[bytes]", socket.socket]]


class Child:
    """One place among the children, and the process that fills it at present."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.line: socket.socket | None = None
        self.heard = b""  # the beginning of a line
        self.began = 0.0
        self.ready_at: float | None = None
        self.asks = False
        self.word = ""  # why it says that it ends
        self.changing = False  # it was stopped to be started again
        self.crashes = 0  # in a row
        self.begun = False  # whether it was ever ready
        self.stillborn = 0  # failed starts in a row
        self.start_at: float | None = 0.0  # None: it is not to be started
        self.counts: dict[str, int] = {}

    @property
    def name(self) -> str:
        """How log lines call it."""
        return f"process {self.number}" + (f" (pid {self.process.pid})" if self.process is not None else "")

    def send(self, number: int) -> None:
        """Send it a signal, if it lives (Popen knows, and then does nothing)."""
        if self.process is not None:
            self.process.send_signal(number)

    def hang_up(self) -> None:
        """Let go of the lifeline: a child that still lives stops by that."""
        if self.line is not None:
            self.line.close()
            self.line = None


class Supervisor:
    """Keeps `count` children alive until they are drained or it is told to stop; `run` returns its exit status.

    spawn: starts the child of a number (from 1).
    reload: a child that fails is left alone until `restart`. patience: seconds a stop may take before it is a kill.
    tell: gets the children's counts, added up, once a second.
    """

    def __init__(
        self, spawn: Spawn, count: int, *, reload: bool = False, patience: float = 35.0,
        tell: Callable[[dict[str, int]], None] = lambda counts: None, monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.children = [Child(number) for number in range(1, count + 1)]
        self.stopping = False
        self.status = 0
        self._spawn, self._reload, self._patience = spawn, reload, patience
        self._tell, self._monotonic = tell, monotonic
        self._kill_at = NEVER
        self._recycling: Child | None = None
        self._past = Counter[str]()  # counts of processes that have ended
        self._told = 0.0
        self._restart = self._quiet = False
        self._signalled: list[int] = []

    def run(self, came: Iterable[int] = ()) -> int:
        """Supervise until all children have ended for good. came: signals that others have heard before."""
        before = {number: signal.getsignal(number) for number in FORWARDED}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup
                # A handler may interrupt anything, also the start of a child: what it means waits for the next step.
                signal.signal(number, lambda number, frame: self._signalled.append(number))
        self._signalled[:0] = came
        try:
            while self.alive():
                self.step()
                time.sleep(TICK)
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.status

    def close(self) -> None:
        """Let go of all children."""
        for child in self.children:
            child.hang_up()

    def alive(self) -> bool:
        """Whether a child lives or is to be started."""
        return any(child.process is not None or child.start_at is not None for child in self.children)

    def step(self) -> None:
        """Look after every child once."""
        now = self._monotonic()
        while self._signalled:
            self.signal(self._signalled.pop(0))
        for child in self.children:
            code = child.process.poll() if child.process is not None else None
            self._listen(child)
            if code is not None:
                self._ended(child, code, now)
        if self._restart and not self.stopping:
            self._restart = False
            self._change(now)
        for child in self.children:
            if child.process is None and child.start_at is not None and now >= child.start_at:
                self._start(child, now)
        self._take_turns()
        if now >= self._kill_at:
            self._kill_at = NEVER
            self._kill()
        if now >= self._told + 1.0:
            self._told = now
            self._tell(self.counts())

    def signal(self, number: int) -> None:
        """Pass a signal on to the children; those that end a process begin the stop: nobody is started any more."""
        first = not self.stopping
        self._quiet |= number == signal.SIGTSTP
        if first and number in STOPS:
            self.stopping = True
            self._kill_at = self._monotonic() + self._patience
            for child in self.children:
                child.start_at = None
        for child in self.children:
            if number == signal.SIGTSTP and child.ready_at is None:  # it would be suspended; it hears of it when it is ready
                continue
            # A child that does not listen yet ends without a word by SIGTERM, with a KeyboardInterrupt by SIGINT.
            early = first and child.ready_at is None and number == signal.SIGINT
            child.send(signal.SIGTERM if early else number)

    def restart(self) -> None:
        """Stop all children and start them afresh: the code has changed. From any thread."""
        self._restart = True

    def counts(self) -> dict[str, int]:
        """What the children say they have done, added up; "work" is what they have in work now."""
        total = Counter(self._past)
        for child in self.children:
            total.update(child.counts)
        return total

    def heard(self, child: Child, line: str) -> None:
        """A child said something."""
        if line == "ready":
            child.begun, child.ready_at = True, self._monotonic()
            if self._quiet:
                child.send(signal.SIGTSTP)
            if self._recycling is child:
                self._recycling = None
            if child.crashes:
                log.info("%s is up again", child.name)
        elif line == "recycle":
            child.asks = True
        elif line in ("failed", "drained", "stopped"):
            child.word = line
        else:
            child.counts = json.loads(line)

    def _start(self, child: Child, now: float) -> None:
        child.start_at = child.ready_at = None
        child.asks = child.changing = False
        child.word = ""
        child.heard = b""
        child.began = now
        child.process, child.line = self._spawn(child.number)

    def _ended(self, child: Child, code: int, now: float) -> None:
        name, lived = child.name, now - child.began
        child.hang_up()
        child.process = None
        child.counts.pop("work", None)
        self._past.update(child.counts)
        child.counts = {}
        if self._recycling is child and code != RECYCLE:
            self._recycling = None
        if self.stopping:
            if code not in (0, RECYCLE) and (child.ready_at is not None or code > 128):  # else it had not begun anything
                self.status = self.status or (code if code > 0 else 1)
                log.error("%s ended with %s", name, outcome_of(code))
        elif child.changing:
            child.start_at = now
        elif child.word == "stopped" and code == 0:
            log.info("%s was stopped by an operator; it is not started again", name)
        elif child.word == "drained" and code == 0:  # (a handler's os._exit(0) says nothing)
            log.info("%s has nothing left to do", name)
        elif code == RECYCLE and child.ready_at is not None:
            log.warning("%s made way for another after %.0f s", name, lived)
            child.start_at = now
        else:
            self._crashed(child, f"{name} ended with {outcome_of(code)} after {lived:.1f} s", now)

    def _crashed(self, child: Child, what: str, now: float) -> None:
        child.crashes = 1 if now - child.began >= STEADY else child.crashes + 1
        # A place that could begin once will again: the disk is full, a broker is away.
        at_start = not child.begun if child.ready_at is None else child.word == "failed" and now - child.ready_at < YOUNG
        child.stillborn = child.stillborn + 1 if at_start else 0
        if self._reload:
            log.error("%s; it is started again when a file changes", what)
            child.start_at = NEVER
        elif child.stillborn >= LIVES:
            log.error("%s, at its start, %d times in a row: giving up; its own lines above say why", what, LIVES)
            self.status = 1
            self.signal(signal.SIGTERM)
        else:
            wait = min(BACKOFF[1], BACKOFF[0] * 2.0 ** min(child.crashes - 1, 20))
            log.error("%s; starting it again in %.1f s", what, wait)
            child.start_at = now + wait

    def _change(self, now: float) -> None:
        for child in self.children:
            child.crashes = 0
            if child.process is None:
                child.start_at = now
            else:
                child.changing = True
                child.send(signal.SIGTERM)

    def _take_turns(self) -> None:
        """Let at most one child at a time make way; its turn ends when the one after it is ready."""
        for child in self.children:
            if child.asks and child.line is not None and self._recycling is None and not self.stopping:
                self._recycling = child
                with contextlib.suppress(OSError):  # it is gone already
                    child.line.send(b"recycle\n")

    def _kill(self) -> None:
        for child in self.children:
            if child.process is not None:
                late = f"{child.name} did not stop within {self._patience:.0f} s and is killed"
                log.error("%s; what it had in work runs again", late)
                self.status = 1
                child.send(signal.SIGKILL)

    def _listen(self, child: Child) -> None:
        try:
            data = child.line.recv(65536, socket.MSG_DONTWAIT) if child.line is not None else b""
        except OSError:  # it has nothing to say, or is ending: `poll` will say how
            return
        *lines, child.heard = (child.heard + data).split(b"\n")
        for line in lines:
            self.heard(child, line.decode(errors="replace"))


def outcome_of(code: int) -> str:
    """An exit status in words."""
    return f"status {code}" if code >= 0 else {-s: s.name for s in signal.Signals}.get(code, f"signal {-code}")


def spawner(command: Sequence[str]) -> Spawn:
    """Start children with this command; each gets `--child N` and `--lifeline FD`.

    They are processes started fresh, in process groups of their own: a terminal's Ctrl-C reaches the supervisor, which
    passes it on, and nobody counts it twice.
    """

    def spawn(number: int) -> tuple["subprocess.Popen[bytes]", socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            words = [*command, "--child", str(number), "--lifeline", str(theirs.fileno())]
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0), ours

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
        with contextlib.suppress(OSError):  # it is gone
            self._socket.send(line.encode() + b"\n", socket.MSG_DONTWAIT)

    def may_recycle(self) -> bool:
        """Ask once for leave to end; whether it was given."""
        if not self._asked:
            self._asked = True
            self.say("recycle")
        return self.turn.is_set()

    def _listen(self) -> None:
        with self._socket, contextlib.suppress(OSError):
            while self._socket.recv(4096):  # there is only one thing to say
                self.turn.set()
        self._lost()
