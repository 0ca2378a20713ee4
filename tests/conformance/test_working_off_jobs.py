"""Jobs: what enqueueing promises, what a worker makes of it, and what becomes of failures."""

import asyncio
import random
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from watching import failures, settled, wait_for, waiting

from barnabas import Concurrent, Reject, RetryAfter
from barnabas.backends.shares import QueueOrder
from barnabas.errors import DeclarationError, SendError
from barnabas.future import Future
from barnabas.jobs.payload import backtrace, parse
from barnabas.worker import Worker


class Order(msgspec.Struct):
    id: int
    customer: str = "ann"


def test_a_job_runs_once_with_its_arguments(place, app):
    seen = []

    @app.job
    def mail(order_id: int, text: str = "hello"):
        seen.append((order_id, text))

    jid = mail.enqueue(1).result(5)
    assert len(jid) == 24 and int(jid, 16) >= 0
    mail.enqueue(2, "bye").result(5)
    place.drain(app)
    assert sorted(seen) == [(1, "hello"), (2, "bye")]
    place.again(app)
    place.drain(app)
    assert len(seen) == 2
    assert settled(app, "jobs") == app.observers.counts["jobs", "done"] == 2


def test_the_id_is_there_at_once(app):
    @app.job
    def mail(order_id: int): ...

    future = mail.enqueue(1)
    assert future.id == future.result(5)


def test_an_enqueue_can_be_awaited_anywhere(place, app):
    seen = []

    @app.job
    def mail(n: int):
        seen.append(n)

    async def main():
        return await asyncio.gather(*(mail.enqueue(n) for n in range(50)))

    assert len(set(asyncio.run(main()))) == 50
    threads = [threading.Thread(target=lambda n=n: mail.enqueue(n).result(10)) for n in range(50, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    place.drain(app)
    assert sorted(seen) == list(range(60))


def test_the_decorated_function_can_still_be_called(app):
    @app.job(queue="mail")
    def double(n: int) -> int:
        """Twice."""
        return 2 * n

    assert double(4) == 8 and double.__name__ == "double" and double.__doc__ == "Twice."


def test_keywords_are_bound_to_positions(place, app):
    seen = []

    @app.job
    def mail(to: str, subject: str = "none", copies: int = 1):
        seen.append((to, subject, copies))

    mail.enqueue("ann", copies=3)
    mail.enqueue(subject="hi", to="bob")
    mail.enqueue("cid").result(5)
    place.drain(app)
    assert sorted(seen) == [("ann", "none", 3), ("bob", "hi", 1), ("cid", "none", 1)]


def test_star_arguments_are_stored_in_order(place, app):
    seen = []

    @app.job
    def add(first: int, *rest: int):
        seen.append((first, rest))

    add.enqueue(1)
    add.enqueue(1, 2, 3).result(5)
    place.drain(app)
    assert sorted(seen) == [(1, ()), (1, (2, 3))]


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"nothing": 1}), ((1,), {"a": 1})])
def test_arguments_that_do_not_fit_are_refused_at_once(app, args, kwargs):
    @app.job
    def mail(a: int, b: int = 0): ...

    with pytest.raises(SendError, match="'mail' cannot be enqueued"):
        mail.enqueue(*args, **kwargs)


@pytest.mark.parametrize("value", [object(), float("nan"), "\ud800", [[[float("inf")]]]])
def test_arguments_that_cannot_be_stored_are_refused_at_once(app, value):
    @app.job
    def mail(a): ...

    with pytest.raises(SendError, match="argument 1"):
        mail.enqueue(value)


def test_arguments_are_decoded_by_the_annotations(place, app):
    seen = []

    @app.job
    def mail(order: Order, when: datetime, ids: list[uuid.UUID], opt: int | None, free, tags: set[str]):
        seen.append((order, when, ids, opt, free, tags))

    now = datetime(2025, 1, 2, tzinfo=UTC)
    mail.enqueue(Order(1), now, [uuid.UUID(int=3)], None, {"a": [1]}, {"x"}).result(5)
    place.drain(app)
    assert seen == [(Order(1), now, [uuid.UUID(int=3)], None, {"a": [1]}, {"x"})]


def test_arguments_that_do_not_match_are_dead_at_once_with_the_reason(place, app):
    @app.job
    def mail(n: int):
        raise AssertionError("it ran")

    mail.enqueue("no number").result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}
    (failure,) = failures(app)
    assert failure.outcome == "dead" and "Expected `int`, got `str`" in failure.reason
    assert app.observers.counts["mail", "dead"] == 1 and app.observers.counts["jobs", "done"] == 0


def test_enqueue_many_gives_the_ids(place, app):
    seen = []

    @app.job
    def mail(n: int, text: str = ""):
        seen.append(n)

    ids = mail.enqueue_many((n,) for n in range(1500)).result(10)
    assert len(set(ids)) == 1500
    assert mail.enqueue_many([]).result(5) == []
    place.drain(app)
    assert sorted(seen) == list(range(1500))


def test_one_thread_runs_a_queue_in_its_order(place):
    app = place.app(threads=1)
    seen = []

    @app.job
    def mail(n: int):
        seen.append(n)

    mail.enqueue_many((n,) for n in range(300)).result(10)
    place.drain(app)
    assert seen == list(range(300))


def test_threads_is_how_many_sync_jobs_run_at_once(place):
    app = place.app(threads=3)
    meeting = threading.Barrier(3, timeout=10)
    lock, now, most = threading.Lock(), 0, 0

    @app.job(retry=False)
    def mail(n: int):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if n < 3:
            meeting.wait()
        with lock:
            now -= 1

    mail.enqueue_many((n,) for n in range(300)).result(10)
    place.drain(app)
    assert most == 3 and not failures(app)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_queue_can_be_given_fewer_at_a_time_than_there_are_threads(place, kind):
    app = place.app(queues=["mail", "rest"], threads=6, concurrency={"mail": 2})
    lock, now, most, done = threading.Lock(), 0, 0, []
    gate = threading.Event()

    def enter(by: int) -> None:
        nonlocal now, most
        with lock:
            now += by
            most = max(most, now)

    @app.job(queue="mail")
    def mail(n: int):
        enter(1)
        gate.wait(10)
        time.sleep(0.001)
        enter(-1)
        done.append(n)

    @app.job(queue="mail")
    async def post(n: int):
        enter(1)
        while not gate.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        enter(-1)
        done.append(n)

    rest = app.job(lambda n: done.append(f"rest {n}"), name="rest", queue="rest")
    first, second = (mail, mail) if kind == "sync" else (mail, post)
    for n in range(0, 40, 2):
        first.enqueue(n)
        second.enqueue(n + 1)
    rest.enqueue_many((n,) for n in range(10)).result(10)
    with place.running(app) as worker:
        wait_for(lambda: len(done) == 10 and now == 2, worker=worker)  # the others are not held up
        state = {state.name: state for state in app.jobs.queue_states()}["mail"]
        assert (state.work, state.ready) == (2, 38)  # what this process may not begin yet, others may
        gate.set()
        wait_for(worker.drained, worker=worker)
    assert most == 2 and sorted(n for n in done if type(n) is int) == [*range(40)] and not failures(app)


def test_a_limit_for_a_queue_that_nobody_has_is_refused(place):
    app = place.app(concurrency={"mial": 2})
    app.job(lambda n: None, name="mail", queue="mail")
    with pytest.raises(DeclarationError, match=r"jobs.concurrency names mial: no job has such a queue; there are mail"):
        Worker(app)


@pytest.mark.parametrize("many", [20, 1200])
def test_async_jobs_run_beside_each_other_and_beside_sync_ones(place, many):
    app = place.app(threads=1, coroutines=many)
    both, inside, everybody = threading.Barrier(2, timeout=10), [], asyncio.Event()

    @app.job(retry=False)
    def sync(n: int):
        both.wait()

    @app.job(retry=False)
    async def meet(n: int):
        inside.append(n)
        if len(inside) == many:
            await asyncio.to_thread(both.wait)
            everybody.set()
        await everybody.wait()

    meet.enqueue_many((n,) for n in range(many))
    sync.enqueue(1).result(5)
    place.drain(app)
    assert sorted(inside) == list(range(many)) and not failures(app)


def test_a_job_enqueued_for_later_waits_for_its_time(place, app):
    seen = []

    @app.job
    def mail(text: str):
        seen.append(text)

    now = app.clock.now()
    mail.enqueue_in(3600, "in an hour")
    mail.enqueue_in(timedelta(hours=2), "in two")
    mail.enqueue_at(now + 3 * 3600, "at three")
    mail.enqueue_at(datetime.fromtimestamp(now + 4 * 3600, UTC), "at four")
    mail.enqueue_at(datetime.fromtimestamp(now + 5 * 3600), "at five, local time")
    mail.enqueue_in(-1, "long due")
    mail.enqueue_at(now - 10, "due").result(5)
    place.drain(app)
    assert sorted(seen) == ["due", "long due"]
    assert waiting(app) == {"scheduled": 5, "retry": 0, "dead": 0}
    for text in ("in an hour", "in two", "at three", "at four", "at five, local time"):
        place.again(app)
        app.clock.advance(3600.5)
        place.drain(app)
        assert seen[-1] == text
    assert len(seen) == 7 and waiting(app)["scheduled"] == 0


def test_a_running_worker_takes_what_becomes_due(place, app):
    seen = []

    @app.job
    def mail(text: str):
        seen.append(text)

    with place.running(app) as worker:
        mail.enqueue("now").result(5)
        wait_for(lambda: seen == ["now"] and worker.drained(), worker=worker)  # it has looked for what is due
        mail.enqueue_in(0.05, "soon").result(5)
        wait_for(lambda: seen == ["now", "soon"], worker=worker)


@pytest.mark.parametrize("delay", ["soon", float("nan"), float("inf"), 1e300, None, True])
def test_a_time_that_is_none_is_refused(app, delay):
    @app.job
    def mail(): ...

    with pytest.raises(SendError, match="seconds"):
        mail.enqueue_in(delay)
    with pytest.raises(SendError, match="give epoch seconds"):
        mail.enqueue_at(delay)


@pytest.mark.parametrize("when", [datetime.min, datetime.max.replace(tzinfo=UTC), -(10**400), float("-inf"), 1.7e12])
def test_a_time_of_no_calendar_is_refused(app, when):
    @app.job
    def mail(): ...

    with pytest.raises(SendError, match="give epoch seconds"):
        mail.enqueue_at(when)


def test_a_naive_time_is_local_and_one_that_has_passed_is_now(app):
    @app.job
    def mail(n: int): ...

    at = datetime(2035, 7, 1, 12, 30)
    for future in (mail.enqueue_at(at, 0), mail.enqueue_in(-5, 1), mail.enqueue_at(datetime(1960, 1, 1), 2)):
        future.result(5)
    assert [job.at for job in app.jobs.find_jobs("scheduled")] == [time.mktime(at.timetuple())]
    assert sorted(bytes(parse(job.payload).args) for job in app.jobs.find_jobs("ready")) == [b"[1]", b"[2]"]


@pytest.mark.parametrize("timeout", ["1", float("nan"), [], True])
def test_a_wait_that_is_none_is_refused(app, timeout):
    @app.job(result_ttl=60)
    def add(n: int) -> int: ...

    future = add.enqueue(1)
    for wait in (future.outcome, lambda timeout: add.outcome(future.id, timeout), Future("a").result):
        with pytest.raises(DeclarationError, match=r"timeout=.* give seconds, or None"):
            wait(timeout)


def test_options_of_options_are_those_of_a_batch(app):
    @app.job
    def add(n: int) -> int: ...

    for wrong, why in (({"queue": "a"}, "unknown option queue='a'; it knows batch"), ({}, "batch=None: give what app.batch")):
        with pytest.raises(DeclarationError, match=why):
            add.options(retry=1).options(**wrong)


def test_options_change_the_queue_of_one_call(place):
    app = place.app(queues=["default", "slow"])
    seen = []

    @app.job
    def mail(n: int):
        seen.append(n)

    mail.options(queue="slow").enqueue(1)
    mail.options(queue="slow").enqueue_many([(2,), (3,)])
    mail.options(queue="slow").enqueue_in(3600, 9)
    mail.enqueue(4).result(5)
    place.drain(app, only=["queue:default"])
    assert seen == [4]
    assert waiting(app, "slow")["scheduled"] == 1 and waiting(app)["scheduled"] == 0
    place.drain(app, only=["queue:slow"])
    assert sorted(seen) == [1, 2, 3, 4]


def test_options_change_the_retries_of_one_call(place, app):
    @app.job(retry=5)
    def mail(n: int):
        raise ValueError(n)

    mail.options(retry=0).enqueue(1).result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}


def test_the_queues_of_the_declared_jobs_are_served_by_default(place, app):
    seen = []
    app.job(queue="a", name="x")(lambda: None)

    @app.job(queue="b")
    def mail(n: int):
        seen.append(n)

    mail.enqueue(1)
    mail.options(queue="nobodys").enqueue(2).result(5)
    place.drain(app)
    assert seen == [1]


def test_strict_queues_are_emptied_in_their_order(place):
    app = place.app(threads=1, queues=["high", "mid", "low"])
    seen = []

    @app.job(queue="low")
    def mail(text: str):
        seen.append(text)

    for _ in range(30):
        for queue in ("low", "high", "mid"):
            mail.options(queue=queue).enqueue(queue)
    app.jobs.flush(5)
    place.drain(app)
    assert seen == ["high"] * 30 + ["mid"] * 30 + ["low"] * 30


def test_weighted_queues_are_all_served(place):
    app = place.app(threads=2, queues={"much": 5, "little": 1})
    seen = []

    @app.job(queue="much")
    def mail(text: str):
        seen.append(text)

    for _ in range(50):
        mail.enqueue("much")
        mail.options(queue="little").enqueue("little")
    app.jobs.flush(5)
    place.drain(app)
    assert (seen.count("much"), seen.count("little")) == (50, 50)


def test_weights_are_how_often_a_queue_is_looked_at_first():
    order = QueueOrder({"much": 5, "little": 1}, random.Random(1))
    first = [order.next()[0] for _ in range(6000)]
    assert 4800 < first.count("much") < 5200
    assert QueueOrder(["b", "a"]).next() == ["b", "a"]


def test_a_failed_job_waits_as_long_as_sidekiq_says(place, app):
    attempts = []

    @app.around
    def watch(delivery):
        attempts.append(delivery.attempt)
        yield

    @app.job
    def mail(n: int):
        raise ValueError("smtp")

    mail.enqueue(1).result(5)
    place.drain(app)
    assert attempts == [1] and waiting(app) == {"scheduled": 0, "retry": 1, "dead": 0}
    app.clock.advance(14)
    place.drain(app)
    assert attempts == [1]  # 15 + 0..9 seconds
    place.again(app)
    app.clock.advance(11)
    place.drain(app)
    assert attempts == [1, 2]
    app.clock.advance(15)
    place.drain(app)
    assert attempts == [1, 2]  # 16 + (0..9) * 2
    app.clock.advance(20)
    place.drain(app)
    assert attempts == [1, 2, 3] and waiting(app)["retry"] == 1
    assert [f.outcome for f in failures(app)] == ["again"] * 3
    assert app.observers.counts["mail", "again"] == 3 and app.observers.counts["jobs", "done"] == 0


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_out_of_retries_goes_to_the_dead_set(place, app, kind):
    runs = []
    if kind == "sync":

        @app.job(retry=2)
        def mail(n: int):
            runs.append(n)
            raise ValueError("smtp")
    else:

        @app.job(retry=2)
        async def mail(n: int):
            runs.append(n)
            raise ValueError("smtp")

    mail.enqueue(7).result(5)
    for _ in range(5):
        place.drain(app)
        app.clock.advance(3600)
    assert runs == [7] * 3 and waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}
    assert [f.outcome for f in failures(app)] == ["again", "again", "dead"]
    assert failures(app)[-1].reason == "failed 3 times, and retry is 2: ValueError: smtp"
    assert {f.job for f in failures(app)} == {parse(job.payload).jid for job in app.jobs.find_jobs("dead")}


def test_a_job_that_wants_no_dead_entry_is_dropped_and_counted(place, app):
    @app.job(retry=0, dead=False)
    def mail(n: int):
        raise ValueError("smtp")

    mail.enqueue(7).result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}
    assert [f.outcome for f in failures(app)] == ["dropped"]
    assert app.observers.counts["mail", "dropped"] == 1


def test_retry_false_is_no_retry_and_no_dead_entry_as_in_sidekiq(place, app):
    @app.job(retry=False)
    def mail(n: int):
        raise ValueError("smtp")

    mail.enqueue(7).result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}
    assert app.observers.counts["mail", "dropped"] == 1


def test_a_rejected_job_is_dead_at_once(place, app):
    runs = []

    @app.job
    def mail(n: int):
        runs.append(n)
        raise Reject("no such order")

    mail.enqueue(7).result(5)
    place.drain(app)
    app.clock.advance(10**6)
    place.drain(app)
    assert runs == [7] and waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}
    assert "no such order" in failures(app)[0].reason


def test_retry_after_names_the_jobs_own_time(place, app):
    runs = []

    @app.job
    def mail(n: int):
        runs.append(n)
        if len(runs) == 1:
            raise RetryAfter(120)

    mail.enqueue(7).result(5)
    place.drain(app)
    app.clock.advance(118)
    place.drain(app)
    assert runs == [7]
    app.clock.advance(3)
    place.drain(app)
    assert runs == [7, 7] and waiting(app)["retry"] == 0


def test_a_job_that_nobody_declares_takes_the_retry_road(place, app):
    @app.job
    def known(n: int): ...

    @app.job
    def ghost(n: int): ...

    ghost.enqueue(1).result(5)
    del app.job_handlers["ghost"]
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 1, "dead": 0}
    assert "no job 'ghost' is declared here" in failures(app)[0].reason
    seen = []
    app.job(name="ghost")(seen.append)
    app.clock.advance(60)
    place.drain(app)
    assert seen == [1]


def test_a_failing_job_sends_and_enqueues_nothing(place, app):
    out = app.topic("out", int, partitions=1)
    runs = []

    @app.job
    def child(n: int):
        runs.append(("child", n))

    @app.job
    def mail(n: int):
        runs.append(("mail", n))
        out.send(len(runs))
        child.enqueue(len(runs))
        if len(runs) == 1:
            raise ValueError("smtp")

    mail.enqueue(1).result(5)
    place.drain(app)
    assert place.values(out) == [] and runs == [("mail", 1)]
    app.clock.advance(60)
    place.drain(app)
    assert place.values(out) == [2] and runs == [("mail", 1), ("mail", 1), ("child", 2)]


def test_a_job_enqueued_in_a_handler_leaves_with_it(place, app):
    orders = app.topic("orders", Order, key="customer")
    seen = []

    @app.job
    def mail(order_id: int):
        seen.append(order_id)

    @app.job
    def later(order_id: int):
        seen.append(-order_id)

    @app.consumer(orders)
    def bill(order: Order):
        mail.enqueue(order.id)
        mail.enqueue_many([(order.id + 100,), (order.id + 200,)])
        later.enqueue_in(3600, order.id)

    orders.send_many(Order(i, f"c{i}") for i in range(1, 21)).result(5)
    place.drain(app)
    assert sorted(seen) == [*range(1, 21), *range(101, 121), *range(201, 221)]
    assert waiting(app)["scheduled"] == 20


SPOILT = {
    "args": ("x", "`args` must be a list"), "tags": (["\ud800"], "half a surrogate pair"), "jid": (object(), "no JSON form"),
    "queue": ("", "the queue '', which is no name of one"), "class": (None, "not a Sidekiq job"),
}  # fmt: skip


@pytest.mark.parametrize("field", SPOILT)
def test_what_before_enqueue_leaves_must_be_a_job(place, field):
    app = place.app()
    app.before_enqueue(lambda job: job.update({field: SPOILT[field][0]}))
    with pytest.raises(SendError, match=f"'work' cannot be enqueued: .*{SPOILT[field][1]}"):
        app.job(lambda n: None, name="work").enqueue_in(1, 1)


def test_before_enqueue_may_change_or_refuse(place):
    app = place.app(queues=["default", "vip"])
    seen, asked = [], []

    @app.job
    def mail(n: int, text: str):
        seen.append((n, text))

    @app.before_enqueue
    def change(job):
        asked.append((job["class"], job["queue"], list(job["args"])))
        if job["args"][0] == 1:
            job["args"][1] = "changed"
            job["queue"] = "vip"
        if job["args"][0] == 2:
            return False

    assert mail.enqueue(1, "as it was").result(5)
    assert mail.enqueue(2, "refused").result(5) is None
    assert len(mail.enqueue_many([(2, "refused"), (3, "kept")]).result(5)) == 1
    place.drain(app, only=["queue:vip"])
    assert seen == [(1, "changed")]
    place.drain(app)
    assert seen == [(1, "changed"), (3, "kept")]
    assert asked[0] == ("mail", "default", [1, "as it was"])


def test_jobs_survive_a_restart_wherever_they_are(place, app):
    seen = []

    @app.job(retry=3)
    def mail(n: int):
        if n < 0 and len([m for m in seen if m == n]) == 0:
            seen.append(n)
            raise ValueError("first time")
        seen.append(n)

    mail.enqueue_many([(n,) for n in range(100)])
    mail.enqueue_in(3600, 1000)
    mail.enqueue(-1)
    place.again(app)
    with place.running(app) as worker:  # stopped wherever it happens to be
        wait_for(lambda: len(seen) > 10, worker=worker)
    place.again(app)
    place.drain(app)
    place.again(app)
    app.clock.advance(3600)
    place.drain(app)
    assert sorted(n for n in seen if n >= 0) == [*range(100), 1000]
    assert seen.count(-1) == 2


def test_two_workers_share_a_queue_and_run_nothing_twice(place, app):
    seen = []

    @app.job
    def mail(n: int):
        seen.append(n)

    mail.enqueue_many((n,) for n in range(2000)).result(10)
    with place.running(app) as one, place.running(app) as two:
        wait_for(lambda: one.drained() and two.drained(), worker=one)
    assert sorted(seen) == list(range(2000))


def test_no_more_jobs_are_taken_than_can_start_soon(place):
    app = place.app(threads=2)
    release, started = threading.Event(), []

    @app.job
    def slow(n: int):
        started.append(n)
        release.wait(20)

    slow.enqueue_many((n,) for n in range(100)).result(10)
    with place.running(app) as worker:
        wait_for(lambda: len(started) == 2, worker=worker)
        runner = worker.runners[0]
        in_hand = sum(len(run.rows) for crew in runner.crews for run in [*crew.lanes.ready, *crew.current] if run)
        assert in_hand <= 2
        release.set()
        wait_for(lambda: len(started) == 100, worker=worker)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_takes_long_holds_nothing_that_was_taken_with_it(place, kind):
    app = place.app(threads=3, coroutines=3)
    seen, waits, gate = [], [], threading.Event()

    @app.job(name="quick")
    def sync(n: int):
        seen.append(n)
        if n == 2100:
            waits.append(n)
            gate.wait(20)

    @app.job(name="quick_too")
    async def coroutine(n: int):
        seen.append(n)
        while n == 2100 and not gate.is_set():
            waits[:] = [n]
            await asyncio.sleep(0.001)

    quick = {"sync": sync, "async": coroutine}[kind]
    quick.enqueue_many((n,) for n in range(3000)).result(10)  # by when the slow one comes, many are taken at once
    with place.running(app) as worker:
        wait_for(lambda: waits and len(seen) == 3000, worker=worker)
        gate.set()
        wait_for(worker.drained, worker=worker)
    assert sorted(seen) == [*range(3000)] and not failures(app)


# Options of failing jobs.


def test_retry_delay_says_when_or_that_there_is_no_retry(place, app):
    asked, runs = [], []

    def delay(count, error, job):
        asked.append((count, str(error), job["args"], job["retry_count"], job["class"]))
        return {1: 1000, 2: "discard", 3: "kill", 4: None, 5: "soon", 6: 1 // 0 if job["args"] == [6] else 0}[job["args"][0]]

    @app.job(retry_delay=delay)
    def mail(n: int):
        runs.append(n)
        if n == 7:
            raise RetryAfter(5000)
        raise ValueError("smtp")

    mail.enqueue_many((n,) for n in range(1, 8)).result(5)
    place.drain(app)
    assert sorted(asked) == [(0, "smtp", [n], 0, "mail") for n in range(1, 7)]  # RetryAfter is the job's own word
    assert waiting(app) == {"scheduled": 0, "retry": 5, "dead": 1}
    waits = {msgspec.json.decode(job.payload)["args"][0]: job.at - app.clock.now() for job in app.jobs.find_jobs("retry")}
    assert {n: wait > 25 for n, wait in waits.items()} == {1: True, 4: False, 5: False, 6: False, 7: True}
    assert 980 < waits[1] < 1010 and 4980 < waits[7] < 5001
    said = {f.outcome: f.reason for f in failures(app)}
    assert "discarded by retry_delay: ValueError: smtp" in said["dropped"] and "killed by retry_delay" in said["dead"]


def test_retry_for_is_a_window_instead_of_a_count(place, app):
    runs = []

    @app.job(retry=1, retry_for=3600, retry_delay=lambda count, error, job: 1300)
    def mail(n: int):
        runs.append(n)
        raise ValueError("smtp")

    mail.enqueue(1)
    mail.options(retry=0).enqueue(2).result(5)  # a call's own number rules
    for _ in range(6):
        place.drain(app)
        app.clock.advance(1400)
    assert runs.count(1) == 4 and runs.count(2) == 1 and waiting(app) == {"scheduled": 0, "retry": 0, "dead": 2}
    assert any("longer than retry_for, 3600 s" in f.reason for f in failures(app))


def test_a_retry_goes_to_its_retry_queue(place, app):
    runs = []

    @app.around
    def watch(delivery):
        runs.append(delivery.topic)
        yield

    @app.job(queue="fast", retry_queue="slow", retry=2)
    def mail(n: int):
        raise ValueError("smtp")

    mail.enqueue(1).result(5)
    place.drain(app)
    assert waiting(app, "slow")["retry"] == 1 and waiting(app, "fast")["retry"] == 0
    for _ in range(3):
        app.clock.advance(3600)
        place.again(app)
        place.drain(app)  # without being told, it serves both
    assert runs == ["fast", "slow", "slow"] and waiting(app, "slow")["dead"] == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("options", "error", "called", "dead"),
    [
        ({"retry": 1}, ValueError, ["exhausted", "death"], 1),
        ({"retry": 1, "dead": False}, ValueError, ["exhausted", "death"], 0),
        ({"retry": False}, ValueError, ["death"], 0),
        ({"retry": 5}, Reject, ["exhausted", "death"], 1),
        ({"retry": 1, "retry_delay": lambda *_: "discard"}, ValueError, ["death"], 0),
        ({"retry": 1, "retry_delay": lambda *_: "kill"}, ValueError, ["exhausted", "death"], 1),
    ],
)  # fmt: skip
def test_who_is_told_that_a_job_ends(place, app, kind, options, error, called, dead):
    told, alerts = [], []

    @app.job
    def alert(what: str):
        alerts.append(what)

    def say(what):
        def tell(job, why):
            told.append((what, job["args"], type(why), job["error_message"], job["retry_count"]))
            alert.enqueue(what)

        return tell

    def mail(n: int):
        alert.enqueue("never")
        raise error("smtp")

    async def mail_async(n: int):
        alert.enqueue("never")
        raise error("smtp")

    function = mail if kind == "sync" else mail_async
    job = app.job(on_exhausted=say("exhausted"), on_death=say("death"), **options)(function)
    job.enqueue(7).result(5)
    place.drain(app)
    assert bool(told) == (options.get("retry_delay") is not None or error is Reject or options["retry"] is False)
    app.clock.advance(3600)
    place.drain(app)
    assert [(what, args, why, text) for what, args, why, text, _ in told] == [(what, [7], error, "smtp") for what in called]
    assert waiting(app)["dead"] == dead and waiting(app)["retry"] == 0 and sorted(alerts) == sorted(called)


def test_on_exhausted_can_keep_a_job_out_of_the_dead_set(place, app):
    deaths = []

    @app.job(retry=0, on_exhausted=lambda job, error: "discard", on_death=lambda job, error: deaths.append(job["jid"]))
    def mail(n: int):
        raise ValueError("smtp")

    jid = mail.enqueue(7).result(5)
    place.drain(app)
    assert waiting(app)["dead"] == 0 and deaths == [jid]
    assert "discarded by on_exhausted, failed 1 times" in failures(app, "dropped")[0].reason


def test_a_callback_that_fails_costs_neither_the_job_nor_what_others_send(place, app, caplog):
    seen = []

    @app.job
    def alert(what: str):
        seen.append(what)

    def exhausted(job, error):
        alert.enqueue("dropped with its failure")
        raise RuntimeError("pager is down")

    def death(job, error):
        raise asyncio.CancelledError

    @app.job(retry=0, on_exhausted=exhausted, on_death=death)
    def mail(n: int):
        if n % 2:
            raise ValueError("smtp")
        alert.enqueue(str(n))

    mail.enqueue_many((n,) for n in range(10)).result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 5} and sorted(seen) == ["0", "2", "4", "6", "8"]
    assert "job 'mail': on_exhausted failed" in caplog.text and "job 'mail': on_death failed" in caplog.text
    assert "pager is down" in caplog.text


@pytest.mark.parametrize("wanted", [False, True, 1])
def test_a_backtrace_is_stored_as_much_as_is_asked_for(place, app, wanted):
    def inner():
        raise ValueError("smtp")

    @app.job(backtrace=wanted)
    def mail(n: int):
        inner()

    mail.enqueue(7).result(5)
    place.drain(app)
    (job,) = app.jobs.find_jobs("retry")
    lines = backtrace(msgspec.json.decode(job.payload).get("error_backtrace"))
    assert bool(lines) == bool(wanted)
    if wanted:
        assert [line.rpartition(":in ")[2] for line in lines] == ["`inner'", "`mail'"][: 2 if wanted is True else 1]
        assert __file__ in lines[0]  # and of what called them, ours, nothing


def test_what_runs_between_jobs_ends_nothing_by_its_exit(place, app):
    seen = []

    def leave(*_):
        sys.exit("not of the worker")

    app.observe(leave)
    app.before_enqueue(lambda job: leave() if job["class"] == "refused" else None)
    good, refused = app.job(name="good")(seen.append), app.job(name="refused")(lambda id: None)
    kinds = app.job(name="kinds", retry=0, limit=Concurrent(1, by=leave))(seen.append)
    fails = app.job(name="fails", retry_delay=leave)(lambda n: 1 / 0)
    with app.batch(on_success=refused) as first:
        first.enqueue(good, 1)
    kinds.enqueue(2), fails.enqueue(3)
    with place.running(app) as worker:
        wait_for(lambda: first.status().done == 1 and waiting(app)["retry"] == waiting(app)["dead"] == 1, "all have run", worker)
        with app.batch(on_success=good) as second:
            second.enqueue(good, 4)
        wait_for(lambda: second.id in seen, "callbacks still run", worker)
    assert seen == [1, 4, second.id]
