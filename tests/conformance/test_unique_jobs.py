"""Unique jobs: one of a kind in the queues, or one at work, whatever becomes of the first."""

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from watching import failures, wait_for, waiting

from barnabas import (
    Reject,
    RetryAfter,
    until_and_while_executing,
    until_executed,
    until_executing,
    until_expired,
    while_executing,
)
from barnabas.errors import Conflict, JobFailed, NoOutcome, SendError
from barnabas.jobs.payload import parse
from barnabas.queues import jobs, locks
from barnabas.worker import Worker


@pytest.fixture
def app(place):
    return place.app(threads=4)


class Gate:
    """A handler that says when it began, and ends when it may."""

    def __init__(self):
        self.began, self.may_end, self.ran = threading.Event(), threading.Event(), []

    def __call__(self, n):
        self.ran.append(n)
        self.began.set()
        assert self.may_end.wait(20)


def arguments(app, state):
    return [bytes(parse(job.payload).args).decode() for job in app.jobs.find_jobs(state)]


def test_no_second_one_until_the_first_is_done(place, app):
    gate = Gate()

    @app.job(unique=until_executed(by="n"))
    def mail(n: int, text: str = ""):
        gate(n)

    first = mail.enqueue(1, "a").result(5)
    with pytest.raises(Conflict, match=f"'mail' is unique: job {first} holds its lock") as told:
        mail.enqueue(1, "b").result(5)
    assert told.value.holder == first and isinstance(told.value, SendError)
    mail.enqueue(2).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(gate.ran) == 2, "both at work", worker)
        with pytest.raises(Conflict):
            mail.enqueue(n=1, text="c").result(5)
        gate.may_end.set()
        wait_for(worker.drained, "drained", worker)
        mail.enqueue(1).result(5)
        wait_for(lambda: gate.ran.count(1) == 2, "the next of its kind", worker)
    place.drain(app)


def test_a_lock_lasts_while_its_job_is_scheduled_or_to_be_retried(place, app):
    runs = []

    @app.job(unique=until_executed())
    def mail(n: int):
        runs.append(n)
        if len(runs) == 1:
            raise RetryAfter(60)

    mail.enqueue_in(60, 1).result(5)
    with pytest.raises(Conflict):
        mail.enqueue(1).result(5)
    app.clock.advance(61)
    with place.running(app) as worker:
        wait_for(lambda: waiting(app)["retry"] == 1, "its retry", worker)
        with pytest.raises(Conflict):
            mail.enqueue(1).result(5)
        assert (runs, failures(app)[0].outcome) == ([1], "again")
        app.clock.advance(61)
        wait_for(lambda: runs == [1, 1], "its second run", worker)
        wait_for(worker.drained, "drained", worker)
    mail.enqueue(1).result(5)
    place.drain(app)
    assert runs == [1, 1, 1]


@pytest.mark.parametrize("end", ["rejected", "dropped", "killed"])
def test_a_job_that_is_dead_or_dropped_has_no_lock(place, app, end):
    @app.job(unique=until_executed(), dead=end != "dropped")
    def mail(n: int):
        raise Reject("no")

    mail.enqueue(1).result(5)
    if end == "killed":
        app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs()], "dead")
    else:
        place.drain(app)
    mail.enqueue(1).result(5)
    assert len(list(app.jobs.find_jobs("ready"))) == 1


def test_the_second_one_may_be_logged_and_dropped(app, caplog):
    @app.job(unique=until_executed(on_conflict="log"))
    def mail(n: int): ...

    assert mail.enqueue(1).result(5) is not None
    assert mail.enqueue(1).result(5) is None
    assert "'mail' is unique" in caplog.text and arguments(app, "ready") == ["[1]"]


def test_the_second_one_may_be_dead(place, app):
    @app.job(unique=until_executed(by=lambda n, text: n, on_conflict="reject"))
    def mail(n: int, text: str): ...

    mail.enqueue(1, "a").result(5)
    jid = mail.enqueue(1, "b").result(5)
    (dead,) = app.jobs.find_jobs("dead")
    assert dead.jid == jid and b"Conflict" in dead.payload and b'"b"' in dead.payload
    assert app.jobs.move_jobs([dead.ref], "ready") == 0  # its kind is there still
    place.drain(app)
    assert app.jobs.move_jobs([dead.ref], "ready") == 1
    with pytest.raises(AssertionError):  # it has the lock now: this one is dead, too
        assert mail.enqueue(1, "c").result(5) not in [job.jid for job in app.jobs.find_jobs("dead")]


def test_the_second_one_may_replace_the_first_unless_that_runs(place, app):
    gate = Gate()

    @app.job(unique=until_executed(by="n", on_conflict="replace"))
    def mail(n: int, text: str):
        gate(text)

    mail.enqueue(1, "a").result(5)
    mail.enqueue_in(60, 1, "b").result(5)
    assert (arguments(app, "ready"), arguments(app, "scheduled")) == ([], ['[1,"b"]'])
    mail.enqueue(1, "c").result(5)
    assert (arguments(app, "ready"), arguments(app, "scheduled")) == (['[1,"c"]'], [])
    with place.running(app) as worker:
        wait_for(gate.began.is_set, "the last one at work", worker)
        with pytest.raises(Conflict):
            mail.enqueue(1, "d").result(5)
        gate.may_end.set()
    assert gate.ran == ["c"]


@pytest.mark.parametrize("waits", ["ready", "scheduled", "chain"])
def test_who_waits_for_a_job_that_another_replaces_is_told(app, waits):
    @app.job(unique=until_executed(by="n", on_conflict="replace"), result_ttl=60)
    def mail(n: int, text: str) -> int: ...

    @app.job(result_ttl=60)
    def sent(n: int) -> int: ...

    first = (mail.then(sent) if waits == "chain" else mail).enqueue_in(60 * (waits == "scheduled"), 1, "a")
    first.result(5)
    with ThreadPoolExecutor() as pool:
        told = pool.submit(pytest.raises, JobFailed, first.outcome, 20)
        second = mail.enqueue(1, "b").result(5)
        began = time.monotonic()
        assert told.result(20).match(f"job {second} has replaced it")
    assert time.monotonic() - began < 3.0
    with pytest.raises(NoOutcome):
        mail.outcome(second, 0)


def test_who_waits_for_a_job_that_is_rejected_is_told(app):
    @app.job(unique=until_executed(by="n", on_conflict="reject"), result_ttl=60)
    def mail(n: int, text: str) -> int: ...

    first = mail.enqueue(1, "a").result(5)
    with pytest.raises(JobFailed, match="'mail' is unique: another job holds its lock"):
        mail.enqueue(1, "b").outcome(3)
    with pytest.raises(NoOutcome):
        mail.outcome(first, 0)


def test_until_executing_ends_as_the_run_begins(place, app):
    gate = Gate()

    @app.job(unique=until_executing())
    def mail(n: int):
        gate(n)

    mail.enqueue(1).result(5)
    with pytest.raises(Conflict):
        mail.enqueue(1).result(5)
    with place.running(app) as worker:
        wait_for(gate.began.is_set, "the first at work", worker)
        mail.enqueue(1).result(5)
        wait_for(lambda: gate.ran == [1, 1], "the second beside it", worker)
        gate.may_end.set()


def test_until_expired_lasts_its_time(place, app):
    ran = []

    @app.job(unique=until_expired(by="n", ttl=0.6))
    def mail(n: int):
        ran.append(n)

    mail.enqueue(1).result(5)
    place.drain(app)
    assert ran == [1]
    with pytest.raises(Conflict):
        mail.enqueue(1).result(5)
    time.sleep(0.65)
    mail.enqueue(1).result(5)
    assert arguments(app, "ready") == ["[1]"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_one_at_work_the_first_enqueued_first(place, app, kind):
    ran, at_work, most = defaultdict(list), defaultdict(int), []

    def begin(n, key):
        at_work[key] += 1
        most.append((at_work[key], sum(at_work.values())))
        time.sleep(0.001)

    def end(n, key):
        ran[key].append(n)
        at_work[key] -= 1

    if kind == "sync":

        @app.job(unique=while_executing(by="key"))
        def charge(n: int, key: str | None):
            begin(n, key)
            time.sleep(0.002)
            end(n, key)
    else:

        @app.job(unique=while_executing(by="key"))
        async def charge(n: int, key: str | None):
            import asyncio

            begin(n, key)
            await asyncio.sleep(0.002)
            end(n, key)

    keys = ["a", "b", "a", "c", "a"]
    charge.enqueue_many((n, keys[n % 5]) for n in range(60)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: sum(map(len, ran.values())) == 60, "all have run", worker)
        wait_for(worker.drained, "drained", worker)
    assert {one for one, _ in most} == {1} and max(all_ for _, all_ in most) > 1
    assert all(numbers == sorted(numbers) for numbers in ran.values())
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}
    assert app.jobs.holder(charge.lock.key((1, "a")) + ":RUN") is None


def test_those_that_wait_hold_no_thread(place, app):
    app, gate, others = place.app(threads=2), Gate(), []

    @app.job(unique=while_executing(by="key"))
    def charge(n: int, key: str | None):
        gate(n) if key == "a" else others.append(n)

    for n in range(10):
        charge.enqueue(n, "a").result(5)
    charge.enqueue_many((n, key) for n in range(10) for key in ("b", None)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(others) == 20, "the others", worker)
        wait_for(lambda: len(arguments(app, "work")) == 1, "settled", worker)
        assert len(gate.ran) == 1 and len(arguments(app, "scheduled")) == 9
        (works,), lock = list(jobs(app, state="work")), charge.lock.key((0, "a")) + ":RUN"
        assert locks(app, works) == {"holds": lock} and app.jobs.holder(lock) == works.job.jid
        told = f"job {works.job.jid}, at work with the lock {lock}"
        assert {locks(app, entry)["waits for"] for entry in jobs(app, state="scheduled")} == {told}
        gate.may_end.set()
        wait_for(lambda: gate.ran == [*range(10)], "all, in their order", worker)


def test_a_key_of_none_is_not_unique(place, app):
    gate = Gate()

    @app.job(unique=until_and_while_executing(by=lambda n, key: key))
    def charge(n: int, key: str | None):
        gate(n)

    charge.enqueue_many((n, None) for n in range(3)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(gate.ran) == 3, "all three at once", worker)
        gate.may_end.set()


@pytest.mark.parametrize("on_conflict", ["raise", "reject", "reschedule", "log"])
def test_what_becomes_of_the_second_at_work(place, app, on_conflict):
    gate = Gate()

    @app.job(unique=while_executing(by="key", on_conflict=on_conflict), retry=3)
    def charge(n: int, key: str):
        gate(n)

    charge.enqueue(1, "a").result(5)
    with place.running(app) as worker:
        wait_for(gate.began.is_set, "the first at work", worker)
        charge.enqueue(2, "a").result(5)
        wait_for(lambda: failures(app), "the second's outcome", worker)
        wait_for(lambda: len(arguments(app, "work")) == 1, "settled", worker)
        outcome = {"raise": "again", "reschedule": "again", "reject": "dead", "log": "dropped"}[on_conflict]
        assert failures(app)[0].outcome == outcome and "is at work" in failures(app)[0].reason
        again, dead = on_conflict in ("raise", "reschedule"), on_conflict == "reject"
        assert (waiting(app)["retry"], waiting(app)["dead"]) == (again, dead)
        (stored,) = [job.payload for job in app.jobs.find_jobs() if job.state != "work"] or [b""]
        assert (b"retry_count" in stored) is (on_conflict in ("raise", "reject"))
        gate.may_end.set()
        wait_for(lambda: not arguments(app, "work"), "the first is done", worker)
        app.clock.advance(120)
        wait_for(lambda: gate.ran == ([1, 2] if again else [1]), "its second try", worker)


def test_one_in_the_queue_and_one_at_work(place, app):
    gate = Gate()

    @app.job(unique=until_and_while_executing())
    def mail(n: int):
        gate(n)

    mail.enqueue(1).result(5)
    with place.running(app) as worker:
        wait_for(gate.began.is_set, "the first at work", worker)
        mail.enqueue(1).result(5)
        wait_for(lambda: arguments(app, "scheduled") == ["[1]"], "the second waits", worker)
        with pytest.raises(Conflict):
            mail.enqueue(1).result(5)
        gate.may_end.set()
        wait_for(lambda: gate.ran == [1, 1], "the second", worker)
        wait_for(worker.drained, "drained", worker)


def test_a_failed_run_lets_the_next_one_begin(place, app):
    ran = []

    @app.job(unique=while_executing(by="key"))
    def charge(n: int, key: str):
        ran.append(n)
        if ran.count(1) == 1 and n == 1:
            raise RetryAfter(60)

    charge.enqueue_many((n, "a") for n in (1, 2)).result(5)
    place.drain(app)
    assert ran == [1, 2] and waiting(app)["retry"] == 1
    app.clock.advance(61)
    with place.running(app) as worker:
        wait_for(lambda: ran == [1, 2, 1], "the retry", worker)


def test_a_run_that_is_due_again_before_it_is_settled_keeps_no_lock(place, app):
    ran = []

    @app.job(unique=while_executing(by="key"))
    def charge(n: int, key: str):
        ran.append(n)
        if len(ran) < 6:
            raise RetryAfter(0.001)

    with place.running(app) as worker:
        charge.enqueue_many((n, "a") for n in (1, 2)).result(5)
        wait_for(lambda: len(ran) == 7, "all runs", worker)
        wait_for(worker.drained, "drained", worker)


def test_operators_free_and_keep_locks(place, app):
    @app.job(unique=until_executed(by="n"))
    def mail(n: int): ...

    key = mail.lock.key((1,))
    jid = mail.enqueue_in(60, 1).result(5)
    assert app.jobs.holder(key) == jid and [locks(app, entry) for entry in jobs(app)] == [{"holds": key}]
    assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs()], "ready") == 1
    assert app.jobs.holder(key) == jid
    assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs()], None) == 1
    assert app.jobs.holder(key) is None
    again = mail.enqueue(1).result(5)
    assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs()], "dead") == 1
    assert app.jobs.holder(key) is None
    assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs()], "ready") == 1
    assert app.jobs.holder(key) == again
    place.drain(app)
    assert app.jobs.holder(key) is None


def test_a_second_one_from_a_handler_costs_the_handler_nothing(place, app, caplog):
    ran = []

    @app.job(unique=until_executed())
    def mail(n: int):
        ran.append("mail")

    @app.job
    def order(n: int):
        mail.enqueue(1)
        ran.append("order")

    mail.enqueue_in(60, 1).result(5)
    order.enqueue(1).result(5)
    place.drain(app)
    assert ran == ["order"] and not failures(app) and "'mail' is unique" in caplog.text


def test_nobody_waits_in_a_handler_for_what_it_enqueues(place, app):
    @app.job(unique=until_executed())
    def mail(n: int): ...

    @app.job(retry=0)
    def order(n: int):
        mail.enqueue_many([(1,), (2,)]).result(10)

    order.enqueue(1).result(5)
    place.drain(app)
    assert "WaitInHandler" in failures(app)[0].reason


def test_many_at_once(app):
    @app.job(unique=until_executed(by="n"))
    def mail(n: int): ...

    assert len(mail.enqueue_many((n,) for n in range(3)).result(5)) == 3
    with pytest.raises(Conflict):
        mail.enqueue_many((n,) for n in (3, 1, 4, 4)).result(5)
    assert sorted(arguments(app, "ready")) == [f"[{n}]" for n in range(5)]
    assert mail.enqueue_many([]).result(5) == []


def test_what_others_enqueue_waits_for_its_turn_too(place, app):
    gate = Gate()

    @app.job(unique=while_executing(by="key"))
    def charge(n: int, key: str = "a"):
        gate(n)

    app.foreign_job("charge").enqueue(1).result(5)
    app.foreign_job("charge").enqueue(2, "a").result(5)
    app.foreign_job("charge").enqueue("no number", "a").result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(arguments(app, "scheduled")) == 1, "the second waits", worker)
        gate.may_end.set()
        wait_for(lambda: gate.ran == [1, 2], "the second", worker)
        wait_for(lambda: [f.outcome for f in failures(app)] == ["dead"], "the third", worker)


def test_a_by_that_fails_is_told(place, app):
    def by(n):
        if n == 0:
            raise ZeroDivisionError("no kind")
        return n

    @app.job(unique=while_executing(by=by), retry=0)
    def charge(n: int): ...

    @app.job(unique=until_executed(by=by))
    def mail(n: int): ...

    with pytest.raises(SendError, match="by= of its unique= failed: ZeroDivisionError"):
        mail.enqueue(0)
    with pytest.raises(SendError, match="do not fit its function"):
        mail.enqueue("text")
    charge.enqueue(0).result(5)
    place.drain(app)
    (failure,) = failures(app, "dead")
    assert "no kind" in failure.reason


def test_a_stop_gives_locks_back(place, app):
    gate = Gate()

    @app.job(unique=while_executing(by="key"))
    async def charge(n: int, key: str):
        import asyncio

        gate.ran.append(n)
        gate.began.set()
        await asyncio.sleep(0 if gate.may_end.is_set() else 20)

    charge.enqueue_many((n, "a") for n in range(3)).result(5)
    worker = Worker(app)
    worker.start()
    wait_for(gate.began.is_set, "the first at work", worker)
    wait_for(lambda: len(arguments(app, "scheduled")) == 2, "the others wait", worker)
    worker.stop(0.0)
    assert app.jobs.holder(charge.lock.key((0, "a")) + ":RUN") is None
    gate.may_end.set()
    place.drain(app)
    assert gate.ran == [0, 0, 1, 2]
