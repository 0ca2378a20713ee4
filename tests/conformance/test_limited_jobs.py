"""Limits of jobs: so many at once, so many in a time; the others wait for their turn, hold no thread, and hold up nobody."""

import asyncio
import threading
import time
from collections import defaultdict

import pytest
from watching import wait_for, waiting

from barnabas import Concurrent, Rate, steps, while_executing
from barnabas.errors import NoSlot
from barnabas.queues import LimitInfo, jobs, limits, locks, move


@pytest.fixture
def app(place):
    return place.app(threads=8)


class Watch:
    """Who is at work together, and when each began."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), defaultdict(int), defaultdict(int)
        self.total = 0
        self.began, self.order = defaultdict(list), defaultdict(list)

    def __call__(self, n, key, seconds=0.005):
        with self.lock:
            self.began[key].append(time.monotonic())
            self.order[key].append(n)
            self.now[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
            self.total = max(self.total, sum(self.now.values()))
        time.sleep(seconds)
        with self.lock:
            self.now[key] -= 1

    def count(self):
        return sum(map(len, self.order.values()))


def densest(times, per):
    """The most that began in any window of so many seconds."""
    times = sorted(times)
    return max(sum(t < start + per for t in times[at:]) for at, start in enumerate(times))


def test_at_most_so_many_at_once_first_enqueued_first(place, app):
    watch = Watch()

    @app.job(limit=Concurrent(2, by="key"))
    def call(n: int, key: str | None):
        watch(n, key)

    call.enqueue_many((n, "abc"[n % 3]) for n in range(60)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: watch.count() == 60, "all have run", worker)
        wait_for(worker.drained, "drained", worker)
    assert set(watch.most.values()) == {2}
    for began in watch.order.values():  # two at once may begin in either order
        assert all(abs(began.index(n) - at) <= 2 for at, n in enumerate(sorted(began))), began
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_at_most_so_many_begin_in_a_time_in_their_order(place, app, kind):
    began = defaultdict(list)
    if kind == "sync":

        @app.job(limit=Rate(4, per=0.4, by="key"))
        def call(n: int, key: str):
            began[key].append((n, time.monotonic()))
    else:

        @app.job(limit=Rate(4, per=0.4, by="key"))
        async def call(n: int, key: str):
            began[key].append((n, time.monotonic()))

    call.enqueue_many((n, "ab"[n % 2]) for n in range(24)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(began["a"]) == 4 == len(began["b"]), "the first of each", worker)
        wait_for(lambda: waiting(app)["scheduled"] == 16, "the others wait, and hold no thread", worker)
        told = {locks(app, entry)["waits for"] for entry in jobs(app, state="scheduled")}
        assert told == {f"its turn: {call.limits[0].limit!r}"}
        wait_for(lambda: sum(map(len, began.values())) == 24, "all have run", worker)
        wait_for(worker.drained, "drained", worker)
    for runs in began.values():
        assert densest([at for _, at in runs], 0.4) == 4
        assert [n for n, _ in runs] == sorted(n for n, _ in runs)
        assert runs[-1][1] - runs[0][1] < 2 * 0.65 + 1.5  # (two windows, each a quarter of a second longer)


def test_who_comes_between_others_that_wait_for_a_rate_is_due_behind_as_many_as_are_ahead_of_him(place, app):
    met, ran = set(), []

    @app.job(limit=Rate(4, per=1.0, by=lambda n: met.add(n) or "all"))
    def call(n: int):
        ran.append(n)

    begin = app.clock.now() + 1.0
    for future in [call.enqueue_at(begin + n % 2, n) for n in range(60)]:
        future.result(5)

    def due() -> float:
        return max((job.at - begin for job in app.jobs.find_jobs("scheduled") if b'"args":[59]' in job.payload), default=0.0)

    with place.running(app) as worker:
        wait_for(lambda: len(met) == 60 and due() > 1.0, "each has looked for a slot, and the last one waits", worker)
        last = due()
    assert last > 15.0  # 4 begin in 1.25 s; where many are due at once, all look again at each window


def test_several_limits_hold_together_with_a_lock(place, app):
    watch = Watch()

    @app.job(limit=[Concurrent(3, name="all"), Concurrent(2, by="key"), Rate(100, per=1)], unique=while_executing(by="n"))
    def call(n: int, key: str):
        watch(n, key)

    @app.job(limit=Concurrent(3, name="all"))
    def other(n: int):
        watch(n, "other")

    call.enqueue_many((n % 10, "ab"[n % 2]) for n in range(40)).result(5)
    other.enqueue_many((n,) for n in range(20)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: watch.count() == 60, "all have run", worker)
        wait_for(worker.drained, "drained", worker)
    assert watch.most["a"] <= 2 and watch.most["b"] <= 2 and watch.total == 3


def test_who_is_woken_in_vain_wakes_the_next(place, app):
    gates, ran = [threading.Event() for _ in range(4)], []

    def hard(n: int, key: str):
        return None if n in (1, 3) else "yes"

    @app.job(limit=[Concurrent(1, by="key"), Concurrent(1, by=hard, name="all")])
    def call(n: int, key: str):
        ran.append(n)
        assert gates[n].wait(20)

    gates[2].set()
    gates[3].set()
    with place.running(app) as worker:
        call.enqueue(0, "b").result(5)
        wait_for(lambda: ran == [0], "one that is hard", worker)
        call.enqueue_many((n, "a") for n in (1, 2, 3)).result(5)
        wait_for(lambda: ran == [0, 1] and waiting(app)["scheduled"] == 2, "one that is not, before two of its kind", worker)
        gates[1].set()
        wait_for(lambda: ran == [0, 1, 3], "the third: what the second needs besides, another has", worker)
        gates[0].set()
        wait_for(lambda: ran == [0, 1, 3, 2], "the second", worker)
        wait_for(worker.drained, "drained", worker)


def test_one_key_with_many_that_wait_delays_no_other(place, app):
    gate, ran = threading.Event(), []

    @app.job(limit=[Concurrent(1, by="key"), Rate(50, per=600, by="key")])
    def call(n: int, key: str):
        ran.append(key)
        assert key != "hot" or gate.wait(20)

    many = 500 if place.name == "memory" else 3000
    call.enqueue_many((n, "hot") for n in range(many)).result(10)
    call.enqueue_many((n, f"cold{n}") for n in range(20)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(ran) == 21, "the others", worker)
        assert sum(1 for _ in app.jobs.find_jobs("scheduled")) == many - 1
        app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("scheduled")], None)
        gate.set()
    assert ran.count("hot") == 1


def test_none_is_no_limit_and_a_failed_run_makes_room(place, app):
    watch = Watch()

    @app.job(limit=Concurrent(1, by=lambda key, n: key), retry=0)
    def call(key: str | None, n: int):
        watch(n, key, 0.05)
        raise ValueError

    call.enqueue_many((key, n) for n in range(4) for key in ("a", None)).result(5)
    place.drain(app)
    assert watch.most == {"a": 1, None: watch.most[None]} and watch.most[None] > 1 and watch.order["a"] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["steps", "cancelled"])
def test_a_start_counts_also_if_a_stop_cut_the_run_off(place, app, kind):
    began = []
    if kind == "steps":

        @app.job(limit=Rate(1, per=60))
        def call():
            began.append(1)
            for _ in steps(range(10_000)):
                time.sleep(0.001)
    else:

        @app.job(limit=Rate(1, per=60))
        async def call():
            began.append(1)
            await asyncio.sleep(60)

    call.enqueue().result(5)
    with place.running(app) as worker:
        wait_for(lambda: began, "the start", worker)
        worker.stop(0.1)
    place.again(app)
    with place.running(app) as worker:
        wait_for(lambda: waiting(app)["scheduled"] == 1 or len(began) > 1, "its turn is waited for", worker)
    assert len(began) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_is_not_to_run_takes_no_slot(place, app, kind):
    ran = []

    def plain(n: int):
        ran.append(n)

    async def awaited(n: int):
        ran.append(n)

    options = {"name": "call", "limit": [Rate(1, per=60), Concurrent(1)], "expires_in": 100}
    call = app.job(**options)(plain if kind == "sync" else awaited)

    @app.job(queue="loops", limit=[Rate(2, per=60), Concurrent(1)], expires_in=100)
    def loop():
        for n in steps(range(3)):
            ran.append(f"step {n}")
            if len(ran) == 2:
                raise ValueError("no")

    loop.enqueue().result(5)
    call.enqueue_many((n,) for n in range(20)).result(5)
    with app.batch() as batch:
        batch.enqueue_many(call.options(expires_in=9999), [(n,) for n in range(20, 40)])
    batch.cancel()
    app.settings = app.settings.override(queues=["loops"])
    with place.running(app) as worker:
        wait_for(lambda: waiting(app, "loops")["retry"] == 1, "it has failed", worker)
    place.again(app)
    app.settings = app.settings.override(queues=["loops", "default"])
    app.clock.advance(101)
    app.batch_status(batch.id)  # (so that this process knows it already)
    call.enqueue(100).result(5)
    with place.running(app) as worker:
        wait_for(lambda: 100 in ran, "nobody is in its way", worker)
        wait_for(lambda: "step 2" in ran, "the loop goes on, late as it is", worker)
        wait_for(worker.drained, "drained", worker)
    assert sorted(map(str, ran)) == ["100", "step 0", "step 1", "step 1", "step 2"]
    assert app.observers.counts["call", "expired"] == 20 == app.observers.counts["call", "cancelled"]


def test_who_waits_behind_jobs_that_have_expired_comes_sooner(place, app):
    ran = []

    @app.job(limit=[Concurrent(3), Rate(1, per=30)])
    def call(n: int):
        ran.append(n)

    for n in range(20):
        call.options(expires_in=100).enqueue(n).result(5)
    call.enqueue(20).result(5)

    def parked():
        return [entry.job.at - time.time() for entry in jobs(app, state="scheduled")]

    with place.running(app) as worker:
        wait_for(lambda: ran == [0] and len(parked()) == 20 and max(parked()) > 580, "the others wait", worker)
        app.clock.advance(101)
        app.jobs.ring() if place.name == "memory" else call.enqueue_in(0.01, 21).result(5)
        wait_for(lambda: app.observers.counts.get(("call", "expired")) == 19, "all that are late are gone", worker)
        wait_for(lambda: 20 in ran or all(at < 200 for at in parked()), "it is the next", worker)


def test_a_queue_that_is_paused_keeps_no_slot_of_a_limit_from_others(place, app):
    watch = Watch()
    one, other = (
        app.job(queue=q, name=q, limit=Concurrent(1, name="both"))(lambda n, key=q: watch(n, key, 0.2)) for q in "ab"
    )
    for n in range(6):
        one.enqueue(n).result(5), other.enqueue(n).result(5)
    with place.running(app) as worker:
        wait_for(lambda: watch.count() == 2, "some have run", worker)
        app.jobs.set_control("pause queue:a", "")
        worker.obey()
        wait_for(lambda: len(watch.order["b"]) == 6, "the others pass", worker)
        app.jobs.set_control("pause queue:a", None)
        worker.obey()
        wait_for(lambda: watch.count() == 12, "all have run", worker)
    assert watch.total == 1


@pytest.mark.parametrize("to", [None, "dead", "queue:elsewhere"])
def test_who_waits_behind_jobs_that_an_operator_moves_comes_sooner(place, app, monkeypatch, to):
    if place.name == "redis":
        monkeypatch.setattr("barnabas.backends.redis_life.SWEEP", 0.1)
        monkeypatch.setattr("barnabas.backends.redis_life.REST", 1)

    @app.job(limit=Rate(1, per=30))
    def call(n: int): ...

    def parked():
        return [entry.job.at - app.clock.now() for entry in jobs(app, state="scheduled", queue="default")]

    ids = [call.enqueue(n).result(5) for n in range(6)]
    with place.running(app) as worker:
        wait_for(lambda: len(parked()) == 5 and max(parked()) > 140, "all wait", worker)
        assert move(app, list(jobs(app, ids[1:5])), to)["moved"] == 4
        wait_for(lambda: [at for at in parked() if at > 1] and max(parked()) < 40, "it is the next", worker)


def test_limits_are_told_the_busiest_first(place, app):
    gate, began = threading.Event(), []

    @app.job(limit=[Concurrent(2, by="key"), Rate(5, per=600, name="all")])
    def call(n: int, key: str):
        began.append(n)
        assert gate.wait(20)

    assert limits(app, 50) == ([LimitInfo("all", "", "5 in 600 s", 0, 0, None)], 1)
    call.enqueue_many(enumerate("aaaabcde")).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(began) == 5 and waiting(app)["scheduled"] == 3, "the others wait", worker)
        (first, second, *others), total = limits(app, 50)
        assert first == LimitInfo("call", "a", "2 at once", 2, 2, None)
        assert second == LimitInfo("all", "", "5 in 600 s", 5, 1, second.next) and 590 < second.next - time.time() < 700
        assert (total, others) == (6, [LimitInfo("call", key, "2 at once", key < "e", 0, None) for key in "bcde"])
        assert limits(app, 2) == ([first, second], 6)
        app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("scheduled")], None)
        gate.set()


def test_a_limit_by_hand(place, app):
    limiter, seen = app.limiter("stripe", Concurrent(2), timeout=10), Watch()

    def act(n):
        with limiter:
            seen(n, "hand", 0.02)

    @app.job(limit=Concurrent(2, name="stripe"))
    def call(n: int):
        seen(n, "job", 0.02)

    call.enqueue_many((n,) for n in range(8)).result(5)
    threads = [threading.Thread(target=act, args=(n,)) for n in range(6)]
    with place.running(app) as worker:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        wait_for(worker.drained, "drained", worker)
    assert (len(seen.order["hand"]), len(seen.order["job"]), seen.total) == (6, 8, 2)
    with limiter, limiter, pytest.raises(NoSlot, match=r"'stripe': no slot of Concurrent.* within 0.1 s"):
        app.limiter("stripe", Concurrent(2), timeout=0.1).__enter__()
    with app.limiter("stripe", Concurrent(1), timeout=0):
        pass


def test_a_rate_by_hand_in_coroutines(app):
    limiter, times = app.limiter("mail", Rate(3, per=0.3), timeout=10), []

    async def act():
        async with limiter:
            times.append(time.monotonic())

    async def all_of_them():
        await asyncio.gather(*(act() for _ in range(7)))

    asyncio.run(all_of_them())
    assert len(times) == 7 and densest(times, 0.3) == 3
    with app.limiter("mail", Rate(1, per=60)), pytest.raises(NoSlot):
        asyncio.run(app.limiter("mail", Rate(1, per=60), timeout=0).__aenter__())
