"""The app that the kill tests run: every way a message can take, and witnesses that nobody can talk out of it.

Each handling appends a line to a file (one write, so it survives any kill); what is stored is checked against it.
"""

import asyncio
import os
from pathlib import Path

import msgspec

from barnabas import App, Delivery, Retry

ROOM = Path(os.environ["KILL_ROOM"])
app = App("kill", events=f"sqlite:///{ROOM}/kill.db", jobs=f"sqlite:///{ROOM}/kill.db", session_timeout=3.0)


class Item(msgspec.Struct):
    id: int
    key: str


items = app.topic("items", Item, key="key", partitions=6)
steps = app.topic("steps", Item, key="key", partitions=6)
seen = app.topic("seen", Item, key="key", partitions=6)
counts = app.table("counts", int)
sums = app.table("sums", int)
_fd: dict[str, int] = {}


def witness(name: str, line: str) -> None:
    if name not in _fd:
        _fd[name] = os.open(ROOM / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(_fd[name], f"{line}\n".encode())


@app.consumer(items, responds=[steps], tables=[counts], retry=Retry(20, backoff=0.01))
def step(item: Item, delivery: Delivery[Item]) -> Item:
    """Partition order; every 97th fails at first."""
    if item.id % 97 == 0 and delivery.attempt == 1:
        raise RuntimeError("fails once")
    witness("step", f"{item.key} {item.id}")
    counts[item.key] = counts.get(item.key, 0) + 1
    if item.id % 10 == 0:
        note.enqueue(item.id)
    return item


@app.consumer(steps, tables=[sums], concurrency=20, retry=Retry(20, backoff=0.01), responds=[seen])
async def total(item: Item, delivery: Delivery[Item]) -> Item:
    """Order per key, twenty at once."""
    if item.id % 5 == 0:
        await asyncio.sleep(0.001)
    if item.id % 89 == 0 and delivery.attempt == 1:
        raise RuntimeError("fails once")
    witness("total", f"{item.key} {item.id}")
    sums[item.key] = sums.get(item.key, 0) + item.id
    return item


@app.job(queue="notes")
def note(id: int) -> None:
    witness("note", str(id))
