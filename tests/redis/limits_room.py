"""The app of the kill tests of limits. An outside witness sees that they hold: each run locks one of so many files, which the
system frees with the process, and writes down if it found none; each start is written down with the machine's time."""

import fcntl
import os
import time

from unique_room import FOLDER, WITNESS, app

from barnabas import Concurrent, Rate, RetryAfter


def among(kind: str, most: int, n: int, seconds: float) -> None:
    for place in range(most):
        file = os.open(FOLDER / f"{kind}-{place}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        time.sleep(seconds)
        os.write(WITNESS, b"ran %d %d -\n" % (n, os.getpid()))
        os.close(file)
        return
    os.write(WITNESS, b"met %d %d %s\n" % (n, os.getpid(), kind.encode()))


@app.job(limit=[Concurrent(3, by="kind"), Concurrent(8, name="all")])
def call(n: int, kind: str) -> None:
    """Three of a kind at once, and eight in all."""
    if n % 40 == 7 and time.time_ns() // 1000 % 2:
        raise RetryAfter(0.2)
    among(f"kind-{kind}", 3, n, 0.3 if n % 50 == 11 else 0.004)


@app.job(limit=Rate(8, per=1.0, by="kind"))
def rated(n: int, kind: str) -> None:
    """Eight of a kind in a second."""
    os.write(WITNESS, b"rated %d %.6f %s\n" % (n, time.monotonic(), kind.encode()))
    time.sleep(0.3 if n % 30 == 11 else 0.002)


@app.job
def byhand(n: int, kind: str) -> None:
    """Two at once, and six in a second, by hand."""
    with app.limiter("door", Concurrent(2)), app.limiter("pace", Rate(6, per=1.0)):
        os.write(WITNESS, b"rated %d %.6f hand\n" % (n, time.monotonic()))
        among("hand", 2, n, 0.02)
