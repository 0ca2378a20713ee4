"""Failures: what is retried, in which order, how often, and what becomes of it in the end."""

import asyncio
import threading
from collections import defaultdict
from itertools import pairwise

import msgspec
import pytest
from watching import Step, failures, settled, wait_for

from barnabas import Batch, Delivery, Message, Reject, Retry, RetryAfter
from barnabas.engine.handler import Stop, to_retry
from barnabas.errors import BackendError, BarnabasError

QUICK = 0.01  # seconds


@pytest.fixture
def topic(app):
    return app.topic("steps", Step, key="key", partitions=3)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("times", [0, 1, 5])
def test_retry_counts_the_runs_after_the_first(place, app, topic, kind, times):
    attempts = []
    if kind == "sync":

        @app.consumer(topic, retry=Retry(times, backoff=QUICK))
        def read(step: Step, delivery: Delivery):
            attempts.append(delivery.attempt)
            raise ValueError("always")
    else:

        @app.consumer(topic, retry=Retry(times, backoff=QUICK))
        async def read(step: Step, delivery: Delivery):
            attempts.append(delivery.attempt)
            raise ValueError("always")

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert attempts == list(range(1, times + 2))
    assert len(place.dead(topic)) == 1
    assert [f.outcome for f in failures(app)] == ["again"] * times + ["dead"]
    assert app.observers.counts["read", "again"] == times if times else True
    assert app.observers.counts["read", "dead"] == 1
    assert app.observers.counts["read", "done"] == 0


def test_five_retries_are_the_default():
    assert Retry().times == 5


def test_a_retry_that_succeeds_is_done(place, app, topic):
    attempts = []

    @app.consumer(topic, retry=Retry(5, backoff=QUICK))
    def read(step: Step, delivery: Delivery):
        attempts.append(delivery.attempt)
        if delivery.attempt < 3:
            raise ValueError("not yet")

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert attempts == [1, 2, 3] and place.dead(topic) == []
    assert app.observers.counts["read", "done"] == settled(app, "read") == 1


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_order_per_key_holds_across_retries_and_other_keys_go_on(place, app, kind):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen: dict[str, list[int]] = defaultdict(list)

    def handle(step: Step) -> None:
        # The first of the slow key fails until all of the other keys, behind it in the partition, are through.
        if step.key == "slow" and step.n == 0 and sum(len(v) for k, v in seen.items() if k != "slow") < 40:
            raise ValueError("not yet")
        seen[step.key].append(step.n)

    options = {"concurrency": 4, "retry": Retry(1000, backoff=QUICK)}
    if kind == "threads":

        @app.consumer(topic, **options)
        def read(step: Step):
            handle(step)
    else:

        @app.consumer(topic, **options)
        async def read(step: Step):
            await asyncio.sleep(0)
            handle(step)

    topic.send_many([Step(key, n) for n in range(10) for key in ("slow", "a", "b", "c", "d")]).result(5)
    place.drain(app)
    assert seen == {key: list(range(10)) for key in ("slow", "a", "b", "c", "d")}
    assert failures(app, "again")


def test_without_lanes_the_partition_waits_and_others_go_on(place, app, topic):
    seen: dict[int, list[int]] = defaultdict(list)

    @app.consumer(topic, retry=Retry(1000, backoff=QUICK))
    def read(step: Step, delivery: Delivery):
        if delivery.partition == 0 and delivery.offset == 0 and len(seen[1]) + len(seen[2]) < 20:
            raise ValueError("not yet")
        seen[delivery.partition].append(step.n)

    topic.send_many(Message(value=Step("k", n), partition=p) for n in range(10) for p in range(3)).result(5)
    place.drain(app)
    assert seen == {p: list(range(10)) for p in range(3)}
    assert failures(app, "again")


def test_without_order_a_parked_message_holds_up_nothing(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, order="none", retry=Retry(1000, backoff=QUICK))
    def read(step: Step):
        if step.n == 0 and len(seen) < 9:
            raise ValueError("not yet")
        seen.append(step.n)

    topic.send_many([Step("same", n) for n in range(10)]).result(5)
    place.drain(app)
    assert seen[-1] == 0 and sorted(seen) == list(range(10))


def test_messages_without_a_key_do_not_wait_for_each_other(place, app):
    topic = app.topic("plain", int, partitions=1)
    seen = []

    @app.consumer(topic, concurrency=2, retry=Retry(1000, backoff=QUICK))
    def read(n: int):
        if n == 0 and len(seen) < 9:
            raise ValueError("not yet")
        seen.append(n)

    topic.send_many(range(10)).result(5)
    place.drain(app)
    assert seen[-1] == 0 and sorted(seen) == list(range(10))


def test_backoff_is_a_number_a_list_or_a_function(place, app):
    topics = [app.topic(f"t{i}", int) for i in range(3)]
    asked = []

    def grow(retry: int) -> float:
        asked.append(retry)
        return QUICK

    for topic, backoff in zip(topics, (QUICK, [QUICK, 0], grow), strict=True):

        @app.consumer(topic, name=topic.name, retry=Retry(3, backoff=backoff))
        def read(n: int):
            raise ValueError("always")

        topic.send(1).result(5)
    place.drain(app)
    assert asked == [1, 2, 3]
    assert [len(place.dead(topic)) for topic in topics] == [1, 1, 1]


def test_a_retry_does_not_come_before_its_time(place, app, topic):
    times = []

    @app.consumer(topic, retry=Retry(2, backoff=0.15, jitter=0))
    def read(step: Step):
        times.append(app.clock.monotonic())
        raise ValueError("always")

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert [b - a >= 0.149 for a, b in pairwise(times)] == [True, True]


def test_attempts_survive_a_restart(place, app, topic):
    attempts = []

    @app.consumer(topic, retry=Retry(3, backoff=lambda retry: 600.0 if len(attempts) == 2 else QUICK, jitter=0))
    def read(step: Step, delivery: Delivery):
        attempts.append(delivery.attempt)
        raise ValueError("always")

    topic.send(Step("k")).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(failures(app, "again")) == 2, worker=worker)
    assert attempts == [1, 2]  # it waits ten minutes, but the wait belongs to the assignment: a restart ends it
    place.again(app)
    place.drain(app)
    assert attempts == [1, 2, 3, 4]
    assert dict(place.dead(topic)[0].headers)["barnabas-attempts"] == b"4"


def test_a_rejected_message_is_dead_at_once(place, app, topic):
    runs = []

    @app.consumer(topic, concurrency=2)
    def read(step: Step):
        runs.append(step.n)
        raise Reject("no such customer")

    topic.send(Step("k")).result(5)
    place.drain(app)
    (letter,) = place.dead(topic)
    assert runs == [0]
    assert dict(letter.headers)["barnabas-reason"] == b"rejected: no such customer"


def test_retry_after_names_its_own_time_and_counts_as_an_attempt(place, app, topic):
    attempts = []

    @app.consumer(topic, retry=Retry(2, backoff=600))
    def read(step: Step, delivery: Delivery):
        attempts.append(delivery.attempt)
        raise RetryAfter(QUICK)

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert attempts == [1, 2, 3] and len(place.dead(topic)) == 1


def test_only_the_errors_named_are_retried(place, app, topic):
    runs: dict[str, int] = defaultdict(int)
    errors = {
        "io": ConnectionError("net"),
        "value": ValueError("v"),
        "late": RetryAfter(QUICK),
        "lookup": KeyError("k"),
    }

    @app.consumer(topic, concurrency=3, retry=Retry(2, backoff=QUICK, on=(OSError, LookupError), give_up_on=KeyError))
    def read(step: Step):
        runs[step.key] += 1
        raise errors[step.key]

    topic.send_many(Step(key) for key in errors).result(5)
    place.drain(app)
    assert runs == {"io": 3, "value": 1, "late": 3, "lookup": 1}
    reasons = {m.key: dict(m.headers)["barnabas-reason"].decode() for m in place.dead(topic)}
    assert reasons["io"] == "failed 3 times, last with ConnectionError: net"
    assert reasons["value"] == "not retried: ValueError: v"
    assert reasons["lookup"] == "gave up on KeyError: 'k'"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_cancellation_that_the_handler_raised_itself_is_a_failure_and_retried(place, app, topic, kind):
    attempts = []
    if kind == "sync":

        @app.consumer(topic, retry=Retry(1, backoff=QUICK))
        def read(step: Step):
            attempts.append(1)
            raise asyncio.CancelledError
    else:

        @app.consumer(topic, retry=Retry(1, backoff=QUICK))
        async def read(step: Step):
            attempts.append(1)
            task = asyncio.create_task(asyncio.sleep(10))
            task.cancel()
            await task

    topic.send_many([Step("k"), Step("l")]).result(5)
    place.drain(app)
    assert len(attempts) == 4 and len(place.dead(topic)) == 2


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


class Panic(BaseException):
    """As Rust's, in Python."""


WILD = [(Mute(), "Mute: (RuntimeError while reading"), (SystemExit(3), "SystemExit: 3"), (Panic("rust"), "Panic: rust")]


@pytest.mark.parametrize("kind", ["sync", "async", "batch", "job", "async job"])
@pytest.mark.parametrize(("error", "said"), WILD)
def test_an_error_that_cannot_be_printed_or_is_no_exception_is_a_failure(place, app, topic, kind, error, said):
    runs, nothing = [], Retry(1, backoff=lambda n: "soon")  # a backoff that fails must not cost the message either

    def fail(step):
        runs.append(step)
        raise error

    async def fail_async(step):
        fail(step)

    def fail_batch(steps: list[Step]):
        fail(steps)

    job = kind.endswith("job")
    function = fail_async if "async" in kind else fail_batch if kind == "batch" else fail
    if job:
        app.job(name="read", retry=1, retry_delay=lambda *given: 0.01)(function).enqueue(1).result(5)
    else:
        app.consumer(topic, name="read", retry=nothing)(function)
        topic.send(Step("k")).result(5)
    with place.running(app) as worker:
        wait_for(lambda: [f.outcome for f in failures(app)] == ["again"] * (not job or 1), worker=worker)
        assert said in failures(app)[0].reason and worker.failed() is None


def test_a_handler_that_waits_for_a_backend_is_no_failure_and_says_so(place, app, topic, caplog):
    tries = []

    @app.consumer(topic, retry=Retry(0))
    def read(step: Step):
        tries.append(step)
        if len(tries) == 1:
            raise BackendError("out of reach")

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert len(tries) == 2 and not failures(app)
    assert "read: what its handler asked of a backend failed" in caplog.text and "BackendError: out of reach" in caplog.text


@pytest.mark.parametrize("seconds", ["5", -1, float("nan"), float("inf"), None])
def test_retry_after_no_time_is_an_error_of_the_handler(seconds):
    with pytest.raises(ValueError, match="give seconds"):
        RetryAfter(seconds)


def test_a_message_that_cannot_be_decoded_is_dead_at_once_with_all_headers(place, app, topic):
    seen = []

    @app.consumer(topic, retry=Retry(3, backoff=QUICK))
    def read(step: Step):
        seen.append(step)

    app.topics["steps"].encode = lambda value: value  # another program's message
    before = app.clock.now()
    bad = topic.send(b'{"key": "k", "n": "no number"}', key="k", headers=[("own", b"1")]).result
    topic.send(msgspec.json.encode(Step("k", 7)), key="k").result(5)
    with pytest.raises(BarnabasError, match="ValidationError"):
        bad(5)
    place.drain(app)
    assert seen == [Step("k", 7)]
    (letter,) = place.dead(topic)
    assert letter.key == "k" and letter.value == b'{"key": "k", "n": "no number"}'
    headers = dict(letter.headers)
    assert headers["own"] == b"1"
    assert headers["barnabas-reason"].startswith(b"undecodable: ValidationError: Expected `int`")
    assert headers["barnabas-exception"] == b"ValidationError"
    assert headers["barnabas-traceback"] == b""  # no code of the user's is at fault
    assert headers["barnabas-attempts"] == b"1"
    assert headers["barnabas-group"] == b"shop-read"
    assert headers["barnabas-topic"] == b"steps"
    partition = int(headers["barnabas-partition"])
    (row,) = app.events.read("steps", partition, int(headers["barnabas-offset"]), 1)
    assert row[2] == letter.value
    assert before <= float(headers["barnabas-time"]) <= app.clock.now()
    assert [f.outcome for f in failures(app)] == ["dead"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"key": 1}', b"null"])
def test_nothing_that_is_no_value_loops_blocks_or_vanishes(place, app, data):
    raw = app.topic("raw", codec="raw", partitions=1)
    seen = []

    @app.consumer(raw)
    def feed(data: bytes):
        seen.append(data)

    typed = app.topic("typed", Step, partitions=1)
    typed.encode = lambda value: value

    @app.consumer(typed)
    def read(step: Step):
        seen.append(step)

    typed.send(data)
    typed.send(msgspec.json.encode(Step("k")))
    app.events.flush(5)
    place.drain(app)
    assert seen == [Step("k")]
    assert [row[2] for row in app.events.read("typed.dead", 0, 0, 9)] == [data]


def test_a_dead_letter_has_the_traceback_of_the_handler(place, app, topic):
    @app.consumer(topic, retry=Retry(0))
    def read(step: Step):
        def deep_inside():
            raise ValueError("x" * 5000)

        deep_inside()

    topic.send(Step("k", 3), timestamp=77.0).result(5)
    place.drain(app)
    (letter,) = place.dead(topic)
    headers = dict(letter.headers)
    assert msgspec.json.decode(letter.value, type=Step) == Step("k", 3)
    assert headers["barnabas-exception"] == b"ValueError"
    assert len(headers["barnabas-traceback"]) <= 2048 and headers["barnabas-traceback"].rstrip().endswith(b"x")
    assert len(headers["barnabas-reason"]) <= 2048


def test_dead_letters_are_as_durable_as_positions(place, app, topic):
    @app.consumer(topic, retry=Retry(0))
    def read(step: Step):
        raise ValueError(step.n)

    topic.send_many(Step(f"k{n}", n) for n in range(200)).result(5)
    place.drain(app)
    place.again(app)
    place.drain(app)
    assert sorted(msgspec.json.decode(m.value)["n"] for m in place.dead(topic)) == list(range(200))
    assert len({(m.partition, m.offset) for m in place.dead(topic)}) == 200


def test_dead_letters_can_be_consumed(place, app, topic):
    reasons = []

    @app.consumer(topic, retry=Retry(0))
    def read(step: Step):
        raise ValueError("broken")

    @app.consumer(topic.dead_topic)
    def undertaker(value: bytes, delivery: Delivery):
        reasons.append(dict(delivery.headers)["barnabas-reason"])

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert reasons == [b"failed 1 times, last with ValueError: broken"]


def test_on_dead_skip_counts_and_goes_on(place, app, topic):
    seen = []

    @app.consumer(topic, retry=Retry(1, backoff=QUICK), on_dead="skip")
    def read(step: Step):
        if step.n == 0:
            raise ValueError("bad")
        seen.append(step.n)

    topic.send_many([Step("k", 0), Step("k", 1)]).result(5)
    place.drain(app)
    assert seen == [1] and place.dead(topic) == []
    assert app.observers.counts["read", "skipped"] == 1 and app.observers.counts["read", "done"] == 1
    assert [f.outcome for f in failures(app)] == ["again", "skipped"]


def test_undecodable_messages_are_never_skipped_in_silence(place, app, topic):
    @app.consumer(topic, on_dead="skip")
    def read(step: Step): ...

    topic.encode = lambda value: b"rubbish"
    topic.send(Step("k"))
    app.events.flush(5)
    place.drain(app)
    assert sum(len(app.events.read("steps.dead", p, 0, 9)) for p in range(3)) == 1


@pytest.mark.parametrize("kind", ["sync", "async", "batch"])
def test_on_dead_stop_stops_without_losing_the_message(place, app, kind):
    topic = app.topic("one", Step, key="key", partitions=1)
    runs, broken = [], True

    def handle(step: Step) -> None:
        runs.append(step.n)
        if step.n == 1 and broken:
            raise ValueError("bad")

    options = {"retry": Retry(1, backoff=QUICK), "on_dead": "stop"}
    if kind == "sync":

        @app.consumer(topic, **options)
        def read(step: Step):
            handle(step)
    elif kind == "async":

        @app.consumer(topic, **options)
        async def read(step: Step):
            handle(step)
    else:

        @app.consumer(topic, batch=Batch(max=3), **options)
        def read(steps: list[Step]):
            for step in steps:
                handle(step)

    topic.send_many([Step("k", n) for n in range(3)]).result(5)
    with place.running(app, fails=True) as worker:
        wait_for(lambda: worker.failed() is not None)
        assert isinstance(worker.failed(), Stop) and 'on_dead="stop"' in str(worker.failed())
    assert 2 not in runs if kind != "batch" else True
    assert place.dead(topic) == []
    assert failures(app)[-1].outcome == "stop"
    broken = False
    place.again(app)
    place.drain(app)
    assert runs[-2:] == [1, 2]


def test_a_retry_that_gives_up_order_goes_through_the_groups_own_topic(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, retry=Retry(5, backoff=QUICK, ordered=False))
    def read(step: Step, delivery: Delivery):
        seen.append((step.n, delivery.attempt))
        if step.n == 0 and delivery.attempt < 3:
            raise ValueError("not yet")

    topic.send_many([Step("k", 0), Step("k", 1), Step("k", 2)]).result(5)
    place.drain(app)
    assert [n for n, attempt in seen if attempt == 1] == [0, 1, 2]  # nobody waited
    assert [attempt for n, attempt in seen if n == 0] == [1, 2, 3]
    assert len(place.stored(topic.retry_topic("shop-read"))) == 2
    assert topic.retry_topic("shop-read").name == "one.retry.shop-read"
    assert app.observers.counts["read", "retry topic"] == 2
    assert app.observers.counts["read", "done"] == 3


def test_a_message_in_a_retry_topic_keeps_its_first_address(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, retry=Retry(2, backoff=QUICK, ordered=False))
    def read(step: Step, delivery: Delivery):
        seen.append(delivery)
        raise ValueError("always")

    topic.send(Step("other", 0)).result(5)
    message = topic.send(Step("k", 1), headers=[("own", b"1")], timestamp=5.0).result(5)
    place.drain(app)
    mine = [d for d in seen if d.key == "k"]
    assert [d.attempt for d in mine] == [1, 2, 3]
    for d in mine:
        assert (d.topic, d.partition, d.offset, d.timestamp) == ("one", 0, message.offset, 5.0)
        assert (d.headers, d.value, d.group) == ([("own", b"1")], Step("k", 1), "shop-read")
    letter = next(m for m in place.dead(topic) if m.key == "k")
    headers = dict(letter.headers)
    assert headers["own"] == b"1"
    assert [headers[f"barnabas-{name}"] for name in ("topic", "partition", "offset", "attempts")] == [
        b"one", b"0", str(message.offset).encode(), b"3",
    ]  # fmt: skip
    assert not [name for name in headers if name.startswith("barnabas-retry")]


def test_messages_of_a_retry_topic_wait_for_their_time_and_outlive_a_restart(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    # The first one's retry is due much later than those of the others, which lie behind it in the retry topic.
    @app.consumer(topic, retry=Retry(3, backoff=lambda n: 600.0 if len(seen) == 1 else QUICK, ordered=False, jitter=0))
    def read(step: Step, delivery: Delivery):
        seen.append((step.n, delivery.attempt))
        if delivery.attempt == 1:
            raise ValueError("once")

    topic.send_many([Step("k", n) for n in range(5)]).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(seen) == 9, worker=worker)
        wait_for(lambda: settled(app, "read") == 9, worker=worker)
    assert (0, 2) not in seen
    app.clock.advance(600)
    place.again(app)
    place.drain(app)
    assert seen[9:] == [(0, 2)]


@pytest.mark.parametrize("options", [{}, {"start": "latest"}, {"concurrency": 3}, {"retry": Retry(0, ordered=False)}])
def test_a_group_always_reads_its_retry_topic_from_its_beginning(place, app, options):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, **options)
    def read(step: Step, delivery: Delivery):
        seen.append((step.n, delivery.offset, delivery.attempt))

    row = (0, "k", b'{"key":"k","n":7}', None, 1.5)
    outputs = [to_retry(topic, "shop-read", ("one", 0, at), 0, app.clock.now(), row, []) for at in range(50)]
    app.events.send(outputs)
    app.events.flush(5)
    place.drain(app)
    assert sorted(seen) == [(7, at, 1) for at in range(50)]


def test_two_groups_retry_apart(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, retry=Retry(1, backoff=QUICK, ordered=False))
    def good(step: Step):
        seen.append("good")

    @app.consumer(topic, retry=Retry(1, backoff=QUICK, ordered=False))
    def bad(step: Step):
        seen.append("bad")
        raise ValueError("always")

    topic.send(Step("k")).result(5)
    place.drain(app)
    assert sorted(seen) == ["bad", "bad", "good"]
    assert dict(place.dead(topic)[0].headers)["barnabas-group"] == b"shop-bad"


@pytest.mark.parametrize("kind", ["plain", "hooked", "batch", "job"])
def test_a_coroutine_that_nobody_awaits_is_a_failure_not_done(place, app, topic, kind):
    async def work(*args): ...

    options = {"retry": Retry(0), "hooks": [hook] if kind == "hooked" else []}
    if kind == "job":

        @app.job(name="work", retry=0)
        def wrapper(n: int):
            return work(n)

        wrapper.enqueue(1).result(5)
    elif kind == "batch":

        @app.consumer(topic, name="work", batch=Batch(max=1), **options)
        def wrapper(steps: list[Step]):
            return work(steps)
    else:

        @app.consumer(topic, name="work", **options)
        def wrapper(step: Step):
            return work(step)

    topic.send(Step("k")).result(5)
    place.drain(app)
    (failure,) = failures(app)
    assert failure.outcome == "dead" and "a coroutine (" in failure.reason and "nobody awaits" in failure.reason


def hook(delivery):
    yield


def test_a_failure_holds_up_no_other_consumer(place, app, topic):
    seen, held = [], threading.Event()

    @app.consumer(topic, retry=Retry(1000, backoff=QUICK))
    def stuck(step: Step):
        if not held.is_set():
            raise ValueError("not yet")

    @app.consumer(topic)
    def free(step: Step):
        seen.append(step.n)
        if len(seen) == 30:
            held.set()

    topic.send_many(Step(f"k{n}", n) for n in range(30)).result(5)
    place.drain(app)
    assert len(seen) == 30


def test_dead_letters_larger_than_the_dead_topic_keep_their_address(place, app):
    topic = app.topic("raw", codec="raw", limit=100)

    @app.consumer(topic, retry=Retry(0))
    def read(value: bytes):
        raise ValueError("bad")

    assert topic.dead_topic.limit == 100 + 64 * 1024
    topic.limit = 10**6  # another process's setting
    topic.send(b"x" * 200_000).result(5)
    topic.limit = 100
    place.drain(app)
    (letter,) = place.dead(topic)
    headers = dict(letter.headers)
    assert letter.value is None and headers["barnabas-value-left-out"] == b"200000"
    assert headers["barnabas-offset"] == b"0"


def test_an_exhausted_message_does_not_hold_its_key(place, app):
    topic = app.topic("one", Step, key="key", partitions=1)
    seen = []

    @app.consumer(topic, concurrency=3, retry=Retry(1, backoff=QUICK))
    def read(step: Step):
        if step.n % 2:
            raise ValueError("odd")
        seen.append(step.n)

    topic.send_many([Step("k", n) for n in range(10)]).result(5)
    place.drain(app)
    assert seen == [0, 2, 4, 6, 8]
    assert [msgspec.json.decode(m.value)["n"] for m in place.dead(topic)] == [1, 3, 5, 7, 9]
