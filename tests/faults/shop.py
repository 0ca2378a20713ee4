"""The app that the fault tests run: as workers (`barnabas run shop:app`), and as a sender (`python shop.py FIRST STEP PAD`)."""

import asyncio
import os
import signal
import sys
import time

import msgspec

from barnabas import App, Delivery, Retry
from barnabas.backends import sqlite
from barnabas.errors import BarnabasError

app = App("shop", session_timeout=2.0, send_timeout=1.0, buffer_messages=300, checkpoint_interval=0.02)
sqlite.ENOUGH = 1.0  # in place of 5
KEYS = 50
_said = os.open(os.environ["SHOP_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666) if "SHOP_WITNESS" in os.environ else -1


def say(*words: object) -> None:
    """One line, with one write: what it says survives anything."""
    os.write(_said, (" ".join(map(str, words)) + "\n").encode())


class Item(msgspec.Struct):
    id: int
    key: str
    wait: float = 0.0
    pad: str = ""


items = app.topic("items", Item, key="key", partitions=6)
copies = app.topic("copies", Item, key="key", partitions=6)
counts = app.table("counts", int)
sums = app.table("sums", int)


@app.consumer(items, name="step", tables=[counts], responds=[copies], retry=Retry(20, backoff=0.01))
def step(item: Item, delivery: Delivery[Item]) -> Item:
    """Partition order."""
    say("begin", "step", os.getpid(), delivery.partition, delivery.offset, item.key, item.id)
    if item.wait:
        time.sleep(item.wait)
    counts[item.key] = counts.get(item.key, 0) + 1
    say("end", "step", os.getpid(), delivery.partition, delivery.offset, item.key, item.id)
    return item


@app.consumer(items, name="many", tables=[sums], concurrency=20, retry=Retry(20, backoff=0.01))
async def many(item: Item, delivery: Delivery[Item]) -> None:
    """Order per key, twenty at once."""
    say("begin", "many", os.getpid(), delivery.partition, delivery.offset, item.key, item.id)
    if item.wait:
        await asyncio.sleep(10 * item.wait)  # twenty at once: as long as the other takes
    sums[item.key] = sums.get(item.key, 0) + item.id
    say("end", "many", os.getpid(), delivery.partition, delivery.offset, item.key, item.id)


@app.job(queue="notes")
def note(id: int, wait: float = 0.0) -> None:
    """A job."""
    say("begin", "note", os.getpid(), -1, id, "-", id)
    if wait:
        time.sleep(wait)
    say("end", "note", os.getpid(), -1, id, "-", id)


def send(first: int, step: int, pad: int) -> None:
    """Send until SIGTERM; say of each whether it is durable: `acked ID`, or `failed ID`."""
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    n = first
    while not ended:
        try:
            future = items.send(Item(n, f"k{n % KEYS}", pad="x" * pad))
        except BarnabasError as error:
            say("refused", n, type(error).__name__, error)
            time.sleep(0.1)
            continue
        future.add_done_callback(lambda f, n=n: say("acked" if f.exception(0) is None else "failed", n))
        n += step
        time.sleep(0.002)
    app.close()


if __name__ == "__main__":
    import logging

    logging.basicConfig(format="%(levelname)s %(message)s", level="INFO")
    send(*map(int, sys.argv[1:]))
