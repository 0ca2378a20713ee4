"""Priorities inside a queue: higher ones overtake, and nobody starves."""

import pytest

from barnabas.errors import DeclarationError, SendError
from barnabas.queues import jobs


@pytest.fixture
def app(place):
    return place.app(threads=1)


@pytest.fixture
def ranked(place):
    return place.app(threads=1) if place.name != "redis" else pytest.skip("Sidekiq's lists are first in, first out")


def test_higher_priorities_overtake_and_one_in_four_is_who_waits_longest(place, ranked):
    seen = []
    job = ranked.job(name="job", priority=1)(lambda n: seen.append(n))
    low, plain, high = job.options(priority=-3), job.options(priority=0), job.options(priority=5)
    low.enqueue_many([(f"low {n}",) for n in range(20)])
    plain.enqueue_many([(f"plain {n}",) for n in range(20)])
    job.enqueue_many([(f"job {n}",) for n in range(20)])
    high.enqueue_many([(f"high {n}",) for n in range(20)]).result(5)
    ranked.settings = ranked.settings.override(concurrency={"default": 1})  # claimed one at a time
    place.drain(ranked)
    kinds = [item.split()[0] for item in seen]
    assert sorted(seen) == sorted(f"{kind} {n}" for kind in ("low", "plain", "job", "high") for n in range(20))
    for kind in ("low", "plain", "job", "high"):
        assert [item for item in seen if item.startswith(kind)] == [f"{kind} {n}" for n in range(20)]
    assert kinds[:24].count("high") == 18 and kinds[:24].count("low") == 6  # who waits longest is a low one each time
    assert [kind for kind in kinds if kind != "low"] == ["high"] * 20 + ["job"] * 20 + ["plain"] * 20


def test_many_are_claimed_in_the_order_of_their_priority(place, ranked):
    seen = []
    job = ranked.job(name="job")(lambda n: seen.append(n))
    for n in range(30):
        job.options(priority=n % 3).enqueue(n)
    job.options(priority=10).enqueue_in(0.01, "due").result(5)
    ranked.clock.advance(1)
    assert [entry.job.state for entry in jobs(ranked)].count("ready") >= 30
    place.drain(ranked)
    assert set(seen[:6]) <= {"due", *range(2, 30, 3), 0, 1, 3, 4} and {*seen} == {"due", *range(30)} and len(seen) == 31
    twos = [n for n in seen if n != "due" and n % 3 == 2]
    assert twos == sorted(twos) and seen.index(29) < seen.index(24)


@pytest.mark.parametrize("how", ["chain", "batch", "handler", "retry", "unique"])
def test_a_priority_goes_along(place, ranked, how):
    from barnabas import RetryAfter, until_executed

    seen, failed = [], []
    kept = until_executed(by="n") if how == "unique" else None

    @ranked.job(name="urgent", priority=5, unique=kept)
    def urgent(n: int):
        if how == "retry" and not failed:
            failed.append(n)
            raise RetryAfter(10)
        seen.append("urgent")

    plain = ranked.job(name="plain")(lambda n: seen.append(n))
    first = ranked.job(name="first", queue="first")(lambda n: n)
    begin = ranked.job(name="begin", queue="first")(lambda n: urgent.enqueue(n).id and None)
    plain.enqueue_many([(n,) for n in range(40)]).result(5)
    if how == "chain":
        first.then(urgent).enqueue(1).result(5)
    elif how == "handler":
        begin.enqueue(1).result(5)
    elif how == "batch":
        with ranked.batch() as batch:
            urgent.options(batch=batch).enqueue(1)
    else:
        urgent.enqueue(1).result(5)
    queues = ["first", "default"] if how in ("chain", "handler") else ["default"]
    ranked.settings = ranked.settings.override(queues=queues[:1], concurrency={"default": 1} if len(queues) == 1 else {})
    if how == "retry":
        place.drain(ranked)
        seen.clear()
        ranked.clock.advance(20)
        plain.enqueue_many([(n,) for n in range(40)]).result(5)
    elif len(queues) > 1:
        place.drain(ranked)
        ranked.settings = ranked.settings.override(queues=["default"], concurrency={"default": 1})
    place.drain(ranked)
    assert "urgent" in seen[:4] and len(seen) == 41


def test_where_queues_are_plain_lists_a_priority_is_refused_with_the_way_out(place, app):
    if place.name != "redis":
        pytest.skip("its queues know priorities")
    job = app.job(name="job", priority=3)(lambda n: None)
    plain = app.job(name="plain")(lambda n: None)
    for wrong in (
        lambda: job.enqueue(1),
        lambda: job.enqueue_many([(1,)]),
        lambda: plain.options(priority=-1).enqueue(1),
        lambda: plain.then(plain.options(priority=2)).enqueue(1),
        lambda: place.drain(app),
    ):
        with pytest.raises(SendError, match=r"weights: \[jobs\] queues = \{urgent = 5, default = 1\}"):
            wrong()
    plain.enqueue(1).result(5)


@pytest.mark.parametrize("priority", [11, -11, True, "high", 1.5])
def test_what_is_no_priority_is_refused(app, priority):
    with pytest.raises(DeclarationError, match=r"priority=.*-10 \(last\) to 10"):
        app.job(name="job", priority=priority)(lambda: None)
    with pytest.raises(DeclarationError, match=r"priority=.*-10 \(last\) to 10"):
        app.job(name="other")(lambda: None).options(priority=priority)
