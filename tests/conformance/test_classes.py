"""Classes as consumers."""

import asyncio
import threading

import pytest
from watching import wait_for

from barnabas import Delivery, Retry


def test_a_class_has_one_instance_a_worker_and_process_is_its_handler(place, app):
    topic = app.topic("numbers", int, partitions=3)
    instances, seen = [], []

    @app.consumer(topic, concurrency=3)
    class Reader:
        def __init__(self):
            instances.append(self)

        def process(self, n: int, delivery: Delivery):
            assert self is instances[-1]
            seen.append((delivery.topic, n))

    topic.send_many(range(10)).result(5)
    place.drain(app)
    assert sorted(seen) == [("numbers", n) for n in range(10)]
    place.drain(app)
    assert len(instances) == 2


def test_the_group_is_named_after_the_class(app):
    @app.consumer(app.topic("numbers", int))
    class Reader:
        def process(self, n: int): ...

    assert app.consumers["Reader"].group == "shop-Reader"
    assert isinstance(Reader, type)


def test_a_method_named_like_a_topic_handles_it(place, app):
    plain, dotted, rest = app.topic("plain", int), app.topic("shop.re-turns", str), app.topic("rest", int)
    seen = []

    @app.consumer([plain, dotted, rest])
    class Reader:
        def plain(self, n: int):
            seen.append(("plain", n))

        def shop_re_turns(self, text: str, delivery: Delivery):
            seen.append((delivery.topic, text))

        def process(self, n: int):
            seen.append(("process", n))

    plain.send(1)
    dotted.send("two")
    rest.send(3).result(5)
    app.events.flush(5)
    place.drain(app)
    assert sorted(seen) == [("plain", 1), ("process", 3), ("shop.re-turns", "two")]


def test_methods_retry_and_fail_like_functions(place, app):
    a, b = app.topic("a", int), app.topic("b", int)
    runs = []

    @app.consumer([a, b], retry=Retry(1, backoff=0.01, ordered=False))
    class Reader:
        def a(self, n: int):
            runs.append("a")
            raise ValueError("a")

        def b(self, n: int): ...

    a.send(1)
    b.send("no number")
    app.events.flush(5)
    place.drain(app)
    assert runs == ["a", "a"]
    assert [len(place.dead(a)), len(app.events.topics()) > 0] == [1, True]
    assert sum(len(app.events.read("b.dead", p, 0, 9)) for p in range(6)) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_set_up_comes_before_and_tear_down_after_all_deliveries(place, app, kind):
    topic = app.topic("numbers", int, partitions=2)
    log, threads = [], set()

    def note(what):
        log.append(what)
        threads.add(threading.get_ident())

    if kind == "sync":

        @app.consumer(topic)
        class Reader:
            def set_up(self):
                note("set_up")

            def process(self, n: int):
                note(n)

            def tear_down(self):
                note("tear_down")
    else:

        @app.consumer(topic)
        class Reader:
            async def set_up(self):
                await asyncio.sleep(0)
                note("set_up")

            async def process(self, n: int):
                note(n)

            async def tear_down(self):
                await asyncio.sleep(0)
                note("tear_down")

    topic.send_many(range(5)).result(5)
    place.drain(app)
    assert log[0] == "set_up" and sorted(log[1:-1]) == list(range(5)) and log[-1] == "tear_down"
    assert len(threads) == 1 and threading.get_ident() not in threads  # a connection of sqlite3 would be at home


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_assigned_and_revoked_tell_of_partitions_on_the_handlers_thread(place, app, kind):
    topic = app.topic("numbers", int, partitions=2)
    log, threads = [], set()

    def note(what, partitions=None):
        log.append((what, sorted(partitions) if partitions is not None else None))
        threads.add(threading.get_ident())

    if kind == "sync":

        @app.consumer(topic)
        class Reader:
            def assigned(self, partitions):
                note("assigned", partitions)

            def process(self, n: int):
                note("process")

            def revoked(self, partitions):
                note("revoked", partitions)

            def tear_down(self):
                note("tear_down")
    else:

        @app.consumer(topic)
        class Reader:
            async def assigned(self, partitions):
                note("assigned", partitions)

            async def process(self, n: int):
                note("process")

            async def revoked(self, partitions):
                note("revoked", partitions)

            async def tear_down(self):
                note("tear_down")

    topic.send(1).result(5)
    place.drain(app)
    both = [("numbers", 0), ("numbers", 1)]
    assert log == [("assigned", both), ("process", None), ("revoked", both), ("tear_down", None)]
    assert len(threads) == 1


def test_assigned_and_revoked_tell_of_what_changes_hands(place, app):
    topic = app.topic("numbers", int, partitions=4)
    log = []

    @app.consumer(topic)
    class Reader:
        def __init__(self):
            self.name = f"worker {len([entry for entry in log if entry[1] == 'made'])}"
            log.append((self.name, "made", None))

        def process(self, n: int): ...

        def assigned(self, partitions):
            log.append((self.name, "assigned", sorted(n for _, n in partitions)))

        def revoked(self, partitions):
            log.append((self.name, "revoked", sorted(n for _, n in partitions)))

    with place.running(app) as one:
        wait_for(lambda: len([p for p in one.runners[0].parts if not p.retries]) == 4, worker=one)
        with place.running(app) as two:
            wait_for(lambda: ("worker 1", "assigned") in [entry[:2] for entry in log], worker=two)
        wait_for(lambda: len([p for p in one.runners[0].parts if not p.retries]) == 4, worker=one)
    one_log = [entry[1:] for entry in log if entry[0] == "worker 0"]
    (_, first), (_, given), (_, back), (_, end) = one_log[1:]
    assert [what for what, _ in one_log[1:]] == ["assigned", "revoked", "assigned", "revoked"]
    assert first == end == [0, 1, 2, 3] and given == back and len(given) == 2
    assert [entry[1:] for entry in log if entry[0] == "worker 1"][1:] == [("assigned", given), ("revoked", given)]


def test_an_error_in_assigned_or_revoked_stops_nothing(place, app, caplog):
    topic = app.topic("numbers", int, partitions=2)
    seen = []

    @app.consumer(topic)
    class Reader:
        def assigned(self, partitions):
            raise RuntimeError("assigned broke")

        def revoked(self, partitions):
            raise RuntimeError("revoked broke")

        def process(self, n: int):
            seen.append(n)

    topic.send(1).result(5)
    place.drain(app)
    assert seen == [1]
    assert "assigned broke" in caplog.text and "revoked broke" in caplog.text


def test_a_failing_set_up_ends_the_start_and_leaves_nothing_behind(place, app):
    topic = app.topic("numbers", int)
    log = []
    broken = True
    app.on_stop(lambda: log.append("stop"))

    @app.consumer(topic, name="good")
    class Good:
        def set_up(self):
            log.append("up")

        def process(self, n: int):
            log.append(n)

        def tear_down(self):
            log.append("down")

    @app.consumer(topic, name="bad")
    class Bad:
        def set_up(self):
            if broken:
                raise RuntimeError("no database")

        def process(self, n: int): ...

        def tear_down(self):
            log.append("never set up" if broken else "bad down")

    topic.send(1).result(5)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no database"), place.running(app):
        pytest.fail("it started")
    assert log == ["up", "down", "stop"]
    wait_for(lambda: threading.active_count() <= before + (2 if place.name == "sqlite" else 0) + 1, "threads to end")
    broken = False
    place.drain(app)
    assert 1 in log


def test_on_start_and_on_stop_run_once_a_worker(place, app):
    topic = app.topic("numbers", int)
    log = []
    app.on_start(lambda: log.append("start"))
    app.on_stop(lambda: log.append("stop"))

    @app.on_start
    async def pool():
        log.append("pool")

    @app.consumer(topic, concurrency=4)
    def read(n: int):
        log.append(n)

    topic.send(1).result(5)
    place.drain(app)
    assert log == ["start", "pool", 1, "stop"]


def test_a_failing_on_stop_hook_stops_no_other(place, app, caplog):
    log = []

    @app.consumer(app.topic("numbers", int))
    def read(n: int): ...

    @app.on_stop
    def bad():
        raise RuntimeError("cannot stop")

    app.on_stop(lambda: log.append("stop"))
    place.drain(app)
    assert log == ["stop"] and "cannot stop" in caplog.text
