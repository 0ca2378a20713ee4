"""Batch handlers: how they are fed, and what a failure in a batch costs."""

import asyncio
import threading
from collections import defaultdict

import msgspec
import pytest
from watching import Step, failures, settled, wait_for

from barnabas import Batch, Delivery, Message, Reject, Respond, Retry

QUICK = 0.01  # seconds


@pytest.fixture
def topic(app):
    return app.topic("steps", Step, key="key", partitions=1)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_batch_handler_gets_lists_in_order_of_at_most_max(place, app, topic, kind):
    batches = []
    if kind == "sync":

        @app.consumer(topic, batch=Batch(max=70, wait=0.05))
        def read(steps: list[Step]):
            batches.append([step.n for step in steps])
    else:

        @app.consumer(topic, batch=Batch(max=70, wait=0.05))
        async def read(steps: list[Step]):
            await asyncio.sleep(0)
            batches.append([step.n for step in steps])

    topic.send_many(Step("k", n) for n in range(300)).result(5)
    place.drain(app)
    assert [n for batch in batches for n in batch] == list(range(300))
    assert [len(batch) for batch in batches] == [70, 70, 70, 70, 20]
    assert settled(app, "read") == app.observers.counts["read", "done"] == 300


def test_a_full_batch_does_not_wait(place, app, topic):
    batches = []

    @app.consumer(topic, batch=Batch(max=5, wait=600))
    def read(steps: list[Step]):
        batches.append(len(steps))

    with place.running(app) as worker:
        topic.send_many(Step("k", n) for n in range(3))
        topic.send_many(Step("k", n) for n in range(7))
        wait_for(lambda: batches == [5, 5], worker=worker)


def test_a_batch_that_does_not_fill_up_waits_no_longer_than_wait(place, app, topic):
    batches, times = [], []

    @app.consumer(topic, batch=Batch(max=1000, wait=0.15))
    def read(steps: list[Step]):
        times.append(app.clock.monotonic())
        batches.append(len(steps))

    with place.running(app) as worker:
        began = app.clock.monotonic()
        topic.send_many(Step("k", n) for n in range(3))
        topic.send(Step("k", 3))
        wait_for(lambda: batches, worker=worker)
        assert batches == [4] and 0.149 <= times[0] - began < 5


def test_without_wait_a_batch_is_what_there_is(place, app, topic):
    batches = []

    @app.consumer(topic, batch=Batch(max=100, wait=0))
    def read(steps: list[Step]):
        batches.append([step.n for step in steps])

    topic.send_many(Step("k", n) for n in range(250)).result(5)
    place.drain(app)
    assert [n for batch in batches for n in batch] == list(range(250))
    assert max(map(len, batches)) <= 100


def test_a_batch_is_of_one_partition(place, app):
    topic = app.topic("many", Step, partitions=4)
    batches = []

    @app.consumer(topic, batch=Batch(wait=0.02))
    def read(steps: list[Step], deliveries: list[Delivery]):
        assert [d.value for d in deliveries] == steps
        batches.append([(d.partition, d.offset) for d in deliveries])

    topic.send_many(Message(value=Step("k", n), partition=n % 4) for n in range(40)).result(5)
    place.drain(app)
    assert all(len({partition for partition, _ in batch}) == 1 for batch in batches)
    assert sorted(at for batch in batches for at in batch) == [(p, o) for p in range(4) for o in range(10)]


def test_deliveries_have_their_fields(place, app, topic):
    seen = []

    @app.consumer(topic, batch=Batch(max=2, wait=0.5))
    def read(steps: list[Step], deliveries: list[Delivery]):
        seen.extend(deliveries)

    topic.send_many([Message(value=Step("k", 1), headers=[("a", b"1")], timestamp=5.0), Step("l", 2)]).result(5)
    place.drain(app)
    first, second = seen
    assert (first.topic, first.partition, first.offset, first.key, first.value) == ("steps", 0, 0, "k", Step("k", 1))
    assert (first.headers, first.timestamp, first.attempt, first.group) == ([("a", b"1")], 5.0, 1, "shop-read")
    assert (second.offset, second.key, second.headers) == (1, "l", [])


def test_with_key_order_a_batch_is_of_one_key(place, app, topic):
    batches = []

    @app.consumer(topic, concurrency=4, batch=Batch(max=10, wait=0.02))
    def read(steps: list[Step]):
        batches.append([(step.key, step.n) for step in steps])

    topic.send_many(Step(f"k{n % 5}", n) for n in range(100)).result(5)
    place.drain(app)
    assert all(len({key for key, _ in batch}) == 1 for batch in batches)
    seen = defaultdict(list)
    for batch in batches:
        for key, n in batch:
            seen[key].append(n)
    assert seen == {f"k{k}": list(range(k, 100, 5)) for k in range(5)}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_failing_batch_is_retried_whole(place, app, topic, kind):
    batches = []

    def handle(steps: list[Step], deliveries: list[Delivery]) -> None:
        batches.append(([step.n for step in steps], [d.attempt for d in deliveries]))
        if len(batches) < 3:
            raise ValueError("not yet")

    options = {"batch": Batch(max=3, wait=0.02), "retry": Retry(5, backoff=QUICK)}
    if kind == "sync":

        @app.consumer(topic, **options)
        def read(steps: list[Step], deliveries: list[Delivery]):
            handle(steps, deliveries)
    else:

        @app.consumer(topic, **options)
        async def read(steps: list[Step], deliveries: list[Delivery]):
            handle(steps, deliveries)

    topic.send_many(Step("k", n) for n in range(4)).result(5)
    place.drain(app)
    assert batches == [([0, 1, 2], [1, 1, 1]), ([0, 1, 2], [2, 2, 2]), ([0, 1, 2], [3, 3, 3]), ([3], [1])]
    assert [f.outcome for f in failures(app)] == ["again", "again"]
    assert app.observers.counts["read", "done"] == 4


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_out_of_attempts_only_the_culprits_of_a_batch_die(place, app, topic, kind):
    batches = []

    def handle(steps: list[Step]) -> None:
        batches.append([step.n for step in steps])
        if any(step.n in (2, 5) for step in steps):
            raise ValueError("culprit")

    options = {"batch": Batch(max=8, wait=0.02), "retry": Retry(2, backoff=QUICK)}
    if kind == "sync":

        @app.consumer(topic, **options)
        def read(steps: list[Step]):
            handle(steps)
    else:

        @app.consumer(topic, **options)
        async def read(steps: list[Step]):
            handle(steps)

    topic.send_many(Step("k", n) for n in range(8)).result(5)
    place.drain(app)
    assert batches == [list(range(8))] * 3 + [[n] for n in range(8)]
    assert [msgspec.json.decode(m.value)["n"] for m in place.dead(topic)] == [2, 5]
    assert app.observers.counts["read", "dead"] == 2
    assert app.observers.counts["read", "done"] == 6


def test_the_batch_after_a_failed_one_has_all_its_attempts(place, app, topic):
    batches = []

    @app.consumer(topic, batch=Batch(max=2, wait=0.02), retry=Retry(1, backoff=QUICK))
    def read(steps: list[Step]):
        batches.append([step.n for step in steps])
        if any(step.n in (0, 2) for step in steps) and len(steps) > 1:
            raise ValueError("only in company")

    topic.send_many(Step("k", n) for n in range(4)).result(5)
    place.drain(app)
    assert batches == [[0, 1], [0, 1], [0], [1], [2, 3], [2, 3], [2], [3]]
    assert place.dead(topic) == []


def test_what_cannot_be_decoded_dies_once_and_the_others_are_handled(place, app, topic):
    batches = []

    @app.consumer(topic, batch=Batch(max=4, wait=0.02), retry=Retry(3, backoff=QUICK))
    def read(steps: list[Step]):
        batches.append([step.n for step in steps])
        if len(batches) < 3:
            raise ValueError("not yet")

    topic.encode = lambda value: b"rubbish" if value.n == 1 else msgspec.json.encode(value)
    for n in range(4):
        topic.send(Step("k", n))
    app.events.flush(5)
    place.drain(app)
    assert batches == [[0, 2, 3]] * 3
    assert [row[2] for row in app.events.read("steps.dead", 0, 0, 9)] == [b"rubbish"]
    assert app.observers.counts["read", "dead"] == 1
    assert app.observers.counts["read", "done"] == 3


def test_a_batch_of_nothing_decodable_calls_nobody(place, app, topic):
    @app.consumer(topic, batch=Batch(max=3, wait=0.02), responds=[app.topic("out", int)])
    def read(steps: list[Step]) -> list[int]:
        raise AssertionError

    topic.encode = lambda value: b"rubbish"
    for n in range(3):
        topic.send(Step("k", n))
    app.events.flush(5)
    place.drain(app)
    assert len(app.events.read("steps.dead", 0, 0, 9)) == 3


def test_null_values_are_left_out_of_a_batch_or_none_in_it(place, app, topic):
    without, with_ = [], []

    @app.consumer(topic, batch=Batch(max=3, wait=0.02), retry=Retry(1, backoff=QUICK))
    def strict(steps: list[Step]):
        without.append(steps)
        if len(without) == 1:
            raise ValueError("once")

    @app.consumer(topic, batch=Batch(max=3, wait=0.02))
    def lenient(steps: list[Step | None]):
        with_.append(steps)

    topic.send(None, key="k")
    topic.send_many([Step("k", 1), Message(value=None, key="k")]).result(5)
    place.drain(app)
    assert without == [[Step("k", 1)]] * 2
    assert with_ == [[None, Step("k", 1), None]]
    assert app.observers.counts["strict", "skipped"] == 2
    assert app.observers.counts["strict", "done"] == 1


def test_a_rejected_batch_dies_one_by_one(place, app, topic):
    @app.consumer(topic, batch=Batch(max=3, wait=0.02))
    def read(steps: list[Step]):
        if any(step.n == 1 for step in steps):
            raise Reject("one is bad")

    topic.send_many(Step("k", n) for n in range(3)).result(5)
    place.drain(app)
    assert [msgspec.json.decode(m.value)["n"] for m in place.dead(topic)] == [1]


def test_answers_of_a_batch_leave_when_it_is_done(place, app, topic):
    out = app.topic("out", int, partitions=1)
    notes = app.topic("notes", str, partitions=1)
    tries = []

    @app.consumer(topic, batch=Batch(max=3, wait=0.02), retry=Retry(2, backoff=QUICK), responds=[out, notes])
    def read(steps: list[Step], respond: Respond):
        tries.append(1)
        for step in steps:
            respond(out, step.n)
        respond(notes, f"{len(steps)} steps")
        if len(tries) == 1:
            raise ValueError("once")

    topic.send_many(Step("k", n) for n in range(3)).result(5)
    place.drain(app)
    assert place.values(out) == [0, 1, 2] and place.values(notes) == ["3 steps"]


def test_a_returned_list_is_one_answer_for_each(place, app, topic):
    out = app.topic("out", int, partitions=1)

    @app.consumer(topic, batch=Batch(max=3, wait=0.02), responds=[out])
    def read(steps: list[Step]) -> list[int]:
        return [step.n * 10 for step in steps]

    topic.send_many(Step("k", n) for n in range(3)).result(5)
    place.drain(app)
    assert place.values(out) == [0, 10, 20]


def test_a_batch_uses_tables_under_any_key_it_has(place, app, topic):
    totals = app.table("totals", int)
    refused = []

    @app.consumer(topic, batch=Batch(max=6, wait=0.02), tables=[totals])
    def read(steps: list[Step]):
        for step in steps:
            totals[step.key] = totals.get(step.key, 0) + 1
        try:
            totals["somebody"] = 1
        except Exception as error:
            refused.append(type(error).__name__)

    topic.send_many(Step(f"k{n % 2}", n) for n in range(6)).result(5)
    place.drain(app)
    with totals.open() as view:
        assert dict(view.items()) == {"k0": 3, "k1": 3}
    assert refused == ["TableError"]


def test_a_topic_of_lists_is_no_batch(place, app):
    topic = app.topic("lists", list[int])
    seen = []

    @app.consumer(topic)
    def read(numbers: list[int]):
        seen.append(numbers)

    topic.send([1, 2, 3]).result(5)
    place.drain(app)
    assert seen == [[1, 2, 3]]


def test_batches_of_different_partitions_are_in_work_at_the_same_time(place, app):
    topic = app.topic("many", Step, partitions=2)
    meeting = threading.Barrier(2, timeout=10)

    @app.consumer(topic, concurrency=2, order="partition", batch=Batch(max=5, wait=0.02), retry=Retry(0))
    def read(steps: list[Step]):
        meeting.wait()

    topic.send_many(Message(value=Step("k", n), partition=n % 2) for n in range(10)).result(5)
    place.drain(app)
    assert place.dead(topic) == []
