"""An app with three messages that kill whoever runs them, each in another consumer; handlings leave lines in a file."""

import os
import signal

from barnabas import App, Batch, Retention

options = {"group.protocol": os.environ["HERD_PROTOCOL"], "fetch.wait.max.ms": 50}
settings = {"session_timeout": 3.0, "create_topics": True, "log_level": "warning", "checkpoint_interval": 0.02}
app = App("poison", events=os.environ["HERD_URL"], jobs="memory:", kafka=options, **settings)
items = app.topic("items", int, partitions=3, retention=Retention(age=3600))
POISON = {"straight": 700, "lanes": 1100, "batches": 1500}
_lines = os.open(os.environ["HERD_LINES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def handle(name: str, *values: int) -> None:
    os.write(_lines, "".join(f"{name} {value}\n" for value in values).encode())
    if POISON[name] in values:
        os.kill(os.getpid(), signal.SIGKILL)


@app.consumer(items)
def straight(n: int) -> None:
    handle("straight", n)


@app.consumer(items, concurrency=20)
async def lanes(n: int) -> None:
    import asyncio

    await asyncio.sleep(0.001 * (n % 5))
    handle("lanes", n)


@app.consumer(items, batch=Batch(max=200, wait=0.05))
def batches(values: list[int]) -> None:
    handle("batches", *values)
