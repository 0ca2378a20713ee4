"""Sends inside a handler: held back until it returns, dropped if it fails, recognisable when repeated."""

import asyncio
import threading

import msgspec
import pytest

from barnabas import Message, Reject, Retry
from barnabas.errors import WaitInHandler


@pytest.fixture
def out(app):
    return app.topic("out", int, partitions=1)


def test_sends_leave_when_the_handler_has_returned(place, app, numbers, out, consume):
    futures = []

    def body(n):
        futures.append(out.send(n))
        assert not futures[-1].done()
        assert app.events.read("out", 0, 0, 9) == []

    consume(numbers, body)
    numbers.send(5).result(5)
    place.drain(app)
    assert place.values(out) == [5]
    message = futures[0].result(5)
    assert (message.topic, message.offset, message.value) == ("out", 0, 5)


def test_sends_of_a_failing_handler_are_dropped(place, app, numbers, out, consume):
    runs, futures = [], []

    def body(n):
        runs.append(n)
        futures.append(out.send(len(runs)))
        futures.append(out.send_many([10, 20]))
        futures.append(job.enqueue(1))
        futures.append(job.enqueue_many([(1,), (2,)]))
        if len(runs) < 3:
            raise ValueError("not yet")

    @app.job
    def job(n: int): ...

    consume(numbers, body, retry=Retry(5, backoff=0.01))
    numbers.send(1).result(5)
    place.drain(app)
    assert place.values(out) == [3, 10, 20]
    assert [future.result(5) for future in futures[:8]] == [None] * 8
    assert futures[9].result(5) == 2 and len(futures[11].result(5)) == 2


def test_sends_of_a_dead_handler_are_dropped_too(place, app, numbers, out, consume):
    def body(n):
        out.send(n)
        raise Reject("no")

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert place.values(out) == [] and len(place.dead(numbers)) == 1


def test_send_many_inside_a_handler_counts_when_it_has_left(place, app, numbers, out, consume):
    futures = []

    def body(n):
        futures.append(out.send_many(range(n)))
        futures.append(out.send_many([Message(value=99, key="k")]))
        futures.append(out.send_many([]))

    consume(numbers, body)
    numbers.send(3).result(5)
    place.drain(app)
    assert place.values(out) == [0, 1, 2, 99]
    assert [future.result(5) for future in futures] == [3, 1, 0]


def test_ids_are_there_at_once_and_equal_on_a_repeat(place, app, numbers, out, consume):
    runs = []

    @app.job
    def job(n: int): ...

    def body(n):
        ids = [out.send(1).id, out.send(2).id, job.enqueue(1).id, out.send_many([1]).id]
        runs.append((n, ids))
        if len([1 for m, _ in runs if m == n]) < 2:
            raise ValueError("once more")

    consume(numbers, body, retry=Retry(5, backoff=0.01))
    numbers.send_many([1, 2]).result(5)
    place.drain(app)
    by_number = {n: [ids for m, ids in runs if m == n] for n in (1, 2)}
    for first, second in by_number.values():
        assert first == second and len(set(first)) == 4 and all(first)
    assert not set(by_number[1][0]) & set(by_number[2][0])


def test_ids_do_not_depend_on_what_ran_before(place, app, numbers, out, consume):
    ids = {}

    @app.job
    def refused(n: int): ...

    app.before_enqueue(lambda job: False)

    def body(n):
        if n != 1:
            out.send_many([])
            refused.enqueue(1)
        if n:
            ids[n] = out.send(n).id

    consume(numbers, body)
    numbers.send_many([0, 1, 2]).result(5)
    place.drain(app, skip=["queue:default"])
    assert {n: text.split("/")[-2:] for n, text in ids.items()} == {1: ["1", "1"], 2: ["2", "3"]}


def test_the_id_of_a_job_is_stored_with_it(place, app, numbers, consume):
    ids, ran = [], []

    @app.job
    def job(n: int): ...

    @app.around
    def watch(delivery):
        ran.append(delivery.key)
        yield

    def body(n):
        ids.append(job.enqueue(n).id)

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert ids[0] in ran


def test_waiting_for_a_send_inside_the_handler_raises_at_once(place, app, numbers, out, consume):
    errors = []

    @app.job
    def job(n: int): ...

    def body(n):
        for future in (out.send(n), out.send_many([n]), job.enqueue(n), job.enqueue_many([(n,), (n,)])):
            try:
                future.result(5)
            except WaitInHandler as error:
                errors.append(str(error))

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert len(errors) == 4 and all("now=True" in text for text in errors)
    assert place.values(out) == [1, 1]


def test_awaiting_a_send_inside_the_handler_raises_at_once(place, app, numbers, out):
    errors = []

    @app.consumer(numbers)
    async def read(n: int):
        try:
            await out.send(n)
        except WaitInHandler as error:
            errors.append(str(error))

    numbers.send(1).result(5)
    place.drain(app)
    assert len(errors) == 1 and "now=True" in errors[0]


def test_a_handler_that_waits_fails_as_any_other(place, app, numbers, out):
    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        out.send(n).result()

    numbers.send(1).result(5)
    place.drain(app)
    assert dict(place.dead(numbers)[0].headers)["barnabas-exception"] == b"WaitInHandler"
    assert place.values(out) == []


def test_now_sends_at_once_whatever_becomes_of_the_message(place, app, numbers, out):
    offsets, jobs = [], []

    @app.job
    def job(n: int):
        jobs.append(n)

    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        offsets.append(out.send(n, now=True).result(5).offset)
        job.options(now=True).enqueue(n).result(5)
        raise ValueError("and fails")

    numbers.send(1).result(5)
    place.drain(app)
    assert offsets == [0] and place.values(out) == [1] and jobs == [1]


def test_sends_of_threads_that_a_handler_started_go_at_once(place, app, numbers, out):
    stored = []

    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        thread = threading.Thread(target=lambda: stored.append(out.send(n).result(5).offset))
        thread.start()
        thread.join(10)
        raise ValueError("and fails")

    numbers.send(1).result(5)
    place.drain(app)
    assert stored == [0] and place.values(out) == [1]


def test_a_task_belongs_to_its_handler_for_as_long_as_that_runs(place, app, numbers, out):
    tasks = []

    @app.consumer(numbers, retry=Retry(0))
    async def read(n: int):
        async def helper():
            out.send(n)

        await asyncio.create_task(helper())  # held back like its own
        released = asyncio.Event()

        async def late():
            await released.wait()
            out.send(100 + n)

        tasks.append((asyncio.create_task(late()), released))
        if n == 2:
            for _, event in tasks:  # the task of the first delivery sends while the second one runs
                event.set()
            await tasks[0][0]
            raise ValueError("drops its own sends, not those of the first one's task")

    numbers.send_many([1, 2]).result(5)
    place.drain(app)
    assert 2 not in place.values(out)
    assert [n for n in place.values(out) if n < 100] == [1] and 101 in place.values(out)


def test_what_a_task_sends_after_its_handler_leaves_though_the_worker_is_at_another_run(place, app, out):
    pair, tasks = app.topic("pair", int, partitions=2), []

    @app.consumer(pair)
    async def read(n: int):
        released = asyncio.Event()

        async def late():
            await released.wait()
            out.send(n)

        tasks.append((n, asyncio.create_task(late()), released))
        if len(tasks) == 2:
            tasks[0][2].set()
            await tasks[0][1]

    for n in range(2):
        pair.send(n, partition=n).result(5)
    place.drain(app)
    assert place.values(out) == [tasks[0][0]]


def test_outputs_of_concurrent_handlers_do_not_mix(place, app):
    keyed = app.topic("keyed", dict, key=lambda v: v["k"], partitions=2)
    out = app.topic("out", dict, partitions=1)

    @app.consumer(keyed, concurrency=20, retry=Retry(0))
    async def read(value: dict):
        for part in range(3):
            out.send({**value, "part": part})
            await asyncio.sleep(0)
        if value["n"] % 3 == 0:
            raise ValueError("dropped")

    keyed.send_many({"k": f"k{n % 7}", "n": n} for n in range(60)).result(5)
    place.drain(app)
    values = place.values(out)
    assert len(values) == 40 * 3
    assert {v["n"] for v in values} == {n for n in range(60) if n % 3}


def test_topic_to_topic_is_exact_over_restarts(place, app, numbers, out):
    @app.consumer(numbers)
    def read(n: int):
        out.send(n * 2)

    for part in range(5):
        numbers.send_many(range(part * 100, part * 100 + 100)).result(5)
        place.drain(app)
        place.again(app)
    assert place.values(out) == [n * 2 for n in range(500)]


def test_a_handler_can_send_to_its_own_topic(place, app, numbers):
    seen = []

    @app.consumer(numbers)
    def read(n: int):
        seen.append(n)
        if n:
            numbers.send(n - 1)

    numbers.send(20).result(5)
    place.drain(app)
    assert seen == list(range(20, -1, -1))


def test_a_send_to_an_unknown_partition_fails_the_handler(place, app, numbers, out):
    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        out.send(n)
        if n == 1:
            out.send(n, partition=7)

    numbers.send_many([1, 2]).result(5)
    place.drain(app)
    assert [msgspec.json.decode(m.value) for m in place.dead(numbers)] == [1]
    assert place.values(out) == [2]


def test_what_another_app_declares_never_goes_where_that_app_does_not_look(place, app, numbers, out):
    other = place.app("other")
    theirs, work = other.topic("theirs", int), other.job(name="work")(lambda n: None)

    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        out.send(n)
        if n == 3:
            return theirs.send(n, now=True).result(5)
        (theirs.send, lambda n: theirs.send_many([n]), work.enqueue)[n](n)

    numbers.send_many([0, 1, 2, 3]).result(5)
    place.drain(app)
    reasons = [dict(m.headers)["barnabas-reason"].decode() for m in place.dead(numbers)]
    assert len(reasons) == 3 and all("belongs to <app other>, and this handler to <app shop>" in why for why in reasons)
    assert place.values(out) == [3] and place.values(theirs) == [3]


def test_a_value_that_cannot_be_sent_fails_the_handler(place, app, numbers, out):
    small = app.topic("small", codec="raw", limit=10)

    @app.consumer(numbers, retry=Retry(0))
    def read(n: int):
        out.send(n)
        small.send(b"x" * 11)

    numbers.send(1).result(5)
    place.drain(app)
    assert dict(place.dead(numbers)[0].headers)["barnabas-exception"] == b"ValueTooLarge"
    assert place.values(out) == []
