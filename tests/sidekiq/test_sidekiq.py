"""Both ways with a real Sidekiq on a real Redis: neither side notices that the other is no relative."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import RedisServer, need

from barnabas import App, Concurrent, Rate, progress, steps, until_executed, until_executing
from barnabas.backends import redis_life
from barnabas.errors import Conflict, JobFailed, NoOutcome
from barnabas.jobs import batch
from barnabas.jobs.payload import backtrace
from barnabas.worker import Worker

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    need("ruby", "sidekiq")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.end()


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    with redis.Redis(port=server.port, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def app(server: RedisServer, client: Any) -> Iterator[App]:
    app = App("shop", events="memory:", jobs=server.url, queues=["shared", "flaky"])

    @app.job(name="Count", queue="shared")
    def count(side: str, n: int) -> None:
        client.pipeline(transaction=False).hincrby(f"ran:{side}", str(n), 1).incr("ran by python").execute()

    @app.job(name="Flaky", queue="flaky", retry=5, backtrace=3)
    def flaky(fails: int) -> None:
        run = client.rpush("flaky:runs", "python")
        if run <= fails:
            raise ValueError(f"Ümläut 'no' {run}")

    yield app
    app.close()


def ruby(server: RedisServer, code: str) -> str:
    command = ["ruby", "-r", str(HERE / "jobs.rb"), "-r", "json", "-r", "sidekiq/api", "-e", code]
    env = {"REDIS_URL": server.url, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def sidekiq(server: RedisServer, tmp_path: Path) -> Iterator[Any]:
    """A real Sidekiq, at work on both queues."""
    env = {"REDIS_URL": server.url, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    with open(tmp_path / "sidekiq.log", "w") as log:
        command = ["sidekiq", "-r", str(HERE / "jobs.rb"), "-q", "shared", "-q", "flaky", "-c", "5"]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(40)


@contextmanager
def python(app: App) -> Iterator[Worker]:
    worker = Worker(app)
    worker.start()
    try:
        yield worker
    finally:
        held = worker.stop(10.0)
    assert not held


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_ten_thousand_jobs_each_way_are_each_run_once_by_either(server, client, app, tmp_path):
    count = 10_000
    by_python = threading.Thread(
        target=lambda: [app.job_handlers["Count"].enqueue_many(("python", n) for n in range(at, at + 500)).result(60)
                        for at in range(0, count, 500)]
    )  # fmt: skip
    with sidekiq(server, tmp_path), python(app):
        wait_for(lambda: len(client.smembers("processes")) == 2)
        by_python.start()
        ruby(server, f"{count}.times.each_slice(500) {{ |ns| Count.perform_bulk(ns.map {{ |n| ['ruby', n] }}) }}")
        by_python.join()
        done = lambda: client.hlen("ran:ruby") == client.hlen("ran:python") == count  # noqa: E731
        wait_for(done, 120)
        assert {p.info.get("app") for p in app.jobs.processes()} > {None}  # Ruby says a tag, we have reported nothing
    for side in ("ruby", "python"):
        ran = client.hgetall(f"ran:{side}")
        assert ran == {str(n): "1" for n in range(count)}
    assert int(client.get("ran by ruby")) > 500 and int(client.get("ran by python")) > 500
    assert int(client.get("ran by ruby")) + int(client.get("ran by python")) == 2 * count
    assert client.llen("queue:shared") == client.zcard("retry") == client.zcard("dead") == 0
    assert client.get("stat:processed") == str(2 * count) and int(client.get("stat:failed") or 0) == 0
    assert client.hlen("barnabas:workers") == 0 and client.keys("barnabas:*") == []


def due_now(client: Any, key: str) -> dict[str, Any]:
    """Let the only member of a set be due, by nothing but its score; what it says."""
    ((member, score),) = client.zrange(key, 0, -1, withscores=True)
    assert score > time.time()
    client.zadd(key, {member: time.time() - 1})
    return json.loads(member)


@pytest.mark.parametrize("first", ["python", "ruby"])
def test_retries_begun_by_one_are_finished_by_the_other(server, client, app, tmp_path, first):
    if first == "python":
        app.job_handlers["Flaky"].enqueue(2).result(10)
    else:
        ruby(server, "Flaky.perform_async(2)")

    def trace(job: Any, who: str) -> None:
        lines = json.loads(ruby(server, "puts Sidekiq::RetrySet.new.first.error_backtrace.to_json"))
        assert backtrace(job["error_backtrace"]) == lines and 1 <= len(lines) <= 3
        assert {"python": "test_sidekiq.py", "ruby": "jobs.rb"}[who] in lines[0]

    def run(who: str, runs: int, retries: int) -> None:
        with python(app) if who == "python" else sidekiq(server, tmp_path):
            wait_for(lambda: client.llen("flaky:runs") == runs and client.zcard("retry") == retries)

    second = "ruby" if first == "python" else "python"
    run(first, 1, 1)
    job = due_now(client, "retry")
    error = {"python": "ValueError", "ruby": "ArgumentError"}
    assert (job["retry_count"], job["queue"], job["error_class"]) == (0, "flaky", error[first])
    assert job["error_message"] == "Ümläut 'no' 1" and isinstance(job["failed_at"], float) and job["retry"] == 5
    trace(job, first)
    run(second, 2, 1)
    again = due_now(client, "retry")
    trace(again, second)
    assert (again["retry_count"], again["jid"], again["error_class"]) == (1, job["jid"], error[second])
    assert again["failed_at"] == job["failed_at"] and again["retried_at"] > job["failed_at"]
    run(first, 3, 0)
    assert client.lrange("flaky:runs", 0, -1) == [first, second, first]
    assert client.zcard("dead") == client.llen("queue:flaky") == 0


def test_either_moves_what_the_other_has_scheduled(server, client, app, tmp_path):
    job = app.job_handlers["Count"]
    job.enqueue_in(1.0, "python", 1).result(10)
    with sidekiq(server, tmp_path):
        wait_for(lambda: client.hget("ran:python", "1") == "1")
    ruby(server, "Count.perform_in(1, 'ruby', 1)")
    with python(app):
        wait_for(lambda: client.hget("ran:ruby", "1") == "1")
    assert client.zcard("schedule") == 0


def test_sidekiq_reads_reschedules_retries_and_kills_our_jobs(server, client, app):
    job = app.job_handlers["Count"]
    job.enqueue_in(3600, "Ümläut / \u2028 \x7f", 12345678901234567890).result(10)
    job.options(retry=3).enqueue("a", 1).result(10)
    (before,) = client.zrange("schedule", 0, -1)
    told = ruby(server, "Sidekiq::ScheduledSet.new.each { |e| e.reschedule(Time.at(2_000_000_000)); puts e.args.to_json }")
    assert json.loads(told) == ["Ümläut / \u2028 \x7f", 12345678901234567890]
    assert client.zrange("schedule", 0, -1, withscores=True) == [(before, 2_000_000_000.0)]
    ruby(server, "Sidekiq::ScheduledSet.new.each(&:kill)")
    assert client.zcard("schedule") == 0 and [json.loads(m)["class"] for m in client.zrange("dead", 0, -1)] == ["Count"]
    (dead,) = app.jobs.find_jobs("dead")
    assert app.jobs.move_jobs([dead.ref], "ready") == 1
    code = "q = Sidekiq::Queue.new('shared'); puts [q.size, q.latency.between?(0, 60), q.map(&:jid)].to_json"
    size, sane, jids = json.loads(ruby(server, code))
    assert (size, sane) == (2, True) and dead.jid in jids
    ruby(server, f"Sidekiq::Queue.new('shared').find_job('{dead.jid}').delete")
    assert [job.jid for job in app.jobs.find_jobs("ready")] == [jid for jid in jids if jid != dead.jid]


def test_sidekiq_sees_our_process_and_what_it_runs_and_may_ask_it_to_stop(server, client, app):
    began, go = threading.Event(), threading.Event()

    @app.job(queue="shared")
    def slow(text: str) -> None:
        began.set()
        go.wait(30)

    with python(app):
        slow.enqueue("ü").result(10)
        assert began.wait(10)
        wait_for(lambda: client.hget(app.jobs.name, "busy") == "1", 10)
        code = """puts Sidekiq::ProcessSet.new.map { |p| [p['identity'], p['concurrency'], p['busy'], p.stopping?] }.to_json
                  puts Sidekiq::Workers.new.map { |id, tid, w| [id, w['queue'], w['payload']['args'], w['run_at']] }.to_json
                  Sidekiq::ProcessSet.new.each(&:quiet!)"""
        processes, works = map(json.loads, ruby(server, code).splitlines())
        assert processes == [[app.jobs.name, 10, 1, False]]
        assert [work[:3] for work in works] == [[app.jobs.name, "shared", ["ü"]]] and abs(works[0][3] - time.time()) < 30
        wait_for(lambda: app.jobs.control() == {f"process:{app.jobs.name}": "quiet"}, 10)
        app.jobs.set_control(f"process:{app.jobs.name}", "stop")
        wait_for(lambda: app.jobs.control() == {f"process:{app.jobs.name}": "stop"}, 10)
        go.set()
    assert client.smembers("processes") == set()


def test_a_ruby_process_can_be_asked_by_us(server, client, app, tmp_path):
    with sidekiq(server, tmp_path) as process:
        wait_for(lambda: [p.name for p in app.jobs.processes()] != [])
        (found,) = app.jobs.processes()
        assert found.pid == process.pid and list(found.info["queues"]) == ["shared", "flaky"] and found.silent < 20
        app.jobs.set_control(f"process:{found.name}", "quiet")
        wait_for(lambda: app.jobs.processes()[0].info["quiet"], 20)
        app.jobs.set_control(f"process:{found.name}", "stop")
        assert process.wait(30) == 0


def test_a_foreign_job_is_enqueued_here_and_run_there(server, client, tmp_path):
    app = App("other", events="memory:", jobs=server.url)
    try:
        hard = app.foreign_job("Count", queue="shared")
        hard.enqueue_many([("foreign", n) for n in range(3)]).result(10)
        with sidekiq(server, tmp_path):
            wait_for(lambda: client.hgetall("ran:foreign") == {"0": "1", "1": "1", "2": "1"})
    finally:
        app.close()


def test_what_sidekiq_has_no_word_for_survives_its_hands(app: App, server: RedisServer, client: Any, tmp_path: Path) -> None:
    seen = []

    @app.job(name="First", queue="mine", retry=3, tags=["night"], expires_in=3600, result_ttl=60)
    def first(n: int) -> int:
        if client.incr("runs") == 1:
            raise ValueError("once")
        return n + 1

    @app.job(name="Second", queue="mine", result_ttl=60)
    def second(n: int) -> int:
        seen.append(n)
        return n + 1

    app.settings = app.settings.override(queues=["mine"])
    future = first.then(second).enqueue_in(600, 1)
    first.enqueue_debounced("key", 40, wait=600).result(10)
    first.enqueue_debounced("key", 50, wait=600).result(10)
    future.result(10)
    stored = json.loads(client.zrange("schedule", 0, 0)[0])
    # Ruby reads it, moves it by its exact bytes, and lets all of it go.
    said = ruby(
        server,
        'set = Sidekiq::ScheduledSet.new; puts set.first.item["tags"].inspect, set.scan("night").count\n'
        "set.each { |entry| entry.reschedule(Time.now + 60) }; puts set.size; set.each(&:add_to_queue)",
    )
    assert said.split() == ['["night"]', "3", "3"]
    again = [json.loads(job) for job in client.lrange("queue:mine", 0, -1)]
    assert stored["barnabas"] in [job["barnabas"] for job in again]
    with python(app):
        wait_for(lambda: client.zcard("retry") == 1)
        ruby(server, "Sidekiq::RetrySet.new.each(&:retry)")
        assert future.outcome(20) == 3
    assert seen == [2]
    assert app.observers.counts["First", "superseded"] == 1
    # And jobs that Ruby itself runs take no harm.
    app.foreign_job("Count", queue="shared", tags=["x"]).enqueue("python", 1).result(10)
    app.job_handlers["Count"].options(tags=["y"], expires_in=60).enqueue("python", 2).result(10)
    with sidekiq(server, tmp_path):
        wait_for(lambda: client.get("ran by ruby") == "2")


def test_a_real_sidekiq_is_not_disturbed_by_batches_and_what_it_deletes_is_found(server, client, app, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "LOOK", 0.3)
    told: list[str] = []

    @app.job(queue="ours", retry=3)
    def mine(n: int) -> None:
        if n < 0:
            raise ValueError("no")

    for event in ("on_complete", "on_success", "on_death"):
        app.job(lambda id, event=event: told.append(event), name=event, queue="ours")
    callbacks = {event: app.job_handlers[event] for event in ("on_complete", "on_success", "on_death")}
    app.settings = app.settings.override(queues=["shared", "ours"])
    with app.batch(**callbacks) as both:  # Ruby may take them, too; it ends nothing, and what it ends is found
        both.enqueue_many(app.job_handlers["Count"], [("python", n) for n in range(200)])
    with app.batch(**callbacks) as deleted:
        deleted.enqueue(mine, 1)
        later = [mine.options(batch=deleted).enqueue_in(1000, n).result(10) for n in (2, 3)]
        deleted.enqueue(mine, -1)
    with sidekiq(server, tmp_path):
        wait_for(lambda: client.hlen("ran:python") == 200)
    assert int(client.get("ran by ruby")) == 200 and client.get("stat:failed") in (None, "0")
    with python(app):
        wait_for(lambda: client.zcard("retry") == 1)
        code = f"Sidekiq::ScheduledSet.new.each {{ |job| job.delete if {later[:1]}.include?(job.jid) }}; "
        ruby(server, code + "Sidekiq::ScheduledSet.new.each(&:kill); Sidekiq::RetrySet.new.each(&:kill)")
        wait_for(lambda: both.status().complete and deleted.status().complete and len(told) == 4)
    assert sorted(told) == ["on_complete", "on_complete", "on_death", "on_death"]
    assert (deleted.status().done, deleted.status().dead, both.status().dead) == (1, 3, 200)
    assert client.zcard("dead") == 2 and both.status().state == deleted.status().state == "complete"


def test_loops_deadlines_and_locks_keep_their_promises_in_ruby_s_hands(server, client, app, monkeypatch):
    monkeypatch.setattr(redis_life, "SWEEP", 0.2)
    monkeypatch.setattr(redis_life, "REST", 1)
    seen, broken = [], {3, 7}

    @app.job(queue="mine")
    def walk():
        for n in steps(range(10)):
            if n in broken:
                broken.remove(n)
                raise ValueError("no")
            seen.append(n)

    @app.job(queue="mine", expires_in=1)
    def late():
        raise ValueError("no")

    unique = app.job(name="Unique", queue="elsewhere", unique=until_executed())(lambda n: None)
    jids = [unique.enqueue(1).result(10), unique.enqueue_in(600, 2).result(10)]
    app.settings = app.settings.override(queues=["mine"])
    jid = walk.enqueue().result(10)
    expiring = late.enqueue().result(10)
    with python(app):
        wait_for(lambda: client.zcard("retry") == 2)
        assert seen == [0, 1, 2]
        # Killed and brought back from the dead; retried too late; moved to another time; deleted.
        ruby(server, f"Sidekiq::RetrySet.new.find_job('{jid}').kill; Sidekiq::DeadSet.new.each(&:retry)")
        wait_for(lambda: seen == list(range(7)))
        time.sleep(1.0)
        ruby(server, f"Sidekiq::RetrySet.new.find_job('{expiring}').retry")
        wait_for(lambda: app.observers.counts.get(("late", "expired")) == 1)
        wait_for(lambda: client.zcard("retry") == 1)
        ruby(server, "Sidekiq::RetrySet.new.each { |e| e.reschedule(Time.now + 60) }; Sidekiq::RetrySet.new.each(&:add_to_queue)")
        wait_for(lambda: seen == list(range(10)))
        wait_for(lambda: client.keys("barnabas:note:steps:*") == [])
        ruby(server, f"Sidekiq::Queue.new('elsewhere').find_job('{jids[0]}').delete; Sidekiq::ScheduledSet.new.clear")
        wait_for(lambda: [app.jobs.holder(unique.lock.key((n,))) for n in (1, 2)] == [None, None])
    assert len(unique.enqueue(1).result(10)) == 24 and client.zcard("retry") == client.zcard("dead") == 0


def test_the_lock_of_a_job_that_ruby_runs_lasts_as_long_as_that_runs(server, client, app, tmp_path, monkeypatch):
    monkeypatch.setattr(redis_life, "SWEEP", 2.0)  # so it would be free after six to eight
    monkeypatch.setattr(redis_life, "REST", 1)
    doze = app.job(name="Doze", queue="shared", unique=until_executed())(lambda seconds: None)
    app.settings = app.settings.override(queues=["mine"])
    with sidekiq(server, tmp_path), python(app):
        wait_for(lambda: len(client.smembers("processes")) == 2)
        jid, began = doze.enqueue(13).result(10), time.monotonic()
        wait_for(lambda: [(job.jid, job.queue) for job in app.jobs.find_jobs("work")] == [(jid, "shared")])
        (job,) = app.jobs.find_jobs()
        assert job.owner != app.jobs.sources[0].name and json.loads(job.payload)["args"] == [13]
        assert app.jobs.move_jobs([job.ref], "dead") == 0
        while not client.get("dozed"):
            assert app.jobs.holder(doze.lock.key((13,))) == jid and time.monotonic() < began + 60
            time.sleep(0.2)
        assert time.monotonic() - began > 12
        wait_for(lambda: app.jobs.holder(doze.lock.key((13,))) is None)
    assert list(app.jobs.find_jobs()) == []


def test_a_unique_job_that_ruby_calls_back_from_the_dead_has_its_lock_again(server, client, app, monkeypatch, caplog):
    monkeypatch.setattr(redis_life, "SWEEP", 0.2)
    monkeypatch.setattr(redis_life, "REST", 1)
    mail = app.job(name="mail", queue="elsewhere", unique=until_executed())(lambda n: None)

    @app.job(queue="mine", unique=until_executing(), retry=3)
    def fails(n):
        raise ValueError("no")

    app.settings = app.settings.override(queues=["mine"])
    jid = mail.enqueue(1).result(10)
    fails.enqueue(1).result(10)
    app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs() if job.jid == jid], "dead")
    key = mail.lock.key((1,))
    assert app.jobs.holder(key) is None
    with python(app):
        wait_for(lambda: client.zcard("retry") == 1)  # it has given its lock up, for good
        time.sleep(0.5)
        ruby(server, "Sidekiq::DeadSet.new.each(&:retry)")
        wait_for(lambda: app.jobs.holder(key) == jid, 10)
        time.sleep(1.0)
        assert app.jobs.holder(fails.lock.key((1,))) is None and client.hgetall("barnabas:locks") == {key: jid}
    assert f"job {jid} was called back by somebody else" in caplog.text
    with pytest.raises(Conflict):
        mail.enqueue(1).result(10)


def test_members_in_steps_that_ruby_retries_or_deletes_end_their_batches(server, client, app, monkeypatch):
    monkeypatch.setattr(batch, "LOOK", 0.3)
    told, seen = list[str](), list[tuple[str, int]]()

    @app.job(queue="mine", result_ttl=60)
    def walk(name: str) -> str:
        for n in steps(range(10)):
            if n == 5 and not client.sismember("mended", name):
                raise ValueError("no")
            seen.append((name, n))
            progress(n + 1, 10, name)
        return f"{name} is done"

    for event in ("on_complete", "on_success"):
        app.job(lambda id, event=event: told.append(f"{event} {app.batch_status(id).description}"), name=event, queue="mine")
    app.settings = app.settings.override(queues=["mine"])
    futures, batches = {}, {}
    for name, retry in (("retried", 3), ("deleted", 3), ("dead", 0), ("mine", 3)):
        callbacks = {event: app.job_handlers[event] for event in ("on_complete", "on_success")}
        with app.batch(**callbacks, description=name) as batches[name]:
            futures[name] = batches[name].enqueue(walk.options(retry=retry), name)
    with python(app):
        wait_for(lambda: (client.zcard("retry"), client.zcard("dead")) == (3, 1) and told == ["on_complete dead"])
        with pytest.raises(JobFailed, match="ValueError: no"):
            futures["dead"].outcome(5)
        client.sadd("mended", "retried", "dead", "mine")
        found = "each { |job| job.%s if job.args == ['%s'] }; "
        ruby(server, "set = Sidekiq::RetrySet.new; " + "".join(
            f"set.{found % pair}" for pair in (("retry", "retried"), ("delete", "deleted"), ("kill", "mine"))
        ))  # fmt: skip
        wait_for(lambda: {"on_success retried", "on_complete deleted", "on_complete mine"} <= set(told))
        ruby(server, "Sidekiq::DeadSet.new.each(&:retry)")
        wait_for(lambda: {"on_success dead", "on_success mine"} <= set(told))
        assert [futures[name].outcome(20) for name in ("retried", "dead", "mine")] == [
            f"{name} is done" for name in ("retried", "dead", "mine")
        ]
        with pytest.raises(NoOutcome):  # nobody can tell
            futures["deleted"].outcome(0.1)
    good = ("success", 1, 0)
    states = {name: (each.status().state, each.status().done, each.status().dead) for name, each in batches.items()}
    assert states == {"retried": good, "deleted": ("complete", 0, 1), "dead": good, "mine": good}
    assert sorted(seen) == sorted((name, n) for name in batches for n in range(5 if name == "deleted" else 10))
    assert {*told} == {f"{event} {name}" for name in batches for event in callbacks} - {"on_success deleted"}


def test_limits_hold_and_nobody_is_stuck_whatever_ruby_does_with_jobs_that_wait(server, client, app, monkeypatch):
    monkeypatch.setattr(redis_life, "SWEEP", 0.2)
    monkeypatch.setattr(redis_life, "REST", 1)
    gate, began, at_work, most, later = threading.Event(), [], [], [], "reschedule(Time.now + 900)"

    @app.job(queue="mine", limit=Rate(2, per=5))
    def paced(n):
        began.append((time.monotonic(), n))

    @app.job(queue="mine", limit=Concurrent(1))
    def single(n):
        at_work.append(n)
        most.append(len(at_work))
        assert gate.wait(30)
        at_work.remove(n)

    app.settings = app.settings.override(queues=["mine"])
    with python(app):
        rated = [paced.enqueue(n).result(10) for n in range(8)]
        wait_for(lambda: client.zcard("schedule") == 6)
    first = {n for _, n in began}  # mostly 0 and 1: several take at once
    waiting = [n for n in range(8) if n not in first]
    assert len(first) == 2
    find = "def job(jid) = Sidekiq::ScheduledSet.new.find_job(jid); "
    acts = zip(waiting[:5], ("delete", "delete", "kill", later, "add_to_queue"), strict=True)
    ruby(server, find + "; ".join(f"job('{rated[n]}').{act}" for n, act in acts))
    with python(app):
        wait_for(lambda: len(began) == 4, 10)  # and not as long as if all were still before them
        alone = [single.enqueue(n).result(10) for n in range(5)]
        wait_for(lambda: client.zcard("schedule") == 5)
        del alone[at_work[0]]
        ruby(server, find + f"job('{alone[0]}').delete; job('{alone[3]}').add_to_queue; job('{alone[1]}').kill")
        gate.set()
        wait_for(lambda: len(most) == 3)
        ruby(server, "Sidekiq::DeadSet.new.each(&:retry); Sidekiq::ScheduledSet.new.each(&:add_to_queue)")
        wait_for(lambda: len(began) == 6 and len(most) == 4 and not at_work)
    assert sorted(n for _, n in began) == sorted({*first, *waiting[2:]}) and max(most) == 1
    times = [at for at, _ in began]
    assert min(b - a for a, b in zip(times, times[2:], strict=False)) >= 5.0
    assert client.keys("*:LOCKED") + client.keys("barnabas:running:*") + client.keys("barnabas:waiting:*") == []
