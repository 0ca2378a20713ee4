"""Other frameworks at the work of bench/kafka.py, in a process and perhaps an environment of their own: prints the seconds
from the first message handled to the last. `python kafka_peers.py faststream|quix SERVERS TOPIC COUNT`"""

import asyncio
import sys
import uuid
from time import perf_counter
from typing import Any

import msgspec

SETTINGS = {"fetch.queue.backoff.ms": 10, "fetch.wait.max.ms": 100, "enable.metrics.push": False}  # as ours


class Order(msgspec.Struct):
    id: int
    customer: str
    total: float
    note: str = ""


class Count:
    """Called for each message; `end` when it was the last."""

    def __init__(self, n: int, end: Any) -> None:
        self.left, self.n, self.end, self.began = n, n, end, 0.0

    def __call__(self) -> None:
        if self.left == self.n:
            self.began = perf_counter()
        self.left -= 1
        if self.left == 0:
            print(perf_counter() - self.began, flush=True)
            self.end()


def faststream(servers: str, topic: str, n: int) -> None:
    """The decoder that is its fastest."""
    from fast_depends.msgspec import MsgSpecSerializer
    from faststream import FastStream
    from faststream.confluent import KafkaBroker

    broker = KafkaBroker(servers, config=SETTINGS, serializer=MsgSpecSerializer(), logger=None)
    app = FastStream(broker, logger=None)
    count = Count(n, app.exit)

    @broker.subscriber(topic, group_id=uuid.uuid4().hex, auto_offset_reset="earliest")
    async def handle(order: Order) -> None:
        count()

    asyncio.run(app.run())


def quix(servers: str, topic: str, n: int) -> None:
    from quixstreams import Application
    from quixstreams.models import Deserializer

    class Typed(Deserializer):
        def __init__(self) -> None:
            super().__init__()
            self.decode = msgspec.json.Decoder(Order).decode

        def __call__(self, value: bytes, ctx: Any) -> Order:
            return self.decode(value)

    app = Application(
        broker_address=servers,
        consumer_group=uuid.uuid4().hex,
        auto_offset_reset="earliest",
        auto_create_topics=False,
        consumer_extra_config=SETTINGS,
        loglevel="ERROR",
    )
    count = Count(n, app.stop)

    def handle(order: Order) -> None:
        count()

    app.dataframe(app.topic(topic, value_deserializer=Typed())).update(handle)
    app.run()


if __name__ == "__main__":
    {"faststream": faststream, "quix": quix}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
