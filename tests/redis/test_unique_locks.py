"""Unique jobs on Redis: what others do with jobs and locks, and a process that cannot renew its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer, shared_redis
from team import HERE

from barnabas import App, until_executed, while_executing
from barnabas.backends import redis_life
from barnabas.errors import Conflict
from barnabas.worker import Worker


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def app(tmp_path):
    app = App("shop", events="memory:", jobs=f"{shared_redis().url}?prefix={tmp_path.name}:", threads=2)
    yield app
    app.close()


def test_the_lock_of_a_job_that_others_delete_is_freed(app, monkeypatch, caplog):
    assert redis_life.SWEEP * (redis_life.MISSES + 0.9) < 60
    monkeypatch.setattr(redis_life, "SWEEP", 0.2)
    monkeypatch.setattr(redis_life, "REST", 1)

    @app.job(queue="mail", unique=until_executed())
    def mail(n: int): ...

    @app.job
    def other(n: int): ...

    stays, goes = (mail.enqueue(n).result(5) for n in (1, 2))
    key, client = app.jobs.key, app.jobs.client
    client.hset(key("barnabas:workers"), "host:1:x", "mail")  # a process that may be dead, and has not looked at what has landed
    client.set(key("barnabas:alive:host:1:x"), 1)
    client.lmove(key("queue:mail"), key("barnabas:landing:host:1:x:mail"), "RIGHT", "LEFT")
    assert [(job.jid, job.owner) for job in app.jobs.find_jobs("work")] == [(stays, "host:1:x")]
    worker = Worker(app, only=["other"])
    worker.start()
    for payload in client.lrange(key("queue:mail"), 0, -1):
        if goes.encode() in payload:
            client.lrem(key("queue:mail"), 1, payload)  # as Sidekiq's web page does
    wait_for(lambda: app.jobs.holder(mail.lock.key((2,))) is None)
    time.sleep(1.0)
    worker.stop(5.0)
    assert app.jobs.holder(mail.lock.key((1,))) == stays and f"job {goes} was deleted by somebody else" in caplog.text
    mail.enqueue(2).result(5)


def test_a_lock_of_ruby_s_keeps_us_out_and_ours_ruby(app):
    ran, client = [], app.jobs.client

    @app.job(unique=while_executing(by="n"))
    def charge(n: int):
        ran.append(client.hgetall(locked))

    locked = app.jobs.key(f"{charge.lock.key((1,))}:RUN:LOCKED")
    client.hset(locked, "ruby", time.time())
    jid = charge.enqueue(1).result(5)
    worker = Worker(app)
    worker.start()
    wait_for(lambda: client.zcard(app.jobs.key("schedule")) == 1)
    client.delete(locked)
    app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("scheduled")], "ready")  # else it looks for itself in a minute
    wait_for(lambda: ran)
    worker.stop(5.0)
    assert list(ran[0]) == [jid.encode()] and not client.exists(locked)


def filler(first: int) -> list[bytes]:
    job = '{"retry":3,"queue":"mail","class":"mail","args":[2,"x"],"jid":"%024x","created_at":1700000000.25}'
    return [(job % n).encode() for n in range(first, first + 1000)]


def test_to_replace_a_job_among_many_keeps_nobody_else_waiting(app):
    @app.job(queue="mail", unique=until_executed(by="n", on_conflict="replace"))
    def mail(n: int, text: str): ...

    client, key, took = app.jobs.client, app.jobs.key, []
    client.config_set("slowlog-log-slower-than", 1000)
    try:
        for text in "abc":
            mail.enqueue(1, text).result(30)
            client.lpush(key("queue:mail"), *(job for first in range(0, 100_000, 1000) for job in filler(first)))
            client.slowlog_reset()
            jid = mail.enqueue(1, text).result(30)
            took.append(max((entry["duration"] for entry in client.slowlog_get(100)), default=0))
            assert jid.encode() in client.lindex(key("queue:mail"), 0)
    finally:
        client.config_set("slowlog-log-slower-than", 10_000)
        client.delete(key("queue:mail"))
    assert min(took) < 20_000, took  # microseconds


@pytest.mark.parametrize("place", ["queue", "work"])
def test_a_job_that_moves_while_it_is_looked_for_is_replaced_or_left_to_run(app, monkeypatch, place):
    @app.job(queue="mail", unique=until_executed(by="n", on_conflict="replace"))
    def mail(n: int, text: str): ...

    client, key, find = app.jobs.client, app.jobs.key, app.jobs.find_jobs
    first = mail.enqueue_in(60, 1, "a").result(5)
    (payload,) = client.zrange(key("schedule"), 0, -1)

    def meanwhile(*args):
        found = [*find(*args)]
        if client.zrem(key("schedule"), payload):
            if place == "queue":
                client.sadd(key("queues"), "mail"), client.lpush(key("queue:mail"), payload[:-1] + b',"enqueued_at":1.5}')
            else:
                client.hset(key("barnabas:workers"), "a:1:x", "mail")
                client.hset(key("barnabas:work:a:1:x"), "1:mail", payload)
        return iter(found)

    monkeypatch.setattr(app.jobs, "find_jobs", meanwhile)
    if place == "work":
        with pytest.raises(Conflict, match=first):
            mail.enqueue(1, "b").result(5)
    else:
        jid = mail.enqueue(1, "b").result(5)
        assert [job.jid for job in find()] == [jid]
    assert app.jobs.holder(mail.lock.key((1, "b"))) == (first if place == "work" else jid)


@pytest.mark.slow
def test_a_process_that_cannot_renew_its_locks_ends_before_they_do(tmp_path: Path):
    server = RedisServer(tmp_path, durable=True)
    env = os.environ | {"KILL_FOLDER": str(tmp_path), "KILL_TIMES": "LEASE=5 RENEW=0.5 SCAN=1.0 CALM=1.0"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "barnabas", "run", "unique_room:app", "--jobs", server.url]
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    app = App("sender", events="memory:", jobs=server.url)
    try:
        app.foreign_job("doze").enqueue(1, "a").result(10)
        wait_for(lambda: any(app.jobs.client.scan_iter("barnabas:running:*")))
        server.process.send_signal(signal.SIGSTOP)  # it answers no more
        began = time.monotonic()
        assert worker.wait(10) == 1 and time.monotonic() - began < 5.0, (tmp_path / "log").read_text()[-2000:]
    finally:
        server.process.send_signal(signal.SIGCONT)
        worker.kill()
        app.close()
        server.end(signal.SIGKILL)
