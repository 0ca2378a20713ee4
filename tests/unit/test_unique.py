"""What makes a job unique: refusals at declaration, and keys as sidekiq-unique-jobs makes them."""

from datetime import timedelta

import pytest

from barnabas import (
    App,
    until_and_while_executing,
    until_executed,
    until_executing,
    until_expired,
    while_executing,
)
from barnabas.errors import DeclarationError, SendError
from barnabas.jobs.limit import digest
from barnabas.jobs.unique import held


async def later(n): ...


@pytest.mark.parametrize(
    ("unique", "why"),
    [
        ("until_executed", r"give while_executing\(\.\.\.\)"),
        (until_executed("nothing"), r"unique=until_executed: by='nothing': there is no such parameter; it takes \(n: int"),
        (while_executing(by=("n", "nothing")), "by='nothing'"),
        (while_executing(by=()), "name a parameter"),
        (while_executing(by=later), "not an `async def`"),
        (while_executing(by=lambda n: n), "unique=while_executing: by: <function .*, and cannot be: too many"),
        (until_executed(on_conflict="wait"), "nobody can wait as he enqueues"),
        (until_executing(on_conflict="reschedule"), "holds the lock, too"),
        (until_and_while_executing(on_conflict="nothing"), "give one of raise, reject, replace, log"),
        (while_executing(on_conflict="replace"), "may be done, or at work"),
        (until_expired(on_conflict="replace", ttl=1), "give one of raise, reject, log"),
        (until_expired(ttl=0), "ttl=0"),
        (until_expired(ttl="1"), "give seconds"),
        (until_expired(ttl=float("inf")), "up to 1,000,000,000"),
    ],
)
def test_what_cannot_be_is_refused(unique, why):
    with pytest.raises(DeclarationError, match=why):

        @App("shop").job(unique=unique)
        def charge(n: int, key: str = "a"): ...


def test_uniqueness_from_enqueueing_on_goes_with_few_others():
    app = App("shop", jobs="memory:")

    @app.job
    def first(n: int): ...

    @app.job(unique=until_executed())
    def mail(n: int): ...

    with pytest.raises(DeclarationError, match="in a chain it can only be the first"):
        first.then(mail)
    mail.then(first)
    with pytest.raises(DeclarationError, match="overlap=False keeps"):
        app.cron(every=timedelta(seconds=60))(mail)
    with pytest.raises(SendError, match="cannot be debounced"):
        mail.enqueue_debounced("key", 1, wait=1)


def test_a_key_is_that_of_the_gem():
    fields = [["class", "MyJob"], ["lock_args", [1, "a"]], ["queue", "default"]]
    assert digest("uniquejobs", fields) == "uniquejobs:80d4ccd5ffe93c8b9644227f32ff5063"


def test_a_kind_is_what_by_says():
    app = App("shop")

    def declare(by, queue="default"):
        @app.job(unique=until_executed(by=by), queue=queue, name=f"charge{len(app.job_handlers)}")
        def charge(n: int, key: str | None = "a", *rest: int): ...

        charge.lock._name = "charge"
        return charge.lock.key

    whole = declare(None)
    assert whole((1,)) == whole((1, "a")) != whole((1, "b")) and whole((1, "a", 2)) != whole((1, "a"))
    assert declare("key")((1,)) == declare(["key"])((2, "a")) == declare(lambda n, key: key)((3, "a")) != whole((1,))
    assert declare("key")((1, None)) is declare(lambda n, key: None)((1, "a")) is None
    assert declare(("n", "key"))((1, None)) is not None
    assert declare("key", "other")((1,)) != declare("key")((1,))
    assert declare(lambda n, key: {"b": 1, "a": 2})((1,)) == declare(lambda n, key: {"a": 2, "b": 1})((1,))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"lock_digest":', b'{"lock_digest":1}', b'{"lock_digest":"\xff"}'])
def test_rubbish_holds_nothing(data):
    assert held(data) == ""
