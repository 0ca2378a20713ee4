"""Operators' commands on a real Kafka in odd states, and what worker processes say of themselves there."""

import signal
import subprocess
import sys
import threading
import time

import confluent_kafka as driver
import pytest
from test_broker import drain, running, wait_for

from barnabas import Delivery, Retry, dead, inspect, lag, processes
from barnabas.backends import kafka_doors
from barnabas.backends.kafka_admin import Change
from barnabas.cli.loading import Wrong
from barnabas.cli.processes import _pause
from barnabas.errors import Refused
from barnabas.processes import Pause


@pytest.mark.parametrize("options", [{"max.poll.interval.ms": 30_000}, {"group.instance.id": "one", "session.timeout.ms": 9000}])
def test_options_of_members_do_not_keep_operators_out(make, options) -> None:
    app = make(kafka=options)
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")([].append)
    topic.send(7).result(10)
    assert [message.value for message in inspect.read(app, "orders")] == [b"7"]
    assert [(group.open, group.state) for group in lag.groups(app)] == [(1, "never ran")]


def test_what_comes_is_followed_at_once_however_many_partitions_there_are(make) -> None:
    app, came = make(), []
    topic = app.topic("orders", int, partitions=12)
    topic.send(0, partition=0).result(10)

    def follow() -> None:
        for _ in inspect.read(app, "orders", "latest", follow=True):
            came.append(time.monotonic())

    threading.Thread(target=follow, daemon=True).start()
    took = []
    for n in range(4):
        time.sleep(1.0)
        sent = time.monotonic()
        topic.send(n, partition=5).result(10)
        wait_for(lambda n=n: len(came) > n, "followed")
        took.append(came[n] - sent)
    assert sorted(took)[1] < 1.5, took


def test_more_dealt_with_than_can_be_kept_is_refused_and_nothing_is_forgotten(make) -> None:
    app = make()
    app.topic("orders", int, partitions=1).send_many(range(4000)).result(10)

    def finish(offsets: range) -> int:
        return app.events.finish("shop-dead", [("orders", 0, offset, None) for offset in offsets])

    assert finish(range(0, 2000, 2)) == 1000
    with pytest.raises(Refused, match=r"orders\[0\]: .* 1,999 stretches, more than can be kept.*the oldest"):
        finish(range(2000, 4000, 2))
    [at] = app.events.positions("shop-dead")
    assert (at.offset, at.done) == (1, [(n, n + 1) for n in range(2, 2000, 2)])
    assert finish(range(4000)) == 3000
    assert [(at.offset, at.done) for at in app.events.positions("shop-dead")] == [(4000, [])]


RETRIER = """
import sys
import confluent_kafka
from barnabas import App, dead
from barnabas.errors import Refused

app = App("shop", events=sys.argv[1])
topic = app.topic("orders", int, partitions=2)
app.consumer(topic, name="read")(lambda n: None)

class Producer(confluent_kafka.Producer):
    def send_offsets_to_transaction(self, *args):
        if "early" in sys.argv:
            self.hang()
        super().send_offsets_to_transaction(*args)

    def commit_transaction(self, *args):
        if "late" in sys.argv:
            self.hang()
        super().commit_transaction(*args)

    def hang(self):
        print("sent", flush=True)
        sys.stdin.readline()

confluent_kafka.Producer = Producer
try:
    dead.deal(app, dead.letters(app), retry=True)
except Refused as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("how", ["overtaken", "killed"])
def test_letters_are_retried_once_by_several_operators_and_after_one_that_was_killed(make, tmp_path, how, when) -> None:
    app, broken, seen = make(), [True], []
    topic = app.topic("orders", int, partitions=2)

    @app.consumer(topic, name="read", retry=Retry(0))
    def read(n: int) -> None:
        seen.append(n)
        if broken:
            raise ValueError

    topic.send_many(range(700)).result(10)  # more than one step
    drain(app)
    broken.clear()
    (tmp_path / "retrier.py").write_text(RETRIER)
    words = [sys.executable, "retrier.py", app.events.url, when]
    other = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "sent\n"
        if how == "killed":
            other.kill()
        assert dead.deal(app, list(dead.letters(app)), retry=True) == dead.Dealt(done=700)
        if how == "overtaken":
            assert "another dead retry or dead drop took over" in other.communicate("go\n", 30)[0]
        assert dead.deal(app, list(dead.letters(app)), retry=True) == dead.Dealt()
        drain(app)
        assert sorted(seen) == sorted([*range(700)] * 2)
        assert [(group.open, group.state) for group in lag.groups(app)] == [(0, "stopped")]
    finally:
        other.kill()
        other.communicate()


def test_a_dead_letter_that_no_broker_takes_is_seen_and_goes_when_it_can(make, monkeypatch, caplog) -> None:
    app = make()
    monkeypatch.setattr(kafka_doors, "REPORTS", 0.0)
    topic = app.topic("orders", int, partitions=1)

    @app.consumer(topic, name="read", retry=Retry(0))
    def read(n: int) -> None:
        raise ValueError

    def allow(size: int) -> None:
        app.events.apply([Change("set", "orders.dead", "max.message.bytes", ("", str(size)))])

    def stands(worker) -> str:
        app.events.report(worker.report())
        return lag.groups(app)[0].state

    allow(100)
    with running(app) as worker:
        topic.send(1).result(10)
        wait_for(lambda: stands(worker) == "troubled", "seen")
        assert "'orders.dead' is larger" in processes.processes(app)[0].trouble
        allow(100_000)
        wait_for(lambda: stands(worker) == "ok" and app.events.read("orders.dead", 0, 0, 10), "gone")
    said = [record.getMessage() for record in caplog.records if "orders.dead" in record.getMessage()]
    assert len(said) == 1 and "raise the topic's max.message.bytes" in said[0], said


def test_a_consumer_does_not_wait_with_an_operator(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    with app.events._asking, running(app):  # as `positions` and `read` have it while a broker does not answer
        topic.send(1).result(10)
        wait_for(lambda: seen == [1], "read")


def test_an_idle_process_is_not_silent(make) -> None:
    app, silent = make(session_timeout=3.0), []
    app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)
    with running(app) as worker:
        end = time.monotonic() + 6
        while time.monotonic() < end:  # as a process does, once a second and now and then a little later
            app.events.report(worker.report())
            time.sleep(1.2)
            silent += [processes.state(process, 3.0) for process in processes.processes(app)]
    assert len(silent) >= 4 and set(silent) == {"ok"}


def test_a_control_topic_that_was_deleted_is_made_anew_and_heeded(make, monkeypatch) -> None:
    app, seen = make(), []
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")(seen.append)
    other = make()
    other.consumer(other.topic("orders", int, partitions=1), name="read")(seen.append)
    monkeypatch.setattr(kafka_doors, "REPORTS", 0.0)
    with running(app) as worker:
        for n in range(20):
            app.events.report({"done": n})
        wait_for(lambda: len(processes.processes(app)) == 1, "reported")
        name = f"{app.events.prefix}shop.control"
        app.events.admin.delete_topics([name])[name].result(10)
        wait_for(lambda: "shop.control" not in app.events.metadata(), "deleted")
        assert processes.set_pause(other, Pause("group", "shop-read"), True)
        wait_for(lambda: worker.obey() is None and worker.paused == ["read"], "heeded")
        app.events.report({"done": 99})
        wait_for(lambda: [p.info for p in app.events.processes()] == [{"done": 99}], "seen again")
        topic.send(1).result(10)
        assert processes.set_pause(other, Pause("group", "shop-read"), False)
        wait_for(lambda: worker.obey() is None and seen == [1], "resumed")
    drain(app)


def put(app, topic: str, *records: tuple[bytes | None, bytes, dict[str, bytes]]) -> None:
    """Store what another program would: key, value, headers."""
    producer = driver.Producer({"bootstrap.servers": app.events.servers})
    for key, value, headers in records:
        producer.produce(f"{app.events.prefix}{topic}", value, key, 0, headers=headers)
    assert producer.flush(10) == 0


def test_rubbish_in_a_control_topic_keeps_nobody_from_it(make) -> None:
    app = make()
    app.topic("orders", int, partitions=1)
    app.events.create_topics([("shop.control", 1, -1, {})])  # by hand: not compacted
    app.events.set_control("pause:group:a", "1")
    rubbish = [(None, b"x"), (b"\xff", b"x"), (b"k", b"\xff"), (b"report:a", b"{}")]
    rubbish += [(b"report:a:1:1", b"{"), (b"report:b:1:1", b"[]")]
    put(app, "shop.control", *[(key, value, {}) for key, value in rubbish])
    app.events.set_control("pause:group:b", "1")
    assert processes.processes(app) == []
    assert {"pause:group:a", "pause:group:b"} <= app.events.control().keys()


def test_a_dead_letter_that_makes_no_sense_is_none(make) -> None:
    app = make()
    app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)
    marks = {"reason": b"r", "group": b"shop-read", "topic": b"orders", "partition": b"0", "offset": b"0", "attempts": b"1"}
    wrongs = [{"timestamp": b"x"}, {"timestamp": b"nan"}, {"timestamp": b"1e300"}, {"time": b"x"}]
    wrongs += [{"partition": b"-3"}, {"offset": b"-1"}]
    app.events  # noqa: B018 - creates the topics
    for wrong in [{}, *wrongs]:
        put(app, "orders.dead", (b"k", b"1", {f"barnabas-{name}": data for name, data in (marks | wrong).items()}))
    assert [letter.address for letter in dead.letters(app)] == ["orders.dead[0]@0"]
    assert dead.deal(app, dead.letters(app), retry=True) == dead.Dealt(done=1)


def test_a_report_that_cannot_be_stored_ends_no_process(make) -> None:
    app = make()
    app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)

    def allow(size: int) -> None:
        app.events.apply([Change("set", "shop.control", "max.message.bytes", ("", str(size)))])

    def tried(work: int) -> bool:
        app.events.report({"work": [work]})
        return True

    with running(app):
        app.events.report({"work": [1]})
        allow(10)
        reported = app.events._reported[0]
        wait_for(lambda: tried(2) and app.events._reported[0] > reported, "tried")
        allow(1_000_000)
        wait_for(lambda: tried(3) and [process.info for process in app.events.processes()] == [{"work": [3]}], "said")


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_static_member_that_was_killed_goes_on_when_it_is_back(make, tmp_path, protocol) -> None:
    options = {"group.protocol": protocol, "group.instance.id": "one"}
    app = make()
    topic = app.topic("orders", int, partitions=1)
    code = f'from barnabas import App\napp = App("shop", session_timeout=3.0, kafka={options!r})\n'
    code += '@app.consumer(app.topic("orders", int), name="read")\ndef read(n: int) -> None:\n'
    code += '    print(n, file=open("seen", "a"), flush=True)\n'
    (tmp_path / "shop.py").write_text(code)
    words = [sys.executable, "-m", "barnabas", "run", "shop:app", "--events", app.events.url, "--create-topics"]
    seen = tmp_path / "seen"
    for n in range(2):
        topic.send(n).result(10)
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_for(lambda n=n: seen.exists() and f"{n}\n" in seen.read_text(), f"{n} was handled", 15)
        finally:
            process.send_signal([signal.SIGKILL, signal.SIGTERM][n])
            process.wait(30)
    said = (tmp_path / "log").read_text()
    assert process.returncode == 0
    assert said.count("still used by another") // 2 == said.count("works again") == (protocol == "consumer"), said


def test_why_a_group_cannot_be_joined_is_one_line(make, caplog) -> None:
    app = make(session_timeout=0.5)  # less than this broker allows
    app.consumer(app.topic("orders", int, partitions=1), name="read")(lambda n: None)
    with running(app) as worker:
        wait_for(lambda: "INVALID_SESSION_TIMEOUT" in caplog.text, "said")
        time.sleep(5)
        assert "INVALID_SESSION_TIMEOUT" in worker.report()["trouble"]
        assert "works again" not in caplog.text
    assert caplog.text.count("INVALID_SESSION_TIMEOUT") == 1


def test_a_group_of_another_client_is_seen_and_not_said_to_be_paused(make) -> None:
    app = make()
    topic = app.topic("orders", int, partitions=1)
    app.consumer(topic, name="read")([].append)
    topic.send(1).result(10)
    options = {"bootstrap.servers": app.events.servers, "group.id": f"{app.events.prefix}java", "client.id": "theirs"}
    theirs = driver.Consumer(options | {"enable.auto.commit": False, "auto.offset.reset": "earliest"})
    theirs.subscribe([f"{app.events.prefix}orders"])
    try:
        message = theirs.poll(20)
        theirs.commit(message, asynchronous=False)
        [group] = [each for each in lag.groups(app) if each.group == "java"]
        assert (group.consumer, group.state, group.processes, group.open) == (None, "ok", ["theirs"], 0)
        with pytest.raises(Wrong, match=r"no consumer of app 'shop' has the group 'java'.*none would heed"):
            _pause(app, "java", None)
        with pytest.raises(Refused, match=r"'java' has members: theirs"):
            lag.place(app, lag.plan(app, "java", "earliest"))
    finally:
        theirs.close()
    lag.place(app, lag.plan(app, "java", "earliest"))
    assert [(each.group, each.state, each.open) for each in lag.groups(app)] == [
        ("java", "stopped", 1), ("shop-read", "never ran", 1),
    ]  # fmt: skip
    assert _pause(app, "read", None) == _pause(app, "shop-read", None) == Pause("group", "shop-read")


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_partitions_that_are_raised_under_a_worker_are_read_from_their_beginning(make, protocol) -> None:
    app, seen = make(kafka={"group.protocol": protocol, "topic.metadata.refresh.interval.ms": 1000}), []
    topic = app.topic("orders", int, partitions=1)

    @app.consumer(topic, name="read", retry=Retry(2, backoff=lambda n: 0.05, ordered=False))
    def read(n: int, delivery: Delivery) -> None:
        seen.append((n, delivery.attempt))
        if delivery.attempt == 1:
            raise ValueError

    more = make(create_topics=False)
    wider = more.topic("orders", int, partitions=4)
    more.consumer(wider, name="read", retry=Retry(2, ordered=False))(lambda n: None)
    with running(app) as worker:
        topic.send(0).result(10)
        wait_for(worker.drained, "drained")
        plan = more.events.plan(more.all_topics())
        assert {(change.kind, change.topic) for change in plan} == {
            ("raise", name) for name in ("orders", "orders.dead", "orders.retry.shop-read")
        }
        more.events.apply(plan)
        for n in range(1, 41):  # before the worker has heard of them
            wider.send(n, partition=n % 4).result(10)
        wait_for(lambda: {n for n, _ in seen} == {*range(41)}, "read")
        wait_for(worker.drained, "drained")
    assert sorted(seen) == [(n, attempt) for n in range(41) for attempt in (1, 2)]
