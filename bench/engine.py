"""The engine on `memory:`: what a message costs beyond decoding its value and calling its handler."""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any

from kit import Figure, Order, Row, Tally, bench, expect, in_turn, orders, tune, work_off

from barnabas import App, Batch

BATCH = 1_000


def shop(n: int, partitions: int = 6) -> tuple[App, Any, list[Any]]:
    """An app whose topic holds n orders, and its rows."""
    app = App("bench", events="memory:", jobs="memory:")
    topic = app.topic("orders", Order, key="customer", partitions=partitions)
    topic.send_many(orders(n)).result()
    rows = [row for number in range(partitions) for row in app.events.read("orders", number, 0, n)]
    expect("stored", len(rows), n)
    return app, topic, rows


def raw_sync(rows: list[Any], decode: Any, n: int) -> float:
    """Decode and call; seconds from the first to the last."""
    tally = Tally(n)
    handle = tally.one
    for row in rows:
        handle(decode(row[2]))
    return tally.seconds


def raw_async(rows: list[Any], decode: Any, n: int) -> float:
    """The same with a coroutine."""
    tally = Tally(n)

    async def loop() -> None:
        handle = tally.one_async
        for row in rows:
            await handle(decode(row[2]))

    asyncio.run(loop())
    return tally.seconds


def raw_batches(rows: list[Any], decode: Any, n: int) -> float:
    """Decode a list and call with it."""
    tally = Tally(n)
    for start in range(0, n, BATCH):
        tally.batch([decode(row[2]) for row in rows[start : start + BATCH]])
    return tally.seconds


def beyond(
    n: int, turn: int, raw: Callable[..., float], kind: str, declare: Any = None, **options: Any
) -> list[Figure]:
    """Microseconds a message of our engine beyond a raw loop over the same rows."""
    app, topic, rows = shop(n)
    tally = Tally(n)
    handler = getattr(tally, kind)
    if declare is not None:
        handler = declare(app, handler)
    app.consumer(topic, name="handle", **options)(handler)
    tune()
    bare, ours = in_turn(
        turn, lambda: raw(rows, topic.decode, n), lambda: work_off(app, "handle", n, lambda: tally.seconds)
    )
    if "out" in app.topics:
        out = next(state for state in app.events.topics() if state.name == "out")
        expect("sent", sum(after - first for first, after, _ in out.partitions), n)
    return [Figure(1e6 * (ours - bare) / n, 1e6 * bare / n, 1e6 * ours / n)]


def _row(what: str, target: float, note: str = "") -> Row:
    return Row(f"engine on `memory:`, beyond decode and call: {what}", target, "us", "us", at_most=True, note=note)


@bench(400_000, 4_000, _row("sync typed handler", 0.5))
def engine_sync(n: int, turn: int) -> list[Figure]:
    return beyond(n, turn, raw_sync, "one")


@bench(400_000, 4_000, _row("batch handler", 0.2))
def engine_batch(n: int, turn: int) -> list[Figure]:
    return beyond(n, turn, raw_batches, "batch", batch=Batch(max=BATCH, wait=0.01))


@bench(300_000, 3_000, _row("sync handler, one hook", 1.5))
def engine_hook(n: int, turn: int) -> list[Figure]:
    def declare(app: App, handler: Any) -> Any:
        @app.around
        def hook(delivery: Any) -> Any:
            yield

        return handler

    return beyond(n, turn, raw_sync, "one", declare)


@bench(300_000, 3_000, _row("sync handler, one send", 1.2, "its encoding and storing included"))
def engine_send(n: int, turn: int) -> list[Figure]:
    def declare(app: App, handler: Any) -> Any:
        out = app.topic("out", Order, key="customer")

        def handle(order: Order) -> None:
            handler(order)
            out.send(order)

        return handle

    return beyond(n, turn, raw_sync, "one", declare)


@bench(
    300_000,
    3_000,
    Row("async handler that does not suspend, partition order", 0.35, "x", "/s", note="raw: our sync path"),
)
def async_order(n: int, turn: int) -> list[Figure]:
    def ours(kind: str) -> float:
        app, topic, _ = shop(n)
        tally = Tally(n)
        app.consumer(topic, name="handle")(getattr(tally, kind))
        tune()
        return work_off(app, "handle", n, lambda: tally.seconds)

    sync, async_ = in_turn(turn, lambda: ours("one"), lambda: ours("one_async"))
    return [Figure(sync / async_, n / sync, n / async_)]


@bench(300_000, 3_000, _row("async handler that does not suspend, 100 lanes, 1,000 keys", 3.0))
def async_lanes(n: int, turn: int) -> list[Figure]:
    return beyond(n, turn, raw_async, "one_async", concurrency=100)


@bench(300_000, 3_000, _row("sync handler, 10 threads in lanes, 1,000 keys", 4.0))
def thread_lanes(n: int, turn: int) -> list[Figure]:
    return beyond(n, turn, raw_sync, "one", concurrency=10)


class Slow:
    """An async handler of 10 ms that notes, by key, what began and what ended."""

    def __init__(self, n: int) -> None:
        self.tally = tally = Tally(n)
        self.seen: dict[str, list[int]] = {}
        self.began = 0.0

        async def handle(order: Order) -> None:
            self.began = self.began or perf_counter()
            seen = self.seen.setdefault(order.customer, [])
            seen.append(order.id)
            await asyncio.sleep(0.01)
            seen.append(order.id)
            await tally.one_async(order)

        self.handle = handle

    @property
    def seconds(self) -> float:
        assert self.tally.seconds
        return self.tally.marks[-1] - self.began

    def in_order(self) -> bool:
        """Whether each message of a key began after the one before it had ended."""
        return all(seen == sorted(seen) for seen in self.seen.values())


@bench(
    20_000,
    500,
    Row(
        "async handler of 10 ms, one partition, 1,000 keys, 100 at once, order per key held",
        0.95,
        "x",
        "/s",
        note="raw: 100 tasks, no order",
    ),
)
def async_slow(n: int, turn: int) -> list[Figure]:
    app, topic, rows = shop(n, partitions=1)
    own, bare = Slow(n), Slow(n)
    app.consumer(topic, name="handle", concurrency=100)(own.handle)
    tune()

    def raw() -> float:
        left = iter(rows)
        decode = topic.decode

        async def task() -> None:
            for row in left:
                await bare.handle(decode(row[2]))

        async def loop() -> None:
            await asyncio.gather(*(task() for _ in range(100)))

        asyncio.run(loop())
        return bare.seconds

    theirs, ours = in_turn(turn, raw, lambda: work_off(app, "handle", n, lambda: own.seconds))
    expect("order per key", own.in_order(), True)
    return [Figure(theirs / ours, n / theirs, n / ours)]
