"""Topics on a real Apache Kafka: against bare confluent-kafka with the same driver settings, and against its peers."""

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from time import perf_counter, sleep
from typing import Any

import msgspec
from engine import Slow
from failover import Group
from kit import WAIT, Figure, Missing, Order, Row, Tally, app_on, bench, expect, in_turn, orders, other, tune, work_off
from processes import RATE, half_and_most, handle_backlog, shared_by, spins, woken

from barnabas import App, Batch, Delivery, Message

HERE = Path(__file__).resolve().parent
NOTE = "left at the neighbour's, who will ring; the bell is out of order" + 80 * "."  # 200 bytes of JSON in all
HEADERS = [("trace", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tenant", b"north")]
SESSION = 5.0  # seconds
QUIX = HERE.parent / "build" / "quix" / "bin" / "python"  # it keeps confluent-kafka below what we need


@contextmanager
def bench_kafka(folder: str) -> Iterator[str]:
    """A broker."""
    if find_spec("confluent_kafka") is None:
        raise Missing("Kafka: confluent-kafka is not installed: pip install 'barnabas[kafka]'")
    for program in ("java", "mvn"):
        if shutil.which(program) is None:
            raise Missing(f"Kafka: there is no {program} to start it with: apt-get install default-jre-headless maven")
    command, where = [sys.executable, str(HERE.parent / "dev" / "kafka")], ["--dir", f"{folder}/kafka"]
    start = [*command, "start", "--session", str(SESSION), *where]
    started = subprocess.run(start, stdout=subprocess.PIPE, check=True, text=True, timeout=120)
    try:
        yield started.stdout.strip()
    finally:
        subprocess.run([*command, "stop", *where], check=True)


class Shop:
    """A topic of its own on the broker, apps on it, and bare clients with the same driver settings."""

    def __init__(self, partitions: int = 6) -> None:
        from barnabas.backends.kafka_options import CONSUMER, PRODUCER

        self.servers, prefix = os.environ["BENCH_KAFKA"], f"{secrets.token_hex(4)}-"
        self.url, self.name, self._partitions = f"kafka://{self.servers}?prefix={prefix}", f"{prefix}orders", partitions
        common = {"bootstrap.servers": self.servers}
        self.sending = {**PRODUCER, **common, "queue.buffering.max.messages": 100_000}
        self.reading = {**CONSUMER, **common, "auto.offset.reset": "earliest", "queued.max.messages.kbytes": 16384}
        self._own, self.topic = self.app()
        self._own.events.declare(self._own.all_topics())

    def app(self, **settings: Any) -> tuple[App, Any]:
        app = app_on(self.url, **settings)
        return app, app.topic("orders", Order, key="customer", partitions=self._partitions)

    def close(self) -> None:
        events = self._own.events
        events.admin.delete_topics([events.prefix + name for name in events.metadata()])
        self._own.close()

    def send(self, n: int, headers: Any = None) -> float:
        """The raw loop: produce with a callback, and a poll each. Messages a second until the last is stored."""
        from confluent_kafka import Producer

        producer, encode, stored, name = Producer(self.sending), msgspec.json.Encoder().encode, 0, self.name
        producer.produce(name, b"", partition=0)  # it has its id and knows the topic
        producer.flush(WAIT)

        def report(error: Any, message: Any) -> None:
            nonlocal stored
            if error is None:
                stored += 1

        began = perf_counter()
        for order in orders(n, note=NOTE):
            while True:
                try:
                    producer.produce(name, encode(order), order.customer, on_delivery=report, headers=headers)
                    break
                except BufferError:  # the broker is slower just now
                    producer.poll(0.05)
            producer.poll(0)
        producer.flush(WAIT)
        seconds = perf_counter() - began
        expect("stored", stored, n)
        return n / seconds

    def fill(self, n: int) -> None:
        """Store orders 1 to n."""
        from confluent_kafka import Producer

        producer, encode = Producer(self.sending), msgspec.json.Encoder().encode
        for order in orders(n, note=NOTE):
            producer.produce(self.name, encode(order), order.customer)
            if order.id % 10_000 == 0:
                while len(producer) > 50_000:
                    producer.poll(0.01)
        expect("not stored", producer.flush(WAIT), 0)

    def read(self, n: int, take: Callable[[list[Any]], Any]) -> None:
        """The raw loop: `consume(1000)`, then whatever `take` does, n messages long."""
        from confluent_kafka import Consumer

        consumer, left = Consumer(self.reading, **{"group.id": secrets.token_hex(4)}), n
        consumer.subscribe([self.name])
        while left > 0:
            messages = consumer.consume(1000, 1.0)
            take(messages)
            left -= len(messages)
        consumer.close()


@contextmanager
def shop(n: int = 0, partitions: int = 6) -> Iterator[Shop]:
    """A topic with n orders."""
    made = Shop(partitions)
    made.fill(n)
    tune()
    yield made
    made.close()


# Handlers.


def by_one(handle: Any, decode: Any) -> Callable[[list[Any]], None]:
    """Decode and call."""

    def take(messages: list[Any]) -> None:
        for message in messages:
            if message.error() is not None:
                raise RuntimeError(message.error().str())
            handle(decode(message.value()))

    return take


def by_batch(handle: Any, decode: Any) -> Callable[[list[Any]], None]:
    """Decode a list and call with it."""

    def take(messages: list[Any]) -> None:
        if any(message.error() is not None for message in messages):
            raise RuntimeError("an error among the messages")
        if messages:
            handle([decode(message.value()) for message in messages])

    return take


def handled(shop: Shop, n: int, kind: str, **options: Any) -> float:
    """Messages a second of one of our handlers, from its first to its last."""
    app, topic = shop.app()
    tally = Tally(n)
    job = tally.job

    def with_delivery(order: Order, delivery: Delivery[Order]) -> None:
        job(order.id)

    def reading(order: Order, delivery: Delivery[Order]) -> None:
        if delivery.offset >= 0 and delivery.key:
            job(order.id)

    handle = {"with_delivery": with_delivery, "reading": reading}.get(kind) or getattr(tally, kind)
    app.consumer(topic, name="handle", group=secrets.token_hex(4), **options)(handle)
    work_off(app, "handle", n)
    app.close()
    return n / tally.seconds


KINDS = ("one", "with_delivery", "reading", "batch", "one_async")


@bench(
    300_000,
    3_000,
    Row("Kafka, 200 bytes: sync handler", 0.75, "x", "/s", note="raw, here and below: confluent-kafka's `consume(1000)`"),
    Row("Kafka: sync handler that asks for its `Delivery`", 0.65, "x", "/s"),
    Row("Kafka: the same, and it reads offset and key of it", None, "x", "/s"),
    Row("Kafka: batch handler", 0.9, "x", "/s", note="raw: one call a list"),
    Row("Kafka: async handler that does not suspend", 0.45, "x", "/s", note="raw: a sync function"),
    server=bench_kafka,
)
def kafka_handlers(n: int, turn: int) -> list[Figure]:
    found = []
    with shop(n) as place:
        for kind in KINDS:
            tally, batch = Tally(n), kind == "batch"
            take = by_batch(tally.batch, place.topic.decode) if batch else by_one(tally.one, place.topic.decode)
            options = {"batch": Batch(max=1000, wait=0.01)} if batch else {}
            _, ours = in_turn(turn, lambda: place.read(n, take), lambda: handled(place, n, kind, **options))  # noqa: B023
            raw = n / tally.seconds
            found.append(Figure(ours / raw, raw, ours))
    return found


@bench(20_000, 500, Row("Kafka: async handler of 10 ms, one partition, 100 at once", 0.95, "x", "/s"), server=bench_kafka)
def kafka_slow(n: int, turn: int) -> list[Figure]:
    own, bare, messages = Slow(n), Slow(n), []
    with shop(n, partitions=1) as place:
        app, topic = place.app()
        app.consumer(topic, name="handle", concurrency=100)(own.handle)
        place.read(n, messages.extend)

        async def task(left: Any) -> None:
            for message in left:
                await bare.handle(topic.decode(message.value()))

        async def hundred() -> None:
            left = iter(messages)
            await asyncio.gather(*(task(left) for _ in range(100)))

        in_turn(turn, lambda: asyncio.run(hundred()), lambda: work_off(app, "handle", n))
        app.close()
    theirs, ours = bare.seconds, own.seconds
    return [Figure(theirs / ours, n / theirs, n / ours)]


# Peers.


def peer(name: str, python: str, place: Shop, n: int) -> float:
    """Messages a second of another framework, in a process of its own; its versions may be others than ours."""
    command = [python, str(HERE / "kafka_peers.py"), name, place.servers, place.name, str(n)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return n / float(done.stdout.splitlines()[-1])


def against(name: str, python: str, n: int, turn: int, times: int) -> list[Figure]:
    with shop(n) as place:
        theirs, ours = in_turn(turn, lambda: peer(name, python, place, n // times), lambda: handled(place, n, "one"))
    return [Figure(ours / theirs, theirs, ours)]


@bench(200_000, 4_000, Row("Kafka: FastStream (confluent), the same typed no-op", 50, "x", "/s"), server=bench_kafka)
def kafka_faststream(n: int, turn: int) -> list[Figure]:
    if find_spec("faststream") is None:
        raise Missing("the comparison with FastStream needs the extra bench")
    return against("faststream", sys.executable, n, turn, 40)


@bench(200_000, 4_000, Row("Kafka: Quix Streams, the same typed no-op", 3, "x", "/s"), server=bench_kafka)
def kafka_quix(n: int, turn: int) -> list[Figure]:
    if not QUIX.exists():
        raise Missing("the comparison with Quix Streams needs it in build/quix: make bench puts it there")
    return against("quix", str(QUIX), n, turn, 4)


# Sending.


def sending(place: Shop, n: int, send: Callable[[Any], int]) -> float:
    """Messages a second until the last is stored, however `send` sends them."""
    app, topic = place.app()
    topic.send(None, key="first").result(WAIT)
    began = perf_counter()
    expect("stored", send(topic), n)
    seconds = perf_counter() - began
    app.close()
    return n / seconds


@bench(
    150_000,
    2_000,
    Row("Kafka: sends, futures collected", 0.55, "x", "/s", note="raw: produce with a callback and a poll each"),
    Row("Kafka: `send_many`", 1.0, "x", "/s"),
    Row("Kafka: `send_many` of Messages with two headers", 0.8, "x", "/s"),
    server=bench_kafka,
)
def kafka_send(n: int, turn: int) -> list[Figure]:
    def collect(topic: Any) -> int:
        futures = [topic.send(order) for order in orders(n, note=NOTE)]
        topic.app.events.flush(WAIT)
        expect("the last order", futures[-1].result().value.id, n)
        return sum([future.done() for future in futures])

    def many(topic: Any) -> int:
        return topic.send_many(orders(n, note=NOTE)).result(WAIT)

    def with_headers(topic: Any) -> int:
        return topic.send_many(Message(value=order, headers=HEADERS) for order in orders(n, note=NOTE)).result(WAIT)

    found = []
    with shop() as place:
        for send in (collect, many, with_headers):
            headers = HEADERS if send is with_headers else None
            raw, ours = in_turn(turn, lambda: place.send(n, headers), lambda: sending(place, n, send))  # noqa: B023
            found.append(Figure(ours / raw, raw, ours))
    return found


# Processes.


def hear(parent: Connection, reading: dict[str, Any], topic: str, n: int) -> None:
    """The seconds from each of the raw loop's sends to its `poll` here."""
    from confluent_kafka import Consumer

    consumer, times = Consumer(reading, **{"group.id": secrets.token_hex(4)}), list[float]()
    consumer.subscribe([topic])
    while not consumer.assignment():
        consumer.poll(0.01)
    tune()
    parent.send("ready")
    while len(times) < n:
        if value := consumer.poll(WAIT).value():
            times.append(perf_counter() - msgspec.json.decode(value, type=Order).total)
    parent.send(times)
    consumer.close()


def heard(place: Shop, n: int) -> list[Figure]:
    """The raw loop: from `produce` and `poll` here to `poll` in another process."""
    from confluent_kafka import Producer

    with other(hear, place.reading, place.name, n) as consumer:
        producer, encode = Producer(place.sending), msgspec.json.Encoder().encode
        producer.produce(place.name, b"", partition=0)  # it has its id and knows the topic
        producer.flush(WAIT)
        consumer.recv()
        tune()
        began = perf_counter()
        for number in range(1, n + 1):
            sleep(max(0.0, began + number / RATE - perf_counter()))
            producer.produce(place.name, encode(Order(number, f"customer-{number}", perf_counter())), f"customer-{number}")
            producer.poll(0)
        return half_and_most(consumer.recv())


@bench(
    1_000,
    40,
    Row(
        "Kafka: from a send to its handler's start in another process, 200 messages/s, p50", 4, "ms", "ms", at_most=True,
        note="raw: confluent-kafka's `produce` and `poll`",
    ),
    Row("the same, p99", 8, "ms", "ms", at_most=True),
    server=bench_kafka,
)
def kafka_wake_up(n: int, turn: int) -> list[Figure]:
    with shop() as one, shop() as two:
        raw, ours = in_turn(turn, lambda: heard(one, n), lambda: woken(two.url, n))
    return [Figure(our.ours, bare.ours, our.ours) for bare, our in zip(raw, ours, strict=True)]


@bench(
    2_000,
    60,
    Row("Kafka: handlers of 1 ms of computing: 2 processes", 1.6, "x", "/s", note="raw: 1 process; two free cores"),
    server=bench_kafka,
)
def kafka_share(n: int, turn: int) -> list[Figure]:
    times = spins(0.001)
    with shop() as one, shop() as two:
        alone, both = in_turn(turn, lambda: shared_by(one.url, 1, n, times), lambda: shared_by(two.url, 2, n, times))
    return [Figure(both / alone, alone, both)]


@bench(
    1_000_000,
    10_000,
    Row("Kafka: a worker at a backlog of 1,000,000 messages: peak memory", 150, "MB", "MB", at_most=True),
    Row("of which: grown after the first 200,000", None, "MB", "MB"),
    server=bench_kafka,
)
def kafka_backlog(n: int, turn: int) -> list[Figure]:
    with shop(n) as place, other(handle_backlog, place.url, n) as worker:
        return [Figure(mb, None, mb) for mb in worker.recv()]


@bench(
    1,
    1,
    Row(f"Kafka: take-over after SIGKILL, session {SESSION:.0f} s", 1000 * SESSION + 2000, "ms", "ms", at_most=True),
    Row("the same with `group.protocol=consumer`", 1000 * SESSION + 2000, "ms", "ms", at_most=True),
    server=bench_kafka,
)
def kafka_take_over(n: int, turn: int) -> list[Figure]:
    def hit(protocol: str) -> float:
        with shop() as place:
            group = Group(place.url, SESSION, kafka={"group.protocol": protocol})
            try:
                return 1000 * group.hit(SIGKILL)
            finally:
                group.close()

    with ThreadPoolExecutor(2) as pool:  # in seconds in which little happens
        return [Figure(ms, None, ms) for ms in pool.map(hit, ("classic", "consumer"))]
