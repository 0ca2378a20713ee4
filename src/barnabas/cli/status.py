"""How a run is getting on: a line that is drawn over on a terminal, now and then a log line elsewhere."""

import logging
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from barnabas.worker import Worker

log = logging.getLogger("barnabas")
SELDOM = 10.0  # seconds between log lines


def counts(worker: Worker) -> dict[str, float]:
    """What a worker has done since its start: "done", "again", "dead", ...; "work": what it has in work now."""
    found: dict[str, float] = {}
    for (_, outcome), count in worker.app.observers.counts.copy().items():
        name = "again" if outcome == "retry topic" else outcome
        found[name] = found.get(name, 0) + count
    runs = (run for runner in worker.runners for crew in runner.crews for run in crew.current)
    found["work"] = sum(len(run.rows) for run in runs if run is not None)
    return found


class Status:
    """Shows counts as they come, about once a second."""

    def __init__(self, stream: TextIO | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._monotonic = monotonic
        self.began = self._at = self._logged_at = monotonic()
        self._done = 0.0
        self._logged: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def __call__(self, found: dict[str, float]) -> None:
        """Show these."""
        now = self._monotonic()
        self.last = found
        if self._terminal:
            text = line(found, (found.get("done", 0) - self._done) / max(1e-3, now - self._at), now - self.began)
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text[:width]}\r")
            self._stream.flush()
            self._done, self._at = found.get("done", 0), now
        elif now - self._logged_at >= SELDOM:
            if found != self._logged:
                rate = (found.get("done", 0) - self._logged.get("done", 0)) / (now - self._logged_at)
                log.info("%s", line(found, rate, now - self.began))
            self._logged, self._logged_at = dict(found), now

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def summary(self) -> str:
        """What was done altogether."""
        seconds = self._monotonic() - self.began
        return line({**self.last, "work": 0}, self.last.get("done", 0) / max(1e-3, seconds), seconds)


def line(found: dict[str, float], rate: float, seconds: float) -> str:
    """The counts in words; `rate` is done per second."""
    parts = [f"{found.get('done', 0):,.0f} done ({rate:,.0f}/s)"]
    if found.get("work"):
        parts.append(f"{found['work']:,.0f} in work")
    names = (("again", "retries"), ("dead", "dead"), ("skipped", "skipped"), ("dropped", "dropped"))
    parts += [f"{found[name]:,.0f} {word}" for name, word in names if found.get(name)]
    return " · ".join([*parts, f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"])
