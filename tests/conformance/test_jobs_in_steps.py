"""Long jobs in steps: loops that are gone on with where they were left."""

import asyncio
import re
import threading
import time

import msgspec
import pytest
from watching import failures, wait_for, waiting

from barnabas import Reject, steps
from barnabas.errors import DeclarationError
from barnabas.jobs.beyond import how_far
from barnabas.jobs.steps import MOST
from barnabas.queues import jobs

ROWS = [(n, f"row {n}") for n in range(10, 10_010, 10)]


def pages(cursor, size=30):
    """A query for the next page, as of a database: (id, row) pairs beyond the cursor."""
    return [row for row in ROWS if row[0] > (cursor or 0)][:size]


async def pages_awaited(cursor):
    return pages(cursor)


async def rows_awaited(cursor):
    for row in pages(cursor, 10_000):
        yield row


async def numbers(count):
    for n in range(count):
        yield n


SOURCES = {
    "range": lambda: range(1000),
    "generator": lambda: (n for n in range(1000)),
    "pages": lambda: pages,
    "async generator": lambda: numbers(1000),
    "awaited pages": lambda: pages_awaited,
    "awaited rows": lambda: rows_awaited,
}


@pytest.fixture
def app(place):
    return place.app()


def expected(source):
    return [text for _, text in ROWS] if source in ("pages", "awaited pages", "awaited rows") else list(range(1000))


def looping(app, seen, source, pause=None, **options):
    """A job that sees the items of a source; `pause(item)` may take its time."""

    if "a" in source[:1]:

        @app.job(name="loop", **options)
        async def loop():
            async for item in steps(SOURCES[source]()):
                if pause is not None:
                    await asyncio.to_thread(pause, item)
                seen.append(item)
    else:

        @app.job(name="loop", **options)
        def loop():
            for item in steps(SOURCES[source]()):
                if pause is not None:
                    pause(item)
                seen.append(item)

    return loop


@pytest.mark.parametrize("source", SOURCES)
def test_a_stop_lets_the_loop_go_and_another_process_goes_on_with_it(place, app, source):
    seen, reached, go_on = [], threading.Event(), threading.Event()

    def pause(item):
        if item == expected(source)[100]:
            reached.set()
            go_on.wait(20)

    loop, short = looping(app, seen, source, pause), app.job(name="short")(lambda: seen.append("short"))
    jid = loop.enqueue().result(5)
    with place.running(app) as worker:
        wait_for(reached.is_set, "the item", worker)
        for runner in worker.runners:
            runner.stop()
        go_on.set()
    assert seen == expected(source)[:101]
    assert how_far(app.jobs, jid).startswith("101")
    (stored,) = jobs(app, state="ready")
    assert stored.job.jid == jid and "retry_count" not in msgspec.json.decode(stored.job.payload) and stored.job.crashes == 0
    short.enqueue().result(5)
    place.again(app)
    place.drain(app)
    assert seen.index("short") >= 101  # a stop puts no other job first (async ones have no order with it)
    seen.remove("short")
    assert seen == expected(source) and app.jobs.note(f"steps:{jid}") is None
    assert app.observers.counts["loop", "steps"] == 1 and not failures(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}


@pytest.mark.parametrize("source", ["range", "pages", "awaited pages", "async generator"])
def test_a_failure_is_retried_from_the_item_that_failed(place, app, source):
    seen, broken = [], {expected(source)[50], expected(source)[70]}

    def pause(item):
        if item in broken:
            broken.remove(item)
            raise ValueError("no")

    jid = looping(app, seen, source, pause).enqueue().result(5)
    for _ in range(3):
        place.drain(app)
        assert (how_far(app.jobs, jid) != "") == (len(seen) < 1000)
        app.clock.advance(60)
    assert seen == expected(source) and len(failures(app, "again")) == 2


@pytest.mark.parametrize("source", ["generator", "awaited rows"])
def test_a_slice_that_is_over_lets_others_go_first(place, app, source):
    seen = []
    loop = looping(app, seen, source, lambda item: time.sleep(0.001), max_runtime=0.2)
    app.job(name="short", queue="default")(lambda n: seen.append(f"short {n}"))
    app.settings = app.settings.override(threads=1)
    loop.enqueue()
    futures = [app.job_handlers["short"].enqueue(n) for n in range(3)]
    futures[-1].result(5)
    place.drain(app)
    assert [item for item in seen if not str(item).startswith("short")] == expected(source)
    if source == "generator":  # an async one shares no worker with them
        assert 0 < seen.index("short 0") < seen.index("short 2") < len(seen) - 1
    assert app.observers.counts["loop", "steps"] >= 3 and not failures(app)
    assert not list(jobs(app))


@pytest.mark.parametrize("source", ["range", "awaited pages"])
def test_a_loop_whose_batch_is_cancelled_ends_between_two_items(place, app, source, monkeypatch):
    monkeypatch.setattr("barnabas.jobs.steps.SAVE", 0.05)
    seen, sent = [], []
    child = app.job(name="child", queue="later")(sent.append)

    def pause(item):
        if item == expected(source)[99]:
            child.enqueue(item)
        if item == expected(source)[100]:
            app.cancel_batch(batch.id)
        time.sleep(0.001 * (len(seen) > 100))

    loop = looping(app, seen, source, pause, queue="first")
    with app.batch(on_complete=child) as batch:
        jid = batch.enqueue(loop).result(5)
    place.drain(app)
    assert 101 <= len(seen) < 1000 and seen == expected(source)[: len(seen)] and sent == [expected(source)[99]]
    assert [failure.job for failure in failures(app, "cancelled")] == [jid] and app.jobs.note(f"steps:{jid}") is None
    assert (batch.status().state, batch.status().dead) == ("cancelled", 1) and waiting(app)["dead"] == 0


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_the_items_send_leaves_with_the_cursor_and_keeps_its_ids(place, app, kind, monkeypatch):
    monkeypatch.setattr("barnabas.jobs.steps.HELD", 30)
    monkeypatch.setattr("barnabas.jobs.steps.SAVE", 1000.0)
    got, ids, broken = [], set(), [70, 50]
    child = app.job(name="child", queue="later")(lambda n: got.append(n))

    def each(n):
        future = child.enqueue(n)
        if broken and n == broken[-1]:
            broken.pop()
            raise ValueError("no")
        ids.add(future.id)

    def parent():
        child.enqueue(-1)
        for n in steps(range(100)):
            each(n)
        child.enqueue(-2)

    async def parent_async():
        child.enqueue(-1)
        async for n in steps(range(100)):
            each(n)
        child.enqueue(-2)

    parent = app.job(name="parent", queue="first")(parent if kind == "sync" else parent_async)
    parent.enqueue().result(5)
    app.settings = app.settings.override(queues=["first"])
    stored = []
    for _ in range(3):
        place.drain(app)
        app.jobs.flush(5)
        stored.append(sorted(msgspec.json.decode(job.payload)["args"][0] for job in app.jobs.find_jobs("ready", "later")))
        app.clock.advance(60)
    # By 30 that wait; what came since is dropped with the failure and comes again, with the same ids.
    assert stored == [list(range(30)), list(range(60)), [-2, -1, *range(100)]]
    assert {job.jid for job in app.jobs.find_jobs("ready", "later")} >= ids and len(ids) == 100


def test_a_dead_job_keeps_its_cursor_for_who_retries_it_and_a_break_does_not(place, app):
    seen, broken = [], [True]

    @app.job(retry=0)
    def loop(stop: int):
        for n in steps(range(10)):
            if n == 5 and broken:
                raise Reject("no")
            seen.append(n)
            if n == stop:
                break

    dead = loop.enqueue(-1).result(5)
    place.drain(app)
    assert waiting(app)["dead"] == 1 and how_far(app.jobs, dead) == "5 of 10 (50%)"
    broken.clear()
    app.jobs.move_jobs([entry.job.ref for entry in jobs(app, state="dead")], "ready")
    broken_off = loop.enqueue(3).result(5)
    place.drain(app)
    assert seen == [0, 1, 2, 3, 4, *sorted([5, 6, 7, 8, 9, 0, 1, 2, 3], key=seen[5:].index)]
    assert app.jobs.note(f"steps:{dead}") is app.jobs.note(f"steps:{broken_off}") is None


def test_a_job_that_has_begun_does_not_expire_between_its_slices(place, app):
    seen, broken = [], [True]

    @app.job(expires_in=30)
    def loop():
        for n in steps(range(10)):
            if n == 5 and broken:
                broken.clear()
                raise ValueError("no")
            seen.append(n)

    loop.enqueue().result(5)
    place.drain(app)
    app.clock.advance(60)
    place.drain(app)
    assert seen == list(range(10))


def test_it_is_seen_how_far_a_loop_is(place, app, monkeypatch):
    monkeypatch.setattr("barnabas.jobs.steps.SAVE", 0.01)
    seen, go_on = [], threading.Event()
    loop = looping(app, seen, "range", lambda n: (time.sleep(0.02) if n < 3 else None, n == 4 and go_on.wait(20)))
    with place.running(app) as worker:
        jid = loop.enqueue().result(5)
        wait_for(lambda: how_far(app.jobs, jid) == "3 of 1,000 (0%)" or len(seen) == 4, "its progress", worker)
        (work,) = (each for each in worker.report()["work"] if each[0] == "loop")
        assert work[5] in ("3 of 1,000 (0%)", "4 of 1,000 (0%)") and how_far(app.jobs, jid)
        go_on.set()
        wait_for(worker.drained, "drained", worker)
        assert all(len(each) < 6 for each in worker.report()["work"])
    assert how_far(app.jobs, jid) == ""


def twice():
    for _ in steps(range(3)):
        for _ in steps(range(3)):
            pass


@pytest.mark.parametrize(
    ("loop", "why"),
    [
        (lambda: list(steps(lambda cursor: [(object(), 1)])), "a cursor is what JSON can say"),
        (lambda: list(steps(lambda cursor: [(float("nan"), 1)])), "a cursor is what JSON can say"),
        (lambda: list(steps(lambda cursor: [("x" * MOST, 1)])), "1,048,578 bytes; 1,048,576 are the most"),
        (lambda: list(steps(lambda cursor: [(1, 1)])), "give those that come after the cursor"),
        (lambda: list(steps(lambda cursor: [1])), r"give \(cursor, item\) pairs"),
        (lambda: list(steps(pages_awaited)), "`async for`"),
        (lambda: list(steps(5)), "something to iterate over"),
        (lambda: list(steps(range(5), cursor=-1)), "a number of items"),
        (lambda: list(steps(range(5), cursor="x")), "a number of items"),
        (twice, "one loop of steps"),
    ],
)
def test_loops_that_cannot_be_gone_on_with_are_dead_with_the_reason(place, app, loop, why):
    app.job(name="loop")(loop).enqueue().result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}
    assert re.search(why, failures(app, "dead")[0].reason)


def test_a_cursor_of_almost_a_mebibyte_is_kept(place, app):
    seen, broken = [], [True]

    @app.job
    def loop():
        for n in steps(lambda cursor: [(f"{n}{'x' * (MOST - 3)}", n) for n in range(int((cursor or "0")[0]), 9)][1:]):
            if n == 5 and broken:
                broken.clear()
                raise ValueError("no")
            seen.append(n)

    loop.enqueue().result(5)
    place.drain(app)
    app.clock.advance(60)
    place.drain(app)
    assert seen == list(range(1, 9))


def test_anywhere_else_it_is_a_plain_loop(app):
    assert list(steps(range(3))) == [0, 1, 2] and list(steps(range(3), cursor=1)) == [1, 2]
    assert list(steps(pages, cursor=9_970)) == ["row 9980", "row 9990", "row 10000"]

    async def collect():
        return [n async for n in steps(numbers(3))] + [n async for n in steps(range(2))]

    assert asyncio.run(collect()) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("value", [0, -1, "60", True, float("inf"), float("nan")])
def test_impossible_slices_are_refused(app, value):
    with pytest.raises(DeclarationError, match=r"max_runtime=.*give seconds"):
        app.job(name="job", max_runtime=value)(lambda: None)
