"""The app of limits_room in three processes, of which one's clock is a minute ahead, and one's a minute behind."""

import os
import time
from contextlib import suppress

from limits_room import FOLDER, app

from barnabas.clock import Clock

for skew in (60, -60, 0):
    with suppress(FileExistsError):
        os.close(os.open(FOLDER / f"skew{skew}", os.O_CREAT | os.O_EXCL))
        break
real = time.time
time.time = lambda: real() + skew
Clock.now = staticmethod(time.time)  # type: ignore[method-assign]

__all__ = ["app"]
