"""Consuming: who gets what, from where, and in which order."""

import asyncio
import copy
import pickle
import threading
from collections import defaultdict

import pytest
from watching import Step, settled, wait_for

from barnabas import Delivery, Retry


def steps(keys: int, each: int) -> list[Step]:
    """`each` numbered steps of `keys` keys, interleaved."""
    return [Step(f"k{k}", n) for n in range(each) for k in range(keys)]


class Order:
    """Collects what handlers saw, by key, and whether a key was ever in two hands at once."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.inside: set[str] = set()
        self.overlaps: list[str] = []
        self.lock = threading.Lock()

    def enter(self, key: str) -> None:
        with self.lock:
            if key in self.inside:
                self.overlaps.append(key)
            self.inside.add(key)

    def leave(self, key: str, n: int) -> None:
        with self.lock:
            self.seen[key].append(n)
            self.inside.discard(key)

    def holds(self, keys: int, each: int) -> None:
        assert not self.overlaps
        assert dict(self.seen) == {f"k{k}": list(range(each)) for k in range(keys)}


@pytest.fixture
def topic(app):
    return app.topic("steps", Step, key="key", partitions=3)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_message_is_handled_once(place, app, topic, kind):
    seen = []
    if kind == "sync":

        @app.consumer(topic)
        def read(step: Step):
            seen.append((step.key, step.n))
    else:

        @app.consumer(topic)
        async def read(step: Step):
            await asyncio.sleep(0)
            seen.append((step.key, step.n))

    topic.send_many(steps(10, 100)).result(10)
    place.drain(app)
    assert sorted(seen) == sorted((s.key, s.n) for s in steps(10, 100))
    assert settled(app, "read") == app.observers.counts["read", "done"] == 1000


def test_messages_sent_while_it_runs_are_handled(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(step: Step):
        seen.append(step.n)

    with place.running(app) as worker:
        for n in range(20):
            topic.send(Step("k", n))
            wait_for(lambda n=n: len(seen) == n + 1, worker=worker)
    assert seen == list(range(20))


def test_the_decorated_function_stays_a_plain_function(app, topic):
    @app.consumer(topic)
    def read(step: Step) -> int:
        return step.n

    assert read(Step("k", 5)) == 5


def test_a_new_group_starts_at_the_earliest_message(place, app, topic):
    seen = []
    topic.send(Step("k", 0)).result(5)

    @app.consumer(topic)
    def read(step: Step):
        seen.append(step.n)

    place.drain(app)
    assert seen == [0]


def test_from_latest_a_new_group_gets_what_is_sent_after_its_first_start(place, app, topic):
    seen = []
    topic.send_many(steps(5, 1)).result(5)

    @app.consumer(topic, start="latest")
    def read(step: Step):
        seen.append(step.n)

    with place.running(app) as worker:
        wait_for(lambda: len(worker.runners[0].parts) == 6, "assignment", worker)
        topic.send(Step("k", 1)).result(5)
        wait_for(lambda: seen, worker=worker)
    topic.send(Step("k", 2)).result(5)
    place.again(app)
    place.drain(app)
    assert seen == [1, 2]  # it has a position now: what came while it was away counts


def test_the_position_survives_a_restart(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(step: Step):
        seen.append((step.key, step.n))

    topic.send_many(steps(5, 10)).result(5)
    place.drain(app)
    place.again(app)
    place.drain(app)
    assert len(seen) == 50
    topic.send(Step("late", 1)).result(5)
    place.again(app)
    place.drain(app)
    assert seen[50:] == [("late", 1)]


def test_another_group_gets_all_of_it_again(place, app, topic):
    one, two = [], []

    @app.consumer(topic)
    def first(step: Step):
        one.append((step.key, step.n))

    @app.consumer(topic, concurrency=4)
    def second(step: Step):
        two.append((step.key, step.n))

    topic.send_many(steps(5, 20)).result(5)
    place.drain(app)
    assert sorted(one) == sorted(two) == sorted((s.key, s.n) for s in steps(5, 20))


def test_groups_are_named_after_app_and_consumer(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(step: Step, delivery: Delivery):
        seen.append(delivery.group)

    @app.consumer(topic, name="audit", group="audits")
    def other(step: Step, delivery: Delivery):
        seen.append(delivery.group)

    topic.send(Step("k", 0)).result(5)
    place.drain(app)
    assert sorted(seen) == ["audits", "shop-read"]


def test_only_the_consumers_chosen_run(place, app, topic):
    seen = []
    app.consumer(topic, name="a")(lambda step: seen.append("a"))
    app.consumer(topic, name="b")(lambda step: seen.append("b"))
    topic.send(Step("k", 0)).result(5)
    place.drain(app, only=["a"])
    assert seen == ["a"]
    place.drain(app, skip=["a"])
    assert seen == ["a", "b"]


@pytest.mark.parametrize("kind", ["threads", "async"])
@pytest.mark.parametrize("order", [None, "partition"])
def test_order_per_key_holds_with_many_in_work(place, app, topic, kind, order):
    state = Order()
    if kind == "threads":

        @app.consumer(topic, concurrency=8, order=order)
        def read(step: Step):
            state.enter(step.key)
            state.leave(step.key, step.n)
    else:

        @app.consumer(topic, concurrency=50, order=order)
        async def read(step: Step):
            state.enter(step.key)
            for _ in range(step.n % 3):
                await asyncio.sleep(0)
            state.leave(step.key, step.n)

    with place.running(app) as worker:  # some of it comes while work goes on
        for part in range(4):
            topic.send_many(steps(17, 100)[part * 425 : (part + 1) * 425])
        wait_for(lambda: sum(map(len, state.seen.values())) == 1700, worker=worker)
        wait_for(worker.drained, worker=worker)
    state.holds(17, 100)


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_what_comes_while_its_key_is_in_work_waits_for_it(place, app, kind):
    topic = app.topic("one", Step, key="key", partitions=1)
    entered, release, seen = threading.Event(), threading.Event(), []

    def enter(step: Step) -> bool:
        seen.append((step.key, step.n))
        entered.set()
        return step.key == "slow" and step.n == 0

    if kind == "threads":

        @app.consumer(topic, concurrency=4)
        def read(step: Step):
            if enter(step):
                release.wait(20)
                seen.append("released")
    else:

        @app.consumer(topic, concurrency=4)
        async def read(step: Step):
            if enter(step):
                while not release.is_set():
                    await asyncio.sleep(0.001)
                seen.append("released")

    with place.running(app) as worker:
        topic.send(Step("slow", 0))
        assert entered.wait(10)
        topic.send_many([Step("slow", 1), Step("slow", 2), Step("other", 3)])
        wait_for(lambda: ("other", 3) in seen, worker=worker)  # so those before it were seen, too
        release.set()
        wait_for(worker.drained, worker=worker)
    assert seen == [("slow", 0), ("other", 3), "released", ("slow", 1), ("slow", 2)]


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_different_keys_are_in_work_at_the_same_time(place, app, kind):
    topic = app.topic("one", Step, key="key", partitions=1)
    met = []
    if kind == "threads":
        meeting = threading.Barrier(4, timeout=10)

        @app.consumer(topic, concurrency=4, retry=Retry(0))
        def read(step: Step):
            meeting.wait()
            met.append(step.key)
    else:
        inside: list[str] = []
        all_in = asyncio.Event()

        @app.consumer(topic, concurrency=4, retry=Retry(0), timeout=10)
        async def read(step: Step):
            inside.append(step.key)
            if len(inside) == 4:
                all_in.set()
            await all_in.wait()
            met.append(step.key)

    topic.send_many(steps(4, 1)).result(5)
    place.drain(app)
    assert sorted(met) == ["k0", "k1", "k2", "k3"]


def test_concurrency_is_the_most_that_is_in_work(place, app, topic):
    now, most = 0, 0

    @app.consumer(topic, concurrency=3)
    async def read(step: Step):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1

    topic.send_many(steps(30, 10)).result(5)
    place.drain(app)
    assert most == 3


def test_partition_order_is_the_default_and_one_at_a_time(place, app, topic):
    by_partition, threads = defaultdict(list), set()

    @app.consumer(topic)
    def read(step: Step, delivery: Delivery):
        by_partition[delivery.partition].append(delivery.offset)
        threads.add(threading.get_ident())

    topic.send_many(steps(20, 50)).result(5)
    place.drain(app)
    assert sum(map(len, by_partition.values())) == 1000
    assert all(offsets == list(range(len(offsets))) for offsets in by_partition.values())
    assert len(threads) == 1


def test_with_partition_order_partitions_are_in_work_at_the_same_time(place, app, topic):
    meeting = threading.Barrier(3, timeout=10)

    @app.consumer(topic, concurrency=3, order="partition", retry=Retry(0))
    def read(step: Step, delivery: Delivery):
        if delivery.offset == 0:
            meeting.wait()

    for partition in range(3):
        topic.send_many([topic_message(partition, n) for n in range(5)]).result(5)
    place.drain(app)
    assert place.dead(topic) == []


def topic_message(partition: int, n: int):
    from barnabas import Message

    return Message(value=Step("same", n), partition=partition)


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_without_order_one_key_is_in_work_many_times(place, app, topic, kind):
    met = []
    if kind == "threads":
        meeting = threading.Barrier(2, timeout=10)

        @app.consumer(topic, concurrency=2, order="none", retry=Retry(0))
        def read(step: Step):
            meeting.wait()
            met.append(step.n)
    else:
        event = asyncio.Event()

        @app.consumer(topic, concurrency=2, order="none", retry=Retry(0), timeout=10)
        async def read(step: Step):
            if step.n == 0:
                await event.wait()
            event.set()
            met.append(step.n)

    topic.send_many([Step("same", 0), Step("same", 1)]).result(5)
    place.drain(app)
    assert sorted(met) == [0, 1]


def test_messages_without_a_key_have_no_order_among_each_other(place, app):
    topic = app.topic("plain", int, partitions=1)
    meeting = threading.Barrier(2, timeout=10)
    met = []

    @app.consumer(topic, concurrency=2, retry=Retry(0))
    def read(n: int):
        meeting.wait()
        met.append(n)

    topic.send_many([1, 2]).result(5)
    place.drain(app)
    assert sorted(met) == [1, 2]


def test_a_delivery_has_all_its_fields(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(step: Step, delivery: Delivery[Step]):
        seen.append(delivery)

    message = topic.send(Step("k", 1), headers=[("a", b"1"), ("a", b"2")], timestamp=12.5).result(5)
    place.drain(app)
    whole = Delivery(
        topic="steps",
        partition=message.partition,
        offset=0,
        key="k",
        value=Step("k", 1),
        headers=[("a", b"1"), ("a", b"2")],
        timestamp=12.5,
        attempt=1,
        group="shop-read",
    )
    assert seen == [whole] and [whole] == seen and repr(seen) == repr([whole])
    assert copy.deepcopy(seen) == [copy.copy(whole)] and pickle.loads(pickle.dumps(seen)) == [whole]


def test_a_delivery_without_headers_has_an_empty_list(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(delivery: Delivery, step: Step):
        seen.append(delivery.headers)

    topic.send(Step("k", 1)).result(5)
    place.drain(app)
    assert seen == [[]]


def test_the_annotation_decides_how_a_value_is_decoded(place, app, topic):
    seen = []

    @app.consumer(topic, name="as-dict")
    def one(step: dict):
        seen.append(step)

    @app.consumer(topic, name="as-it-is")
    def two(step):
        seen.append(step)

    topic.send(Step("k", 1)).result(5)
    place.drain(app)
    assert {"key": "k", "n": 1} in seen and Step("k", 1) in seen


def test_one_function_can_take_several_topics(place, app, topic):
    other = app.topic("other", Step, partitions=2)
    seen = []

    @app.consumer([topic, other], concurrency=2)
    def read(step: Step, delivery: Delivery):
        seen.append((delivery.topic, step.n))

    topic.send(Step("k", 1)).result(5)
    other.send(Step("k", 2)).result(5)
    place.drain(app)
    assert sorted(seen) == [("other", 2), ("steps", 1)]


def test_topics_of_different_types_are_decoded_each_by_its_own(place, app, topic):
    numbers = app.topic("numbers", int)
    raw = app.topic("raw", codec="raw")
    seen = []

    @app.consumer([topic, numbers, raw])
    def read(value):
        seen.append(value)

    topic.send(Step("k", 1)).result(5)
    numbers.send(5).result(5)
    raw.send(b"\xff").result(5)
    place.drain(app)
    assert len(seen) == 3 and all(value in seen for value in (Step("k", 1), 5, b"\xff"))


def test_hundreds_of_topics_run_in_one_process(place, app):
    topics = [app.topic(f"t{i}", int, partitions=1) for i in range(200)]
    seen = []

    @app.consumer(topics)
    def read(n: int):
        seen.append(n)

    for i, topic in enumerate(topics):
        topic.send(i)
    place.drain(app)
    assert sorted(seen) == list(range(200))


def test_a_null_value_is_none_if_the_annotation_allows_it(place, app, topic):
    seen = []

    @app.consumer(topic)
    def read(step: Step | None):
        seen.append(step)

    topic.send(Step("k", 1))
    topic.send(None, key="k").result(5)
    place.drain(app)
    assert seen == [Step("k", 1), None]


@pytest.mark.parametrize("annotated", [True, False])
def test_a_null_value_is_skipped_and_counted_if_not(place, app, topic, annotated):
    seen = []
    if annotated:

        @app.consumer(topic)
        def read(step: Step):
            seen.append(step)
    else:

        @app.consumer(topic)
        def read(step):
            seen.append(step)

    topic.send(None, key="k")
    topic.send(Step("k", 1)).result(5)
    place.drain(app)
    assert seen == [Step("k", 1)]
    assert app.observers.counts["read", "skipped"] == 1
    assert app.observers.counts["read", "done"] == 1
    assert place.dead(topic) == []


def test_a_consumer_never_holds_more_than_its_limit_of_a_partition(place, app):
    topic = app.topic("one", int, partitions=1)
    open_, first = threading.Event(), threading.Event()
    seen = []

    @app.consumer(topic)
    def read(n: int):
        first.set()
        open_.wait(20)
        seen.append(n)

    topic.send_many(range(6000)).result(10)
    with place.running(app) as worker:
        runner = worker.runners[0]
        assert first.wait(10)
        taken = lambda: sum(r.held.next for r in runner.parts)  # noqa: E731
        wait_for(lambda: taken() >= 1000, "it to read ahead", worker)
        runner.wake()
        # The limit may be passed by one fetch, no more.
        assert taken() <= runner.limit + 2500
        open_.set()
        wait_for(lambda: len(seen) == 6000, worker=worker)
    assert seen == list(range(6000))
