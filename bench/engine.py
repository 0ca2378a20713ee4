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
    topic.send_many(orders(n, note="")).result()
    rows = [row for number in range(partitions) for row in app.events.read("orders", number, 0, n)]
    expect("stored", len(rows), n)
    return app, topic, rows


def raw_sync(rows: list[Any], decode: Any, handle: Any) -> None:
    """Decode and call."""
    for row in rows:
        handle(decode(row[2]))


def raw_async(rows: list[Any], decode: Any, handle: Any) -> None:
    """The same with a coroutine."""

    async def loop() -> None:
        for row in rows:
            await handle(decode(row[2]))

    asyncio.run(loop())


def raw_batches(rows: list[Any], decode: Any, handle: Any) -> None:
    """Decode a list and call with it."""
    for start in range(0, len(rows), BATCH):
        handle([decode(row[2]) for row in rows[start : start + BATCH]])


def beyond(n: int, turn: int, raw: Callable[..., None], kind: str, prepare: Any = None, **options: Any) -> list[Figure]:
    """Microseconds a message beyond a raw loop over the same rows. `prepare` may add to its handler and to ours."""
    app, topic, rows = shop(n)
    bare, own = Tally(n), Tally(n)
    handlers = getattr(bare, kind), getattr(own, kind)
    if prepare is not None:
        handlers = prepare(app, *handlers)
    app.consumer(topic, name="handle", **options)(handlers[1])
    tune()

    in_turn(turn, lambda: raw(rows, topic.decode, handlers[0]), lambda: work_off(app, "handle", n))
    if "out" in app.topics:
        out = next(state for state in app.events.topics() if state.name == "out")
        expect("sent", sum(after - first for first, after, _ in out.partitions), n)
    theirs, ours = 1e6 * bare.seconds / n, 1e6 * own.seconds / n
    return [Figure(ours - theirs, theirs, ours)]


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
    def prepare(app: App, one: Any, other: Any) -> tuple[Any, Any]:
        @app.around
        def hook(delivery: Any) -> Any:
            yield

        return one, other

    return beyond(n, turn, raw_sync, "one", prepare)


@bench(300_000, 3_000, _row("sync handler, one send", 1.2, "encoding and storing what is sent included"))
def engine_send(n: int, turn: int) -> list[Figure]:
    def prepare(app: App, one: Any, other: Any) -> tuple[Any, Any]:
        out = app.topic("out", Order, key="customer")

        def plain(order: Order) -> None:
            one(order)

        def sending(order: Order) -> None:
            other(order)
            out.send(order)

        return plain, sending

    return beyond(n, turn, raw_sync, "one", prepare)


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
        work_off(app, "handle", n)
        return tally.seconds

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
        self.n = n
        self.seen: dict[str, list[int]] = {}
        self.marks: list[float] = []  # of each begin and end

        async def handle(order: Order) -> None:
            seen = self.seen.setdefault(order.customer, [])
            for nap in (0.01, None):
                self.marks.append(perf_counter())
                seen.append(order.id)
                if nap:
                    await asyncio.sleep(nap)

        self.handle = handle

    @property
    def seconds(self) -> float:
        expect("handled", sorted(id_ for ids in self.seen.values() for id_ in set(ids)), list(range(1, self.n + 1)))
        return self.marks[-1] - self.marks[0]


@bench(
    20_000,
    500,
    Row("async handler of 10 ms, one partition, 1,000 keys, 100 at once, order per key held", 0.95, "x", "/s"),
)
def async_slow(n: int, turn: int) -> list[Figure]:
    app, topic, rows = shop(n, partitions=1)
    own, bare = Slow(n), Slow(n)
    app.consumer(topic, name="handle", concurrency=100)(own.handle)
    tune()

    async def task(left: Any) -> None:
        for row in left:
            await bare.handle(topic.decode(row[2]))

    async def hundred() -> None:
        left = iter(rows)
        await asyncio.gather(*(task(left) for _ in range(100)))

    in_turn(turn, lambda: asyncio.run(hundred()), lambda: work_off(app, "handle", n))
    theirs, ours = bare.seconds, own.seconds
    for key, ids in own.seen.items():  # each began after the one before it had ended
        expect(f"order of {key}", ids, sorted(ids))
    return [Figure(theirs / ours, n / theirs, n / ours)]
