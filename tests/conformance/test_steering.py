"""What operators see and do: positions, queues, stored jobs, processes, and what is asked of them."""

import json
import threading
from datetime import UTC, datetime

import pytest
from watching import settled, wait_for

from barnabas import Message, Reject, Retry, inspect
from barnabas import processes as workers
from barnabas.errors import BackendError, Refused, UnknownTopic
from barnabas.ports import Position


def at(topic, group, partition, offset, done=(), **more):
    return Position(group, topic.name, partition, 0, 0, offset, list(done), {}, {}, None)._replace(**more)


# Positions.


def test_a_position_is_placed_alone_where_something_is_stored_or_comes_next(place, app):
    topic = app.topic("steps", int, partitions=1)
    topic.send_many(range(5)).result(5)
    for wrong in (-1, 6):
        with pytest.raises(Refused, match=rf"steps\[0\] has no offset {wrong}: it holds 0 to 4; 5 is next"):
            app.events.place([at(topic, "readers", 0, wrong)])
    app.events.place([at(topic, "readers", 0, 5)])
    assert [position.offset for position in app.events.positions()] == [5]


def test_a_time_is_found_where_the_first_message_is_not_older(place, app):
    topic = app.topic("steps", int, partitions=1)
    now = float(int(app.clock.now()))
    for ago in (90, 50, 70, 30):  # senders' own times need not rise
        topic.send(ago, timestamp=now - ago).result(5)

    def since(ago: float) -> list[int]:
        when = datetime.fromtimestamp(now - ago, UTC)
        return sorted(message.offset for message in inspect.read(app, "steps", when))

    assert [since(ago) for ago in (100, 90, 89.5, 60, 50, 40, 29)] == [[0, 1, 2, 3]] * 2 + [[1, 2, 3]] * 3 + [[3], []]


def positions(app):
    """Without those of retry topics."""
    return [position for position in app.events.positions() if position.topic == "steps"]


def test_positions_tell_how_far_each_group_is_and_who_has_what(place, app):
    topic = app.topic("steps", int, partitions=2)
    bad, go = threading.Event(), threading.Event()

    @app.consumer(topic, group="readers", retry=Retry(5, backoff=lambda n: 60.0), order="key", concurrency=2)
    def read(n: int):
        if n == 3:
            bad.set()
            raise ValueError("not yet")

    for n in range(6):
        topic.send(n, key=str(n), partition=n % 2).result(5)
    assert positions(app) == []
    with place.running(app) as worker:
        wait_for(lambda: bad.is_set() and settled(app, "read") == 5, worker=worker)
        wait_for(lambda: [p.offset for p in positions(app)] == [3, 1] and positions(app)[1].attempts, worker=worker)
        first, second = positions(app)
        name = app.events.name
        assert (first.group, first.topic, first.partition, first.first, first.end) == ("readers", "steps", 0, 0, 3)
        assert (first.offset, first.done, first.attempts, first.owner) == (3, [], {}, name)
        assert (second.offset, second.done, second.attempts, second.owner) == (1, [(2, 3)], {1: 1}, name)
    assert [p.owner for p in positions(app)] == [None, None] and not go.is_set()


def test_a_placed_group_goes_on_from_there(place, app):
    topic, totals, seen = app.topic("steps", int, partitions=1), app.table("totals", int), []

    @app.consumer(topic, group="readers", tables=[totals])
    def read(n: int):
        seen.append(n)
        totals["a"] = totals.get("a", 0) + 1

    for n in range(8):
        topic.send(n, key="a").result(5)
    place.drain(app)
    assert seen == list(range(8)) and app.events.cell("totals", "a") is not None
    events = app.events
    events.place([at(topic, "readers", 0, 2, [(4, 6)], attempts={2: 3})], clear=["totals", "none such"])
    assert events.cell("totals", "a") is None
    assert positions(app)[0][5:9] == (2, [(4, 6)], {}, {})
    del seen[:]
    place.drain(app)
    assert seen == [2, 3, 6, 7] and dict(events.cells("totals")) == {"a": b"\x04"}


def test_a_group_without_position_can_be_placed_and_made_to_forget(place, app):
    topic, seen = app.topic("steps", int, partitions=2), []
    app.consumer(topic, group="readers", start="latest")(seen.append)
    for n in range(4):
        topic.send(n, partition=n % 2).result(5)
    app.events.place([at(topic, "readers", n, 1) for n in (0, 1)])
    assert [p[:6] for p in positions(app)] == [("readers", "steps", n, 0, 2, 1) for n in (0, 1)]
    place.drain(app)
    assert sorted(seen) == [2, 3]
    app.events.place([at(topic, "readers", 0, None)])
    assert [p.partition for p in positions(app)] == [1]


def test_a_group_with_members_is_not_placed_and_nothing_of_the_step_is_done(place, app):
    topic, free = app.topic("steps", int, partitions=1), app.topic("free", int, partitions=1)
    table = app.table("totals", int)

    @app.consumer(topic, group="readers", tables=[table])
    def read(n: int):
        table["a"] = n

    app.events.declare([free])
    topic.send(7, key="a").result(5)
    with place.running(app) as worker:
        wait_for(worker.drained, worker=worker)
        with pytest.raises(Refused, match=f"'readers' has members: {app.events.name};"):
            app.events.place([at(free, "others", 0, 0), at(topic, "readers", 0, 0)], clear=["totals"])
    assert app.events.cell("totals", "a") == b"\x07"
    assert [(p.group, p.offset) for p in positions(app)] == [("readers", 1)]
    with pytest.raises(UnknownTopic, match="partition 1 of a topic 'steps'"):
        app.events.place([at(topic, "readers", 0, 0), at(topic, "readers", 1, 0)])
    assert positions(app)[0].offset == 1


# Jobs.


@pytest.fixture
def stocked(place):
    """Jobs in every state but "work", of two queues."""
    app = place.app()

    @app.job(queue="mail", retry=0)
    def mail(n: int):
        raise Reject("no")

    @app.job(queue="slow", retry=3)
    def slow(n: int):
        raise ValueError("again")

    mail.enqueue(1)
    slow.enqueue(2).result(5)
    place.drain(app)
    mail.enqueue_in(60, 3)
    mail.enqueue_in(30, 4).result(5)
    app.before_enqueue = app.clock.now()
    for n in (5, 6):
        slow.enqueue(n).result(5)
    app.runs = []
    app.job(queue="mail", name="after")(app.runs.append)
    return app


def args(jobs):
    return [json.loads(job.payload)["args"][0] for job in jobs]


def test_queues_and_jobs_are_told_by_state(stocked):
    *together, mail, slow = stocked.jobs.queue_states()
    if together:  # waiting and dead jobs of all queues are kept in one place
        assert together == [("", 0, 0, 2, 1, 1, None)]
        mail, slow = mail._replace(scheduled=2, dead=1), slow._replace(retry=1)
    assert mail == ("mail", 0, 0, 2, 0, 1, None)
    assert slow[:6] == ("slow", 2, 0, 0, 1, 0) and 0 <= slow.since - stocked.before_enqueue < 5
    find = stocked.jobs.find_jobs
    assert sorted(args(find())) == [1, 2, 3, 4, 5, 6]
    assert args(find("ready")) == [5, 6] and args(find("scheduled")) == [4, 3] and args(find("retry")) == [2]
    assert args(find("dead")) == [1] and args(find(queue="mail", state="ready")) == [] == list(find("work"))
    assert sorted(args(find(queue="mail"))) == [1, 3, 4]
    first = next(find("scheduled"))
    assert (first.queue, first.state, first.crashes, first.owner) == ("mail", "scheduled", 0, None)
    assert 20 < first.at - stocked.clock.now() < 31 and first.jid == json.loads(first.payload)["jid"]
    assert abs(next(find("dead")).at - stocked.clock.now()) < 20 and next(find("ready")).at is None


@pytest.mark.parametrize(
    ("to", "moved", "left"),
    [("ready", 4, {"ready": 6}), ("dead", 5, {"dead": 6}), (None, 6, {})],
)
def test_jobs_are_moved_by_their_refs(stocked, to, moved, left):
    jobs = list(stocked.jobs.find_jobs())
    assert stocked.jobs.move_jobs([job.ref for job in jobs], to) == moved
    assert stocked.jobs.move_jobs([job.ref for job in jobs], to) == 0
    found = list(stocked.jobs.find_jobs())
    assert {job.state for job in found} == left.keys() and len(found) == sum(left.values())
    if to == "dead":
        assert {job.jid: job.payload for job in found} == {job.jid: job.payload for job in jobs}
    assert all((job.at is None) == (to == "ready") for job in found)


def test_jobs_are_put_into_another_queue_in_the_state_they_are_in(place, stocked):
    jobs = list(stocked.jobs.find_jobs())
    refs = [job.ref for job in jobs]
    assert stocked.jobs.move_jobs(refs, "queue:low") == 6
    assert stocked.jobs.move_jobs(refs, "queue:other") in (0, 6)  # (a handle may say what is in the job)
    again = [job.ref for job in stocked.jobs.find_jobs()]
    stocked.jobs.move_jobs(again, "queue:low")
    assert stocked.jobs.move_jobs([job.ref for job in stocked.jobs.find_jobs()], "queue:low") == 0
    found = {job.jid: job for job in stocked.jobs.find_jobs()}
    assert {job.queue for job in found.values()} == {"low"}
    for job in jobs:
        assert (found[job.jid].state, found[job.jid].at) == (job.state, job.at)
        assert json.loads(found[job.jid].payload) == json.loads(job.payload) | {"queue": "low"}
    assert args(stocked.jobs.find_jobs("ready", "low")) == [5, 6] and args(stocked.jobs.find_jobs("scheduled")) == [4, 3]
    (state,) = [state for state in stocked.jobs.queue_states() if state.name == "low"]
    assert state.ready == 2


def test_a_retried_job_has_a_run_left_and_one_that_was_moved_by_another_is_left_alone(stocked):
    (job,) = stocked.jobs.find_jobs("retry")
    before = json.loads(job.payload)
    assert stocked.jobs.move_jobs([job.ref], "dead") == 1
    assert stocked.jobs.move_jobs([job.ref], "ready") == 0 == stocked.jobs.move_jobs([job.ref], None)
    (dead,) = [each for each in stocked.jobs.find_jobs("dead") if each.jid == job.jid]
    assert stocked.jobs.move_jobs([dead.ref], "ready") == 1
    after = json.loads(next(each.payload for each in stocked.jobs.find_jobs("ready") if each.jid == job.jid))
    assert after["retry_count"] == before["retry_count"] - 1
    assert abs(after["enqueued_at"] - stocked.clock.now()) < 20
    changed = {"retry_count": 0, "enqueued_at": 0}
    assert after | changed == before | changed


def test_offsets_are_finished_once_and_what_comes_with_them_is_sent_once(place, app):
    topic, other = app.topic("letters", int, partitions=2), app.topic("again", int, partitions=1)
    topic.send_many([Message(value=n, partition=n % 2) for n in range(12)]).result(5)

    def finish(*offsets, partition=0):
        return app.events.finish("ops", [("letters", partition, at, other.outgoing(at)) for at in offsets])

    def position(partition=0):
        return next((p.offset, p.done) for p in app.events.positions() if (p.group, p.partition) == ("ops", partition))

    assert finish(4, 2) == 2 and position() == (0, [(2, 3), (4, 5)])
    place.again(app)
    assert finish(3, 2, 3) == 1 and position() == (0, [(2, 5)])
    assert finish(0, partition=1) == 1 and position(1) == (1, [])
    assert finish(0, 1) == 2 and position() == (5, []) and finish(1, 4) == 0
    assert finish(5) == 1 and position() == (6, [])
    wait_for(lambda: place.values(other) == [4, 2, 3, 0, 0, 1, 5])  # Kafka shows the end of a transaction a moment later
    with pytest.raises(UnknownTopic, match="no partition 2 of a topic 'letters'"):
        finish(0, partition=2)
    threads = [threading.Thread(target=finish, args=range(n, 6), kwargs={"partition": 1}) for n in (1, 2, 3, 4) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert position(1) == (6, [])
    wait_for(lambda: sorted(place.values(other)[7:]) == [1, 2, 3, 4, 5])


def test_more_jobs_than_a_page_are_streamed_in_their_order(place, app):
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue_many([(n,) for n in range(450)]).result(10)
    assert args(app.jobs.find_jobs("ready")) == list(range(450))
    refs = [job.ref for job in app.jobs.find_jobs("ready")]
    assert app.jobs.move_jobs(refs, "dead") == 450
    assert sorted(args(app.jobs.find_jobs("dead"))) == list(range(450))


@pytest.mark.parametrize(("state", "to"), [("dead", None), ("scheduled", "ready"), ("ready", "dead")])
def test_jobs_may_be_moved_while_they_are_streamed(place, app, state, to):
    mail = app.job(lambda n: None, name="mail")
    if state == "scheduled":
        due = app.clock.now() + 600  # of most
        for n in range(1200):
            mail.enqueue_at(due + (n % 3 == 0) * n, n)
        app.jobs.flush(10)
    else:
        mail.enqueue_many([(n,) for n in range(1200)]).result(10)
    if state == "dead":
        assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("ready")], "dead") == 1200
    seen, refs = [], []
    for job in app.jobs.find_jobs(state):
        seen += args([job])
        refs.append(job.ref)
        if len(refs) == 30:
            assert app.jobs.move_jobs(refs, to) == 30
            refs = []
    assert sorted(seen) == list(range(1200)) and list(app.jobs.find_jobs(state)) == []


def test_a_job_in_work_is_left_alone_and_told_with_its_owner(place, app):
    began, go = threading.Event(), threading.Event()

    @app.job
    def mail(n: int):
        began.set()
        assert go.wait(10)

    mail.enqueue(1).result(5)
    with place.running(app) as worker:
        wait_for(began.is_set, worker=worker)
        (job,) = app.jobs.find_jobs("work")
        assert (job.state, job.owner) == ("work", app.jobs.name) and job.owner
        assert app.jobs.queue_states()[0][:4] == ("default", 0, 1, 0)
        assert [app.jobs.move_jobs([job.ref], to) for to in ("ready", "dead", None)] == [0, 0, 0]
        go.set()
        wait_for(worker.drained, worker=worker)
    assert list(app.jobs.find_jobs()) == []


def test_a_job_that_is_made_ready_wakes_a_waiting_worker(place, app):
    seen = threading.Event()

    @app.job
    def mail(n: int):
        seen.set()

    mail.enqueue_in(600, 1).result(5)
    with place.running(app) as worker:
        assert not seen.wait(0.2)  # it has looked, and waits
        (job,) = app.jobs.find_jobs("scheduled")
        assert app.jobs.move_jobs([job.ref], "ready") == 1
        assert seen.wait(0.9)  # before the safety poll of a second
        wait_for(worker.drained, worker=worker)


# Processes, and what is asked of them.


def test_processes_are_those_with_a_worker_and_say_what_they_report(place, app):
    topic = app.topic("steps", int)
    app.consumer(topic, name="read")(lambda n: None)
    assert app.events.processes() == [] and app.events.name == ""
    app.events.report({"work": []})  # nobody to report of
    with place.running(app):
        app.events.report({"work": [1]})
        (process,) = app.events.processes()
        assert process.name == app.events.name == f"{process.host}:{process.pid}:{process.name.rpartition(':')[2]}"
        assert process.info == {"work": [1]} and process.silent < 5 and abs(process.started - app.clock.now()) < 10
    assert place.name == "sqlite" or app.events.processes() == []


def test_what_a_backend_cannot_do_for_a_process_is_seen_from_outside(place, app):
    app.consumer(app.topic("steps", int), name="read")(lambda n: None)

    def fetch(limit, timeout):
        raise BackendError("the broker is on fire")

    def troubles():
        app.events.report(worker.report())
        return [process.trouble for process in workers.processes(app) if process.app == "shop"]

    with place.running(app) as worker:
        source = worker.runners[0].source
        assert troubles() == [""]
        real, source.fetch = source.fetch, fetch
        wait_for(lambda: troubles() == ["BackendError: the broker is on fire"])
        source.fetch = real
        wait_for(lambda: troubles() == [""], worker=worker)


def test_what_operators_ask_for_is_kept_until_it_is_taken_back(place, app):
    events = app.events
    assert events.control() == {}
    events.set_control("pause group:shop-read", "")
    events.set_control("pause key:shop-read", '["é"]')
    place.again(app)
    assert app.events.control() == {"pause group:shop-read": "", "pause key:shop-read": '["é"]'}
    app.events.set_control("pause key:shop-read", '["a", "b"]')
    app.events.set_control("pause group:shop-read", None)
    app.events.set_control("pause queue:none", None)
    assert app.events.control() == {"pause key:shop-read": '["a", "b"]'}


def test_what_is_asked_of_a_process_goes_with_it(place, app):
    app.consumer(app.topic("steps", int), name="read")(lambda n: None)
    with pytest.raises(Refused, match="no worker process 'a:1:1'"):
        app.events.set_control("process:a:1:1", "stop")
    with place.running(app):
        name = f"process:{app.events.name}"
        app.events.set_control(name, "quiet")
        assert app.events.control() == {name: "quiet"}
    place.again(app)
    assert app.events.control() == {}
