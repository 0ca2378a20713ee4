"""The app of the kill tests of batches. A witness: jobs write lines into a file, and a callback looks in it for the lines of all
jobs of its batch, whose description says which those are: their family, their number."""

import os
import time
from pathlib import Path

from barnabas import App, Reject, RetryAfter
from barnabas.backends import redis_life
from barnabas.jobs import batch

for name, value in (pair.split("=") for pair in os.environ.get("KILL_TIMES", "").split()):
    setattr(redis_life, name, float(value) if "." in value else int(value))
batch.LOOK = 1.0
app = App("room", events="memory:", threads=4, coroutines=4, stop_timeout=5.0, session_timeout=4.0)
FOLDER = Path(os.environ["KILL_FOLDER"])
WITNESS = os.open(FOLDER / "witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
INSIDE = 7  # jobs of a batch made by a job


def note(text: str) -> None:
    os.write(WITNESS, f"{text}\n".encode())


def work(family: str, n: int) -> None:
    """Of a batch of 100: one makes a batch inside, some add to their own, fail at first, or die."""
    mine = app.current_batch()
    if n == 11:
        with app.batch(on_complete=ended, on_success=ended.options(tags=["s"]), description=f"{family}.{n} {INSIDE}") as inside:
            inside.enqueue_many(step, [(f"{family}.{n}", each) for each in range(INSIDE)])
    if n % 25 == 13:
        mine.enqueue(step, family, 1000 + n)
    if n % 20 == 5 and time.time_ns() // 1000 % 2:
        raise RetryAfter(0.2)
    time.sleep(0.001)
    note(f"ran {family} {n}")
    if n == 17 and family.endswith("3"):
        raise Reject("to the dead")


@app.job
async def step(family: str, n: int) -> None:
    """A job of a batch that jobs made or added to."""
    note(f"ran {family} {n}")


work = app.job(work)


@app.job
def ended(id: str) -> None:
    """A callback."""
    family, count = app.batch_status(id).description.split()
    wanted = {*range(int(count)), *((1013, 1038, 1063, 1088) if int(count) == 100 else ())}
    lines = (line.split() for line in (FOLDER / "witness").read_text().splitlines())
    missing = wanted - {int(line[2]) for line in lines if line[:2] == ["ran", family]}
    note(f"ended {family} {id} {','.join(map(str, sorted(missing))) or '-'}")


@app.job
def death(id: str) -> None:
    """Another."""
    note(f"death {app.batch_status(id).description.split()[0]} {id} -")
