"""Workers: timeouts, sharing and handing over, stopping, counting, draining."""

import asyncio
import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress

import pytest
from watching import Step, failures, settled, wait_for, waiting

from barnabas import Batch, Delivery, Done, Message, Retry
from barnabas.engine.observe import Failed, Settled
from barnabas.errors import DeclarationError, TimedOut
from barnabas.worker import Worker


@pytest.fixture
def topic(app):
    return app.topic("steps", Step, key="key", partitions=6)


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request, monkeypatch):
    """The event loop of a worker is uvloop's where that is installed."""
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    else:
        pytest.importorskip("uvloop")
    return request.param


def parts(worker: Worker) -> int:
    return sum(not part.retries for runner in worker.runners for part in runner.parts)


# Timeouts.


def test_an_async_handler_past_its_timeout_is_cancelled_and_has_failed(place, app, topic, loop):
    log = []

    @app.consumer(topic, timeout=0.1, retry=Retry(1, backoff=0.01))
    async def read(step: Step, delivery: Delivery):
        assert type(asyncio.get_running_loop()).__module__.startswith(loop)
        try:
            await asyncio.sleep(0 if step.n else 60)
        except asyncio.CancelledError:
            log.append(("cancelled", delivery.attempt))
            raise
        log.append("quick")

    topic.send_many([Step("k", 0), Step("k", 1)]).result(5)
    place.drain(app)
    assert log == [("cancelled", 1), ("cancelled", 2), "quick"]
    (letter,) = place.dead(topic)
    assert dict(letter.headers)["barnabas-exception"] == b"TimedOut"
    assert "ran longer than its timeout of 0.1 s" in dict(letter.headers)["barnabas-reason"].decode()
    assert all(isinstance(f.error, TimedOut) for f in failures(app))


def test_an_async_handler_that_ignores_its_cancellation_has_failed_all_the_same(place, app, topic, loop):
    ends = []

    @app.consumer(topic, timeout=0.1, retry=Retry(0))
    async def read(step: Step):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0 if step.n else 60)
        ends.append(step.n)
        async with asyncio.timeout(10):  # what was cancelled once is not cancelled for good
            await asyncio.sleep(0)

    topic.send_many([Step("k", 0), Step("k", 1)]).result(5)
    place.drain(app)
    assert ends == [0, 1] and len(place.dead(topic)) == 1
    assert app.observers.counts["read", "done"] == 1


def test_the_timeout_is_for_one_run_not_for_a_batch_of_them(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)

    @app.consumer(topic, timeout=0.3, retry=Retry(0))
    async def read(step: Step):
        await asyncio.sleep(0.03)

    topic.send_many(Step("k", n) for n in range(20)).result(5)
    place.drain(app)
    assert place.dead(topic) == [] and app.observers.counts["read", "done"] == 20


def test_a_sync_handler_past_its_timeout_has_failed_when_it_returns(place, app, topic, caplog):
    runs = []

    @app.consumer(topic, timeout=0.2, retry=Retry(1, backoff=0.01))
    def read(step: Step):
        runs.append(step.n)
        if runs.count(step.n) == 1 and step.n == 0:
            time.sleep(0.3)  # the point of the test: nobody can end it

    topic.send_many([Step("k", 0), Step("k", 1)]).result(5)
    with place.running(app) as worker:
        wait_for(worker.drained, worker=worker)
        assert worker.recycling is None
    assert runs == [0, 0, 1] and place.dead(topic) == []
    assert [f.outcome for f in failures(app)] == ["again"]
    assert isinstance(failures(app)[0].error, TimedOut)
    assert "time.sleep(0.3)" in caplog.text  # the log says where it is


def test_a_sync_batch_handler_past_its_timeout_has_failed_when_it_returns(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    runs = []

    @app.consumer(topic, timeout=0.2, retry=Retry(1, backoff=0.01), batch=Batch(max=3, wait=0.02))
    def read(steps: list[Step]):
        runs.append(len(steps))
        if len(runs) == 1:
            time.sleep(0.3)  # the point of the test: nobody can end it

    topic.send_many(Step("k", n) for n in range(3)).result(5)
    place.drain(app)
    assert runs == [3, 3] and [f.outcome for f in failures(app)] == ["again"]


def test_a_sync_handler_past_twice_its_timeout_gives_its_delivery_up(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    release, runs = threading.Event(), []

    @app.consumer(topic, timeout=0.1, retry=Retry(0), concurrency=2)
    def read(step: Step):
        runs.append(step.n)
        if step.n == 0:
            release.wait(20)

    topic.send_many([Step("slow", 0), Step("k", 1)]).result(5)
    with place.running(app) as worker:
        wait_for(lambda: worker.recycling, worker=worker)
        assert "read hangs at one[0]@0" in worker.recycling
        wait_for(worker.drained, worker=worker)
    release.set()
    (letter,) = place.dead(topic)
    assert "twice its timeout" in dict(letter.headers)["barnabas-reason"].decode()
    assert sorted(runs) == [0, 1]
    place.again(app)
    place.drain(app)
    assert sorted(runs) == [0, 1]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_that_hangs_is_named_with_the_line_it_is_at(place, app, caplog, kind):
    release = threading.Event()

    def hang(n: int):
        release.wait(20)  # in a coroutine: all of its loop waits

    async def hang_all(n: int):
        hang(n)

    jid = app.job(name="hang", timeout=0.1, retry=0)(hang if kind == "sync" else hang_all).enqueue(1).result(5)
    with place.running(app) as worker:
        wait_for(lambda: worker.recycling, worker=worker)
        release.set()
    assert f"hangs at job hang {jid}, twice" in worker.recycling
    assert "release.wait(20)" in caplog.text


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_jobs_have_timeouts_of_their_own(place, app, kind):
    runs = []

    if kind == "sync":

        @app.job(timeout=0.2, retry=0)
        def slow(n: int):
            runs.append(n)
            time.sleep(0.3)  # the point of the test: nobody can end it
    else:

        @app.job(timeout=0.1, retry=0)
        async def slow(n: int):
            runs.append(n)
            await asyncio.sleep(60)

    @app.job
    def patient(n: int):
        time.sleep(0.3)  # longer than the other's timeout
        runs.append(n)

    slow.enqueue(1)
    patient.enqueue(2).result(5)
    place.drain(app)
    assert sorted(runs) == [1, 2]
    (failure,) = failures(app)
    assert (failure.name, failure.outcome) == ("slow", "dead") and "timeout" in failure.reason


# Sharing.


def test_two_workers_share_the_partitions_and_hand_them_over(place, app, topic):
    seen = Counter()
    lock = threading.Lock()

    @app.consumer(topic, concurrency=2)
    def read(step: Step):
        with lock:
            seen[step.key, step.n] += 1

    sent = 0

    def send() -> None:
        nonlocal sent
        topic.send_many(Step(f"k{n % 13}", sent + n) for n in range(500)).result(5)
        sent += 500

    with place.running(app) as one:
        send()
        wait_for(lambda: parts(one) == 6, "all partitions", one)
        with place.running(app) as two:
            send()
            wait_for(lambda: (parts(one), parts(two)) == (3, 3), "three each", one)
            send()
            with place.running(app) as three:
                wait_for(lambda: (parts(one), parts(two), parts(three)) == (2, 2, 2), "two each", one)
                send()
            wait_for(lambda: (parts(one), parts(two)) == (3, 3), "three each again", one)
            send()
        wait_for(lambda: parts(one) == 6, "all partitions again", one)
        send()
        wait_for(one.drained, worker=one)
    assert len(seen) == sent and set(seen.values()) == {1}


def test_order_holds_over_a_hand_over(place, app, topic):
    seen: dict[str, list[int]] = defaultdict(list)
    lock = threading.Lock()

    @app.consumer(topic, concurrency=3)
    def read(step: Step):
        with lock:
            seen[step.key].append(step.n)

    with place.running(app) as one:
        for n in range(0, 1000, 100):
            topic.send_many(Step(f"k{k}", n + m) for m in range(100) for k in range(5))
            if n == 300:
                two = Worker(app)
                two.start()
            if n == 700:
                two.stop(10)
        wait_for(one.drained, worker=one)
    assert seen == {f"k{k}": list(range(1000)) for k in range(5)}


def test_what_is_done_is_settled_before_a_partition_changes_hands(place):
    app = place.app(checkpoint_interval=60)
    topic = app.topic("two", int, partitions=2)
    entered, release, seen = threading.Event(), threading.Event(), Counter()

    @app.consumer(topic, concurrency=2, order="partition")
    def read(n: int):
        seen[n] += 1
        if n == 0:
            entered.set()
            release.wait(20)

    topic.send(0, partition=0).result(5)
    with place.running(app) as one:
        assert entered.wait(10)  # while this one is in work, nothing else has to be settled for a minute
        topic.send(1, partition=1)
        wait_for(lambda: settled(app, "read") == 1, worker=one)  # but for the very first
        topic.send_many(Message(value=n, partition=1) for n in range(2, 11)).result(5)
        wait_for(lambda: len(seen) == 11, worker=one)
        with place.running(app) as two:
            wait_for(lambda: parts(two) == 1, worker=two)
            release.set()
            wait_for(lambda: two.drained() and one.drained(), worker=one)
    again = {0} if place.name == "kafka" else set()  # where it is the busy partition that changes hands
    assert {n for n, count in seen.items() if count > 1} <= again and len(seen) == 11


def test_more_workers_than_partitions_leave_some_idle(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic)
    def read(step: Step):
        seen.append(step.n)

    with place.running(app) as one, place.running(app) as two:
        wait_for(lambda: parts(one) + parts(two) == 1, worker=one)
        topic.send_many(Step("k", n) for n in range(10))
        wait_for(lambda: len(seen) == 10, worker=one)
        wait_for(two.drained, worker=two)
    assert seen == list(range(10))


def test_tables_move_with_their_partitions(place, app, topic):
    totals = app.table("totals", int)

    @app.consumer(topic, tables=[totals])
    def count(step: Step):
        totals[step.key] = totals.get(step.key, 0) + 1

    def send() -> None:
        topic.send_many(Step(f"k{n % 10}") for n in range(500)).result(5)

    with place.running(app) as one:
        send()
        wait_for(lambda: parts(one) == 6, worker=one)
        with place.running(app) as two:
            send()
            wait_for(lambda: (parts(one), parts(two)) == (3, 3), worker=one)
            send()
            wait_for(two.drained, worker=two)
        send()
        wait_for(one.drained, worker=one)
    with totals.open() as view:
        assert dict(view.items()) == {f"k{n}": 200 for n in range(10)}


# Stopping.


@pytest.mark.parametrize("kind", ["sync", "threads", "async"])
def test_a_stop_in_the_middle_loses_nothing_and_doubles_nothing(place, app, topic, kind):
    seen = Counter()
    lock = threading.Lock()

    def note(step: Step) -> None:
        with lock:
            seen[step.key, step.n] += 1

    if kind == "async":

        @app.consumer(topic, concurrency=10)
        async def read(step: Step):
            await asyncio.sleep(0)
            note(step)
    else:

        @app.consumer(topic, concurrency=4 if kind == "threads" else 1)
        def read(step: Step):
            note(step)

    topic.send_many(Step(f"k{n % 20}", n) for n in range(4000)).result(5)
    for target in (50, 500, 1500):
        with place.running(app) as worker:
            wait_for(lambda target=target: len(seen) > target, worker=worker)
        place.again(app)
    place.drain(app)
    assert len(seen) == 4000 and set(seen.values()) == {1}


def test_a_stop_waits_for_what_is_in_work(place, app, topic):
    entered, release, done = threading.Event(), threading.Event(), []

    @app.consumer(topic)
    def read(step: Step):
        entered.set()
        release.wait(20)
        done.append(step.n)

    topic.send_many([Step("k", 0), Step("k", 1)]).result(5)
    worker = Worker(app)
    worker.start()
    assert entered.wait(10)
    stop = threading.Thread(target=lambda: held.append(worker.stop(10)))
    held: list[list[str]] = []
    stop.start()
    wait_for(lambda: worker.runners[0].stopping)
    release.set()
    stop.join(10)
    assert held == [[]] and 0 in done
    first = list(done)
    place.again(app)
    place.drain(app)
    assert done == [0, 1] and done[: len(first)] == first


@pytest.mark.parametrize("who", ["hook", "handler"])
def test_what_a_stop_cancelled_is_not_done_whoever_swallows_that(place, app, topic, who, loop):
    entered, done = threading.Event(), []

    @app.around
    def greedy(delivery):
        try:
            yield
        except BaseException:
            if who == "hook":
                return Done
            raise

    @app.consumer(topic)
    async def read(step: Step, delivery: Delivery):
        try:
            if not entered.is_set():
                entered.set()
                await asyncio.sleep(60)
            done.append(delivery.attempt)
        except asyncio.CancelledError:
            if who == "hook":
                raise

    topic.send(Step("k")).result(5)
    worker = Worker(app)
    worker.start()
    assert entered.wait(10)
    assert len(worker.stop(0.1)) == 1
    place.again(app)
    place.drain(app)
    assert done == [1]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stop_that_overruns_names_what_held_it_and_gives_the_delivery_back(place, app, topic, kind):
    entered, release, done = threading.Event(), threading.Event(), []

    if kind == "sync":

        @app.consumer(topic, retry=Retry(0))
        def stubborn(step: Step, delivery: Delivery):
            entered.set()
            release.wait(20)
            done.append(delivery.attempt)
    else:

        @app.consumer(topic, retry=Retry(0))
        async def stubborn(step: Step, delivery: Delivery):
            entered.set()
            if not release.is_set():
                await asyncio.sleep(60)
            done.append(delivery.attempt)

    topic.send(Step("k")).result(5)
    worker = Worker(app)
    worker.start()
    assert entered.wait(10)
    began = time.monotonic()
    (held,) = worker.stop(0.1)
    assert time.monotonic() - began < 5
    assert held.startswith("stubborn, at steps[") and "in stubborn" in held
    assert ("release.wait(20)" if kind == "sync" else "await asyncio.sleep(60)") in held
    release.set()
    if kind == "sync":
        wait_for(lambda: done, "the old thread to end")
        done.clear()
    place.again(app)
    place.drain(app)
    assert done == [1] and place.dead(topic) == [] and not failures(app)  # a stop is no attempt


def test_a_stop_ends_waits_at_once(place, app, topic):
    @app.consumer(topic, retry=Retry(5, backoff=600))
    def read(step: Step):
        raise ValueError("later")

    @app.job
    def mail(n: int): ...

    topic.send(Step("k"))
    mail.enqueue_in(600, 1).result(5)
    began = time.monotonic()
    with place.running(app) as worker:
        wait_for(lambda: failures(app), worker=worker)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_exception_that_is_none_ends_the_runner_and_loses_nothing(place, app, topic, kind):
    seen, broken = [], True

    class Leave(GeneratorExit): ...  # what a handler raises otherwise is its failure

    def handle(step: Step) -> None:
        if broken:
            raise Leave
        seen.append(step.n)

    if kind == "sync":

        @app.consumer(topic)
        def read(step: Step):
            handle(step)
    else:

        @app.consumer(topic)
        async def read(step: Step):
            await asyncio.sleep(0)
            handle(step)

    topic.send(Step("k", 7)).result(5)
    began = time.monotonic()
    with place.running(app, fails=True) as worker:
        wait_for(lambda: worker.failed() is not None)
        assert isinstance(worker.failed(), Leave)
    assert time.monotonic() - began < 4
    broken = False
    place.again(app)
    place.drain(app)
    assert seen == [7] and place.dead(topic) == []


def test_a_worker_without_anything_to_do_is_refused(place):
    with pytest.raises(DeclarationError, match="no consumer and no job"):
        Worker(place.app())


def test_names_that_nothing_has_are_refused(place, app, topic):
    app.consumer(topic, name="read")(lambda step: None)
    with pytest.raises(DeclarationError, match=r"nothing is named 'raed'; there are read"):
        Worker(app, only=["raed"])


# Counting and watching.


def test_every_outcome_is_counted(place, app, topic):
    @app.consumer(topic, retry=Retry(1, backoff=0.01))
    def read(step: Step):
        if step.n % 10 == 0:
            raise ValueError("bad")

    topic.send_many(Step(f"k{n}", n) for n in range(100))
    topic.send_many([Message(value=None, key="k")] * 3).result(5)
    place.drain(app)
    assert app.observers.counts == {
        ("read", "done"): 90, ("read", "again"): 10, ("read", "dead"): 10, ("read", "skipped"): 3,
    }  # fmt: skip


def test_observers_get_frozen_records(place, app, topic):
    @app.consumer(topic, retry=Retry(1, backoff=0.01), responds=[app.topic("out", int)])
    def read(step: Step) -> int:
        if step.n == 0:
            raise ValueError("bad")
        return step.n

    topic.send_many(Step("k", n) for n in range(10)).result(5)
    place.drain(app)
    records = app.records
    assert sum(r.count for r in records if isinstance(r, Settled)) == 10
    assert sum(r.outputs for r in records if isinstance(r, Settled)) == 9 + 1
    again, dead = (r for r in records if isinstance(r, Failed))
    assert (again.name, again.topic, again.offset, again.attempt, again.outcome) == ("read", "steps", 0, 1, "again")
    assert (dead.attempt, dead.outcome, type(dead.error)) == (2, "dead", ValueError)
    for record in records:
        with pytest.raises(AttributeError):
            record.name = "changed"


def test_an_observers_error_is_logged_once_and_stops_nothing(place, app, topic, caplog):
    calls, seen = [], []

    @app.observe
    def broken(record):
        calls.append(record)
        raise RuntimeError("the observer broke")

    @app.consumer(topic, on_dead="skip", retry=Retry(0))
    def read(step: Step):
        seen.append(step.n)
        raise ValueError("bad")

    topic.send_many(Step("k", n) for n in range(5)).result(5)
    place.drain(app)
    assert len(seen) == 5 and len(calls) >= 6
    assert caplog.text.count("RuntimeError: the observer broke") == 1


def test_successes_are_not_logged(place, app, topic, caplog):
    caplog.set_level(logging.INFO, logger="barnabas")

    @app.consumer(topic)
    def read(step: Step): ...

    topic.send_many(Step("k", n) for n in range(200)).result(5)
    place.drain(app)
    assert len(caplog.records) < 10


# Draining.


def test_open_work_is_what_is_not_settled(place, app, topic):
    release, entered = threading.Event(), threading.Event()

    @app.consumer(topic)
    def read(step: Step):
        entered.set()
        release.wait(20)

    @app.job
    def mail(n: int):
        release.wait(20)

    groups, queues = {"shop-read": ["steps"]}, ["default"]
    assert app.events.open_work(groups, []) == app.jobs.open_work({}, queues) == 0
    topic.send_many(Step("k", n) for n in range(10)).result(5)
    mail.enqueue_many([(1,), (2,)]).result(5)
    mail.enqueue_in(600, 3).result(5)
    assert app.events.open_work(groups, []) > 0 and app.jobs.open_work({}, queues) > 0
    assert app.events.open_work({"shop-other": ["steps"]}, []) > 0
    assert app.jobs.open_work({}, ["empty"]) == 0
    with place.running(app) as worker:
        assert entered.wait(10)
        assert not worker.drained()  # taken, not done
        release.set()
        wait_for(worker.drained, worker=worker)
    assert app.events.open_work(groups, []) == app.jobs.open_work({}, queues) == 0


def test_a_retry_in_order_holds_a_drain_and_a_waiting_job_does_not(place, app, topic):
    fail = True

    @app.consumer(topic, retry=Retry(10000, backoff=0.01))
    def read(step: Step):
        if fail:
            raise ValueError("not yet")

    @app.job
    def mail(n: int):
        raise ValueError("for Sidekiq's time")

    topic.send(Step("k"))
    mail.enqueue(1)
    mail.enqueue_in(600, 2).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(failures(app, "again")) > 5, worker=worker)
        assert not worker.drained()
        fail = False
        wait_for(worker.drained, worker=worker)
    assert waiting(app) == {"scheduled": 1, "retry": 1, "dead": 0}


def test_jobs_that_are_due_hold_a_drain(place, app):
    seen = []

    @app.job
    def mail(n: int):
        seen.append(n)

    mail.enqueue_in(600, 1).result(5)
    assert app.jobs.open_work({}, ["default"]) == 0
    app.clock.advance(601)
    assert app.jobs.open_work({}, ["default"]) == 1
    place.drain(app)
    assert seen == [1]


def test_a_chain_is_drained_to_its_end(place, app):
    topics = [app.topic(f"t{n}", int, partitions=2) for n in range(6)]
    ends = []

    @app.job
    def end(n: int):
        ends.append(n)

    for n, topic in enumerate(topics):

        @app.consumer(topic, name=f"c{n}")
        def step(value: int, n=n):
            if n < 5:
                topics[n + 1].send(value + 1)
            else:
                end.enqueue(value)

    topics[0].send_many(range(20)).result(5)
    place.drain(app)
    assert sorted(ends) == list(range(5, 25))


def test_what_waits_in_the_backend_is_seen_by_a_watcher(place, app, topic):
    woken = threading.Event()
    end = app.events.watch(woken.set)
    topic.send(Step("k")).result(5)
    assert woken.wait(10)
    end()
