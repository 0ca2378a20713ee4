"""The app of the kill test of what jobs can beyond Sidekiq's: whatever runs leaves a line in a file that nobody settles away."""

import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from barnabas import App, RetryAfter, steps, until_executed
from barnabas.backends import redis_life
from barnabas.jobs import steps as _steps
from barnabas.jobs.beyond import End

for name, value in (pair.split("=") for pair in os.environ.get("KILL_TIMES", "").split()):
    setattr(redis_life, name, float(value) if "." in value else int(value))
_steps.SAVE = 0.2
times = {"stop_timeout": 5.0, "session_timeout": 4.0, "send_timeout": 120.0}
app = App("room", events="memory:", threads=6, coroutines=6, unknown="wait", **times)
FOLDER = Path(os.environ["KILL_FOLDER"])
WITNESS = os.open(FOLDER / "witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def say(what: str, *numbers: float) -> None:
    os.write(WITNESS, f"{what} {' '.join(map(str, numbers))}\n".encode())


@app.job
def first(n: int) -> int:
    return n + 1


@app.job
async def second(n: int) -> int:
    if n % 20 == 3 and time.time_ns() // 1000 % 2:
        raise RetryAfter(0.2)
    return n + 1


@app.job(result_ttl=86400)
def third(n: int) -> int:
    say("chain", n)
    return n


@app.job
def index(page: int, version: int) -> None:
    say("index", page, version)


@app.job(unique=until_executed(by="page", on_conflict="replace"))
def replace(page: int, version: int) -> None:
    say("replace", page, version)


if "KILL_TIMES" not in os.environ or (FOLDER / "deployed").exists():  # a worker knows it only if it began after the deploy

    @app.job(tags=["rare"])
    def rare(n: int) -> None:
        say("rare", n)


LOOK, admit = threading.local(), End.admit


def look(end: End) -> None:
    """When a job is let in; on a busy machine it may begin a second later."""
    LOOK.at = time.time()
    admit(end)


End.admit = look  # type: ignore[method-assign]


@app.job(expires_in=2)
def alarm(n: int, until: float) -> None:
    say("alarm", n, LOOK.at - until)


@app.job
def child(walk: int, item: int) -> None:
    say("child", walk, item)


def stroll(walk: int, item: int) -> None:
    say("step", walk, item)
    if item % 10 == 0:
        child.enqueue(walk, item)
    if item == 77 and time.time_ns() // 1000 % 2:
        raise RetryAfter(0.2)


@app.job(retry=1000, max_runtime=1.0)
def walk(n: int, count: int) -> None:
    """Over what can be counted, slice by slice."""
    for item in steps(range(count)):
        time.sleep(0.004)
        stroll(n, item)


@app.job(retry=1000)
async def walk_awaited(n: int, count: int) -> None:
    """Over pages of a query, at one stretch."""
    import asyncio

    async def page(cursor: str | None) -> list[tuple[str, int]]:
        begin = 0 if cursor is None else int(cursor.removeprefix("row ")) + 1
        return [(f"row {item}", item) for item in range(begin, min(begin + 20, count))]

    async for item in steps(page, total=count):
        await asyncio.sleep(0.004)
        stroll(n, item)


@app.cron(every=timedelta(seconds=1), on_missed="all", overlap=True)
def tick(at: datetime) -> None:
    say("tick", round(at.timestamp()))


def lines(folder: Path) -> Iterator[tuple[str, tuple[float, ...]]]:
    """What was said: a word and its numbers."""
    for line in (folder / "witness").read_text().splitlines():
        what, *numbers = line.split()
        yield what, tuple(float(number) if "." in number or "e" in number else int(number) for number in numbers)
