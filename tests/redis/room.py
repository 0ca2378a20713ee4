"""The app of the kill tests: jobs of every kind, each of which leaves a line in a file that nobody can settle away."""

import asyncio
import os
import random
import time

from barnabas import App, RetryAfter

app = App("room", events="memory:", queues=["notes", "tasks"], stop_timeout=5.0)
WITNESS = os.open(f"{os.environ['KILL_FOLDER']}/witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def ran(n: int) -> None:
    os.write(WITNESS, b"%d %d\n" % (n, os.getpid()))


def fail_at_times(n: int) -> None:
    if n % 50 == 7 and random.random() < 0.7:
        raise RetryAfter(0.2)


@app.job(queue="notes")
def note(n: int) -> None:
    """Short ones, claimed many at a time."""
    fail_at_times(n)
    if n % 20 == 0:
        time.sleep(0.02)
    ran(n)


@app.job(queue="tasks")
async def task(n: int) -> None:
    """Async ones."""
    fail_at_times(n)
    await asyncio.sleep(0.005)
    ran(n)
