"""Batches of jobs: what follows when all have ended, whoever worked them off, and whatever became of them."""

import asyncio
import threading
import time

import pytest
from watching import failures, wait_for

from barnabas import Reject, until_executed
from barnabas.errors import DeclarationError, Refused, SendError, UnknownBatch
from barnabas.jobs import batch as batches
from barnabas.jobs.batch import statuses
from barnabas.queues import jobs, move


@pytest.fixture
def shop(place):
    """An app with a job that does what it is told, and callbacks that write down what they see."""
    app = place.app()
    app.ran, app.told = [], []

    @app.job(retry=0)
    def work(n: int, what: str = "") -> int:
        app.ran.append(n)
        if what == "die":
            raise ValueError("no")
        if what == "reject":
            raise Reject("no")
        if what == "more":
            app.current_batch().enqueue(work, n + 100)
        if what == "nest":
            with app.batch(on_success=good, description=f"in {n}") as inner:
                inner.enqueue(work, n + 1000)
        return n

    def callback(name):
        @app.job(name=name)
        def tell(id: str):
            app.told.append((name, id, sorted(app.ran)))

        return tell

    good, all_, dead = callback("good"), callback("all"), callback("dead")
    app.work, app.good = work, good
    app.callbacks = {"on_success": good, "on_complete": all_, "on_death": dead}
    return app


def names(app):
    return [name for name, *_ in app.told]


def test_callbacks_run_once_all_jobs_are_done(place, shop):
    with shop.batch(**shop.callbacks, description="ten") as batch:
        ids = [batch.enqueue(shop.work, n).result(5) for n in range(5)]
        ids += batch.enqueue_many(shop.work, [(n,) for n in range(5, 10)]).result(5)
    before = batch.status()
    assert (before.state, before.total, before.open, before.description) == ("running", 10, 10, "ten")
    assert sorted(shop.jobs.batch_members(batch.id, "open")) == sorted(ids)
    place.drain(shop)
    assert shop.told == [("all", batch.id, [*range(10)]), ("good", batch.id, [*range(10)])]
    after = shop.batch_status(batch.id)
    assert (after.state, after.total, after.open, after.done, after.dead) == ("success", 10, 0, 10, 0)
    assert after.created <= after.complete == after.success and after.death is None


def test_the_dead_are_told_of_once_and_success_comes_if_they_are_mended(place, shop):
    with shop.batch(**shop.callbacks) as batch:
        batch.enqueue(shop.work, 1)
        batch.enqueue(shop.work, 2, "die")
        batch.enqueue(shop.work, 3, what="reject")
    place.drain(shop, fails=True)
    assert sorted(names(shop)) == ["all", "dead"]
    status = batch.status()
    assert (status.state, status.total, status.open, status.done, status.dead) == ("complete", 3, 0, 1, 2)
    shop.work.function = lambda n, what: None
    found = list(jobs(shop, state="dead"))
    assert move(shop, found, "ready")["moved"] == 2
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "dead", "good"]
    status = batch.status()
    assert (status.state, status.total, status.done, status.dead) == ("success", 3, 3, 0)


def test_a_batch_inside_another_ends_before_it(place, shop):
    with shop.batch(**shop.callbacks) as outer:
        outer.enqueue(shop.work, 1, "nest")
        with shop.batch(on_success=shop.good) as inner:
            assert shop.current_batch() is inner
            inner.enqueue(shop.work, 2)
        assert shop.current_batch() is outer
    assert shop.current_batch() is None
    assert inner.status().parent == outer.id and outer.status().total == 2
    place.drain(shop)
    told = {id: seen for name, id, seen in shop.told if name == "good"}
    assert len(told) == 3 and told[outer.id] == [1, 2, 1001]
    made = next(s for s in statuses(shop) if s.description == "in 1")
    assert (made.parent, made.state, outer.status().state, outer.status().done) == (outer.id, "success", "success", 3)


def test_a_dead_job_of_a_batch_inside_is_a_dead_member_of_the_outer_one(place, shop):
    with shop.batch(**shop.callbacks) as outer, shop.batch() as inner:
        inner.enqueue(shop.work, 1, "die")
    place.drain(shop, fails=True)
    assert sorted(names(shop)) == ["all", "dead"] and outer.status().dead == 1
    shop.work.function = lambda n, what: None
    move(shop, list(jobs(shop, state="dead")), "ready")
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "dead", "good"] and inner.status().state == outer.status().state == "success"


def test_jobs_add_to_their_own_batch(place, shop):
    with shop.batch(**shop.callbacks) as batch:
        batch.enqueue_many(shop.work, [(n, "more") for n in range(3)])
    place.drain(shop)
    assert shop.told[-1] == ("good", batch.id, [0, 1, 2, 100, 101, 102]) and batch.status().done == 6


def test_empty_batches_end_wherever_they_are_made(place, shop):
    @shop.job
    def make():
        with shop.batch(**shop.callbacks):
            pass

    with shop.batch(**shop.callbacks):
        pass
    make.enqueue()
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "all", "good", "good"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_batch_made_in_a_handler_leaves_with_it_and_a_repeat_is_the_same_one(place, shop, kind):
    ids, fail = [], [True]

    def make():
        with shop.batch(**shop.callbacks) as batch:
            batch.enqueue(shop.work, 1)
            shop.work.options(batch=batch, queue="default").enqueue_in(30, 2)
        ids.append(batch.id)
        if fail.pop() if fail else False:
            raise ValueError("again")

    async def make_async():
        async with shop.batch(**shop.callbacks) as batch:
            batch.enqueue(shop.work, 1)
            shop.work.options(batch=batch).enqueue_in(30, 2)
        ids.append(batch.id)
        if fail.pop() if fail else False:
            raise ValueError("again")

    job = shop.job(make if kind == "sync" else make_async, name="make", retry_delay=lambda *_: 1)
    job.enqueue()
    place.drain(shop, fails=True)
    assert shop.ran == [] and not list(statuses(shop))
    shop.clock.advance(11)
    place.drain(shop)
    assert ids[0] == ids[1] and shop.ran == [1] and names(shop) == []
    assert shop.batch_status(ids[0]).open == 1
    shop.clock.advance(61)
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "good"]


def test_a_batch_in_a_coroutine(place, shop):
    async def main():
        with pytest.raises(SendError, match="async with"), shop.batch():
            pass
        async with shop.batch(**shop.callbacks) as batch:
            await batch.enqueue(shop.work, 1)
        return batch.status()

    assert asyncio.run(main()).open == 1
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "good"]


def test_a_chain_is_of_its_batch_to_the_end(place, shop):
    @shop.job
    def last(n: int):
        shop.ran.append(n + 1)

    with shop.batch(on_success=shop.good) as batch:
        batch.enqueue(shop.work.then(shop.work, last), 7)
    place.drain(shop)
    assert len(shop.told) == 1 and shop.ran == [7, 7, 8] and batch.status().done == 3


def test_jobs_of_other_processes_end_a_batch(place, shop):
    if place.name == "memory":
        pytest.skip("memory: is of one process")
    with shop.batch(**shop.callbacks) as batch:
        batch.enqueue(shop.work, 1)
    other = place.app()
    ran = []

    @other.job(retry=0, name="work")
    def work(n: int, what: str = ""):
        ran.append(n)

    with place.running(other):  # (it does not declare the callbacks: they are left for whoever does)
        wait_for(lambda: other.batch_status(batch.id).state == "success")
    assert ran == [1]


def test_what_does_not_run_any_more_counts_as_dead(place, shop):
    app, work = shop, shop.work

    @app.job(retry=3)
    def fails():
        raise ValueError("no")

    @app.job(retry=False)
    def vanishes():
        raise ValueError("no")

    with app.batch(**app.callbacks) as batch:
        work.options(batch=batch, expires_in=0.001).enqueue(1)
        batch.enqueue(vanishes)
        batch.enqueue(fails)
        dropped = [work.options(batch=batch).enqueue_in(1000, n).result(5) for n in (2, 3)]
    app.clock.advance(1)
    place.drain(app, fails=True)
    assert names(app) == ["dead"] and batch.status().dead == 2 and batch.status().open == 3
    assert move(app, list(jobs(app, [dropped[0]])), None)["moved"] == 1
    assert move(app, list(jobs(app, [dropped[1]])), "dead")["moved"] == 1
    assert batch.status().dead == 4
    assert move(app, list(jobs(app, state="retry")), None)["moved"] == 1
    place.drain(app, fails=True)
    assert sorted(names(app)) == ["all", "dead"] and batch.status().state == "complete"


def test_a_cancelled_batch_skips_what_has_not_begun_and_calls_nobody(place, shop):
    with shop.batch(**shop.callbacks) as outer:
        outer.enqueue_many(shop.work, [(n,) for n in range(3)])
        with shop.batch(**shop.callbacks) as inner:
            inner.enqueue(shop.work, 5)
    shop.cancel_batch(outer.id)
    other = shop.work.enqueue(9)
    place.drain(shop, fails=True)
    assert other.done() and shop.ran == [9] and names(shop) == []
    assert [batch.status().state for batch in (outer, inner)] == ["cancelled"] * 2
    assert len(failures(shop, "cancelled")) == 4
    with pytest.raises(Refused, match="has ended"):
        outer.cancel()


def test_what_has_ended_well_in_a_batch_that_is_cancelled_has_ended_well(place, shop):
    with shop.batch() as outer:
        shop.work.options(batch=outer).enqueue_in(600, 1)
        with shop.batch(on_success=shop.callbacks["on_success"]) as inner:
            inner.enqueue(shop.work, 5)
    place.drain(shop)
    outer.cancel()
    assert [batch.status().state for batch in (outer, inner)] == ["cancelled", "success"]


def test_an_error_in_its_block_cancels_a_batch(place, shop):
    with pytest.raises(ZeroDivisionError), shop.batch(**shop.callbacks) as batch:
        batch.enqueue(shop.work, 1)
        raise ZeroDivisionError
    place.drain(shop, fails=True)
    assert shop.ran == [] and names(shop) == [] and batch.status().state == "cancelled"


def test_wrong_use_is_refused(place, shop):
    foreign, unique = shop.foreign_job("Ruby"), shop.job(lambda n: None, name="unique", unique=until_executed())
    with shop.batch(on_success=foreign) as batch:
        batch.enqueue(shop.work, 1)
        later = shop.work.options(batch=batch)
        others = place.app("others").job(lambda n: None, name="others")
        for job, error in [(foreign, "another program"), (unique, "unique from"), (print, "no job"), (others, "its own app")]:
            with pytest.raises(DeclarationError, match=error):
                batch.enqueue(job, 1)
        with pytest.raises(SendError, match="begun already"), batch:
            pass
    for late in (lambda: batch.enqueue(shop.work, 2), lambda: later.enqueue(2), lambda: shop.batch().enqueue(shop.work, 2)):
        with pytest.raises(SendError, match="inside its `with` block only"):
            late()
    two = shop.job(lambda a, b: None, name="two")
    for callback in (print, "work", place.app("other").job(lambda: None, name="x"), two, unique, shop.work.then(shop.work)):
        with pytest.raises(DeclarationError, match="on_complete"):
            shop.batch(on_complete=callback)
    for description in (7, "\ud800"):
        with pytest.raises(DeclarationError, match="description"):
            shop.batch(description=description)
    for ask in (shop.batch_status, shop.cancel_batch):
        with pytest.raises(UnknownBatch, match="there is no batch 'b-no'"):
            ask("b-no")
        with pytest.raises(UnknownBatch, match="there is no batch"):
            ask("\ud800")
    with pytest.raises(DeclarationError, match=r"batch=7: give what app.batch\(\)"):
        shop.work.options(batch=7)
    assert batch.status().total == 1


def test_a_job_run_again_after_its_batch_has_ended_adds_nothing(place, shop):
    with shop.batch(**shop.callbacks) as batch:
        batch.enqueue(shop.work, 1, "die")
    place.drain(shop, fails=True)
    shop.batches_met.clear()
    shop.work.function = lambda n, what: shop.current_batch().enqueue(shop.work, 5)
    move(shop, list(jobs(shop, state="dead")), "ready")
    place.drain(shop, fails=True)
    assert "takes no more jobs" in failures(shop)[-1].reason and batch.status().total == 1


def test_members_that_others_deleted_and_callbacks_that_were_lost_are_found(place, shop, monkeypatch):
    monkeypatch.setattr(batches, "LOOK", 0.05)
    monkeypatch.setattr(batches, "MISSING", 1)  # one at a time
    with shop.batch(**shop.callbacks) as batch:
        ids = [shop.work.options(batch=batch).enqueue_in(1000, n).result(5) for n in range(3)]
    with shop.batch(**shop.callbacks) as lost:
        lost.enqueue(shop.work, 9)
    shop.jobs.move_jobs([entry.job.ref for entry in jobs(shop, ids[:2])], None)  # as somebody does who knows no batches
    shop.jobs.move_jobs([entry.job.ref for entry in jobs(shop, ids[2:])], "dead")
    with place.running(shop, fails=True) as worker:
        shop.jobs.ripe = lambda id: None  # nobody is told
        wait_for(lambda: len(names(shop)) == 4, "callbacks", worker)
    assert sorted(names(shop)) == ["all", "all", "dead", "good"]
    assert (batch.status().dead, lost.status().state) == (3, "success")


def test_no_callback_waits_for_a_look_at_all_that_is_stored(place, shop, monkeypatch):
    monkeypatch.setattr(batches, "LOOK", 0.05)
    looks, go_on, sealed, find_jobs = *(threading.Event() for _ in range(3)), shop.jobs.find_jobs
    last = shop.job(name="last")(lambda: sealed.wait(20))

    def slowly(*which):
        looks.set()
        assert go_on.wait(20)
        yield from find_jobs(*which)

    with shop.batch() as later:
        shop.work.options(batch=later).enqueue_in(1000, 1)
    with place.running(shop) as worker:
        monkeypatch.setattr(shop.jobs, "find_jobs", slowly)
        wait_for(looks.is_set, "a look", worker)
        with shop.batch(**shop.callbacks) as batch:
            batch.enqueue(last)
        sealed.set()
        try:
            wait_for(lambda: len(names(shop)) == 2, "callbacks", worker)
        finally:
            monkeypatch.undo()
            go_on.set()


def test_who_ends_leaves_the_looks_to_another_at_once(place, shop):
    with shop.batch() as batch:
        shop.work.options(batch=batch).enqueue_in(1000, 1)
    first, second = batches.Keeper(shop), batches.Keeper(shop)
    shop.clock.monotonic = lambda: time.monotonic() + 2 * batches.LOOK
    first.step()
    assert not second._leads(1.0)
    first.end()
    wait_for(lambda: second._leads(1.0), "another leads")


def test_no_callback_waits_until_a_large_batch_is_forgotten(place, shop, monkeypatch):
    monkeypatch.setattr(batches, "LARGE", 2)
    with shop.batch(**shop.callbacks) as batch:
        batch.enqueue_many(shop.work, [(n,) for n in range(3)])
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "good"] and len([*shop.jobs.batch_members(batch.id, "done")]) == 3
    keeper = batches.Keeper(shop)
    shop.clock.monotonic = lambda: time.monotonic() + batches.LOOK
    keeper.step()
    assert [*shop.jobs.batch_members(batch.id, "done")] == [] and (batch.status().state, batch.status().done) == ("success", 3)


def test_looks_that_take_long_are_rare_but_while_something_is_missing(place, shop, monkeypatch):
    spent = iter([0.0, 3.0] * 9)  # seconds of this thread, before and after each look
    monkeypatch.setattr(batches, "thread_time", spent.__next__)
    with shop.batch() as batch:
        jid = shop.work.options(batch=batch).enqueue_in(1000, 1).result(5)
    keeper, now, pauses = batches.Keeper(shop), time.monotonic() + 100.0, []
    shop.clock.monotonic = lambda: now
    for look in range(4):
        if look == 1:
            shop.jobs.move_jobs([entry.job.ref for entry in jobs(shop, [jid])], None)
        keeper.step()
        pauses.append(keeper._next - now)
        now = keeper._next
    assert pauses == pytest.approx([60.0, batches.LOOK, batches.LOOK, batches.LOOK]) and batch.status().dead == 1


def test_what_a_look_has_seen_takes_no_room():
    seen, ids = batches.Seen(), [f"{n:024x}" for n in range(200_000)]
    for id in ids[::2]:
        seen.add(id)
    assert all(id in seen for id in ids[::2]) and sum(id in seen for id in ids[1::2]) < 2_500
    again = batches.Seen()
    for id in ids[::2]:
        again.add(id)
    assert sum(id in seen and id in again for id in ids[1::2]) < 100


def test_ended_batches_are_forgotten_after_30_days(place, shop):
    if place.name == "redis":
        pytest.skip("the server's clock cannot be moved")
    with shop.batch() as batch:
        batch.enqueue(shop.work, 1)
    place.drain(shop)
    assert [s.id for s in statuses(shop)] == [batch.id]
    shop.clock.advance(31 * 86400)
    with place.running(shop) as worker:
        wait_for(lambda: not list(shop.jobs.batch_members("all", "done")), "the purge", worker)
    assert not list(statuses(shop)) and shop.jobs.batch(batch.id) == (0, 0, 0)


def test_a_batch_being_filled_does_not_end(place, shop):
    with place.running(shop) as worker, shop.batch(**shop.callbacks) as batch:
        batch.enqueue(shop.work, 1)
        wait_for(lambda: batch.status().done == 1, "the job", worker)
        assert batch.status().state == "filling" and names(shop) == []
    place.drain(shop)
    assert sorted(names(shop)) == ["all", "good"]
