"""What only a real Kafka shows: its own tools' records, transactions, compaction, topics that go away, brokers that die."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import confluent_kafka as driver
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewTopic
from servers import murmur2

from barnabas import App, Delivery, Message, dead
from barnabas.backends import kafka, kafka_admin, kafka_log
from barnabas.backends.kafka_admin import Change
from barnabas.backends.kafka_group import KafkaMember
from barnabas.backends.kafka_log import KafkaLog
from barnabas.backends.kafka_options import COMMON
from barnabas.engine.observe import Statistics
from barnabas.engine.runner import Runner
from barnabas.errors import BackendError, DeclarationError, Reject, SendError, UnknownTopic, ValueTooLarge
from barnabas.ports import Part
from barnabas.retry import Retry
from barnabas.worker import Worker

DEV = [sys.executable, str(Path(__file__).parents[2] / "dev" / "kafka")]


def wait_for(condition, what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextmanager
def running(app: App) -> Iterator[Worker]:
    worker = Worker(app)
    worker.start()
    try:
        yield worker
    finally:
        assert not worker.stop(10.0)


def drain(app: App, seconds: float = 30.0) -> None:
    with running(app) as worker:
        wait_for(worker.drained, "drained", seconds)


def test_a_missing_topic_fails_its_send_at_once_and_a_start_in_a_sentence(make) -> None:
    app = make(create_topics=False)
    topic = app.topic("orders", int)
    app.consumer(topic, name="read")(lambda n: None)
    began = time.monotonic()
    with pytest.raises(UnknownTopic, match=r"has no topic 'orders'.*barnabas topics apply"):
        topic.send(1).result(10)
    with pytest.raises(UnknownTopic, match=r"'orders', 'orders\.dead', 'orders\.retry\.shop-read'.*--create-topics"):
        Worker(app).start()
    assert time.monotonic() - began < 5


def test_a_send_to_a_topic_that_was_deleted_since_fails_soon(make) -> None:
    app = make()
    topic = app.topic("orders", int, partitions=1)
    topic.send(1).result(10)
    name = f"{app.events.prefix}orders"
    app.events.admin.delete_topics([name])[name].result(10)
    wait_for(lambda: "orders" not in app.events.metadata(), "deleted")
    error = topic.send(2).exception(25)  # else of half a minute and more
    assert isinstance(error, UnknownTopic) or "_DESTROY" in str(error), error  # the driver, where it was just at that partition


def test_what_is_left_when_its_producer_fails_for_good_in_the_close_is_told(make, monkeypatch, caplog) -> None:
    app = make(kafka={"linger.ms": 60_000})
    topic = app.topic("orders", int)
    future = topic.send(1)  # the driver waits for more
    line = app.events.line
    real = line.producer

    class Failing:
        def __len__(self) -> int:
            return len(real)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def flush(self, timeout: float) -> int:
            if line.fatal:
                return real.flush(timeout)
            raise driver.KafkaException(driver.KafkaError(driver.KafkaError._FATAL))

    monkeypatch.setattr(line, "producer", Failing())
    app.close()
    assert future.done() and isinstance(future.exception(), SendError)
    assert "1 messages could not be stored before the end" in caplog.text
    assert not any(line in idle for idle in kafka._idle.values())  # the next app gets another


def test_a_message_that_the_broker_says_it_has_but_not_where_counts_as_failed(make, monkeypatch) -> None:
    app = make()
    topic = app.topic("orders", int)
    topic.send(1).result(30)
    real = app.events._producer

    class Doubtful:
        def __len__(self) -> int:
            return len(real)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def produce(self, name, value, key, where, done, *rest) -> None:
            done(None, driver.Message(topic=name, partition=0, offset=7 if value == b"3" else -1))

    monkeypatch.setattr(app.events, "_producer", Doubtful())
    for future in (topic.send(2), topic.send_many([2, 3]), topic.send_many([3, 2])):
        with pytest.raises(SendError, match=r"'orders': .* says that it has it already, and not where.*send it again"):
            future.result(5)
    assert topic.send_many([3, 3]).result(5)


def test_topics_are_planned_and_applied(make) -> None:
    app = make(create_topics=False, topics={"orders": {"compact": True, "replication": 1}})
    app.topic("orders", int, partitions=2)
    kinds = [(change.kind, change.topic, change.what) for change in app.events.plan(app.all_topics())]
    assert kinds == [("create", "orders", 2), ("create", "orders.dead", 2)]
    app.events.apply(app.events.plan(app.all_topics()))
    assert app.events.plan(app.all_topics()) == []
    more = make(create_topics=False)
    topic = more.topic("orders", int, partitions=3, limit=3_000_000)
    more.consumer(topic, name="read")(lambda n: None)
    with pytest.raises(DeclarationError, match=r"partitions=3, but .* has it with 2; .*barnabas topics apply"):
        topic.send(1).result(10)
    plan = more.events.plan(more.all_topics())
    assert [(c.kind, c.topic) for c in plan] == [
        ("create", "orders.retry.shop-read"), ("raise", "orders"), ("raise", "orders.dead"),
        ("set", "orders"), ("differs", "orders"), ("set", "orders.dead"),
    ]  # fmt: skip
    more.events.apply(plan)
    assert [change.kind for change in more.events.plan(more.all_topics())] == ["differs"]
    fewer = make(create_topics=False, topics={"orders": {"replication": 3}})
    fewer.topic("orders", int, partitions=1, limit=3_000_000)
    plan = fewer.events.plan(fewer.all_topics())
    assert {change.kind for change in plan} == {"keep", "differs"}
    assert [change for change in plan if change.topic == "orders"][1:] == [
        Change("differs", "orders", "replication", (1, 3, "kafka-reassign-partitions")),
        Change("differs", "orders", "cleanup.policy", ("compact", "delete", "compact = false")),
    ]
    undone = make(create_topics=False, topics={"orders": {"compact": False}})
    undone.topic("orders", int, limit=3_000_000)
    undone.events.apply(undone.events.plan(undone.all_topics()))
    assert undone.events.plan(undone.all_topics()) == []


def test_what_the_broker_takes_for_too_large_has_an_error_of_its_own(make) -> None:
    app = make()
    small = app.topic("small", bytes, codec="raw", limit=1000, partitions=1)
    assert small.send(b"x").result(10).offset == 0
    assert small.send_many([b"x" * 900] * 2000).result(30) == 2000  # Kafka takes a batch as a whole, or not
    small.limit = 10**7  # the broker knows better
    with pytest.raises(ValueTooLarge, match=r"'small' is larger than .*max\.message\.bytes"):
        small.send(b"x" * 5_000_000).result(10)
    assert small.send(b"y").result(10).offset == 2001


def test_with_no_broker_sends_wait_and_then_say_what_to_do() -> None:
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", kafka={"delivery.timeout.ms": 2500, "linger.ms": 0})
    topic = app.topic("orders", int)
    future = topic.send(1)
    assert not future.done()
    began = time.monotonic()
    more = [topic.send(n) for n in range(5)]
    assert time.monotonic() - began < 1.0  # who sends is held up but once
    for each in (future, *more):
        with pytest.raises(SendError, match=r"127\.0\.0\.1:1 did not answer in time.*delivery\.timeout\.ms"):
            each.result(20)
    app.close()
    app = App("shop", events="kafka://127.0.0.1:1", jobs="memory:", send_timeout=0.5)
    future = app.topic("orders", int).send(1)
    app.close()
    with pytest.raises(SendError, match="did not answer in time"):  # of what could not leave before the end, too
        future.result(5)


def test_a_dead_letter_that_the_broker_refuses_as_too_large_goes_without_its_value(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", bytes, codec="raw", partitions=1)

    @app.consumer(topic, name="read", retry=Retry(0))
    def read(value: bytes) -> None:
        seen.append(len(value))
        raise Reject("bad")

    app.events.apply([Change("set", "orders.dead", "max.message.bytes", ("", "3000"))])  # as somebody else made it
    topic.send_many([b"x" * 5000, b"y" * 10]).result(10)
    drain(app)
    letters = [(value, dict(headers)) for _, _, value, headers, _ in app.events.read("orders.dead", 0, 0, 10)]
    letters.sort(key=lambda letter: letter[1]["barnabas-offset"])
    assert [value for value, _ in letters] == [None, b"y" * 10] and seen == [5000, 10]
    assert letters[0][1]["barnabas-value-left-out"] == b"5000" and letters[0][1]["barnabas-reason"] == b"rejected: bad"


def test_a_dead_letter_whose_headers_are_too_large_goes_without_the_long_ones_and_is_retried_with_them(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    headers = [("trace", b"abc"), ("note", b"n" * 5000), ("note", b"m" * 70), ("list", b"l" * 1500)]

    @app.consumer(topic, name="read", retry=Retry(0))
    def read(value: int | None, delivery: Delivery) -> None:
        seen.append((value, delivery.headers))
        if len(seen) <= 2:
            raise ValueError

    app.events.apply([Change("set", "orders.dead", "max.message.bytes", ("", "1500"))])  # as somebody else made it
    topic.send(7, headers=headers).result(10)
    topic.send(None, key="k", headers=headers).result(10)
    drain(app)
    letters = [(value, dict(headers)) for _, _, value, headers, _ in app.events.read("orders.dead", 0, 0, 10)]
    assert [(value, said["trace"], said["note"]) for value, said in letters] == [(None, b"abc", b"m" * 70)] * 2
    assert not any("list" in said for _, said in letters) and letters[0][1]["barnabas-value-left-out"] == b"1"
    assert 70 < int(letters[0][1]["barnabas-headers-left-out"]) < 1500
    came = dead.deal(app, list(dead.letters(app)), retry=True)
    assert (came.done, came.refused) == (2, [])
    drain(app)
    assert len(seen) == 4 and sorted(seen[2:], key=repr) == sorted(seen[:2], key=repr) == [(7, headers), (None, headers)]


@pytest.mark.parametrize("order", ["partition", "key"])
@pytest.mark.parametrize("batch", [False, True])
def test_an_output_that_the_broker_refuses_as_too_large_ends_as_a_dead_letter_of_its_cause(make, batch, order) -> None:
    app = make()
    topic, out = app.topic("orders", bytes, codec="raw", partitions=1), app.topic("out", bytes, codec="raw", partitions=1)

    def answer(values: list[bytes], delivery: list[Delivery]) -> None:
        for value in values:
            out.send(value, key=str(len(value)))

    def answer_one(value: bytes, delivery: Delivery) -> None:
        answer([value], [delivery])

    app.consumer(topic, name="read", order=order, retry=Retry(2))(answer if batch else answer_one)
    app.events.apply([Change("set", "out", "max.message.bytes", ("", "3000"))])  # as somebody else made it
    topic.send_many([b"a" * 10, b"b" * 5000, b"c" * 11]).result(10)
    drain(app, 20)
    read = app.events.read
    [(_, _, value, headers, _)] = read("orders.dead", 0, 0, 10)
    told = dict(headers)
    assert value == b"b" * 5000 and (told["barnabas-offset"], told["barnabas-topic"]) == (b"1", b"orders")
    assert told["barnabas-reason"].startswith(b"an output cannot be stored: a message for topic 'out' is larger than")
    assert told["barnabas-exception"] == b"ValueTooLarge"
    values = [value for _, _, value, _, _ in read("out", 0, 0, 100)]
    assert set(values) == {b"a" * 10, b"c" * 11} and len(values) == (4 if batch else 2)  # a batch's others run again, alone


def test_so_does_a_job_and_what_is_too_large_for_its_retry_topic_or_the_process_stops(make) -> None:
    app, attempts = make(), []
    topic, out = app.topic("orders", bytes, codec="raw", partitions=1), app.topic("out", bytes, codec="raw", partitions=1)

    @app.job
    def make_large(size: int) -> None:
        out.send(b"x" * size)

    @app.consumer(topic, name="read", retry=Retry(3, ordered=False), on_dead="topic")
    def read(value: bytes) -> None:
        attempts.append(len(value))
        raise ValueError

    for name in ("out", "orders.retry.shop-read"):
        app.events.apply([Change("set", name, "max.message.bytes", ("", "3000"))])
    make_large.enqueue_many([(5000,), (10,)]).result(10)
    topic.send(b"x" * 4000).result(10)
    drain(app, 20)
    [job] = app.jobs.find_jobs("dead")
    assert b"larger than" in job.payload and attempts == [4000]
    assert [len(value) for _, _, value, _, _ in app.events.read("out", 0, 0, 9)] == [10]
    assert [len(value) for _, _, value, _, _ in app.events.read("orders.dead", 0, 0, 9)] == [4000]
    strict = make()
    topic, out = strict.topic("orders", bytes, codec="raw"), strict.topic("out", bytes, codec="raw")

    @strict.consumer(topic, name="stop", on_dead="stop")
    def stop(value: bytes) -> None:
        out.send(value)

    strict.events.require(strict.all_topics())
    worker = Worker(strict)
    worker.start()
    wait_for(worker.failed, "stopped")
    assert not worker.stop(10.0) and "an output cannot be stored" in str(worker.failed())
    assert strict.events.committed("shop-stop", [("orders", 0)]).get(("orders", 0), (0, ""))[0] == 0


def test_outputs_that_are_refused_for_their_time_or_for_want_of_a_key_make_dead_letters_and_say_why(make) -> None:
    first = make(topics={"out": {"compact": True}})
    compacted = first.topic("out", int, partitions=1)
    with pytest.raises(SendError, match="the topic is compacted, it keeps the last message of each key, and this has none"):
        compacted.send(0)
    compacted.send(9, key="9").result(10)
    app = make()  # whose settings do not say so
    topic, out, plain = (app.topic(name, int, partitions=1) for name in ("orders", "out", "plain"))

    @app.consumer(topic, name="read")
    def read(n: int) -> None:
        out.send(n, key=str(n) if n != 1 else None)
        if n == 2:
            plain.send(n, timestamp=time.time() + 86_400)

    topic.send_many(range(4)).result(10)
    drain(app, 20)
    letters = [(value, dict(headers)["barnabas-reason"]) for _, _, value, headers, _ in app.events.read("orders.dead", 0, 0, 10)]
    assert [value for value, _ in letters] == [b"1", b"2"] and b"takes no message without a key" in letters[0][1]
    assert b"message.timestamp.after.max.ms" in letters[1][1]
    assert {value for _, _, value, _, _ in app.events.read("out", 0, 0, 9)} == {b"9", b"0", b"2", b"3"}


def test_a_member_that_another_fenced_says_so_and_does_not_claim_to_work(make, caplog) -> None:
    apps = [make(kafka={"group.instance.id": "one"}, session_timeout=6.0) for _ in range(2)]
    for app in apps:
        app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)
    with running(apps[0]):
        wait_for(lambda: app.events.committed("shop-read", [("orders", 0)]), "assigned")
        [member] = app.events._describe([f"{app.events.prefix}shop-read"]).popitem()[1].members
        assert member.group_instance_id == "one-shop-read"
        with running(apps[1]):
            wait_for(lambda: "fenced by other consumer" in caplog.text, "fenced")
            time.sleep(3)
        assert "then start the process again" in caplog.text
    assert "the backend works again" not in caplog.text


def test_each_process_is_a_static_member_of_its_own(make, tmp_path) -> None:
    app = make()
    app.consumer(app.topic("orders", int, partitions=2), name="read")(lambda n: None)
    code = ["from barnabas import App", 'app = App("shop", kafka={"group.instance.id": "env:POD"})']
    (tmp_path / "shop.py").write_text("\n".join([*code, 'app.consumer(app.topic("orders", int), name="read")(lambda n: None)']))
    words = [sys.executable, "-m", "barnabas", "run", "shop:app", "--processes", "2", "--events", app.events.url]
    command = subprocess.Popen([*words, "--create-topics"], cwd=tmp_path, env={**os.environ, "POD": "pod7"})
    group = f"{app.events.prefix}shop-read"

    def members() -> set[str]:
        return {member.group_instance_id for about in app.events._describe([group]).values() for member in about.members}

    try:
        wait_for(lambda: members() == {"pod7-1-shop-read", "pod7-2-shop-read"}, "two members")
    finally:
        command.terminate()
        assert command.wait(30) == 0


def test_kafkas_own_producer_chooses_the_same_partitions_and_its_records_are_read(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", bytes, codec="raw", partitions=7)

    @app.consumer(topic)
    def read(value: bytes, delivery: Delivery) -> None:
        seen.append((delivery.key, delivery.partition, list(delivery.headers), value))

    events = app.events
    keys = [f"key{n}" for n in range(50)] + ["ü", "a b", "x" * 300]
    tool = [*DEV, "tool", "ConsoleProducer", "--bootstrap-server", events.servers, "--topic", f"{events.prefix}orders"]
    tool += ["--property", "parse.key=true", "--property", "parse.headers=true"]
    lines = "".join(f"h:{n},g:2\t{key}\t{{}}\n" for n, key in enumerate(keys))
    subprocess.run(tool, input=lines.encode(), check=True, capture_output=True)
    drain(app)
    place = [(murmur2(key.encode()) & 0x7FFFFFFF) % 7 for key in keys]
    expected = [(key, place[n], [("h", str(n).encode()), ("g", b"2")], b"{}") for n, key in enumerate(keys)]
    assert sorted(seen) == sorted(expected)
    mine = {key: topic.send(b"1", key=key).result(10).partition for key in keys}
    assert mine == {key: partition for key, partition, _, _ in expected}


def test_aborted_records_and_markers_are_stepped_over(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    events = app.events
    producer = driver.Producer({**COMMON, "bootstrap.servers": events.servers, "transactional.id": events.prefix})
    producer.init_transactions(10)
    n = 0
    for end in ("commit", "abort", "commit", "abort"):
        producer.begin_transaction()
        for _ in range(5):
            producer.produce(f"{events.prefix}orders", str(n), "k")
            n += 1
        producer.flush()
        getattr(producer, f"{end}_transaction")(10)
    drain(app)  # to the end: what will never come is no lag
    assert seen == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    [at] = [p for p in events.positions() if p.topic == "orders"]
    assert at.offset == at.end == 24
    topic.send(99).result(10)
    drain(app)
    assert seen[10:] == [99]


def test_positions_of_others_are_gone_on_from_whatever_is_written_beside_them(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(10)).result(10)
    events = app.events
    where = TopicPartition(f"{events.prefix}orders", 0, 4, metadata="stream-time=12 ÿ")
    request = driver.ConsumerGroupTopicPartitions(f"{events.prefix}shop-read", [where])
    for future in events.admin.alter_consumer_group_offsets([request]).values():
        future.result(10)
    drain(app)
    assert seen == [4, 5, 6, 7, 8, 9]


def test_groups_of_others_cost_few_clients(make) -> None:
    app = make()
    topic, events = app.topic("orders", int, partitions=1), app.events
    app.consumer(topic, name="read")([].append)
    topic.send_many(range(10)).result(10)
    names = [f"other-{n}" for n in range(25)] + ["shop-read"]
    for name in names:
        with events._asking:
            events.asker(name).commit(offsets=[TopicPartition(f"{events.prefix}orders", 0, 4)], asynchronous=False)
            events._askers.pop(name).close()
    assert [(at.group, at.offset) for at in events.positions()] == [(name, 4) for name in sorted(names)]
    assert len(events._askers) == kafka_admin.ASKERS < 26
    assert [at.group for at in events.positions("shop-")] == ["shop-read"]
    with running(app):
        assert not events._askers  # who works has no more to ask


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_topic_that_is_made_anew_is_read_from_its_beginning(make, caplog, monkeypatch, protocol) -> None:
    monkeypatch.setattr(kafka_admin, "LOOK", 2.0)
    app, seen = make(session_timeout=6.0, kafka={"group.protocol": protocol}), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(20)).result(10)
    with running(app) as worker:
        wait_for(lambda: len(seen) == 20 and worker.drained(), "drained")
        make_anew(app, "orders", lambda: "topic 'orders' was deleted; `barnabas topics apply`" in caplog.text)
        wait_for(lambda: sent(topic, 100), "sent again")
        wait_for(lambda: 100 in seen, f"read again: {seen}", 60)
    assert caplog.text.count("was deleted") == 2  # that it was, and that it is there again
    assert f"{app.events.servers}: " not in caplog.text  # nothing is the matter with the cluster


def make_anew(app: App, topic: str, noticed: Callable[[], bool]) -> None:
    """Delete the topic, and once that is noticed make it again."""
    name = f"{app.events.prefix}{topic}"
    app.events.admin.delete_topics([name])[name].result(10)
    wait_for(lambda: topic not in app.events.metadata(), "deleted")
    wait_for(noticed, "noticed")
    app.events.admin.create_topics([NewTopic(name, 1, 1)])[name].result(10)


def sent(topic, value: int) -> bool:
    try:
        topic.send(value).result(10)
    except SendError:
        return False
    return True


@pytest.mark.parametrize("strategy", ["cooperative-sticky", "range"])
def test_what_was_paused_for_want_of_room_goes_on_after_a_doubt_about_its_claim(make, monkeypatch, strategy) -> None:
    """The driver keeps the pause of a partition that is taken away and given back."""
    monkeypatch.setattr(kafka_log, "PATIENCE", 0.1)
    app, seen, go = make(kafka={"partition.assignment.strategy": strategy}), [], threading.Event()
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(lambda n: (go.wait(30), seen.append(n)))
    topic.send_many(range(6000)).result(10)
    with running(app) as worker:
        source = worker.runners[0].source
        wait_for(lambda: any(claim.paused for claim in source._claims.values()), "paused")
        source._until = 0.0
        wait_for(lambda: source._until, "claimed anew")
        go.set()
        wait_for(worker.drained, "drained")
    assert sorted(set(seen)) == list(range(6000))


@pytest.mark.parametrize("options", [{}, {"partition.assignment.strategy": "range"}, {"group.protocol": "consumer"}])
def test_nothing_begins_of_partitions_that_were_given_back(make, options) -> None:
    """A worker may have such runs in hand: what it did of them would be done again by whoever has them now."""
    apps = [make(kafka=options) for _ in range(2)]
    for app in apps:
        app.consumer(app.topic("orders", int, partitions=6), name="read")(lambda n: None)
    with running(apps[0]) as worker:
        claims = worker.runners[0].source._claims
        wait_for(lambda: len(claims) == 12, "assigned")  # with those of its retry topic
        parts = [claim.part for claim in claims.values()]
        with running(apps[1]):
            wait_for(lambda: sum(part.closed for part in parts) >= 6, "given back")
            wait_for(lambda: len(claims) == 6, "rebalanced")
            assert [part.until for part in parts if part.closed] == [0.0] * sum(part.closed for part in parts)


@pytest.mark.parametrize("order", ["partition", "key"])
def test_what_is_kept_goes_on_when_what_goes_took_longer_than_a_term(make, monkeypatch, order) -> None:
    """The claims on all partitions end while one is waited for: what workers had in hand of the others is not forgotten."""
    apps, seen, going, since = [make(session_timeout=3.0) for _ in range(2)], [], set(), [0.0]

    def revoked(runner: Runner, parts: list[Part]) -> None:
        if not going and len(parts) < 12:
            since[0] = time.monotonic()
            going.update(part.partition for part in parts)
        return told(runner, parts)

    def read(n: int, delivery: Delivery) -> None:
        seen.append(n)
        time.sleep(0.005)
        while delivery.partition in going and time.monotonic() < since[0] + 2.5:
            time.sleep(0.005)

    told = Runner.revoked
    monkeypatch.setattr(Runner, "revoked", revoked)
    topics = [app.topic("orders", int, key=str, partitions=6) for app in apps]
    for app, topic in zip(apps, topics, strict=True):
        app.consumer(topic, name="read", concurrency=6, order=order)(read)
    with running(apps[0]) as worker:
        wait_for(lambda: len(worker.runners[0].source._claims) == 12, "assigned")
        topics[0].send_many(range(6000)).result(10)
        wait_for(lambda: len(seen) > 100, "at work")
        with running(apps[1]):
            wait_for(lambda: len(worker.runners[0].source._claims) == 6, "rebalanced")
            wait_for(worker.drained, "drained")
    assert going and len(set(seen)) == 6000


def test_a_freeze_before_a_claim_is_renewed_is_no_less_a_freeze(make, monkeypatch) -> None:
    app, ahead, doubts = make(), [0.0], []
    clock, lapse, renew = app.clock.monotonic, KafkaMember._lapse, KafkaMember._renew
    monkeypatch.setattr(app.clock, "monotonic", lambda: clock() + ahead[0], raising=False)

    def frozen(source: KafkaMember, *since: float) -> None:
        if source._claims and not ahead[0]:
            ahead[0] += source._session
        renew(source, *since)
        if ahead[0] and not doubts:
            doubts.append(max(claim.part.until for claim in source._claims.values()) - app.clock.monotonic())

    monkeypatch.setattr(KafkaMember, "_renew", frozen)
    monkeypatch.setattr(KafkaMember, "_lapse", lambda source: (doubts.append(0.0), lapse(source)))
    app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)
    with running(app):
        wait_for(lambda: len(doubts) > 1, "doubted")
    assert doubts[0] < 0


def test_partitions_that_come_while_the_claims_are_in_doubt_come_once(make, monkeypatch) -> None:
    app, told, fetch = make(), [], KafkaLog.fetch

    def doubtful(source: KafkaLog, *args: object) -> object:
        source._lapsed = not told
        return fetch(source, *args)

    monkeypatch.setattr(KafkaLog, "fetch", doubtful)

    @app.consumer(app.topic("orders", int, partitions=2), name="read")
    class Read:
        def process(self, n: int) -> None: ...

        def assigned(self, where: list[tuple[str, int]]) -> None:
            told.append(1)

        def revoked(self, where: list[tuple[str, int]]) -> None:
            told.append(-1)

    with running(app) as worker:
        runner = worker.runners[0]
        wait_for(lambda: told and not runner.source._lapsed and sum(told) == 1, "assigned, once")
        assert len(runner.parts) == 4
        parts = list(runner.parts)
    runner.revoked(parts)  # as it may come twice: once in doubt, and once for good
    assert told in ([1, -1], [1, -1, 1, -1])


def test_a_hook_that_takes_longer_than_a_term_is_called_once(make) -> None:
    app, told, seen = make(session_timeout=3.0), [], []
    topic = app.topic("orders", int, partitions=1)

    @app.consumer(topic, name="read")
    class Read:
        def process(self, n: int) -> None:
            seen.append(n)

        def assigned(self, where: list[tuple[str, int]]) -> None:
            told.append(where)
            time.sleep(2)

    with running(app):
        topic.send(1).result(10)
        wait_for(lambda: seen, f"handled: {told}")
    assert len(told) == 1


def test_what_was_done_before_a_handler_that_outlasts_its_grace_is_not_done_again(make) -> None:
    apps, done, stuck, over = [make() for _ in range(2)], ([], []), set(), threading.Event()

    async def read(n: int, delivery: Delivery) -> None:
        while n == 8 and not over.is_set():
            stuck.add(delivery.partition)
            await asyncio.sleep(0.01)
        done[0].append((delivery.partition, n))

    def read_on(n: int, delivery: Delivery) -> None:
        done[1].append((delivery.partition, n))

    topics = [app.topic("orders", int, key=str, partitions=2) for app in apps]
    apps[0].consumer(topics[0], name="read", concurrency=2, order="partition")(read)
    apps[1].consumer(topics[1], name="read")(read_on)
    keys = {murmur2(key.encode()) % 2**31 % 2: key for key in "abcdefgh"}
    topics[0].send_many(Message(value=n, key=keys[number]) for n in range(10) for number in range(2)).result(10)
    with running(apps[0]) as worker:
        worker.runners[0].grace = 0.2
        wait_for(lambda: len(stuck) == 2, "stuck")
        with running(apps[1]):
            wait_for(lambda: len(done[1]) >= 2, "handed over")
            over.set()
            wait_for(worker.drained, "drained")
    assert sorted(done[0] + done[1]) == [(number, n) for number in range(2) for n in range(10)]


def test_what_was_taken_before_an_error_is_handed_out_after_it(make, monkeypatch) -> None:
    app, seen, failed, hand_out = make(), [], [], KafkaLog._hand_out

    def failing(source: KafkaLog, now: float) -> None:
        hand_out(source, now)
        if source._found and not failed:
            failed.append(now)
            raise BackendError("away")

    monkeypatch.setattr(KafkaLog, "_hand_out", failing)
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    topic.send_many(range(100)).result(10)
    drain(app)
    assert failed and seen == list(range(100))


def test_a_member_that_has_to_join_anew_repeats_nothing(make, monkeypatch) -> None:
    monkeypatch.setattr(kafka_log, "COMMIT", 60.0)
    monkeypatch.setattr(kafka_log, "QUIET", 60.0)
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    with running(app) as worker:
        source = worker.runners[0].source
        for begin in (0, 10):
            topic.send_many(range(begin, begin + 10)).result(10)
            wait_for(lambda begin=begin: len(seen) >= begin + 10, "handled")
            source._broken, source._error = True, BackendError("refused")
            wait_for(lambda: not source._broken and source._claims, "joined anew")
        topic.send(20).result(10)
        wait_for(lambda: 20 in seen, "goes on")
    assert seen == list(range(21))


def test_statistics_of_the_clients_reach_observers_if_asked_for(make) -> None:
    app, told = make(kafka={"statistics.interval.ms": 200}), []
    app.observe(told.append)
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(lambda n: None)
    topic.send(1).result(10)
    with running(app):
        found = lambda: {each.kind: each for each in told if isinstance(each, Statistics)}  # noqa: E731
        wait_for(lambda: found().keys() == {"producer", "consumer"}, "told")
        wait_for(lambda: found()["consumer"].figures["rxmsgs"] == 1, "counted")
    assert found()["producer"].figures["txmsgs"] >= 1


def test_what_is_idle_is_committed_again_before_kafka_forgets_it(make, monkeypatch) -> None:
    app, commits = make(), []
    topic = app.topic("orders", int, partitions=2)
    app.consumer(topic, name="read")(lambda n: None)
    answered = KafkaMember._on_commit
    monkeypatch.setattr(KafkaMember, "_on_commit", lambda self, *a: (commits.append((time.monotonic(), a)), answered(self, *a)))
    monkeypatch.setattr(kafka_log, "KEEP", 1.5)
    with running(app) as worker:
        wait_for(worker.drained, "drained")
        wait_for(lambda: len([1 for _, (_, where) in commits if len(where) == 4]) >= 4, "committed again and again")
    assert all(error is None for _, (error, _) in commits)  # of the retry topic too, which nobody subscribes to


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_broker_that_goes_away_and_comes_back_loses_nothing(make, tmp_path, caplog, how) -> None:
    folder = ["--dir", str(tmp_path / "kafka")]
    servers = subprocess.run([*DEV, "start", *folder], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        app, seen, futures = make(servers=servers, session_timeout=3.0), [], []
        topic = app.topic("orders", int, partitions=3)
        app.consumer(topic, name="read")(seen.append)
        with running(app) as worker:
            for n in range(300):
                futures.append(topic.send(n))
                if n == 100:
                    wait_for(lambda: len(seen) > 50, "running")
                    pid = json.loads((tmp_path / "kafka" / "kafka.json").read_text())["nodes"][0]["pid"]
                    os.kill(pid, how)
                time.sleep(0.02)
            if how == signal.SIGKILL:
                subprocess.run([*DEV, "node", "1", *folder], check=True)
            else:
                os.kill(pid, signal.SIGCONT)
            assert [future.result(60).value for future in futures] == list(range(300))
            wait_for(lambda: len(set(seen)) == 300 and worker.drained(), "drained", 60)
            if how == signal.SIGKILL:  # one line a change
                said = [line for line in caplog.messages if line.startswith(f"{servers}: ")]
                assert len(said) == 2 and "all brokers down" in said[0] and said[1].endswith("works again"), said
        app.close()
    finally:
        subprocess.run([*DEV, "stop", *folder], check=True)


FORKING = """
import os, sys
from barnabas import App
from barnabas.worker import Worker

app = App("forking", events=sys.argv[1], jobs="memory:", create_topics=True)
numbers = app.topic("numbers", int, key=str, partitions=2)
seen = []
app.consumer(numbers, name="read")(seen.append)
worker = Worker(app)
worker.start()  # the parent's producer and consumer are open, and in use
numbers.send_many(range(100)).result(20)
child = os.fork()
if child == 0:
    numbers.send_many(range(100, 200)).result(20)
    sys.exit(0)  # ends as any program does: what is open is closed
assert os.waitpid(child, 0)[1] == 0, "the child"
numbers.send_many(range(200, 300)).result(20)
while not worker.drained():
    assert worker.failed() is None
held = worker.stop(10.0)
app.close()
print(sorted(seen) == [*range(300)], held)
"""


def test_a_forked_child_opens_clients_of_its_own_and_its_parent_goes_on(make) -> None:
    url = make().settings.events
    done = subprocess.run([sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "True []\n"), done.stderr
    assert "Traceback" not in done.stderr
