"""The app of the kill tests of unique jobs. An outside witness sees that two of a kind never run at once: each run locks a
file of its kind, which the system frees with the process, and writes down whom it met there."""

import fcntl
import os
import time
from pathlib import Path

from barnabas import App, RetryAfter, until_executed, while_executing
from barnabas.backends import redis_life

for name, value in (pair.split("=") for pair in os.environ.get("KILL_TIMES", "").split()):
    setattr(redis_life, name, float(value) if "." in value else int(value))
app = App("room", events="memory:", threads=4, coroutines=4, stop_timeout=5.0, session_timeout=4.0)
FOLDER = Path(os.environ["KILL_FOLDER"])
WITNESS = os.open(FOLDER / "witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def alone(kind: str, n: int, seconds: float) -> None:
    file = os.open(FOLDER / f"kind-{kind}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(WITNESS, b"met %d %d %s\n" % (n, os.getpid(), os.pread(file, 20, 0).strip() or b"0"))
        os.close(file)
        return
    os.pwrite(file, b"%-20d" % os.getpid(), 0)
    time.sleep(seconds)
    os.write(WITNESS, b"ran %d %d -\n" % (n, os.getpid()))
    os.close(file)


@app.job(unique=while_executing(by="kind"))
def charge(n: int, kind: str) -> None:
    """One of a kind at work."""
    if n % 40 == 7 and time.time_ns() // 1000 % 2:
        raise RetryAfter(0.2)
    alone(kind, n, 0.3 if n % 50 == 11 else 0.004)


@app.job(unique=until_executed(by="n"))
def once(n: int) -> None:
    """One of a kind from its enqueueing on."""
    alone(f"once-{n}", n, 0.01)


@app.job(unique=while_executing(by="kind"))
def doze(n: int, kind: str) -> None:
    """It ends by itself long after its lock would."""
    time.sleep(60)
