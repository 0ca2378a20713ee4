"""What jobs can beyond Sidekiq's: chains, deadlines, tags, the last of several calls, deploys in steps, results."""

import asyncio
import threading
from datetime import datetime

import msgspec
import pytest
from watching import failures, wait_for, waiting

from barnabas import Reject, progress, until_executed
from barnabas.errors import DeclarationError, JobFailed, NoOutcome, SendError
from barnabas.jobs.beyond import how_far
from barnabas.message import OutgoingJob
from barnabas.queues import jobs, move


def repr_of(value):
    return repr(value)[:60]


def payloads(app, **which):
    return [msgspec.json.decode(entry.job.payload) for entry in jobs(app, **which)]


# Chains.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_chain_hands_each_result_to_the_next_job(place, app, kind):
    seen = []

    if kind == "sync":

        @app.job(queue="slow", retry=3, tags=["first"])
        def parse(text: str) -> list[int]:
            return [int(word) for word in text.split()]
    else:

        @app.job(queue="slow", retry=3, tags=["first"])
        async def parse(text: str) -> list[int]:
            return [int(word) for word in text.split()]

    @app.job(retry=2, tags=["second"])
    def add(numbers: list[int]) -> datetime:
        return datetime(2026, 1, sum(numbers))

    @app.job
    async def tell(day: datetime, word: str = "on"):
        seen.append((day, word))

    chain = parse.then(add.options(queue="sums", retry=7, tags=["x"]), tell.options(expires_in=100))
    chain.enqueue("1 2 3").result(5)
    parse.options(queue="other").then(add).then(tell).enqueue_in(60, "4 5").result(5)
    (other,), (first,) = payloads(app, state="scheduled"), payloads(app, state="ready")
    assert first["queue"] == "slow" and other["queue"] == "other"
    second, third = first["barnabas"]["then"]
    assert second == {"class": "add", "queue": "sums", "retry": 7, "tags": ["x"]}
    assert third == {"class": "tell", "queue": "default", "retry": 25, "barnabas": {"expires_in": 100}}
    app.settings = app.settings.override(queues=["slow", "other", "sums", "default"])
    app.clock.advance(61)
    place.drain(app)
    assert sorted(seen) == [(datetime(2026, 1, 6), "on"), (datetime(2026, 1, 9), "on")]


def test_a_failure_ends_a_chain_and_shows_where_and_a_retry_goes_on(place, app):
    seen, broken = [], True

    @app.job
    def first(n: int) -> int:
        return n + 1

    @app.job(retry=0)
    def second(n: int) -> int:
        if broken:
            raise ValueError("no")
        return n + 1

    @app.job
    def third(n: int):
        seen.append(n)

    first.then(second, third).enqueue(1).result(5)
    place.drain(app)
    (dead,) = payloads(app, state="dead")
    assert dead["class"] == "second" and dead["args"] == [2]
    assert dead["barnabas"] == {"step": 2, "then": [{"class": "third", "queue": "default", "retry": 25}]}
    broken = False
    app.jobs.move_jobs([entry.job.ref for entry in jobs(app, state="dead")], "ready")
    place.drain(app)
    assert seen == [3]


def test_a_chain_sent_by_a_handler_leaves_with_it(place, app):
    seen = []

    @app.job
    def first(n: int) -> int:
        return n + 1

    @app.job
    def second(n: int):
        seen.append(n)

    @app.job(retry=0)
    def begin(n: int):
        first.then(second).enqueue(n)
        if n < 0:
            raise ValueError("no")

    begin.enqueue(-1)
    begin.enqueue(5).result(5)
    place.drain(app)
    assert seen == [6]


@pytest.mark.parametrize("value", [object(), float("nan"), "\ud800", [[{"a": float("inf")}]]])
@pytest.mark.parametrize("what", ["chain", "result"])
def test_results_that_cannot_be_encoded_are_dead_with_the_reason(place, app, value, what):
    @app.job(**({"result_ttl": 60} if what == "result" else {}))
    def first():
        return value

    @app.job
    def second(n):
        raise AssertionError("it ran")

    (first if what == "result" else first.then(second)).enqueue().result(5)
    place.drain(app)
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 1}
    (failure,) = failures(app)
    assert failure.outcome == "dead" and "cannot be kept or handed on" in failure.reason
    assert ("argument 1" in failure.reason) == (what == "chain")


def test_impossible_chains_are_refused_where_they_stand(app):
    @app.job
    def one(n): ...

    @app.job
    def none(): ...

    @app.job
    def two(a, b): ...

    ruby = app.foreign_job("HardWorker", queue="ruby")
    for wrong, why in (
        (lambda: one.then(*[one] * 10_000), "1000 are the most"),
        (lambda: one.then(none), "gets one argument"),
        (lambda: one.then(two), "gets one argument"),
        (lambda: one.then(one.then(one)), "not of chains"),
        (lambda: one.then(ruby, one), "can only be the last"),
        (lambda: ruby.then(one), "can only be the last"),
    ):
        with pytest.raises(DeclarationError, match=why):
            wrong()
    jid = one.then(one, ruby).enqueue(1).result(5)
    assert len(jid) == 24


def test_a_long_chain_runs_to_its_end(place, app):
    seen = []

    @app.job
    def one(n: int) -> int:
        seen.append(n)
        return n + 1

    one.then(*[one] * 99).enqueue(0).result(5)
    place.drain(app)
    assert seen == list(range(100))


LINK = {"class": "one", "queue": "default", "retry": 1}


@pytest.mark.parametrize("name", ["one", "fails"])
@pytest.mark.parametrize(
    "more",
    [
        {"then": [1]},
        {"then": ["one"]},
        {"then": [None]},
        {"then": [{}]},
        {"then": [LINK | {"class": 7}]},
        {"then": [LINK | {"queue": None}]},
        {"then": [LINK | {"queue": ""}]},
        {"then": [LINK | {"retry": "x"}]},
        {"then": [LINK | {"barnabas": 7}]},
        {"then": [LINK | {"barnabas": {"expires_in": "x"}}]},
        {"then": [LINK | {"barnabas": {"result_ttl": "x"}}]},
        {"then": [LINK | {"barnabas": {"priority": "x"}}]},
        {"then": [LINK | {"barnabas": {"result_ttl": 1e308}}]},
        {"then": [LINK] * 10_000},
        {"result_ttl": -1},
        {"result_ttl": 1e308},
    ],
    ids=repr_of,
)
def test_nonsense_that_others_stored_is_dead_with_the_reason_and_stops_nobody(place, app, name, more):
    seen = []
    app.job(name="one", retry=0)(seen.append)
    app.job(name="fails", retry=0)(lambda: 1 / 0)
    fields = {"class": name, "queue": "default", "args": [1][: name == "one"], "jid": "a" * 24, "retry": 0, "barnabas": more}
    app.jobs.send([OutgoingJob("default", msgspec.json.encode(fields), None, "a" * 24, None)])
    app.job_handlers["one"].enqueue(2).result(5)
    place.drain(app)
    assert seen == [2] and [entry.job.state for entry in jobs(app)] == ["dead"]
    (failure,) = failures(app)
    assert "not a Sidekiq job" in failure.reason


def test_a_priority_that_others_stored_is_one_where_queues_know_them(place, app):
    seen = []
    app.job(name="one", retry=0)(seen.append)
    fields = {"class": "one", "queue": "default", "args": [1], "jid": "a" * 24, "retry": 0}
    data = msgspec.json.encode(fields | {"barnabas": {"then": [LINK | {"barnabas": {"priority": 5}}]}})
    app.jobs.send([OutgoingJob("default", data, None, "a" * 24, None)])
    app.jobs.flush(5)
    place.drain(app)
    assert seen == [1, None]


# Deadlines.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_that_comes_too_late_is_not_run_but_counted(place, app, kind, caplog):
    seen, deaths = [], []

    def note(n: int):
        seen.append(n)

    async def note_async(n: int):
        seen.append(n)

    function = note if kind == "sync" else note_async
    job = app.job(expires_in=60, name="job", on_death=lambda job, error: deaths.append(job))(function)
    job.enqueue(1)
    job.options(expires_in=3600).enqueue(2)
    job.enqueue_in(3000, 3).result(5)  # the minute begins when it is due
    app.clock.advance(61)
    place.drain(app)
    assert seen == [2]
    app.clock.advance(2950)
    place.drain(app)
    assert seen == [2, 3] and deaths == []
    assert app.observers.counts["job", "expired"] == 1 and "(expires_in)" in caplog.text
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}


@pytest.mark.parametrize("option", ["expires_in", "result_ttl"])
@pytest.mark.parametrize("value", [0, -1, "60", True, float("inf"), float("nan")])
def test_seconds_that_are_none_are_refused(app, option, value):
    with pytest.raises(DeclarationError, match=f"{option}=.*give seconds"):
        app.job(name="job", **{option: value})(lambda n: None)


# Tags.


def test_tags_are_sidekiqs_and_can_be_searched_for(place, app):
    @app.job(tags=["mail", "slow"])
    def send(n: int): ...

    @app.job
    def plain(n: int): ...

    send.enqueue(1)
    send.options(tags=["urgent"]).enqueue(2)
    plain.options(tags=["mail"]).enqueue_in(60, 3)
    app.foreign_job("HardWorker", tags=["mail"]).enqueue(4)
    plain.enqueue(5).result(5)
    app.jobs.flush(5)
    assert sorted(p["args"][0] for p in payloads(app, tag="mail")) == [1, 3, 4]
    assert [p["tags"] for p in payloads(app, tag="urgent")] == [["urgent"]]
    assert payloads(app, tag="ur") == []


@pytest.mark.parametrize("tags", ["mail", [1], [""], 7, ["\ud800"]])
def test_tags_are_texts(app, tags):
    with pytest.raises(DeclarationError, match="give a list of texts"):
        app.job(name="tagged", tags=tags)(lambda n: None)
    with pytest.raises(DeclarationError, match="give a list of texts"):
        app.job(name="job")(lambda n: None).options(tags=tags)


# The last of several calls.


def test_of_debounced_calls_the_last_one_runs(place, app):
    seen = []

    @app.job
    def index(doc: int, text: str):
        seen.append((doc, text))

    for text in ("a", "ab", "abc"):
        future = index.enqueue_debounced("doc-1", 1, text, wait=5)
        assert future.result(5) == future.id and len(future.id) == 24
        index.enqueue_debounced("doc-2", 2, text, wait=5).result(5)
        app.clock.advance(3)
    place.drain(app)
    assert seen == []
    app.clock.advance(3)
    place.drain(app)
    assert sorted(seen) == [(1, "abc"), (2, "abc")] and app.observers.counts["index", "superseded"] == 4
    index.enqueue_debounced("doc-1", 1, "abcd", wait=5).result(5)
    app.clock.advance(6)
    place.drain(app)
    assert len(seen) == 3
    assert waiting(app) == {"scheduled": 0, "retry": 0, "dead": 0}


def test_a_debounced_call_of_a_handler_leaves_with_it(place, app):
    seen = []

    @app.job
    def index(n: int):
        seen.append(n)

    futures = []

    @app.job(retry=0)
    def change(n: int):
        futures.append(index.enqueue_debounced("k", n, wait=5))
        if n == 3:
            raise Reject("no")

    for n in (1, 2, 3):
        change.enqueue(n).result(5)
        place.drain(app)
    assert [future.result(0) == future.id for future in futures] == [True, True, False] and futures[2].result(0) is None
    app.clock.advance(6)
    place.drain(app)
    assert seen == [2]


def test_calls_that_cannot_be_debounced_are_refused(app):
    @app.job
    def index(n: int): ...

    with pytest.raises(SendError, match="another program"):
        app.foreign_job("HardWorker").enqueue_debounced("k", 1, wait=5)
    for key in ("", "\ud800"):
        with pytest.raises(SendError, match="give a text"):
            index.enqueue_debounced(key, 1, wait=5)
    with pytest.raises(SendError, match=r"enqueue_debounced\(wait='5'\): give seconds"):
        index.enqueue_debounced("k", 1, wait="5")
    with pytest.raises(SendError, match="cannot be enqueued"):
        index.enqueue_debounced("k", wait=5)


# Deploys in steps.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_that_nobody_knows_yet_waits_for_a_worker_that_does(place, kind, caplog):
    old, new, seen = place.app(unknown="wait", unknown_timeout=600), place.app(), []
    new.clock = old.clock
    if place.name == "memory":
        new._jobs = old.jobs

    @old.job
    def known(): ...

    async def report_async(n: int) -> int:
        seen.append(n)
        return n

    def report(n: int) -> int:
        seen.append(n)
        return n

    job = new.job(name="report", retry=0)(report if kind == "sync" else report_async)
    job.then(job).enqueue(1)
    job.enqueue(2).result(5)
    for _ in range(5):
        place.drain(old)
        assert waiting(old) == {"scheduled": 0, "retry": 2, "dead": 0}
        new.clock.advance(31)
    assert old.observers.counts["report", "waits"] == 10
    assert caplog.text.count("left to workers that know it") == 5  # once a worker
    stored, _ = payloads(new, state="retry")
    assert "retry_count" not in stored and "error_class" not in stored
    place.again(old)
    place.drain(new)
    assert sorted(seen) == [1, 1, 2]


def test_a_job_that_nobody_knows_in_time_fails_as_ever(place):
    app = place.app(unknown="wait", unknown_timeout=60)
    app.job(name="known")(lambda: None)
    app.foreign_job("Later", retry=0).enqueue(1).result(5)
    for _ in range(4):
        place.drain(app)
        app.clock.advance(31)
    (dead,) = payloads(app, state="dead")
    assert "no job 'Later' is declared here" in dead["error_message"]


def test_the_time_that_nobody_knows_a_job_begins_anew_after_a_run(place):
    old, new = place.app(unknown="wait", unknown_timeout=600), place.app()
    new.clock = old.clock
    if place.name == "memory":
        new._jobs = old.jobs
    old.job(name="known")(lambda: None)
    new.job(name="report", retry=3)(lambda: 1 / 0)
    new.foreign_job("report", retry=3).enqueue().result(5)
    for worker, seconds in ((old, 31), (new, 3600), (old, 0)):
        place.drain(worker)
        place.again(worker)
        old.clock.advance(seconds)
    (stored,) = payloads(new, state="retry")
    assert stored["retry_count"] == 0 and old.observers.counts["report", "waits"] == 2


# Results and progress.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_outcome_of_a_job_is_told_to_whoever_waits_for_it(place, app, kind):
    def double(when: datetime) -> list[datetime]:
        return [when, when]

    async def double_async(when: datetime) -> list[datetime]:
        return [when, when]

    job = app.job(result_ttl=60, name="double")(double if kind == "sync" else double_async)
    now, found = datetime(2026, 1, 2), []
    with place.running(app) as worker:
        future = job.enqueue(now)
        threads = [threading.Thread(target=lambda: found.append(future.outcome(20))) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(found) == 3, "the outcome", worker)
    for thread in threads:
        thread.join(5)
    assert found == [[now, now]] * 3 == [job.outcome(future.id, 0)] * 3
    app.clock.advance(61)
    if place.name != "redis":  # whose own clock it is
        with pytest.raises(NoOutcome, match=f"jobs show {future.id}"):
            job.outcome(future.id, 0)


def test_the_outcome_of_a_job_that_fails_is_its_reason(place, app):
    @app.job(result_ttl=60, retry=0, expires_in=100)
    def job(n: int) -> int:
        raise ValueError(f"no {n}")

    @app.job(result_ttl=60)
    def other(n: int) -> int:
        return n

    first, second, third = job.enqueue(1), other.then(job, other).enqueue(2), job.options(expires_in=1).enqueue_in(1, 3)
    second.result(5), third.result(5)
    place.drain(app)
    app.clock.advance(3)
    place.drain(app)
    for future, why in ((first, "ValueError: no 1"), (second, "'job' .* ended the chain: .*no 2"), (third, "expires_in")):
        with pytest.raises(JobFailed, match=why):
            future.outcome(0)
    assert other.outcome(second.id, 0) == 2


def test_who_waits_is_told_that_a_job_was_dropped_or_refused(place, app):
    @app.job(result_ttl=60)
    def first(n: int) -> int:
        return n

    @app.job(result_ttl=60)
    def last(n: int) -> int:
        return n

    @app.before_enqueue
    def refuse(job):
        return job["class"] != "last" or job["args"] != [7]

    dropped, buried, refused = first.then(last).enqueue_in(60, 1), first.enqueue_in(60, 2), first.then(last).enqueue(7)
    for future, to in ((dropped, None), (buried, "dead")):
        move(app, list(jobs(app, [future.result(5)])), to)
        with pytest.raises(JobFailed, match="an operator dropped it"):
            future.outcome(5)
    place.drain(app)
    with pytest.raises(JobFailed, match="hook refused"):
        refused.outcome(5)
    one = app.job(result_ttl=60, unique=until_executed(on_conflict="log"), name="one")(first.function)
    _, second = one.enqueue(1), one.enqueue(1)
    with pytest.raises(JobFailed, match=r"not enqueued: .* another has its lock \(on_conflict=log\)"):
        second.outcome(5)
    move(app, list(jobs(app, state="dead")), "ready")
    place.drain(app)
    assert buried.outcome(5) == 2


def test_the_outcome_of_a_chain_is_that_of_its_last_job(place, app):
    @app.job
    def add(n: int) -> int:
        return n + 1

    @app.job(result_ttl=60)
    def text(n: int) -> str:
        return str(n)

    future = add.then(add, text).enqueue(1)
    future.result(5)
    place.drain(app)
    assert future.outcome(5) == "3"


def test_a_result_that_is_too_large_is_dead_with_the_reason(place):
    app = place.app(value_limit=1000)
    app.job(name="large", result_ttl=60)(lambda: "x" * 1000).enqueue().result(5)
    place.drain(app)
    (failure,) = failures(app)
    assert failure.outcome == "dead" and "1002 bytes, and value_limit is 1000" in failure.reason


def test_outcomes_that_nobody_keeps_are_refused(app):
    @app.job
    def job(n: int): ...

    with pytest.raises(DeclarationError, match="result_ttl"):
        job.enqueue(1).outcome(0)
    with pytest.raises(DeclarationError, match="result_ttl"):
        job.outcome("0" * 24, 0)
    kept = app.job(name="kept", result_ttl=5)(lambda: None)
    with pytest.raises(NoOutcome):
        kept.outcome("0" * 24, 0.01)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_progress_is_seen_while_the_job_runs(place, app, kind):
    go_on = threading.Event()

    def load(n: int) -> None:
        progress(1, 4, "rows")
        progress(3, 4, "rows")  # too soon to be told of
        go_on.wait(20)

    async def load_async(n: int) -> None:
        progress(1, 4, "rows")
        await asyncio.to_thread(go_on.wait, 20)

    job = app.job(result_ttl=60, name="load")(load if kind == "sync" else load_async)
    plain = app.job(name="plain")(lambda: progress(1))
    with place.running(app) as worker:
        jid = job.enqueue(1).result(5)
        plain.enqueue().result(5)
        wait_for(lambda: how_far(app.jobs, jid), "its progress", worker)
        assert how_far(app.jobs, jid) == "1 of 4 (25%) rows"
        (work,) = (each for each in worker.report()["work"] if each[0] == "load")
        assert work[5] == ("3 of 4 (75%) rows" if kind == "sync" else "1 of 4 (25%) rows")
        go_on.set()
        wait_for(worker.drained, "drained", worker)
    progress(1, 2)  # outside of a job it says nothing


NOT_SHOWN = [(float("nan"),), (float("inf"), 2), (True,), ("1", 2), (1, "2"), (None,), (1, 2, 7), (1, 2, "\ud800")]


@pytest.mark.parametrize("said", NOT_SHOWN, ids=repr_of)
def test_progress_that_nobody_could_show_is_the_job_s_failure(place, app, said):
    jid = app.job(name="job", result_ttl=60, retry=0)(lambda: progress(*said)).enqueue().result(5)
    place.drain(app)
    assert how_far(app.jobs, jid) == "" and "give one or two numbers, and a text" in failures(app, "dead")[0].reason
