"""The app of the kill test on Kafka: each handling leaves lines in a file, written at once, that outlive its process."""

import os
import time

from barnabas import App, Delivery

options = {"group.protocol": os.environ["HERD_PROTOCOL"]} | {"fetch.wait.max.ms": 50}
settings = {"session_timeout": 3.0, "create_topics": True, "stop_timeout": 5, "log_level": "warning"}
app = App("herd", events=os.environ["HERD_URL"], jobs="memory:", kafka=options, **settings)
items = app.topic("items", dict, key="key", partitions=6)
# Opened when it is first needed: also by the test, which only sends.
_lines = os.open(os.environ["HERD_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def say(what: str, delivery: Delivery[dict]) -> None:
    where = f"{delivery.partition} {delivery.offset} {delivery.key} {delivery.value['n']}"
    os.write(_lines, f"{what} {os.getpid()} {time.monotonic()} {where}\n".encode())


def young(item: dict) -> bool:
    """Whether it was sent just now: who takes over what has waited need not be slow."""
    return time.monotonic() - item["at"] < 1


@app.consumer(items, name="straight")
def straight(item: dict, delivery: Delivery[dict]) -> None:
    say("straight", delivery)
    time.sleep(0.003 * young(item))


@app.consumer(items, name="lanes", concurrency=20)
async def lanes(item: dict, delivery: Delivery[dict]) -> None:
    import asyncio

    say("lanes", delivery)
    await asyncio.sleep(0.01 * (item["n"] % 3) * young(item))
