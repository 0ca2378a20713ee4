"""Time is a parameter: whoever needs the time is handed a clock."""

import time

from barnabas.errors import must


class Clock:
    """The real time: `now()` in epoch seconds, `monotonic()` in seconds since some start."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class FakeClock(Clock):
    """A clock for tests that moves only by `advance(seconds)`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now
        self.now = self.monotonic = self._read

    def _read(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, 0 or more."""
        must(seconds >= 0, "clock.advance", "seconds", seconds, "time does not go back")
        self._now += seconds
