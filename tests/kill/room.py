"""The app that the kill tests run, every way a message can take; as a script, a sender that is killed as well."""

import asyncio
import os
import sys

import msgspec

from barnabas import App, Delivery, Retry

app = App("kill", session_timeout=3.0)
KEYS = 50


class Item(msgspec.Struct):
    id: int
    key: str


items = app.topic("items", Item, key="key", partitions=6)
steps = app.topic("steps", Item, key="key", partitions=6)
seen = app.topic("seen", Item, key="key", partitions=6)
counts = app.table("counts", int)
sums = app.table("sums", int)


@app.consumer(items, name="step", responds=[steps], tables=[counts], retry=Retry(20, backoff=0.01))
def step(item: Item, delivery: Delivery[Item]) -> Item:
    """Partition order; every 97th fails at first."""
    if item.id % 97 == 0 and delivery.attempt == 1:
        raise RuntimeError("fails once")
    counts[item.key] = counts.get(item.key, 0) + 1
    if item.id % 10 == 0:
        note.enqueue(item.id)
    return item


@app.consumer(steps, name="total", tables=[sums], concurrency=20, retry=Retry(20, backoff=0.01), responds=[seen])
async def total(item: Item, delivery: Delivery[Item]) -> Item:
    """Order per key, twenty at once."""
    if item.id % 5 == 0:
        await asyncio.sleep(0.001)
    if item.id % 89 == 0 and delivery.attempt == 1:
        raise RuntimeError("fails once")
    sums[item.key] = sums.get(item.key, 0) + item.id
    return item


@app.consumer(steps, name="batches")
def batches(items: list[Item]) -> None:
    """Batches of a partition; one with poison in it kills its process."""
    if any(item.key == "poison" for item in items):
        os._exit(9)


@app.job(queue="notes")
def note(id: int) -> None:
    """A job a tenth message."""


def load(app: App, n: int) -> object:
    """A thousand items before each kill."""
    return items.send_many(Item(i, f"k{i % KEYS}") for i in range(n * 1000, n * 1000 + 1000))


def send(url: str, number: int, acks: str) -> None:
    """Send what is this sender's, one by one, and write down what is durable: "i" an item, "j" a job, and its id."""
    fd = os.open(acks, os.O_WRONLY | os.O_APPEND)
    app.settings = app.settings.override(events=url, jobs=url)
    for i in range(number * 20_000, number * 20_000 + 20_000):
        future = items.send(Item(i, f"k{i % KEYS}"))
        future.add_done_callback(lambda future, i=i: future.result() and os.write(fd, b"i%d\n" % i))
        if i % 10 == 0:
            note.enqueue(i).add_done_callback(lambda future: os.write(fd, f"j{future.result()}\n".encode()))
            future.result(60)


if __name__ == "__main__":
    send(sys.argv[1], int(sys.argv[2]), sys.argv[3])
