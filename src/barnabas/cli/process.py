"""One worker process from its start to its end: signals, drain, recycling, status."""

import atexit
import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from barnabas.app import App
from barnabas.cli import draw
from barnabas.errors import BackendError, BarnabasError, Replaced, SettingError, told
from barnabas.supervisor import STOPS, Lifeline
from barnabas.worker import RECYCLE, Worker, memory

log = logging.getLogger("barnabas")
Tell = Callable[[dict[str, int]], None]  # gets the counts, about once a second
DRAINING, TICK = 0.05, 0.25  # seconds between looks at the worker: looking is most of what an idle process costs
ANEW = -1  # not an exit status: another file was put in the place of ours
SELDOM = 10.0  # seconds between log lines that say how a run is getting on
HURRY = 2.0  # seconds a process that hangs gives to what does not


class Stopper:
    """The signals of a worker process: the first asks for a stop, a SIGINT after it ends the process at once; a SIGTSTP
    makes it quiet.

    Nothing is lost by that either: what is not settled will be delivered again.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()  # a bare one: an Event's own may be in the hand of whom the signal interrupts
        self._gate.acquire()
        self.quiet, self.name, self.came = False, "", list[int]()

    def asked(self, number: int, frame: FrameType | None = None) -> None:
        """A signal came."""
        self.came.append(number)
        if number == signal.SIGTSTP:
            self.quiet = True
        elif not self.name:
            self.name = signal.Signals(number).name
            if self._gate.locked():  # two signals at once come one inside the other
                self._gate.release()
        elif number == signal.SIGINT:
            os._exit(128 + number)

    def wait(self, seconds: float) -> bool:
        """Wait so long for a stop; whether it was asked for."""
        return bool(self.name) or self._gate.acquire(timeout=seconds)

    def install(self) -> None:
        """Listen from now on; a signal that is ignored (nohup) stays so."""
        for number in (*STOPS, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.asked)
            # The interpreter's end brings back what is usual: a SIGTSTP would suspend what is about to end, for good.
            atexit.register(signal.signal, number, signal.SIG_IGN)


def serve(worker: Worker, stopper: Stopper, tell: Tell, drain: bool, lifeline: Lifeline | None) -> int:
    """Run a worker until it is asked to stop, drained, failed, hanging or too large; returns the exit status of its process, or
    ANEW.

    Raises SettingError if `max_memory` is less than what the app uses before its first message.
    """
    say: Callable[[str], None] = lifeline.say if lifeline is not None else lambda word: None
    most = worker.app.settings.max_memory
    if 0 < most < (used := memory()):  # it would make way again and again
        sizes = f"max_memory is {draw.size(most)}, but this app uses {draw.size(used)} before its first message"
        raise SettingError(f"{sizes}; give it more, or 0 for no limit")
    try:
        worker.start()
    except Exception as wrong:  # of a hook, a set_up or a class; ours are shown by whoever called
        if isinstance(wrong, BarnabasError):
            raise
        log.error("the start failed: %s", told(wrong), exc_info=wrong)
        return 1
    _tune()
    say("ready")
    why = _wait(worker, stopper, tell, drain, lifeline)
    if why == "stop":
        timeout = worker.app.settings.stop_timeout
        log.info("%s: finishing what is in work, within %.0f s (a second Ctrl-C ends at once)", stopper.name, timeout)
    held = worker.stop(HURRY if why == "hangs" else None)
    tell(worker.counts())
    if why == "hangs":  # in order, or what else is in work would count as in work at a crash
        end_now(worker.app, RECYCLE)
    for text in held:
        log.error("the stop was held up by %s\nit is given back and will run again", text.rstrip())
    error = worker.failed()
    if isinstance(error, Replaced) and why == "failed" and not held:
        log.warning("%s: this process starts anew with that one", error)
        return ANEW
    if error is not None:
        shown = None if isinstance(error, BarnabasError) else error
        log.error("this process ends: %s", told(error) if shown else error, exc_info=shown)
        say("failed")
    if why == "drained":
        say("drained")
    status = 1 if error is not None else RECYCLE if why == "large" else 0
    if held:  # the interpreter would wait for their threads
        end_now(worker.app, status)
    return status


def _wait(worker: Worker, stopper: Stopper, tell: Tell, drain: bool, lifeline: Lifeline | None) -> str:
    """Why the worker is to end: "stop", "failed", "hangs", "large" (it uses too much memory) or "drained"."""
    told, said = time.monotonic(), not drain
    most, large = worker.app.settings.max_memory, False
    while not stopper.wait(DRAINING if drain else TICK):
        if worker.failed() is not None:
            return "failed"
        if (large or worker.recycling is not None) and (lifeline is None or lifeline.may_recycle()):
            return "hangs" if worker.recycling is not None else "large"
        if stopper.quiet:
            worker.hush("SIGTSTP")
        if most and not large and time.monotonic() >= told + 1.0 and (used := memory()) > most:
            large = True
            sizes = f"{draw.size(used)}, over max_memory ({draw.size(most)})"
            log.warning("this process uses %s: it finishes what is in work and makes way for another", sizes)
        with contextlib.suppress(BackendError):  # away for a while: the runners say so, and go on when it is back
            if drain and worker.drained():
                return "drained"
            if worker.paused and not said:
                said = True
                log.info("--drain does not end while there is work for what is paused: %s", ", ".join(worker.paused))
            if time.monotonic() >= told + 1.0:
                told = time.monotonic()
                tell(worker.counts())
                asked = worker.obey()
                if asked == "stop":
                    stopper.name = "stopped by an operator"
                    if lifeline is not None:
                        lifeline.say("stopped")
                    return asked
                if asked == "quiet":
                    worker.hush("asked by an operator")
                info = worker.report()
                for home in worker.homes:
                    home.report(info)
    return "stop"


def _tune() -> None:
    """Handlers that compute let go of the interpreter sooner, and what was loaded is no garbage to look for."""
    sys.setswitchinterval(0.001)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def end_now(app: App, status: int) -> None:
    """End a process in which a handler hangs; what is sent is flushed first."""
    with contextlib.suppress(BarnabasError):
        app.close()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# How a run is getting on.


class Status:
    """Shows counts as they come, about once a second: as a line that is drawn over on a terminal, now and then as a log line
    elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = self._at = time.monotonic()
        self._shown: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def __call__(self, found: dict[str, int]) -> None:
        """Show these."""
        self._last = found
        seconds = time.monotonic() - self._at
        if not self._terminal and (seconds < SELDOM or found == self._shown):
            return
        done = found.get("done", 0) - self._shown.get("done", 0)
        text = _line(found, done / max(1e-3, seconds), self._at + seconds - self._began)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="\r", file=sys.stderr, flush=True)
        else:
            log.info("%s", text)
        self._shown, self._at = dict(found), self._at + seconds

    def conclude(self) -> None:
        """Say what was done altogether, and leave the terminal's line empty."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        seconds = time.monotonic() - self._began
        log.info("%s", _line(self._last | {"work": 0}, self._last.get("done", 0) / max(1e-3, seconds), seconds))


def _line(found: dict[str, int], rate: float, seconds: float) -> str:
    """The counts in words; `rate` is done per second."""
    parts = [f"{found.get('done', 0):,.0f} done ({rate:,.0f}/s)"]
    if found.get("work"):
        parts.append(f"{found['work']:,.0f} in work")
    names = {"again": "retries", "unseen": "failed sends"} | {name: name for name in ("dead", "skipped", "dropped", "overtaken")}
    parts += [f"{found[name]:,.0f} {word}" for name, word in names.items() if found.get(name)]
    return " · ".join([*parts, f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"])
