"""Limits: refusals at declaration, keys, and the rule of a rate."""

import random

import pytest

from barnabas import App, Concurrent, Rate
from barnabas.errors import DeclarationError
from barnabas.jobs.limit import Need, slack

NAN = float("nan")


async def later(n): ...


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Rate(0, per=1), r"Rate\(0\): give a whole number, 1 to"),
        (lambda: Rate(-1, per=1), "whole number"),
        (lambda: Rate(1.5, per=1), "whole number"),
        (lambda: Rate(True, per=1), "whole number"),
        (lambda: Rate(1, per=0), r"Rate\(per=0\): give seconds"),
        (lambda: Rate(1, per=NAN), "give seconds"),
        (lambda: Rate(1, per=float("inf")), "give seconds"),
        (lambda: Concurrent(NAN), "whole number"),
        (lambda: Concurrent(1, name=""), "give the name that those have in common"),
        (lambda: Concurrent(1, by="nothing"), "limit=Concurrent: by='nothing': there is no such parameter; it takes "),
        (lambda: [Rate(1, per=1), Rate(1, per=2, by=("n", "x"))], "limit=Rate: by='x'"),
        (lambda: Concurrent(1, by=()), "name a parameter"),
        (lambda: Concurrent(1, by=[[]]), r"by=\[\]: there is no such parameter"),
        (lambda: Concurrent(1, by=later), "not an `async def`"),
        (lambda: Concurrent(1, by=lambda: 1), r"Concurrent: by: <function .* is called with \(n, key\), and cannot be: too"),
        (lambda: Rate(1, per=1, by=lambda n, key, more: 1), "missing a required argument: 'more'"),
        (lambda: Concurrent(1, name="\ud800"), "give the name that those have in common"),
        (lambda: 5, r"limit=5: give Rate\(count, per=SECONDS\)"),
        (lambda: None, "limit=None: give Rate"),
        (lambda: [Concurrent(1), Concurrent(2)], "two limits of the same"),
        (lambda: [Concurrent(1, by="n", name="x"), Concurrent(2, by="key", name="x")], "two limits of the same"),
    ],
)
def test_what_cannot_be_is_refused(make, why):
    with pytest.raises(DeclarationError, match=why):

        @App("shop").job(limit=make())
        def call(n: int, key: str = "a"): ...


@pytest.mark.parametrize(
    ("name", "limit", "timeout", "why"),
    [
        ("a", 5, 1, "give Rate"),
        ("", Concurrent(1), 1, "its name, a text, makes it"),
        ("\ud800", Concurrent(1), 1, "its name, a text, makes it"),
        ("a", Concurrent(1, by="n"), 1, "put the kind into that"),
        ("a", Concurrent(1, name="b"), 1, "put the kind into that"),
        ("a", Concurrent(1), -1, "give seconds, 0 or more"),
        ("a", Concurrent(1), NAN, "give seconds, or None"),
    ],
)
def test_a_limiter_that_cannot_be_is_refused(name, limit, timeout, why):
    with pytest.raises(DeclarationError, match=why):
        App("shop").limiter(name, limit, timeout=timeout)


def test_a_slot_s_key_is_of_job_or_name_and_kind():
    app = App("shop", jobs="memory:")

    def key(limit, args, name="call"):
        app.job_handlers.pop(name, None)

        @app.job(limit=limit, name=name)
        def call(n: int, key: str | None = "a", *rest: int): ...

        return (need := call.limits[0].need(args)) and need.key

    assert key(Concurrent(1, by="key"), (1,)) == key(Concurrent(2, by=lambda n, key: key), (2, "a"))
    assert key(Concurrent(1, by="key"), (1,)) != key(Concurrent(1, by="key"), (1, "b"))
    assert key(Concurrent(1), (1,)) == key(Concurrent(1), (2, "b")) != key(Concurrent(1), (1,), "other")
    assert key(Concurrent(1, name="all"), (1,)) == key(Concurrent(1, name="all"), (1,), "other")
    assert key(Rate(1, per=1), (1,)) != key(Rate(1, per=2), (1,)) != key(Concurrent(1), (1,))
    assert key(Concurrent(1, by="rest"), (1, "a", 2, 3)) == key(Concurrent(1, by="rest"), (9, "b", 2, 3))
    assert key(Concurrent(1, by="key"), (1, None)) is key(Concurrent(1, by=lambda n, key: None), (1,)) is None
    assert app.limiter("all", Concurrent(5))._need.key == key(Concurrent(1, name="all"), (1,))


@pytest.mark.parametrize("kind", [Concurrent, lambda count, by: Rate(count, per=1, by=by)])
def test_limits_of_one_job_by_different_parameters_are_different(kind):
    @App("shop", jobs="memory:").job(limit=[kind(1, by="customer"), kind(2, by="account")])
    def call(customer: int, account: int): ...

    first, second = ({each.need(args).key for args in ((7, 7), (7, 8), (8, 7))} for each in call.limits)
    assert len(first) == len(second) == 2 and not first & second


@pytest.mark.parametrize("per", [0.01, 0.5, 2.0, 7.0, 60.0])
def test_no_window_has_more_starts_than_it_may(per):
    """Slots are taken by the log, each function begins as late as it may: its start is never the one too many."""
    dice, most = random.Random(per), 4
    need, now, log, starts = Rate(most, per=per).need([], "job"), 1e9, [], []
    for _ in range(300):
        free = log[-most] + need.span if len(log) >= most else now
        now = max(now, free) + dice.choice([0, 0, slack(need.span) / 5, slack(need.span), per / 3]) * dice.random()
        log.append(need.nominal(now, log[-most] if len(log) >= most else None))
        log.sort()
        starts.append(now + 0.75 * slack(need.span) * dice.random() * 0.999)
    starts.sort()
    assert all(b - a > per for a, b in zip(starts, starts[most:], strict=False))


def test_who_waits_for_a_rate_is_due_when_it_is_his_turn():
    need = Need("key", 5, 10.0, True)
    assert need.turn(100.0, 95.0, 0, None) == 105.0 and need.turn(100.0, 95.0, 4, 120.0) == 122.0
    assert need.turn(100.0, 95.0, 12, 90.0) == 125.0  # (those ahead are late)
