"""Hooks: what runs around handlers and jobs, and what it may do."""

import asyncio
from contextlib import suppress

import pytest
from watching import failures, waiting

from barnabas import Batch, Delivery, Done, Reject, Respond, Retry


def around(name, log):
    def hook(delivery):
        log.append(f"{name} before")
        try:
            outcome = yield
        except Exception as error:
            log.append(f"{name} saw {type(error).__name__}")
            raise
        log.append(f"{name} after {outcome}")

    return hook


def test_hooks_stand_around_the_handler_like_an_onion(place, app, numbers, consume):
    log = []
    app.around(around("outer", log))
    app.around(around("inner", log))

    def body(n):
        log.append("handler")
        return n * 2

    consume(numbers, body, hooks=[around("own", log)])
    numbers.send(21).result(5)
    place.drain(app)
    assert log == [
        "outer before", "inner before", "own before", "handler", "own after 42", "inner after 42", "outer after 42",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_hook_sees_the_error_inside_out(place, app, numbers, consume, count):
    log = []
    for n in range(count):
        app.around(around(str(n), log))

    def body(n):
        raise ValueError("bad")

    consume(numbers, body, retry=Retry(0))
    numbers.send(1).result(5)
    place.drain(app)
    names = [str(n) for n in range(count)]
    assert log == [f"{n} before" for n in names] + [f"{n} saw ValueError" for n in reversed(names)]
    assert len(place.dead(numbers)) == 1


def test_a_hook_gets_the_delivery(place, app, numbers, consume):
    seen = []

    @app.around
    def watch(delivery):
        seen.append(delivery)
        yield

    consume(numbers, lambda n: None)
    numbers.send(7, key="k", headers=[("a", b"1")], timestamp=3.0).result(5)
    place.drain(app)
    assert seen == [Delivery("numbers", 0, 0, "k", 7, [("a", b"1")], 3.0, 1, "shop-read")]


def test_before_and_after_are_plain_functions(place, app, numbers, consume):
    log = []
    app.before(lambda delivery: log.append(("before", delivery.value)))
    app.after(lambda delivery, outcome: log.append(("after", outcome)))

    def body(n):
        if n == 2:
            raise ValueError("bad")
        return n * 10

    consume(numbers, body, retry=Retry(0))
    numbers.send_many([1, 2]).result(5)
    place.drain(app)
    assert log == [("before", 1), ("after", 10), ("before", 2)]


def test_an_error_in_before_fails_the_delivery_and_the_handler_does_not_run(place, app, numbers, consume):
    runs, outer = [], []
    app.around(around("outer", outer))

    @app.before
    def refuse(delivery):
        raise Reject("not for us")

    consume(numbers, runs.append)
    numbers.send(1).result(5)
    place.drain(app)
    assert runs == [] and outer == ["outer before", "outer saw Reject"]
    assert dict(place.dead(numbers)[0].headers)["barnabas-reason"] == b"rejected: not for us"


def test_an_error_after_the_handler_fails_the_delivery(place, app, numbers, consume):
    runs, outer = [], []
    out = app.topic("out", int, partitions=1)
    app.around(around("outer", outer))

    @app.after
    def check(delivery, outcome):
        if len(runs) == 1:
            raise ValueError("checked and found wanting")

    def body(n):
        runs.append(n)
        out.send(len(runs))

    consume(numbers, body, retry=Retry(1, backoff=0.01))
    numbers.send(1).result(5)
    place.drain(app)
    assert runs == [1, 1] and place.values(out) == [2]
    assert outer[1] == "outer saw ValueError" and outer[3] == "outer after None"


def test_a_swallowed_error_is_not_done(place, app, numbers, consume):
    runs = []

    @app.around
    def swallow(delivery):
        with suppress(ValueError):
            yield

    def body(n):
        runs.append(n)
        raise ValueError("bad")

    consume(numbers, body, retry=Retry(1, backoff=0.01))
    numbers.send(1).result(5)
    place.drain(app)
    assert runs == [1, 1] and len(place.dead(numbers)) == 1


@pytest.mark.parametrize("done", [Done, Done()])
@pytest.mark.parametrize("hooks", [1, 2])
def test_a_hook_that_says_done_makes_it_so(place, app, numbers, consume, done, hooks):
    runs, outer = [], []
    if hooks == 2:
        app.around(around("outer", outer))

    @app.around
    def forgive(delivery):
        try:
            yield
        except ValueError:
            return done

    def body(n):
        runs.append(n)
        raise ValueError("bad")

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert runs == [1] and place.dead(numbers) == [] and not failures(app)
    assert outer == (["outer before", "outer after <class 'barnabas.verdict.Done'>"] if hooks == 2 else [])


def test_an_error_can_be_turned_into_another(place, app, numbers, consume):
    @app.around
    def translate(delivery):
        try:
            yield
        except KeyError:
            raise Reject("unknown") from None

    def body(n):
        raise KeyError(n)

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert dict(place.dead(numbers)[0].headers)["barnabas-reason"] == b"rejected: unknown"


@pytest.mark.parametrize("hooks", [1, 2])
def test_a_hook_that_yields_twice_fails(place, app, numbers, consume, hooks):
    if hooks == 2:
        app.before(lambda delivery: None)

    @app.around
    def twice(delivery):
        yield
        yield

    consume(numbers, lambda n: None, retry=Retry(0))
    numbers.send(1).result(5)
    place.drain(app)
    assert "yielded twice" in dict(place.dead(numbers)[0].headers)["barnabas-reason"].decode()


@pytest.mark.parametrize("hooks", [1, 2])
def test_a_hook_that_does_not_yield_fails_with_its_name(place, app, numbers, consume, hooks):
    runs = []
    if hooks == 2:
        app.before(lambda delivery: None)

    @app.around
    def never(delivery):
        if delivery.value < 0:
            yield

    consume(numbers, runs.append, retry=Retry(0))
    numbers.send(1).result(5)
    place.drain(app)
    assert runs == []
    reason = dict(place.dead(numbers)[0].headers)["barnabas-reason"].decode()
    assert "the hook never ended before its `yield`" in reason


def test_async_generators_serve_async_handlers(place, app, numbers):
    log = []

    @app.consumer(numbers, retry=Retry(1, backoff=0.01))
    async def read(n: int):
        log.append("handler")
        if log.count("handler") == 1:
            raise ValueError("bad")
        return "fine"

    @app.around
    async def outer(delivery):
        await asyncio.sleep(0)
        log.append("async before")
        try:
            outcome = yield
        except ValueError:
            await asyncio.sleep(0)
            log.append("async saw it")
            raise
        await asyncio.sleep(0)
        log.append(f"async after {outcome}")

    app.around(around("plain", log))
    numbers.send(1).result(5)
    place.drain(app)
    assert log == [
        "async before", "plain before", "handler", "plain saw ValueError", "async saw it",
        "async before", "plain before", "handler", "plain after fine", "async after fine",
    ]  # fmt: skip


def test_among_async_hooks_the_same_rules_hold(place, app):
    log = []
    topics = {name: app.topic(name, int, partitions=1) for name in ("swallow", "done", "twice", "never", "error")}

    async def swallow(delivery):
        try:
            yield
        except ValueError:
            log.append("swallowed")

    def done(delivery):
        try:
            yield
        except ValueError:
            return Done

    async def twice(delivery):
        yield
        yield

    async def never(delivery):
        if delivery.value < 0:
            yield

    async def error(delivery):
        yield
        raise KeyError("after")

    async def outer(delivery):
        try:
            yield
        except BaseException as error:
            log.append(type(error).__name__)
            raise

    for name, hook in {"swallow": swallow, "done": done, "twice": twice, "never": never, "error": error}.items():

        @app.consumer(topics[name], name=name, hooks=[outer, hook], retry=Retry(0))
        async def read(n: int, name=name):
            if name in ("swallow", "done"):
                raise ValueError("bad")

        topics[name].send(1).result(5)
    place.drain(app)
    dead = {name: [dict(m.headers)["barnabas-reason"].decode() for m in place.dead(t)] for name, t in topics.items()}
    assert dead["done"] == []
    assert dead["swallow"] == ["failed 1 times, last with ValueError: bad"] and "swallowed" in log
    assert "yielded twice" in dead["twice"][0]
    assert "the hook never ended before its `yield`" in dead["never"][0]
    assert "KeyError" in dead["error"][0]
    assert sorted(entry for entry in log if entry != "swallowed") == [
        "KeyError",
        "RuntimeError",
        "RuntimeError",
        "ValueError",
    ]


def test_hooks_of_one_consumer_run_for_it_alone(place, app, numbers):
    log = []

    @app.consumer(numbers, hooks=[around("own", log)])
    def one(n: int): ...

    @app.consumer(numbers)
    def two(n: int): ...

    numbers.send(1).result(5)
    place.drain(app)
    assert log == ["own before", "own after None"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hooks_run_around_jobs(place, app, kind):
    log, deliveries = [], []
    app.around(around("app", log))

    def watch(delivery):
        deliveries.append(delivery)
        yield

    if kind == "sync":

        @app.job(queue="mail", hooks=[around("own", log), watch])
        def mail(n: int, text: str):
            return n
    else:

        @app.job(queue="mail", hooks=[around("own", log), watch])
        async def mail(n: int, text: str):
            return n

    @app.job(queue="mail")
    def other(): ...

    jid = mail.enqueue(1, "x").result(5)
    place.drain(app)
    assert log == ["app before", "own before", "own after 1", "app after 1"]
    (delivery,) = deliveries
    assert (delivery.topic, delivery.key, delivery.value, delivery.attempt, delivery.group) == (
        "mail", jid, (1, "x"), 1, "mail",
    )  # fmt: skip
    log.clear()
    other.enqueue().result(5)
    place.drain(app)
    assert log == ["app before", "app after None"]


def test_a_hook_can_fail_and_forgive_a_job(place, app):
    runs = []

    @app.around
    def forgive(delivery):
        try:
            yield
        except KeyError:
            return Done

    @app.job
    def mail(n: int):
        runs.append(n)
        raise (KeyError if n else ValueError)("bad")

    mail.enqueue(0)
    mail.enqueue(1).result(5)
    place.drain(app)
    assert sorted(runs) == [0, 1]
    assert waiting(app) == {"scheduled": 0, "retry": 1, "dead": 0}


def test_hooks_run_once_a_call_of_a_batch_handler(place, app, numbers):
    seen = []

    @app.around
    def watch(deliveries):
        seen.append([(d.value, d.offset) for d in deliveries])
        yield

    @app.consumer(numbers, batch=Batch(max=3, wait=0.02))
    def read(values: list[int]): ...

    numbers.send_many(range(5)).result(5)
    place.drain(app)
    assert seen == [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4)]]


def test_what_a_hook_sends_belongs_to_the_delivery(place, app, numbers, consume):
    out = app.topic("out", str, partitions=1)
    runs = []

    @app.around
    def audit(delivery):
        out.send(f"before {len(runs)}")
        yield
        out.send(f"after {len(runs)}")

    def body(n):
        runs.append(n)
        if len(runs) == 1:
            raise ValueError("bad")

    consume(numbers, body, retry=Retry(1, backoff=0.01))
    numbers.send(1).result(5)
    place.drain(app)
    assert place.values(out) == ["before 1", "after 2"]


def test_a_message_forgiven_by_a_hook_sends_nothing_of_the_failed_handler(place, app, numbers, consume):
    out = app.topic("out", int, partitions=1)

    @app.around
    def forgive(delivery):
        try:
            yield
        except ValueError:
            return Done

    def body(n):
        out.send(n)
        raise ValueError("bad")

    consume(numbers, body)
    numbers.send(1).result(5)
    place.drain(app)
    assert place.values(out) == [] and place.dead(numbers) == []


def test_a_message_forgiven_by_a_hook_owes_no_answer_but_what_the_hook_sends_leaves(place, app, numbers):
    out = app.topic("out", int, partitions=1)
    errors = app.topic("errors", str, partitions=1)

    @app.around
    def forgive(delivery):
        try:
            yield
        except ValueError as error:
            errors.send(str(error))
            return Done

    @app.consumer(numbers, responds=[out])
    def read(n: int, respond: Respond):
        respond(out, n)
        raise ValueError("bad")

    numbers.send(1).result(5)
    place.drain(app)
    assert place.values(out) == [] and place.dead(numbers) == [] and place.values(errors) == ["bad"]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_cancellation_is_nobodys_to_swallow(place, app, numbers, mixed):
    if mixed:

        @app.around
        async def another(delivery):
            yield

    @app.around
    def greedy(delivery):
        try:
            yield
        except BaseException:
            return Done

    runs = []

    @app.consumer(numbers, timeout=0.1, retry=Retry(0))
    async def read(n: int):
        runs.append(n)
        await asyncio.sleep(60)

    numbers.send(1).result(5)
    place.drain(app)
    assert "timeout" in dict(place.dead(numbers)[0].headers)["barnabas-reason"].decode()
