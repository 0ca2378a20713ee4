"""How a run is getting on: a line that is drawn over on a terminal, now and then a log line elsewhere."""

import logging
import shutil
import sys
import time

log = logging.getLogger("barnabas")
SELDOM = 10.0  # seconds between log lines


class Status:
    """Shows counts as they come, about once a second."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = self._at = time.monotonic()
        self._shown: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __call__(self, found: dict[str, float]) -> None:
        """Show these."""
        self._last = found
        seconds = time.monotonic() - self._at
        if not self._terminal and (seconds < SELDOM or found == self._shown):
            return
        done = found.get("done", 0) - self._shown.get("done", 0)
        text = line(found, done / max(1e-3, seconds), self._at + seconds - self._began)
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
        log.info("%s", line(self._last | {"work": 0}, self._last.get("done", 0) / max(1e-3, seconds), seconds))


def line(found: dict[str, float], rate: float, seconds: float) -> str:
    """The counts in words; `rate` is done per second."""
    parts = [f"{found.get('done', 0):,.0f} done ({rate:,.0f}/s)"]
    if found.get("work"):
        parts.append(f"{found['work']:,.0f} in work")
    names = (("again", "retries"), ("dead", "dead"), ("skipped", "skipped"), ("dropped", "dropped"))
    parts += [f"{found[name]:,.0f} {word}" for name, word in names if found.get(name)]
    return " · ".join([*parts, f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"])
