"""Pausing: what operators pause is not begun, nothing of it is lost or overtaken, and it goes on where it stopped."""

import json
import threading
import time

import pytest
from watching import settled, wait_for

from barnabas import Message, Retry
from barnabas.processes import Pause, pauses, set_pause


@pytest.fixture
def topic(app):
    return app.topic("steps", int, partitions=1)


def ask(app, name, value=""):
    """What `barnabas pause` and `resume` do; of keys, those of a group that are to be paused (None: none)."""
    if name.startswith("pause key:"):
        wanted = {Pause("key", name[10:], key) for key in value or ()}
        for pause in wanted.symmetric_difference(each for each in pauses(app) if each.kind == "key"):
            assert set_pause(app, pause, pause in wanted) and not set_pause(app, pause, pause in wanted)
        return
    (app.jobs if "queue" in name else app.events).set_control(name, value)


def send(topic, *steps):
    for key, n in steps:
        topic.send(n, key=key).result(5)


def obey(worker):
    """What a process does once a second, and its fetch threads soon after."""
    asked = worker.obey()
    wait_for(lambda: all(runner.pauses is runner._pauses for runner in worker.runners), worker=worker)
    return asked


def position(app):
    return next(each for each in app.events.positions() if each.topic == "steps")


def states(app):
    """Of all jobs, how many are due, and how many in work."""
    found = app.jobs.queue_states()
    return sum(state.ready + state.retry for state in found), sum(state.work for state in found)


def rests(seen, worker):
    """Nothing more comes within a moment."""
    before = list(seen)
    time.sleep(0.15)
    assert seen == before and worker.failed() is None


def test_a_paused_group_keeps_its_partitions_and_begins_nothing(place, app, topic, caplog):
    caplog.set_level("INFO", "barnabas")
    seen, others, gate = [], [], threading.Event()

    @app.consumer(topic)
    def read(n: int):
        seen.append(n)
        assert gate.wait(10)

    app.consumer(topic, name="other")(others.append)
    send(topic, ("a", 0), ("a", 1))
    with place.running(app) as worker:
        wait_for(lambda: seen == [0] and others == [0, 1], worker=worker)
        ask(app, "pause group:shop-read")
        assert obey(worker) is None and worker.paused == ["read"]
        gate.set()
        wait_for(lambda: settled(app, "read") == 2, worker=worker)  # what was in hand is finished
        send(topic, ("a", 2), ("b", 3))
        wait_for(lambda: others == [0, 1, 2, 3], worker=worker)
        rests(seen, worker)
        owners = {p.group: p.owner for p in app.events.positions()}
        assert owners["shop-read"] == app.events.name and not worker.drained() and worker.report()["paused"] == ["read"]
        ask(app, "pause group:shop-read", None)
        obey(worker)
        wait_for(lambda: seen == [0, 1, 2, 3], worker=worker)
    lines = [r.getMessage() for r in caplog.records if "read" in r.getMessage().split(": ")[-1]]
    assert lines == ["paused by an operator: read", "resumed: read"]


def test_a_pause_holds_from_the_first_fetch_of_a_worker_on(place, app, topic):
    seen, jobs = [], []
    app.consumer(topic, name="read")(lambda n: seen.append(n))
    job = app.job(jobs.append, name="mail", queue="mail")
    send(topic, ("a", 0))
    job.enqueue(1).result(5)
    ask(app, "pause group:shop-read")
    ask(app, "pause queue:mail")
    place.again(app)
    with place.running(app) as worker:
        rests(seen, worker)
        assert seen == jobs == [] and worker.paused == ["read", "queue:mail"] and not worker.drained()
        ask(app, "pause group:shop-read", None)
        ask(app, "pause queue:mail", None)
        obey(worker)
        wait_for(worker.drained, worker=worker)
    assert (seen, jobs) == ([0], [1])


@pytest.mark.parametrize("weights", [["mail", "slow"], {"mail": 1, "slow": 5}])
def test_a_paused_queue_is_not_claimed_from(place, weights):
    app = place.app(queues=weights, threads=1)
    seen, gate = [], threading.Event()

    @app.job(queue="slow")
    def slow(n: int):
        seen.append(n)
        assert n or gate.wait(10)

    @app.job(queue="mail")
    def mail(n: int):
        seen.append(n)

    slow.enqueue(0).result(5)
    with place.running(app) as worker:
        wait_for(lambda: seen == [0], worker=worker)
        slow.enqueue(1)
        slow.enqueue(2).result(5)  # more than there is room for, and seen by the worker
        ask(app, "pause queue:slow")
        obey(worker)
        gate.set()
        mail.enqueue(7).result(5)
        wait_for(lambda: 7 in seen and settled(app, "jobs") >= 2, worker=worker)
        rests(seen, worker)
        begun = seen.count(1) + seen.count(2)
        assert begun < 2  # at most what it had claimed already
        state = {state.name: state for state in app.jobs.queue_states()}["slow"]
        assert state.ready == 2 - begun and state.work == 0
        slow.enqueue_in(0.01, 3).result(5)
        rests(seen, worker)
        ask(app, "pause queue:slow", None)
        obey(worker)
        wait_for(worker.drained, worker=worker)
    assert sorted(seen) == [0, 1, 2, 3, 7]


@pytest.mark.parametrize(
    ("order", "size", "held_back", "after"),
    [
        ("key", 1, [0, 2, 5], [0, 2, 5, 1, 3, 4]),
        ("key", 4, [0, 2, 5], [0, 2, 5, 1, 3, 4]),
        ("none", 1, [0, 2, 5], [0, 2, 5, 1, 3, 4]),
        ("partition", 1, [0], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_paused_key_is_held_back_in_order(place, app, topic, order, size, held_back, after):
    seen = []
    app.consumer(topic, name="read", order=order, concurrency=size)(lambda n: seen.append(n))
    ask(app, "pause key:shop-read", ["bad", "b\u00e4d"])
    with place.running(app) as worker:
        assert worker.paused == ["read --key bad", "read --key b\u00e4d"]
        send(topic, ("ok", 0), ("bad", 1), ("ok", 2), ("bad", 3), ("bad", 4), ("ok", 5))
        wait_for(lambda: settled(app, "read") == len(held_back), worker=worker)
        rests(seen, worker)
        assert sorted(seen) == held_back and not worker.drained()
        ask(app, "pause key:shop-read", ["b\u00e4d"])
        obey(worker)
        wait_for(worker.drained, worker=worker)
    free = len(held_back)
    assert (sorted(seen[:free]), seen[free:]) == (held_back, after[free:])


def test_of_several_paused_keys_one_is_resumed(place, app, topic):
    seen = []
    app.consumer(topic, name="read", order="key", concurrency=2)(lambda n: seen.append(n))
    ask(app, "pause key:shop-read", ["a", "b"])
    with place.running(app) as worker:
        send(topic, ("a", 1), ("b", 2), ("a", 3), ("c", 4))
        wait_for(lambda: seen == [4], worker=worker)
        ask(app, "pause key:shop-read", ["b"])
        obey(worker)
        send(topic, ("a", 5), ("b", 6))
        wait_for(lambda: seen == [4, 1, 3, 5], worker=worker)
        rests(seen, worker)
    place.again(app)
    ask(app, "pause key:shop-read", None)
    place.drain(app)
    assert seen == [4, 1, 3, 5, 2, 6]


def test_keys_that_two_operators_pause_at_once_are_both_paused(place, app, topic, monkeypatch):
    app.events.declare([topic])
    monkeypatch.setattr("barnabas.processes.pauses", lambda app: [])  # neither has seen what the other does
    wanted = [Pause("key", "shop-read", key) for key in "ab"]
    assert all(set_pause(app, pause, True) for pause in wanted)
    assert pauses(app) == wanted


def test_a_paused_key_of_bytes_is_meant_too(place, app):
    topic, seen = app.topic("raw", codec="raw", partitions=1), []
    app.consumer(topic, name="read", order="key")(lambda n: seen.append(n))
    ask(app, "pause key:shop-read", ["k"])
    with place.running(app) as worker:
        topic.send(b"1", key=b"k").result(5)
        topic.send(b"2", key=b"l").result(5)
        wait_for(lambda: seen == [b"2"], worker=worker)
        rests(seen, worker)


def test_what_is_held_back_counts_as_in_flight(place, app, topic):
    seen = []
    app.consumer(topic, name="read", order="key")(lambda n: seen.append(n))
    ask(app, "pause key:shop-read", ["bad"])
    send(topic, ("ok", -1))
    with place.running(app) as worker:
        most = worker.runners[0].limit
        topic.send_many([Message(topic="steps", key="bad", value=n) for n in range(most)]).result(10)
        send(topic, ("ok", most))  # not reached while so many are in flight
        wait_for(lambda: seen and any(len(part.held) == most for part in worker.runners[0].parts), worker=worker)
        rests(seen, worker)
        assert seen == [-1]
        ask(app, "pause key:shop-read", None)
        obey(worker)
        wait_for(worker.drained, worker=worker)
    assert seen == [-1, *range(most + 1)]


def test_what_is_held_back_goes_to_the_next_owner(place, app, topic):
    seen = []
    app.consumer(topic, name="read", order="key", concurrency=2)(lambda n: seen.append(n))
    ask(app, "pause key:shop-read", ["bad"])
    send(topic, ("bad", 1), ("ok", 2), ("bad", 3))
    with place.running(app) as worker:
        wait_for(lambda: settled(app, "read") == 1, worker=worker)
    place.again(app)
    at = position(app)
    assert (at.offset, at.done, at.owner) == (0, [(1, 2)], None)
    with place.running(app) as worker:
        rests(seen, worker)
        ask(app, "pause key:shop-read", None)
        obey(worker)
        wait_for(worker.drained, worker=worker)
    assert seen == [2, 1, 3]


def test_a_retry_in_hand_goes_on_while_its_key_is_paused(place, app, topic):
    seen, fail = [], True

    @app.consumer(topic, name="read", order="key", retry=Retry(100, backoff=lambda n: 0.01))
    def read(n: int):
        seen.append(n)
        if fail:
            raise ValueError("not yet")

    send(topic, ("a", 1))
    with place.running(app) as worker:
        wait_for(lambda: len(seen) > 2, worker=worker)
        ask(app, "pause key:shop-read", ["a"])
        obey(worker)
        send(topic, ("a", 2))
        fail = False
        wait_for(lambda: settled(app, "read") == 1, worker=worker)
        rests(seen, worker)
        ask(app, "pause key:shop-read", None)
        obey(worker)
        wait_for(worker.drained, worker=worker)
    assert seen[-1] == 2 and set(seen[:-1]) == {1}


# Quiet, and what a process says of itself.


def test_a_quiet_worker_finishes_what_it_has_and_leaves_the_rest_to_others(place, app, topic):
    seen, gate = [], threading.Event()

    @app.consumer(topic, name="read")
    def read(n: int):
        seen.append(n)
        assert n or gate.wait(10)

    @app.job
    def mail(n: int):
        seen.append(n)
        assert n == 7 or gate.wait(10)

    send(topic, ("a", 0), ("a", 1))
    mail.enqueue(6).result(5)
    with place.running(app) as worker:
        wait_for(lambda: sorted(seen) == [0, 6], worker=worker)
        ask(app, f"process:{app.events.name}", "quiet")
        assert obey(worker) == "quiet" and not worker.quiet
        worker.hush("asked")
        mail.enqueue(7).result(5)
        wait_for(lambda: states(app) == (1, 1), worker=worker)  # also if it had just claimed it
        rests(seen, worker)
        assert states(app) == (1, 1)
        assert worker.report()["quiet"] and position(app).owner == app.events.name
        gate.set()
        wait_for(lambda: position(app).owner is None, worker=worker)
        wait_for(lambda: states(app) == (1, 0), worker=worker)
        assert sorted(seen) == [0, 6] and position(app).offset == 1 and not worker.drained()
        stored = [home for home in worker.homes if home.url != "memory:"]  # where a quiet process is still to be seen
        assert [[process.info["quiet"] for process in home.processes()] for home in stored] == [[True]] * len(stored)
        place.drain(app)  # another worker has them
        assert sorted(seen) == [0, 1, 6, 7] and worker.drained()
        for home in stored[-1:]:
            home.set_control(f"process:{home.name}", "stop")
            wait_for(lambda: worker.obey() == "stop")


def test_a_worker_reports_what_it_is_and_does(place, app, topic):
    began, gate = threading.Event(), threading.Event()

    @app.consumer(topic, name="read", concurrency=2)
    async def read(n: int):
        assert n < 3

    @app.job(queue="slow", name="slow job")
    def slow(n: int):
        began.set()
        assert gate.wait(10)

    send(topic, ("a", 1), ("b", 2))
    slow.enqueue(1).result(5)
    with place.running(app) as worker:
        wait_for(lambda: began.is_set() and settled(app, "read") == 2, worker=worker)
        first = worker.report()
        time.sleep(0.12)
        report = worker.report()
        assert report["counts"] == {"done": 2} and report["handlers"]["read"]["done"] == 2
        assert {k: report[k] for k in ("app", "groups", "queues", "quiet", "paused")} == {
            "app": "shop", "groups": ["shop-read"], "queues": {"slow": 0}, "quiet": False, "paused": [],
        }  # fmt: skip
        ((*what, number, seconds),) = report["work"]
        assert what == ["slow job", "slow", -1] and number > 0
        assert 0.1 <= seconds - first["work"][0][4] < 5 and 1 << 22 < report["rss"] < 1 << 33
        app.events.report(report)
        assert app.events.processes()[0].info == json.loads(json.dumps(report))
        gate.set()
        wait_for(worker.drained, worker=worker)
        assert worker.report()["work"] == [] and worker.report() == worker.report()
