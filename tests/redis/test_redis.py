"""What only Redis can get wrong: keys and bytes, refusals, outages, the dead and the frozen, rubbish of others."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import RedisServer, shared_redis

from barnabas import App, Concurrent, Rate, Reject, RetryAfter, backends, until_executed, until_expired
from barnabas.backends import redis_life, redis_outbox, redis_source
from barnabas.backends.redis import Where, explain
from barnabas.backends.redis_source import RedisQueues
from barnabas.clock import FakeClock
from barnabas.dead import deal, letters
from barnabas.engine.observe import Failed
from barnabas.errors import BackendError, BufferFull, SendError, SettingError
from barnabas.future import Future
from barnabas.message import OutgoingJob, note
from barnabas.ports import Part, Result
from barnabas.processes import processes
from barnabas.queues import jobs
from barnabas.verdict import Again
from barnabas.worker import Worker

NOW = 1_700_000_000.25


@pytest.fixture
def client() -> Iterator[Any]:
    with redis.Redis(port=shared_redis().port, db=7) as client:
        client.flushdb()
        yield client


@pytest.fixture
def url() -> str:
    return shared_redis().url.replace("/0", "/7")


@pytest.fixture
def apps(url: str) -> Iterator[Callable[..., App]]:
    made = []

    def make(**options: Any) -> App:
        made.append(App("shop", **{"events": "memory:", "jobs": url, "checkpoint_interval": 0.02, **options}))
        return made[-1]

    yield make
    for app in made:
        app.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are taken for dead in a second."""
    for name, value in {"LEASE": 1, "RENEW": 0.2, "SCAN": 0.1, "CALM": 0.0, "TICK": 0.05}.items():
        monkeypatch.setattr(redis_life, name, value)


@contextmanager
def running(app: App) -> Iterator[Worker]:
    worker = Worker(app)
    worker.start()
    try:
        yield worker
    finally:
        held = worker.stop(10.0)
    assert not held


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


class Idle:
    """A listener that takes note."""

    size = 10

    def __init__(self) -> None:
        self.gone: list[Part] = []

    def assigned(self, parts: list[Part]) -> None: ...

    def revoked(self, parts: list[Part]) -> None:
        self.gone += parts


def source(app: App, *queues: str) -> RedisQueues:
    return app.jobs.queues(list(queues) or ["default"], Idle())  # type: ignore[return-value]


def rows(found: Any) -> list[Any]:
    return [row for _, some in found for row in some]


def die(source: RedisQueues) -> None:
    """As by SIGKILL: nothing is given back, no sign of life follows."""
    source.life.stop()
    source.landing.close()
    source.home.sources.remove(source)


# Keys and bytes.


def test_golden_keys_and_bytes(client, apps):
    app = apps()
    app.clock = FakeClock(NOW)

    @app.job(queue="mail", retry=3)
    def mail(to: str): ...

    first, second = mail.enqueue("ann").result(5), mail.enqueue("bé").result(5)
    later = mail.enqueue_at(NOW + 3600, "bob").result(5)
    head = b'{"retry":3,"queue":"mail","class":"mail","args":["%s"],"jid":"%s","created_at":1700000000.25'
    text = lambda to, jid: head % (to, jid.encode())  # noqa: E731
    now = b',"enqueued_at":1700000000.25}'
    assert client.lrange("queue:mail", 0, -1) == [text("bé".encode(), second) + now, text(b"ann", first) + now]
    assert client.smembers("queues") == {b"mail"}
    assert client.zrange("schedule", 0, -1, withscores=True) == [(text(b"bob", later) + b"}", NOW + 3600)]
    assert sorted(client.keys("*")) == [b"queue:mail", b"queues", b"schedule"]
    assert re.fullmatch("[0-9a-f]{24}", first)


def test_a_backend_that_refuses_does_so_before_any_hook_runs():
    app, ran = App("shop", events="memory:", jobs="redis://127.0.0.1:1/0"), []
    app.job(lambda n: None, name="mail")
    app.on_start(lambda: ran.append("start"))
    app.on_stop(lambda: ran.append("stop"))
    with pytest.raises(BackendError, match="out of reach"):
        Worker(app).start()
    assert ran == []


@pytest.mark.parametrize("sentinel", ["", "&sentinel=jobs"])
def test_an_option_that_redis_does_not_know_is_refused_at_start(sentinel):
    with pytest.raises(SettingError, match="'sockt_timeout'"):
        App("shop", events="memory:", jobs=f"redis://127.0.0.1:1/0?sockt_timeout=1{sentinel}").jobs  # noqa: B018


@pytest.mark.parametrize("sentinel", ["", "&sentinel=jobs"])
def test_options_of_the_url_reach_the_driver_and_an_answer_is_not_waited_for_for_ever(sentinel):
    plain, timed = (Where(f"rediss://h:1/2?{more}{sentinel}", {}) for more in ("", "socket_timeout=1.5&ssl_ca_certs=x.pem"))
    given = timed.pool.connection_kwargs
    assert (given["socket_timeout"], given["ssl_ca_certs"], given["db"]) == (1.5, "x.pem", 2)
    assert plain.pool.connection_kwargs["socket_timeout"] == 5.0


def test_golden_keys_of_failures_and_of_the_process(client, apps):
    app = apps()

    @app.job(queue="mail", retry=3)
    def mail(to: str):
        raise Reject("no") if to == "dead" else RetryAfter(60)

    jid = mail.enqueue("again").result(5)
    mail.enqueue("dead").result(5)
    with running(app) as worker:
        until(lambda: client.zcard("retry") and client.zcard("dead"))
        name = app.jobs.name
        until(lambda: client.hlen(name))
        assert client.smembers("processes") == {name.encode()} and re.fullmatch(r"[^:]+:\d+:[0-9a-f]{12}", name)
        fields, info = client.hgetall(name), json.loads(client.hget(name, "info"))
        assert fields.keys() >= {b"info", b"concurrency", b"busy", b"beat", b"quiet", b"rss", b"rtt_us"}
        assert (fields[b"quiet"], fields[b"concurrency"], info["concurrency"], info["queues"]) == (b"false", b"10", 10, ["mail"])
        assert info["identity"] == name and 0 < client.ttl(name) <= 60 and isinstance(info["started_at"], float)
        assert client.get(f"barnabas:alive:{name}") == b"1" and 0 < client.ttl(f"barnabas:alive:{name}") <= 30
        until(worker.drained)
    ((again, score),) = client.zrange("retry", 0, -1, withscores=True)
    kept = rb'\{"retry":3,"queue":"mail","class":"mail","args":\["again"\],"jid":"%s","created_at":T,"enqueued_at":T,'
    failed = rb'"error_message":"retry after 60 s","error_class":"barnabas.errors.RetryAfter","failed_at":T,"retry_count":0\}'
    assert re.fullmatch((kept % jid.encode() + failed).replace(b"T", rb"\d+\.\d+"), again) and abs(score - time.time() - 60) < 10
    day = time.strftime("%Y-%m-%d", time.gmtime())
    for stat in ("processed", "failed"):
        assert client.get(f"stat:{stat}") == client.get(f"stat:{stat}:{day}") == b"2"
        assert 157_000_000 < client.ttl(f"stat:{stat}:{day}") <= 157_680_000
    assert client.smembers("processes") == set() and client.keys("barnabas:*") == []


def test_due_jobs_keep_their_bytes_and_go_through_many_movers_once(client, apps):
    app, other = apps(), apps()
    args = b'[1.0e+16, [] ,{},12345678901234567890,"\\u00e9\\/"]'
    strange = b'{"class":"Other","args":%s,"queue":"else","jid":"x","e":{"a" :1}}' % args
    client.zadd("schedule", {strange: time.time() - 5})
    bulk = b'{"class":"N","args":[%d],"queue":"bulk","jid":"x"}'
    client.zadd("schedule", {bulk % n: 1.5 for n in range(3000)})
    one, two = source(app), source(other)
    until(lambda: client.zcard("schedule") == 0)
    assert client.llen("queue:bulk") == 3000 and client.smembers("queues") >= {b"bulk", b"else"}
    assert sorted(json.loads(job)["args"][0] for job in client.lrange("queue:bulk", 0, -1)) == list(range(3000))
    (moved,) = client.lrange("queue:else", 0, -1)
    assert re.sub(rb',"enqueued_at":\d+\.\d+\}$', b"}", moved).replace(b" ", b"") == strange.replace(b" ", b"")
    assert args in moved
    one.close(), two.close()


# Refusals.


def test_topics_are_refused(url, apps):
    with pytest.raises(BackendError, match="keeps jobs, not topics"):
        apps(events=url).events  # noqa: B018


@pytest.mark.parametrize(
    ("options", "query", "match"),
    [
        (("--maxmemory-policy", "allkeys-lru"), "", "allkeys-lru: it would throw jobs away"),
        (("--cluster-enabled", "yes"), "", "is a Redis Cluster"),
        (("--requirepass", "hidden"), "", "refuses user or password"),
        (("--maxmemory-policy", "volatile-ttl"), "?allow_eviction=true", None),
    ],
)
def test_servers_on_which_jobs_are_not_safe_are_refused(tmp_path, apps, caplog, options, query, match):
    server = RedisServer(tmp_path, options=options)
    try:
        url = server.url.replace("//", "//:Geheim@") if match and "password" in match else server.url
        app = apps(jobs=url + query)
        if match is None:
            assert app.jobs.queue_states() == [] and "on disk" not in caplog.text
            source(app).close()
            assert caplog.text.count("keeps nothing on disk: a restart loses all jobs; set appendonly yes") == 1
        else:
            with pytest.raises(BackendError, match=match) as refused:
                app.jobs  # noqa: B018
            assert "Geheim" not in f"{refused.value}{caplog.text}"
    finally:
        server.end()


def test_user_and_password_work_and_are_not_told(tmp_path, apps, caplog):
    server = RedisServer(tmp_path, options=("--requirepass", "Geheim", "--user", "ann", "on", ">Wort", "~*", "&*", "+@all"))
    caplog.set_level(logging.DEBUG)
    try:
        app = apps(jobs=server.url.replace("//", "//ann:Wort@"))
        app.job(lambda n: None, name="mail").enqueue(1).result(5)
        with running(app) as worker:
            until(worker.drained)
        server.end()
        with pytest.raises(BackendError) as refused:
            app.jobs.queue_states()
        assert "Wort" not in f"{refused.value}{caplog.text}" and "redis at 127.0.0.1" in str(refused.value)
    finally:
        server.process.kill()


@pytest.mark.parametrize("how", ["fails", "conflicts", "is rubbish", "is killed"])
def test_the_dead_are_kept_within_sidekiq_s_bounds_whoever_buries(client, apps, how):
    app, now = apps(), time.time()
    mail = app.job(lambda n: 1 / 0, name="mail", retry=0, unique=until_executed(on_conflict="reject"))
    client.zadd("dead", {f"{n}": now - n for n in range(10_000)} | {"old": now - 181 * 86400})
    if how == "is rubbish":
        client.zadd("schedule", {"rubbish": 1.0})
    else:
        mail.enqueue(1).result(5)
    if how == "conflicts":
        mail.enqueue(1).result(5)
    elif how == "is killed":
        assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("ready")], "dead") == 1
    else:
        with running(app):
            until(lambda: client.zcard("dead") < 10_000)
    assert client.zcard("dead") == 9_999 and client.zscore("dead", "old") is None is client.zscore("dead", "9999")


@pytest.mark.parametrize("key", ["queues", "processes", "paused", "barnabas:workers"])
def test_a_database_in_which_somebody_else_has_sidekiq_s_sets_is_refused(client, apps, key):
    client.set(key, "1")
    with pytest.raises(BackendError, match=f"has a string under the key '{key}', not a (set|hash): .* or a prefix"):
        apps().jobs  # noqa: B018


def test_a_report_that_finds_redis_away_is_an_error_of_ours_and_a_count_that_is_none_stops_nobody(tmp_path, apps, caplog):
    server = RedisServer(tmp_path)
    app, seen = apps(jobs=server.url), []
    mail = app.job(seen.append, name="mail")
    app.jobs.client.set("stat:processed", "no number")
    mail.enqueue(1).result(5)
    with running(app) as worker:
        until(lambda: seen == [1] and worker.drained())
        assert "no longer ours" not in caplog.text and "trying again" not in caplog.text
        server.end(signal.SIGKILL)
        with pytest.raises(BackendError):
            app.jobs.report({"quiet": True})
        server.start()
    server.end()


def test_a_name_that_is_no_text_is_an_error_of_ours(client, apps):
    with pytest.raises(BackendError, match="half a surrogate pair is no text"):
        apps().job(lambda: None, name="mail", result_ttl=1).outcome("\ud800", 1)


@pytest.mark.parametrize("lead", ["", "Command # 1 (HSET NOAUTH x) of pipeline caused error: "])
@pytest.mark.parametrize(("said", "told"), [("OOM not allowed", "no memory left"), ("NOPERM this user", "may not do this")])
def test_why_a_command_was_refused_is_told_also_of_one_among_many(lead, said, told):
    assert told in str(explain("redis", redis.ResponseError(lead + said)))


@pytest.mark.parametrize("path", ["/abc", "/0/1", "/-1"])
def test_a_database_that_is_no_number_is_refused(apps, path):
    with pytest.raises(SettingError, match=f"the number of a database, as in /0, not '{path}'"):
        apps(jobs=f"redis://127.0.0.1:1{path}").jobs  # noqa: B018


@pytest.mark.parametrize("mark", ["/", "?", "#"])
@pytest.mark.parametrize("query", ["", "?sentinel=jobs"])
def test_a_password_that_is_not_encoded_is_refused_and_not_told(apps, mark, query):
    for password in (f"Ge{mark}heim", f"98{mark}765"):
        app = apps(jobs=f"redis://ann:{password}@127.0.0.1:1/0{query}")
        with pytest.raises(SettingError, match=r"in a password, / . # and @ are written %2F") as refused:
            app.jobs  # noqa: B018
        shown = f"{refused.value}{app.settings.shown('jobs')}"
        assert not any(part in shown for part in password.split(mark))


def test_no_password_is_told_where_a_url_cannot_be_taken_apart_or_its_driver_is_missing(apps, monkeypatch):
    app = apps(jobs="redis://ann:Ge\uff03heim@127.0.0.1:1/0")  # what looks like #
    with pytest.raises(SettingError, match="cannot be taken apart") as refused:
        app.jobs  # noqa: B018
    assert "heim" not in f"{refused.value}{app.settings.shown('jobs')}"

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="redis")

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.raises(SettingError, match="redis is not installed") as refused:
        apps(jobs="redis://ann:Geheim@127.0.0.1:1/0").jobs  # noqa: B018
    assert "Geheim" not in str(refused.value)


def test_a_prefix_keeps_applications_apart(client, url, apps):
    seen = []
    for name in ("a", "b"):
        app = apps(jobs=f"{url}?prefix={name}:")
        app.job(lambda n, name=name: seen.append((name, n)), name="mail").enqueue(1).result(5)
    with running(app) as worker:
        until(worker.drained)
    assert seen == [("b", 1)] and client.llen("a:queue:default") == 1
    assert {key.partition(b":")[0] for key in client.keys("*")} == {b"a", b"b"}


# Outages.


def test_what_was_claimed_is_handed_out_also_if_the_server_goes_away_just_then(client, apps, monkeypatch):
    app = apps()
    mail = app.job(name="mail")(lambda n: None)
    here = source(app)
    assert here.fetch(5, 0.01) == [] and here.landing.waiting  # blocking moves are under way
    mail.enqueue_many((n,) for n in range(9)).result(5)
    here.settle([])
    assert len(here.work) == 5 and here.landing.waiting

    def away(landing: Any) -> None:
        raise redis.ConnectionError("cut by the test")

    with monkeypatch.context() as patch:
        patch.setattr(redis_source.Landing, "end", away)
        with pytest.raises(BackendError):
            here.fetch(5, 0.0)
    assert len(rows(here.fetch(5, 0.0))) == 5
    here.close()


def test_scripts_go_by_their_digests_and_whole_again_to_a_server_that_has_lost_them(client, apps):
    app, ran = apps(), []
    app.job(name="once", unique=until_executed())(ran.append)
    once, plain = app.job_handlers["once"], app.job(name="plain", limit=Concurrent(9))(ran.append)
    sent = lambda: client.info("stats")["total_net_input_bytes"]  # noqa: E731
    once.enqueue(-1).result(5)
    before = sent()
    assert len(once.enqueue_many((n,) for n in range(100)).result(5)) == 100
    assert sent() - before < 100_000  # (the script has 14 kB)
    plain.enqueue_many((n,) for n in range(100, 400)).result(5)
    with running(app):
        until(lambda: len(ran) == 401)
        client.script_flush()
        plain.enqueue_many((n,) for n in range(400, 700)).result(5)
        assert once.enqueue(0).result(5)
        until(lambda: len(ran) == 702)
    assert sorted(ran) == sorted([*range(-1, 700), 0])


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, durable=True)
    yield server
    server.end(signal.SIGKILL)


def test_an_enqueue_waits_while_redis_is_away_and_a_worker_goes_on(durable, apps, caplog):
    app, seen = apps(jobs=durable.url), []
    mail = app.job(seen.append, name="mail")
    mail.enqueue(0).result(5)
    with running(app) as worker:
        until(lambda: seen == [0] and worker.drained())
        durable.end(signal.SIGKILL)
        futures = [mail.enqueue(n) for n in range(1, 50)]
        time.sleep(0.5)
        assert not any(future.done() for future in futures)
        durable.start()
        assert len({future.result(20) for future in futures}) == 49
        until(lambda: len(seen) >= 50)
        until(worker.drained)
    assert sorted(set(seen)) == list(range(50))
    assert "jobs cannot be stored, trying again" in caplog.text and "jobs are stored again" in caplog.text


def test_an_enqueue_that_waited_too_long_says_why(durable, apps, monkeypatch):
    monkeypatch.setattr(redis_outbox, "PAUSES", (1.0, 1.0))  # what fills the buffer is given up later than who waits for room
    app = apps(jobs=durable.url, send_timeout=0.3, buffer_messages=5)
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue(0).result(5)
    durable.end(signal.SIGKILL)
    one, many = mail.enqueue(1), mail.enqueue_many((n,) for n in range(3))
    with pytest.raises(SendError, match=r"not stored within 0.3 s: redis at 127.0.0.1:\d+/0: it is out of reach"):
        one.result(5)
    with pytest.raises(SendError, match="out of reach"):
        many.result(5)
    lost = [mail.enqueue_many((n,) for n in range(5))]
    with pytest.raises(BufferFull, match=r"was full for 0.3 s: 5 jobs"):
        for _ in range(5):
            lost.append(mail.enqueue(2))
    assert all(future.exception(5) is not None for future in lost)
    durable.start()
    until(lambda: app.jobs.flush(1) == 0)


def test_an_enqueue_waits_for_the_master_that_a_server_is_to_become(durable, apps):
    app = apps(jobs=durable.url)
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue(0).result(5)
    with redis.Redis(port=durable.port) as client:
        client.replicaof("127.0.0.1", 1)
        futures = [mail.enqueue(1), mail.enqueue_in(60, 2)]
        time.sleep(0.2)
        assert not any(future.done() for future in futures)
        client.replicaof("NO", "ONE")
        assert all(future.result(10) for future in futures)
        assert client.llen("queue:default") == 2 and client.zcard("schedule") == 1


def test_a_refused_write_is_the_futures_error_and_the_next_one_works(client, apps):
    app = apps()
    mail = app.job(lambda n: None, name="mail")
    client.set("queue:default", "no list")
    with pytest.raises(SendError, match="WRONGTYPE"):
        mail.enqueue(1).result(5)
    with pytest.raises(SendError, match="WRONGTYPE"):
        mail.enqueue_many((n,) for n in range(2500)).result(5)
    mail.options(queue="other").enqueue(1).result(5)
    assert client.llen("queue:other") == 1 and app.jobs.flush(1) == 0


def test_a_job_of_which_no_command_can_be_made_fails_alone_and_ends_no_thread(client, apps):
    home = apps().jobs
    for _ in range(2):
        wrong, right = Future[str](), Future[str]()
        job = OutgoingJob("mail", b"{}", None, "1", None)
        wrong.add_done_callback(lambda _: sys.exit("of a callback"))
        home.send([job, note("\ud800", b"it is no key", NOW, wrong), OutgoingJob("mail", b"{}", None, "2", right)])
        until(right.done, 5)  # nobody waits for it, so the thread stores them
        assert right.result() == "2"
        with pytest.raises(SendError, match=r"the job was not stored: UnicodeEncodeError: .* surrogates not allowed"):
            wrong.result()
    assert client.llen("queue:mail") == 4 and home.flush(1) == 0


class Cut(Exception):
    pass


@pytest.mark.parametrize("answered", [False, True], ids=["before it was done", "its answer lost"])
def test_a_claim_whose_answer_is_lost_strands_nothing_and_doubles_nothing(client, apps, answered, monkeypatch):
    app = apps()
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue_many((n,) for n in range(6)).result(5)
    ours = source(app)
    script = app.jobs.script

    def cut(name: str, *args: Any) -> Any:
        if name != "turn":
            return script(name, *args)
        monkeypatch.setattr(app.jobs, "script", script)
        if answered:
            script(name, *args)
        raise BackendError("cut")

    monkeypatch.setattr(app.jobs, "script", cut)
    with pytest.raises(BackendError):
        ours.fetch(4, 0)
    first = ours.fetch(4, 0)
    assert [json.loads(row[2])["args"] for row in rows(first)] == [[0], [1], [2], [3]]
    part = first[0][0]
    done = [Result(part, rows(first), [], {}, {})]
    monkeypatch.setattr(app.jobs, "script", cut)
    with pytest.raises(BackendError):
        ours.settle(done)
    ours.settle(done)
    second = ours.fetch(4, 0)
    assert [json.loads(row[2])["args"] for row in rows(second)] == [[4], [5]]
    ours.settle([Result(part, rows(second), [], {}, {})])
    assert client.get("stat:processed") == b"6" and app.jobs.open_work({}, ["default"]) == 0
    ours.close()


# The dead and the frozen.


def test_what_a_dead_process_had_goes_to_the_front_in_its_order(client, apps, hasty, caplog):
    app, other = apps(), apps()
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue_many((n,) for n in range(8)).result(5)
    first = source(app)
    claimed = rows(first.fetch(5, 0))
    assert len(claimed) == 5
    client.rpoplpush("queue:default", f"barnabas:landing:{first.name}:default")  # it landed and was not looked at
    second = source(other, "other")
    die(first)
    until(lambda: client.llen("queue:default") == 8)
    assert [json.loads(job)["args"][0] for job in reversed(client.lrange("queue:default", 0, -1))] == list(range(8))
    assert client.hlen("barnabas:crashes") == 5 and client.hkeys("barnabas:workers") == [second.name.encode()]
    assert f"process {first.name} died with 6 jobs in hand" in caplog.text
    second.close()


def test_nobody_is_taken_for_dead_soon_after_a_restart_also_one_that_went_unnoticed(tmp_path, apps, monkeypatch):
    for name, value in {"RENEW": 0.2, "SCAN": 0.0, "CALM": 2.0, "TICK": 0.5}.items():
        monkeypatch.setattr(redis_life, name, value)
    server = RedisServer(tmp_path, durable=True)
    ours, waited = source(apps(jobs=server.url)), []
    try:
        for away in (0.0, 0.8, 0.0):  # no tick falls into the first; the second is noticed
            with redis.Redis(port=server.port) as client:
                began = time.monotonic()
                client.hset("barnabas:workers", "silent", "default")
                until(lambda client=client: not client.hexists("barnabas:workers", "silent"))
                waited.append(time.monotonic() - began)
            server.end(signal.SIGKILL)
            time.sleep(away)
            server.start()
        assert waited[1] > 1.9 and 1.4 < waited[2] < 3.3, waited
    finally:
        ours.close()
        server.end(signal.SIGKILL)


def test_what_a_lost_connection_brings_to_a_busy_process_goes_back_to_its_queue(client, apps, hasty):
    app = apps()
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue(1).result(5)
    ours = source(app)
    assert len(rows(ours.fetch(1, 0))) == 1  # it is busy now
    mail.enqueue(2).result(5)
    client.rpoplpush("queue:default", f"barnabas:landing:{ours.name}:default")  # as the move of a line that was cut
    until(lambda: client.llen("queue:default") == 1)
    ours.close()


def test_who_thaws_after_others_took_his_jobs_shows_none_of_them(client, apps):
    app = apps()
    app.job(name="mail")(lambda n: None).enqueue(1).result(5)
    here = source(app)
    [row] = rows(here.fetch(5, 0.0))
    app.jobs.boxes.append(array("q", [1, row[0], 1]))  # it is at work
    until(lambda: here.life.beat() or client.keys("*:work"))  # its own beat may have begun before, and comes after
    assert [job.state for job in app.jobs.find_jobs()] == ["work"]
    die(here)
    here.life.until = 0.0  # its lease is over
    app.jobs.recover(here.name)
    here.life.beat()
    assert [job.state for job in app.jobs.find_jobs()] == ["ready"] and not client.keys("*:work")


def test_a_job_in_hand_at_three_crashes_runs_alone_and_only_a_crash_of_that_run_buries_it(client, apps, hasty):
    app, runs = apps(threads=4), []
    mail = app.job(lambda n: runs.append(n), name="mail")
    mail.enqueue_many((n,) for n in range(3)).result(5)
    watch = source(apps(), "other")

    def crash(*expected: int) -> None:
        victim = source(app)
        found = victim.fetch(10, 0)
        assert [json.loads(row[2])["args"][0] for row in rows(found)] == list(expected)
        die(victim)
        until(lambda: client.hlen("barnabas:workers") == 1)

    for _ in range(3):
        crash(0, 1, 2)
    assert set(client.hvals("barnabas:crashes")) == {b"3"}
    crash(0)  # alone
    assert sorted(client.hvals("barnabas:crashes")) == [b"3", b"3", b"4"]
    failures: list[Failed] = []
    app.observe(lambda record: failures.append(record) if isinstance(record, Failed) else None)
    mail.enqueue(9).result(5)
    with running(app) as worker:
        until(worker.drained)
    assert sorted(runs) == [1, 2, 9]
    (dead,) = app.jobs.find_jobs("dead")
    assert json.loads(dead.payload)["args"] == [0]
    assert [f.reason for f in failures] == ["was in work at 4 crashes of its process, the last time alone"]
    assert client.keys("barnabas:crashes") == [] == client.keys("barnabas:alone:*")
    watch.close()


def test_a_process_that_was_silent_too_long_settles_nothing_of_what_others_took(client, apps, hasty, caplog):
    app, other = apps(), apps()
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue_many((n,) for n in range(4)).result(5)
    frozen = source(app)
    found = frozen.fetch(10, 0)
    frozen.life.stop()  # no sign of life, as under SIGSTOP
    watch = source(other, "other")
    until(lambda: client.llen("queue:default") == 4)
    parts = list(frozen.parts.values())
    assert all(part.until < time.monotonic() for part in parts)
    frozen.settle([Result(found[0][0], rows(found)[:2], [], {}, {})])
    assert "2 jobs were no longer ours when they had ended" in caplog.text and app.jobs.overtaken == 2
    assert client.llen("queue:default") == 4
    again = frozen.fetch(10, 0)
    assert frozen.listener.gone == parts and [row[2] for row in rows(again)] == [row[2] for row in rows(found)]
    assert client.get("stat:processed") is None
    frozen.close(), watch.close()
    assert client.llen("queue:default") == 4


def test_no_more_jobs_that_had_a_crash_are_claimed_than_can_begin(client, apps):
    app = apps()
    jobs = [b'{"class":"work","args":[%d],"jid":"j%d","retry":true}' % (n, n) for n in range(30)]
    client.lpush("queue:default", *jobs)
    client.hset("barnabas:crashes", mapping={sha1(job).hexdigest(): 1 for job in jobs[2:]})
    one = source(app)
    ((part, first),) = one.fetch(100, 0.0)
    assert [row[2] for row in first] == jobs[:12]  # ten, and those that had none
    assert client.lrange("queue:default", 0, -1) == jobs[:11:-1]
    assert one.fetch(100, 0.0) == [] and len(one.work) == 12
    one.settle([Result(part, first[:5], [], {}, {})])
    assert len(rows(one.fetch(100, 0.0))) == 3
    one.close()
    assert client.lrange("queue:default", 0, -1) == jobs[:4:-1]


def test_jobs_that_had_a_crash_and_wait_for_a_slot_are_in_nobodys_hand(client, apps):
    app, ran = apps(threads=2), []

    @app.job(limit=Concurrent(1))
    def call(n: int):
        ran.append(n)
        time.sleep(0.3 if n == 0 else 0.0)

    call.enqueue_many((n,) for n in range(20)).result(5)
    client.hset("barnabas:crashes", mapping={sha1(job).hexdigest(): 1 for job in client.lrange("queue:default", 0, -2)})
    with running(app):
        until(lambda: len(ran) == 20)


def test_many_that_wait_for_a_rate_and_are_late_do_not_all_come_again_at_once(client, apps):
    app, ran = apps(), []

    @app.job(limit=Rate(4, per=1.0))
    def call(n: int):
        ran.append(n)

    call.enqueue_many((n,) for n in range(60)).result(5)
    with running(app):
        until(lambda: client.zcard("schedule") >= 50)
    waiting, (parked,) = client.zrange("schedule", 0, -1), client.keys("barnabas:parked:*")
    for jid, said in client.hgetall(parked).items():  # all of them are late, and come in no order
        client.hset(parked, jid, b" ".join([b"%f" % (time.time() - 5)] * 2 + said.split(b" ", 2)[2:]))
    client.delete("schedule"), client.lpush("queue:default", *reversed(waiting))
    with running(app):
        until(lambda: client.zcard("schedule") >= len(waiting) - 8)
        dues = [due - time.time() for _, due in client.zrange("schedule", 0, -1, withscores=True)]
    assert sum(due < 3.0 for due in dues) < 16 and max(dues) > 10.0, dues


def test_what_is_given_back_unbegun_keeps_its_crashes(client, apps, hasty):
    app = apps()
    app.job(lambda n: None, name="mail").enqueue(1).result(5)
    (payload,) = client.lrange("queue:default", 0, -1)
    client.hset("barnabas:crashes", sha1(payload).hexdigest(), 2)
    ours = source(app)
    found = ours.fetch(1, 0)
    ours.settle([Result(found[0][0], rows(found), [], {}, {rows(found)[0][0]: Again(time.time(), None)})])
    assert client.lrange("queue:default", 0, -1) == [payload] and client.hvals("barnabas:crashes") == [b"2"]
    ours.close()


def test_what_is_not_begun_goes_back_at_a_stop_and_what_is_in_work_last_of_all(client, apps):
    app, go, began = apps(threads=2), threading.Event(), []

    @app.job
    def slow(n: int):
        began.append(n)
        go.wait(20)

    slow.enqueue_many((n,) for n in range(6)).result(5)
    worker = Worker(app)
    worker.start()
    until(lambda: len(began) == 2)
    assert len(worker.stop(0.2)) == 2
    args = lambda: [json.loads(job)["args"][0] for job in reversed(client.lrange("queue:default", 0, -1))]  # noqa: E731
    assert args() == [2, 3, 4, 5]  # nobody may begin 0 and 1 while they are still in work here
    app.close()
    assert args() == [0, 1, 2, 3, 4, 5] and client.keys("barnabas:*") == []
    go.set()


# Others' rubbish, and what operators ask for.

def rubbish(**fields: Any) -> bytes:
    return json.dumps({"class": "mail", "args": [1], "queue": "default", "jid": "x", **fields}, ensure_ascii=False).encode()


RUBBISH = [
    *(b"", b"no json", b"null", b"[1,2]", b"\xff\xfe", b"[" * 5000, b"x" * 3_000_000, b'{"class":"mail"', b'{"args":[1]}'),
    *(b'{"class":"mail","args":[NaN]}', b'{"class":"mail","args":[-Infinity]}', b'{"class":"mail","args":[1e999]}'),
    *(b'{"class":"mail","args":["\\ud800"]}', rubbish(tags="?").replace(b"?", b"\\udfff"), b'{"class":"\xed\xa0\x80","args":[]}'),
    *(rubbish(args=[[]]).replace(b"[]", b"[" * 5000 + b"]" * 5000), rubbish(args=["y" * 3_000_000]), rubbish()[:-1]),
    *(rubbish(args={}), rubbish(args="1"), rubbish(args=None), rubbish(args=[1, 2, 3]), rubbish(**{"class": 3})),
    *(rubbish(queue=5), rubbish(queue=None), rubbish(jid=7), rubbish(jid=[]), rubbish(retry="yes"), rubbish(retry=1.5)),
    *(rubbish(retry_count="x"), rubbish(retry_count=10**30), rubbish(retry_count=0.5)),
]
HOSTILE = ["a\nb* c", "*", "[a-z]?", "\r\nSET x y", "l" * 100_000, "q\x00\x7f", "barnabas:workers", "{x}:%s%n"]


def test_rubbish_in_queues_and_sets_is_buried_with_its_reason_and_harms_nobody(client, apps, caplog):
    app, seen, failures = apps(), [], []

    @app.job
    def mail(n: int) -> None:
        seen.append(n)

    app.observe(lambda record: failures.append(record) if isinstance(record, Failed) else None)
    client.lpush("queue:default", *RUBBISH)
    for blanks, place in ((b" ", "retry"), (b"  ", "schedule")):  # else they could not be told apart in the end
        client.zadd(place, {text + blanks: 1.0 for text in RUBBISH})
    client.sadd("paused", b"\xff"), client.sadd("queues", b"\xfe\n"), client.sadd("processes", b"\xfd", "y", "*\n")
    client.hset("y", mapping={"info": "no json", "beat": "x"}), client.hset("*\n", mapping={"info": "[]", "beat": "1"})
    client.set("barnabas:alive:no process", "x"), client.hset("barnabas:workers", b"no\n*\xff", b"\xff * default")
    mail.enqueue(1).result(5)
    with running(app) as worker:
        until(lambda: [p.name for p in app.jobs.processes()] == [app.jobs.name])
        assert len(app.jobs.control()) == 1
        until(lambda: worker.drained() and client.zcard("dead") == 3 * len(RUBBISH))
        assert client.zcard("retry") == client.zcard("schedule") == 0
    assert seen == [1]
    dead = [json.loads(job) if b"error_message" in job else job.rstrip() for job in client.zrange("dead", 0, -1)]
    assert all(job["error_message"] for job in dead if isinstance(job, dict))
    told = caplog.text.count(": buried, since ") + len([failed for failed in failures if failed.reason])
    assert told == 3 * len(RUBBISH) and max(len(failed.reason) for failed in failures) < 1000
    assert {bytes(job.payload).rstrip() for job in app.jobs.find_jobs("dead")} >= {b"no json", RUBBISH[5], RUBBISH[9]}
    (state,) = [state for state in app.jobs.queue_states() if not state.name]
    assert state.dead == 3 * len(RUBBISH)


SAID = [
    {"barnabas": "[]"}, {"barnabas": '{"work":5}'}, {"barnabas": '{"work":[[1,2]]}'}, {"barnabas": '{"queues":[1]}'},
    {"barnabas": '{"counts":{"done":"x"}}'}, {"barnabas": '{"trouble":[]}'}, {"barnabas": '{"handlers":{"a":1}}'},
    {"info": '{"hostname":"h","pid":1,"started_at":1,"queues":[1,null]}'}, {"info": '{"hostname":7,"pid":1,"started_at":1}'},
]


def test_a_process_that_says_rubbish_of_itself_hides_no_other(client, apps):
    app = apps()
    good = {"info": '{"hostname":"h","pid":1,"started_at":1.5,"queues":["a"],"tag":"ruby"}', "beat": "1.5"}
    for n, said in enumerate([{}, *SAID]):
        client.sadd("processes", f"h:{n}:x"), client.hset(f"h:{n}:x", mapping=good | said)
    assert [(p.name, p.app) for p in processes(app)] == [("h:0:x", "ruby")]


def test_a_process_that_is_asked_from_afar_shows_where_it_is(client, url, tmp_path):
    (tmp_path / "shop.py").write_text(
        "import asyncio, time\nfrom barnabas import App\napp = App('shop', events='memory:')\n\n"
        "@app.job\ndef doze_here(n):\n    time.sleep(n)\n\n"
        "@app.job\nasync def doze_there(n):\n    await doze(n)\n\nasync def doze(n):\n    await asyncio.sleep(n)\n"
    )
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "barnabas", "run", "shop:app", "--jobs", url]
        worker = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    app = App("sender", events="memory:", jobs=url)
    try:
        app.foreign_job("doze_here").enqueue(3).result(10)
        jid = app.foreign_job("doze_there").enqueue(3).result(10)
        until(lambda: [name for name in client.smembers("processes") if client.hget(name, "busy") == b"2"])
        (name,) = client.smembers("processes")
        client.lpush(name + b"-signals", "TTIN")
        until(lambda: 'shop.py", line 7 in doze_here' in (tmp_path / "log").read_text())
        until(lambda: 'shop.py", line 14, in doze\n' in (tmp_path / "log").read_text())
        assert f"Coroutine of job doze_there {jid}:\n" in (tmp_path / "log").read_text()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        app.close()


def test_hostile_names_do_no_harm(client, url, apps):
    app, seen = apps(jobs=f"{url}?prefix=%2A%5Bx%5D%0A%7By%7D%20"), []
    mail, prefix = app.job(seen.append, name="mail *[x]"), "*[x]\n{y} "
    client.mset({"x": "mine", "queue:other": "mine"})
    for n, name in enumerate(HOSTILE):
        client.zadd(f"{prefix}{('retry', 'schedule')[n % 2]}", {rubbish(queue=name, jid=name, **{"class": name}): 1.0})
    with running(app) as worker:
        mail.enqueue(1).result(5)
        until(lambda: worker.drained() and seen == [1])
        assert {state.name for state in app.jobs.queue_states() if state.ready} == set(HOSTILE)
    assert sorted(job.queue for job in app.jobs.find_jobs("ready")) == sorted(HOSTILE)
    assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("ready")], "dead") == len(HOSTILE)
    assert client.mget("x", "queue:other") == [b"mine"] * 2
    assert all(key.startswith(prefix.encode()) for key in client.keys("*") if key not in (b"x", b"queue:other"))


def test_what_is_stored_does_nothing_to_the_terminal_of_who_looks_at_it(client, url, tmp_path):
    code = "from barnabas import App\napp = App('shop', events='memory:')\n@app.job\ndef mail(n): ...\n"
    (tmp_path / "shop.py").write_text(code)
    hostile = "\x1b]0;x\x07\x1b[2J\x9b31m\r\n2026-01-01 00:00:00.000 ERROR   forged"
    client.sadd("queues", "default", f"q{hostile}"), client.lpush("queue:default", rubbish(jid=hostile, **{"class": hostile}))
    client.zadd("dead", {rubbish(jid="d", error_message=hostile, error_class="E", tags=[hostile]): 1.0, hostile: 2.0})
    options = ["--app", "shop:app", "--jobs", url]
    for command in ("queues", "jobs list", "jobs show d", "dead list", "run --drain"):
        words = [sys.executable, "-m", "barnabas", *command.split(), *options]
        said = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=30)
        text = (said.stdout + said.stderr).decode()
        assert said.returncode == 0 and "\\x1b[2J" in text, text
        assert not command.startswith("run") or ("forged" in text and "\n2026-01-01" not in text), text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), repr(text)


def test_no_job_is_lost_where_a_key_is_somebody_elses(client, apps, caplog):
    app, seen = apps(), []

    @app.job
    def mail(n: int) -> None:
        seen.append(n)
        if n == 2:
            raise RetryAfter(0.01) if seen.count(2) == 1 else Reject("no")

    client.mset({"queue:taken": "x", "retry": "x", "dead": "x"})
    client.zadd("schedule", {rubbish(queue="taken"): 1.0, rubbish(args=[3]): 1.0})
    refs = [job.ref for job in app.jobs.find_jobs("scheduled")]
    assert [app.jobs.move_jobs(refs, to) for to in ("dead", "queue:taken")] == [0, 0] and client.zcard("schedule") == 2
    with running(app) as worker:
        mail.enqueue(2).result(5)
        until(lambda: 2 in seen and 3 in seen and "retry is no zset" in caplog.text and "dead is no zset" in caplog.text)
        assert client.hlen(f"barnabas:work:{app.jobs.name}") == 1  # it stays in hand until it can be stored
        client.delete("retry"), client.delete("dead")
        until(lambda: seen.count(2) == 2 and 3 in seen and worker.drained(), 30)
    assert caplog.text.count("queue:taken is no list, so it is no queue; what was due there is buried") == 1
    assert sorted(json.loads(job)["queue"] for job in client.zrange("dead", 0, -1)) == ["default", "taken"]


@pytest.mark.parametrize("drops", [False, True], ids=["", "what was seen is dropped"])
def test_no_job_of_a_queue_is_overlooked_while_others_are_enqueued_and_claimed(client, apps, drops):
    app = apps()
    mail = app.job(lambda n: None, name="mail")
    mail.enqueue_many((n,) for n in range(3000)).result(5)
    seen, claimed, ours = list[int](), set[int](), source(app)
    for at, job in enumerate(app.jobs.find_jobs("ready")):
        seen.append(json.loads(job.payload)["args"][0])
        if at % 100 == 0:
            mail.enqueue_many((n,) for n in range(10_000 + at, 10_050 + at)).result(5)
        if at < 100 and at % 10 == 0:
            claimed |= {json.loads(row[2])["args"][0] for row in rows(ours.fetch(1000, 0))}
        if drops:
            app.jobs.move_jobs([job.ref], None)
    old = [n for n in seen if n < 3000]
    assert old == sorted(old) and {*old} | claimed == {*range(3000)} and claimed
    ours.close()


def test_operators_are_shown_the_rest_where_keys_are_somebody_elses_and_rubbish_has_an_address(client, apps, caplog):
    app = apps(queues=["default", "odd"])
    app.foreign_job("mail").enqueue(1).result(5)
    (rails,) = jobs(app, ["r"]) if client.lpush("queue:default", rubbish(wrapped="Job", jid="r")) else ()
    assert rails.name == "Job" and client.lpop("queue:default") == rails.job.payload
    client.sadd("queues", "odd"), client.mset({"queue:odd": "x", "retry": "x"})
    client.zadd("dead", {b"no json": 1.0, b"{}": 2.0})
    states = [(state.name, state.ready, state.dead) for state in app.jobs.queue_states()]
    assert states == [("", 0, 2), ("default", 1, 0), ("odd", 0, 0)]
    assert app.jobs.open_work({}, ["default", "odd"]) == 1
    assert sorted(job.state for job in app.jobs.find_jobs()) == ["dead", "dead", "ready"]
    assert [caplog.text.count(f"{key} is no {kind}, but") for key, kind in (("queue:odd", "list"), ("retry", "zset"))] == [1, 1]
    first, second = sorted(letter.address for letter in letters(app))
    assert first.startswith("raw-") and first != second
    assert deal(app, letters(app, [first]), retry=False).done == 1
    assert [letter.address for letter in letters(app)] == [second] and client.zcard("dead") == 1


@pytest.mark.parametrize("key", ["retry", "schedule"])
def test_a_set_that_is_none_is_told_once_and_stops_no_other(client, apps, caplog, key):
    app, seen = apps(), []
    mail = app.job(seen.append, name="mail")
    client.set(key, "no set")
    other = "schedule" if key == "retry" else "retry"
    client.zadd(other, {rubbish(): 1.0})
    with running(app):
        mail.enqueue(2).result(5)
        until(lambda: sorted(seen) == [1, 2])
        time.sleep(1.2)
    assert caplog.text.count(f"{key} is no zset, but somebody else's string: what needs it waits") == 1


def test_a_failure_that_cannot_be_stored_stays_in_hand_and_stops_nothing_else(client, apps, caplog):
    app, seen = apps(threads=4), []

    @app.job(queue="odd")
    def odd(n: int) -> None:
        raise RetryAfter(60) if n % 2 else Reject("no")

    mail, more = app.job(seen.append, name="mail"), {"retry": 10, "dead": 10}
    client.mset({"retry": "x", "dead": "x"})
    with running(app) as worker:
        hands = f"barnabas:work:{app.jobs.name}"
        odd.enqueue_many((n,) for n in range(20)).result(5)  # more than it takes ahead
        until(lambda: client.hlen(hands) == 20)
        mail.enqueue_many((n,) for n in range(50)).result(5)
        until(lambda: sorted(seen) == [*range(50)])
        assert all(f"{key} is no zset" in worker.report()["trouble"] for key in more)
        client.delete("retry")
        until(lambda: client.zcard("retry") == 10 and client.hlen(hands) == 10)
        assert "dead is no zset" in worker.report()["trouble"] and client.get("dead") == b"x"
        client.delete("dead")
        until(lambda: client.zcard("dead") == 10 and client.hlen(hands) == 0)
        assert worker.report()["trouble"] == "" and client.get("stat:failed") == b"20"
    assert [caplog.text.count(f"{key} is no zset") for key in more] == [1, 1]


def test_a_failure_that_could_not_be_stored_by_the_end_is_back_in_its_queue(client, apps):
    app = apps()
    fails = app.job(lambda n: 1 / 0, name="fails")
    client.set("retry", "x")
    with running(app) as worker:
        fails.enqueue(1).result(5)
        until(lambda: "retry is no zset" in worker.report()["trouble"])
    app.close()
    assert client.llen("queue:default") == 1 and client.keys("barnabas:*") == []


def test_a_job_that_cannot_be_stored_takes_no_lock(client, apps):
    mail = apps().job(lambda n: None, name="mail", unique=until_expired(ttl=1000))
    client.set("queue:default", "x")
    with pytest.raises(SendError, match="WRONGTYPE"):
        mail.enqueue(1).result(5)
    client.delete("queue:default")
    assert mail.enqueue(1).result(5)


@pytest.mark.parametrize("key", ["processes", "paused"])
def test_a_set_of_sidekiq_s_that_is_none_keeps_nobody_from_work_from_burying_the_dead_and_from_obeying(client, apps, hasty, key):
    app, seen = apps(queues=["default", "rests"]), []
    mail = app.job(seen.append, name="mail")
    app.jobs.set_control("pause queue:rests", "")
    mail.options(queue="rests").enqueue(9).result(5)
    with running(app) as worker:
        until(lambda: worker.obey() is None and worker.paused)
        client.set(key, "x")  # in one step: between two the queue would be open
        client.hset("barnabas:workers", "a:1:x", "default"), client.hset("barnabas:work:a:1:x", "1:default", rubbish(args=[7]))
        mail.enqueue(8).result(5)
        until(lambda: sorted(seen) == [7, 8])
        until(lambda: f"{key} is no set, but somebody else's string" in worker.report()["trouble"])
        client.lpush(f"{app.jobs.name}-signals", "TSTP")
        until(lambda: worker.obey() == "quiet")
        assert seen.count(9) == 0 and worker.paused == ["queue:rests"]
        client.delete(key)
        until(lambda: worker.report()["trouble"] == "")


def test_what_the_dead_had_goes_back_once_though_one_of_its_queues_is_somebody_elses(client, apps, hasty, caplog):
    jobs = {name: rubbish(queue=name, jid=name) for name in ("bad", "good", "late")}
    client.hset("barnabas:workers", mapping={"a:1:x": "bad good", "b:2:y": "bad good"})
    client.hset("barnabas:work:a:1:x", mapping={"1:bad": jobs["bad"], "2:good": jobs["good"]})
    client.hset("barnabas:work:b:2:y", "1:good", jobs["late"])
    client.lpush("barnabas:landing:b:2:y:bad", "landed")
    client.set("queue:bad", "x")
    app = apps()
    ours = source(app, "other")
    until(lambda: client.llen("queue:good") >= 2)
    time.sleep(0.5)  # (it is looked at ten times a second)
    assert sorted(client.lrange("queue:good", 0, -1)) == sorted([jobs["good"], jobs["late"]])
    assert client.hvals("barnabas:crashes") == [b"1", b"1"]
    assert sorted(job.payload for job in app.jobs.find_jobs("work")) == sorted([jobs["bad"], b"landed"])
    client.delete("queue:bad")
    until(lambda: sorted(client.lrange("queue:bad", 0, -1)) == sorted([jobs["bad"], b"landed"]))
    until(lambda: client.hkeys("barnabas:workers") == [ours.name.encode()])
    assert client.hvals("barnabas:crashes") == [b"1", b"1", b"1"] and caplog.text.count("queue:bad is no list") == 1
    ours.close()


@pytest.mark.parametrize("key", ["queue:default", "barnabas:crashes"])
def test_nothing_is_lost_of_what_is_being_claimed_where_a_key_is_somebody_elses(client, apps, key):
    app = apps()
    ours = source(app)
    client.sadd("queues", "default")
    client.lpush(f"barnabas:landing:{ours.name}:default", *(rubbish(jid=f"{n}") for n in range(3)))
    client.set(key, "x")
    with suppress(BackendError):
        assert len(rows(ours.fetch(1, 0))) == 1
    assert sum(job.state in ("ready", "work") for job in app.jobs.find_jobs()) == 3
    ours.close()


def test_a_queue_that_is_a_list_again_is_waited_for_again(client, apps):
    app, at = apps(queues=["bad", "default"]), []
    mail = app.job(lambda n: at.append(time.monotonic()), name="mail", queue="bad")
    client.set("queue:bad", "x")
    with running(app) as worker:
        until(lambda: "queue:bad is no list" in worker.report()["trouble"])
        client.delete("queue:bad")
        until(lambda: worker.report()["trouble"] == "")
        time.sleep(1.5)
        began = time.monotonic()
        mail.enqueue(1).result(5)
        until(lambda: at)
        assert at[0] - began < 0.5


def test_a_key_that_is_no_list_stops_no_other_queue(client, apps, caplog):
    app, seen = apps(queues=["bad", "default"]), []
    client.set("queue:bad", "x")
    client.zadd("schedule", {b'{"class":"mail","args":[%d],"queue":"bad","jid":"x"}' % n: 1.0 for n in range(3)})
    mail = app.job(seen.append, name="mail")
    with running(app) as worker:
        mail.enqueue(1).result(5)
        until(lambda: client.zcard("dead") == 3 and client.zcard("schedule") == 0)
        until(lambda: seen == [1])
        time.sleep(0.3)
        mail.enqueue(2).result(5)
        until(lambda: seen == [1, 2])
        assert worker.failed() is None
    assert caplog.text.count("queue:bad is no list") == 2 and "what was due there is buried" in caplog.text


def test_a_paused_queue_rests_in_all_processes_until_it_is_opened(client, apps):
    app, other, seen = apps(queues=["default", "mail"]), apps(), []
    mail = app.job(seen.append, name="mail")
    with running(app):
        mail.enqueue(0).result(5)
        until(lambda: seen == [0])
        other.jobs.set_control("pause queue:default", "")
        assert app.jobs.control() == {"pause queue:default": ""} and client.smembers("paused") == {b"default"}
        mail.enqueue(1).result(5)  # at once: the worker may be waiting on the queue, and must give it back
        mail.options(queue="mail").enqueue(2).result(5)
        until(lambda: seen == [0, 2])
        time.sleep(0.5)
        assert seen == [0, 2] and client.llen("queue:default") == 1
        other.jobs.set_control("pause queue:default", None)
        until(lambda: seen == [0, 2, 1], 5)


def test_an_idle_worker_starts_a_job_at_once_and_asks_little(client, apps):
    queues = [f"q{n}" for n in range(5)]
    app, at = apps(queues=queues), []
    mail = app.job(lambda n: at.append(time.perf_counter()), name="mail")
    took = []
    with running(app):
        rates = []
        for _ in range(3):  # other tests' connections may have something left to say
            time.sleep(1.0)
            before = client.info()["total_commands_processed"]
            time.sleep(1.0)
            rates.append(client.info()["total_commands_processed"] - before)
        assert min(rates) < 30, rates
        for n in range(50):
            time.sleep(0.005)
            began = time.perf_counter()
            mail.options(queue=queues[n % 5]).enqueue(n).result(5)
            until(lambda n=n: len(at) > n)
            took.append(at[-1] - began)
    assert sorted(took)[25] < 0.05  # a poll would take longer
