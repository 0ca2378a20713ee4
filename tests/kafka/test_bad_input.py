"""What may lie in a real topic, and what may happen to it: nothing of it crashes, stalls or loses what exists."""

import itertools
import logging
import random
import threading
import time

import confluent_kafka as driver
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewTopic
from test_broker import drain, make_anew, running, sent, wait_for

from barnabas import App, Delivery
from barnabas.backends.kafka_log import KafkaLog
from barnabas.backends.kafka_options import COMMON
from barnabas.errors import BackendError, PositionLost
from barnabas.worker import Worker

MARKS = "reason exception traceback attempts group topic partition offset timestamp time"


def produce(app: App, topic: str, records, **options) -> None:
    """As another program would: (key, value, headers) each."""
    producer = driver.Producer({**COMMON, "bootstrap.servers": app.events.servers, "message.max.bytes": 2_000_000, **options})
    for key, value, headers in records:
        while True:
            try:
                producer.produce(f"{app.events.prefix}{topic}", value, key, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


def rubbish(count: int, large: int = 0):
    """Random records, one in 10,000 as large as Kafka takes by default."""
    choose = random.Random(7)
    for n in range(count):
        size = large if large and n % 10_000 == 0 else choose.randrange(200)
        value = choose.randbytes(size) if size == large else choose.choice([None, b"", b"{", b"null", choose.randbytes(size)])
        key = choose.choice([None, b"", "k", choose.randbytes(5), choose.randbytes(choose.randrange(1, 200))])
        headers = choose.choice([None, [("a", None), ("", b""), ("a", choose.randbytes(20))], [("\u00fc", "text")]])
        yield key, value, headers


def ends(app: App, topic: str) -> dict[int, tuple[int, int]]:
    parts = next(state.partitions for state in app.events.topics() if state.name == topic)
    return {number: (first, end) for number, (first, end, _) in enumerate(parts)}


@pytest.mark.parametrize("options, count", [({}, 100_000), ({"concurrency": 5}, 10_000)], ids=str)
def test_random_records_do_no_harm(make, options, count) -> None:
    app, seen, lock = make(), [], threading.Lock()
    topic = app.topic("orders", bytes, codec="raw", partitions=3)

    @app.consumer(topic, **options)
    def read(value: bytes | None, delivery: Delivery) -> None:
        with lock:
            seen.append((delivery.partition, delivery.offset))

    app.events  # noqa: B018 - creates the topics
    produce(app, "orders", rubbish(count, large=1_000_000))
    drain(app, 60)
    assert len(seen) == count
    assert sorted(seen) == [(n, offset) for n, (_, end) in ends(app, "orders").items() for offset in range(end)]


@pytest.mark.parametrize("value", [None, b""])
def test_nothing_but_empty_values_is_read_too(make, value) -> None:
    app, seen = make(), []
    topic = app.topic("orders", bytes, codec="raw", partitions=1)

    @app.consumer(topic)
    def read(value: bytes | None) -> None:
        seen.append(value)

    app.events  # noqa: B018
    produce(app, "orders", [(None, value, None)] * 10)
    drain(app)
    assert seen == [value] * 10


def test_what_cannot_be_decoded_is_dead_with_its_reason_and_all_headers(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", dict[str, int], partitions=3)

    @app.consumer(topic, name="read")
    def read(value: dict[str, int] | None) -> None:
        seen.append(value)

    app.events  # noqa: B018
    records = [*rubbish(2_000), ("good", b'{"a":1}', None)]
    produce(app, "orders", records)
    drain(app)
    fine = [value for _, value, _ in records if value in (None, b'{"a":1}')]
    assert len(seen) == len(fine)
    letters = [row for n, (_, end) in ends(app, "orders.dead").items() for row in app.events.read("orders.dead", n, 0, end)]
    assert len(letters) == len(records) - len(fine)
    names = [f"barnabas-{mark}" for mark in MARKS.split()]
    assert all([name for name, _ in row[3][-len(names) :]] == names for row in letters)
    whence = {(row[3][-5][1], row[3][-4][1], row[3][-3][1]) for row in letters if row[3][-10][1].startswith(b"undecodable: ")}
    assert len(whence) == len(letters)  # each from another place


@pytest.mark.parametrize("options", [{}, {"concurrency": 10}], ids=str)
def test_a_compacted_topic_with_gaps_is_read_to_its_end(make, options) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read", **options)(seen.append)
    config = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.001", "delete.retention.ms": "0"}
    app.events  # noqa: B018
    name = f"{app.events.prefix}orders"
    app.events.admin.delete_topics([name])[name].result(10)
    wait_for(lambda: "orders" not in app.events.metadata(), "deleted")
    app.events.admin.create_topics([NewTopic(name, 1, 1, config=config)])[name].result(10)

    def stored() -> list[int]:
        return [row[0] for row in app.events.read("orders", 0, 0, ends(app, "orders")[0][1])]

    for n in range(300):
        topic.send(n, key=f"k{n % 7}" if n % 10 else f"once{n}").result(10)
    for n in itertools.count(1000):  # the segment that is written to is not compacted
        topic.send(n, key="last").result(10)
        if len(offsets := stored()) < 200:
            break
        time.sleep(0.3)
        assert n < 1100, "never compacted"
    drain(app)
    assert len(seen) >= 30 + 7 and offsets != list(range(offsets[0], offsets[-1] + 1))
    [at] = [position for position in app.events.positions() if position.topic == "orders"]
    assert (at.offset, at.done) == (at.end, [])
    topic.send(5000, key="last").result(10)
    drain(app)
    assert seen[-1] == 5000 and seen.count(5000) == 1


def cut(app: App, topic: str, offset: int) -> None:
    """Delete what is stored before this offset of partition 0."""
    where = TopicPartition(f"{app.events.prefix}{topic}", 0, offset)
    for future in app.events.admin.delete_records([where]).values():
        future.result(10)


def left_behind(app: App) -> tuple:
    """A topic with 15 to 19 in it, and what a consumer saw of it whose position is 10."""
    topic, seen = app.topic("orders", int, partitions=1), []
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(10)).result(10)
    drain(app)
    topic.send_many(range(10, 20)).result(10)
    cut(app, "orders", 15)
    return topic, seen


@pytest.mark.parametrize("policy", [None, "earliest", "latest"])
def test_a_position_no_longer_stored_goes_on_by_policy_and_says_so(make, monkeypatch, caplog, policy) -> None:
    tries, found = [], KafkaLog._out_of_range

    def out_of_range(source: KafkaLog, *args: object) -> None:
        tries.append(args)
        if len(tries) == 1:  # the driver tells of it but once
            raise BackendError("the ends of topics: it did not answer in time")
        found(source, *args)

    monkeypatch.setattr(KafkaLog, "_out_of_range", out_of_range)
    app = make(kafka={"auto.offset.reset": policy} if policy else {})
    topic, seen = left_behind(app)
    with running(app) as worker:
        wait_for(lambda: "is no longer stored" in caplog.text, "said")
        wait_for(worker.drained, "drained")
        topic.send(20).result(10)
        wait_for(lambda: 20 in seen, "goes on")
    assert seen == [*range(10), *([] if policy == "latest" else range(15, 20)), 20]
    [said] = [record for record in caplog.records if "is no longer stored" in record.getMessage()]
    assert said.levelno == logging.ERROR
    assert "shop-read: its position 10 in orders[0]" in said.getMessage()
    where = "latest, 20" if policy == "latest" else "earliest, 15"
    assert said.getMessage().endswith(f"it goes on at the {where}")


def test_a_position_no_longer_stored_stops_the_process_if_the_policy_says_so(make) -> None:
    app = make(kafka={"auto.offset.reset": "error"})
    _, seen = left_behind(app)
    for _ in range(2):  # it does not go away by itself
        worker = Worker(app)
        worker.start()
        wait_for(lambda w=worker: w.failed() is not None, "stopped")
        assert not worker.stop(10.0)
        assert isinstance(worker.failed(), PositionLost)
        assert "orders[0]: the position of 'shop-read', 10, is no longer stored" in str(worker.failed())
        assert "barnabas reset" in str(worker.failed())
    assert seen == list(range(10))
    [at] = [each for each in app.events.positions() if each.topic == "orders"]
    app.events.place([at._replace(offset=17)])
    drain(app)
    assert seen[10:] == [17, 18, 19]


def test_what_is_deleted_in_front_of_a_running_worker_is_passed_over(make, caplog) -> None:
    options = {"queued.max.messages.kbytes": 100, "max.partition.fetch.bytes": 100_000, "fetch.max.bytes": 1_100_000}
    app, seen, free = make(kafka=options), [], threading.Event()
    topic = app.topic("orders", bytes, codec="raw", partitions=1)

    @app.consumer(topic, name="read")
    def read(value: bytes, delivery: Delivery) -> None:
        free.wait(20)
        seen.append(delivery.offset)

    topic.send_many([bytes(90_000)] * 200).result(20)
    with running(app) as worker:
        wait_for(lambda: any(crew.busy() for runner in worker.runners for crew in runner.crews), "in hand")
        cut(app, "orders", 195)
        free.set()
        wait_for(lambda: seen[-1:] == [199] and worker.drained(), "drained")
    assert seen == [*range(len(seen) - 5), *range(195, 200)] and "is no longer stored" in caplog.text


def make_larger(app: App, topic: str, pause: float) -> None:
    """Make the topic anew, and put more into it than it had."""
    make_anew(app, topic, lambda: time.sleep(pause) is None)
    produce(app, topic, [("k", str(n).encode(), None) for n in range(100, 200)])


def test_a_topic_made_anew_while_nobody_ran_is_read_from_its_beginning(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(20)).result(10)
    drain(app)
    make_larger(app, "orders", 0)
    drain(app)
    assert seen == [*range(20), *range(100, 200)]


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_a_topic_made_anew_is_read_from_its_beginning_even_if_it_is_longer_than_the_old(make, caplog, pause) -> None:
    app, seen = make(session_timeout=6.0), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(20)).result(10)
    with running(app) as worker:
        wait_for(lambda: len(seen) == 20 and worker.drained(), "drained")
        make_larger(app, "orders", pause)
        wait_for(lambda: {*range(100, 200)} <= {*seen}, "read again", 60)
        wait_for(lambda: sent(topic, 200), "sent again")
        wait_for(lambda: 200 in seen, "goes on", 60)
    assert sorted(set(seen)) == [*range(20), *range(100, 201)] and len(seen) < 300
    assert "topic 'orders' was deleted and made anew; it is read from its beginning" in caplog.text
