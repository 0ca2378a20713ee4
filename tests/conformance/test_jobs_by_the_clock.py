"""Schedules: each tick enqueues its job once, whoever is there, whatever was missed, on every backend."""

import random
import threading
import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from barnabas.clock import FakeClock
from barnabas.errors import DeclarationError
from barnabas.jobs.cron import LATE, LOOK, Cron

MINUTE = timedelta(minutes=1)
START = 1_767_225_600.0  # 2026-01-01, a whole minute


def processes(place, count, declare):
    """So many processes of an app, with one clock; on `memory:` there is one home for all of them."""
    clock, found = FakeClock(START), []
    clock.monotonic = time.monotonic  # for what a real worker waits for
    for _ in range(count):
        if not found or place.name != "memory":
            app = place.app()
            app.clock = clock
            declare(app)
        found.append(app)
    return clock, found


def ticks(app):
    """The ticks whose jobs are stored, in the order they came."""
    jobs = [msgspec.json.decode(job.payload) for job in app.jobs.find_jobs()]
    assert len({job["jid"] for job in jobs}) == len(jobs), "a tick was enqueued twice"
    return [datetime.fromisoformat(job["args"][0]).timestamp() for job in jobs]


@pytest.mark.parametrize("policy", ["once", "skip", "all"])
def test_no_tick_is_doubled_and_none_missed_beyond_the_policy(place, policy):
    def declare(app):
        @app.cron("* * * * *", on_missed=policy, overlap=True)
        def report(at: datetime): ...

    clock, apps = processes(place, 3, declare)
    crons = [Cron(app, app.crons.values()) for app in apps]
    crons[0].step()
    rand, expected, before = random.Random(7), [], START
    while before < START + 1000 * 60:
        clock.advance(rand.choice((3, 11, 25, 70, 200, 800)))
        which = rand.randrange(3)
        if rand.random() < 0.1:  # it was restarted
            crons[which] = Cron(apps[which], apps[which].crons.values())
        next_ = crons[which].step()
        now, last = clock.now(), clock.now() // 60 * 60
        assert next_ == last + 60
        missed = [before + 60 * n for n in range(1, int(last - before) // 60 + 1)]
        if policy == "all":
            expected += missed
        elif missed and (policy == "once" or now - last <= LATE):
            expected.append(last)
        before = last
    assert ticks(apps[0]) == expected and len(expected) > 40


def test_processes_that_race_for_a_tick_enqueue_it_once(place):
    def declare(app):
        app.cron(every=MINUTE, overlap=True)(app.job(lambda at: None, name="report"))

    clock, apps = processes(place, 4, declare)
    crons = [Cron(app, app.crons.values()) for app in apps]
    crons[0].step()
    for _ in range(15):
        clock.advance(60)
        threads = [threading.Thread(target=cron.step) for cron in crons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert ticks(apps[0]) == [START + 60 * n for n in range(1, 16)]


def test_a_schedule_begins_with_its_first_start_and_remembers_over_restarts(place):
    def declare(app):
        @app.cron("0 12 * * *", tz="Europe/Athens")
        def report(at: datetime): ...

    clock, (app,) = processes(place, 1, declare)
    assert Cron(app, app.crons.values()).step() == START + 10 * 3600
    clock.advance(20 * 3600)  # nobody ran at noon
    assert Cron(app, app.crons.values()).step() == START + 34 * 3600
    assert ticks(app) == [START + 10 * 3600]
    (job,) = app.jobs.find_jobs()
    assert msgspec.json.decode(job.payload)["args"] == ["2026-01-01T12:00:00+02:00"]


def test_a_changed_schedule_takes_effect_at_the_next_start_and_makes_up_for_nothing(place):
    hourly, minutely = place.app(), place.app()
    if place.name == "memory":
        minutely._jobs = hourly.jobs
    hourly.clock = minutely.clock = hourly.jobs.clock = clock = FakeClock(START)
    place.again(hourly)
    for app, every in ((hourly, 60 * MINUTE), (minutely, MINUTE)):
        app.cron(every=every, on_missed="all", overlap=True)(app.job(lambda at: None, name="report"))
    old = Cron(hourly, hourly.crons.values())
    old.step()
    clock.advance(59 * 60)
    new = Cron(minutely, minutely.crons.values())
    for _ in range(3):  # both run for a while, as in a rolling deploy
        new.step(), old.step()
        clock.advance(60)
    assert ticks(hourly) == [START + 3600, START + 3660]  # what both meant came once


def test_no_run_begins_while_the_last_one_has_not_ended(place, caplog):
    fail = True

    def declare(app):
        @app.cron(every=MINUTE)
        @app.job(retry=0, dead=False)
        def report(at: datetime):
            if fail:
                raise ValueError("no")

    clock, (app,) = processes(place, 1, declare)
    cron = Cron(app, app.crons.values())
    cron.step()

    def tick() -> int:
        clock.advance(60)
        cron.step()
        return len(ticks(app))

    assert [tick(), tick(), tick()] == [1, 1, 1] and "has not ended" in caplog.text
    place.drain(app)  # it fails, and that is an end
    fail = False
    assert [tick(), tick()] == [1, 1]
    place.drain(app)
    assert [tick(), tick()] == [1, 1]
    (job,) = app.jobs.find_jobs()
    app.jobs.move_jobs([job.ref], None)  # somebody dropped it
    clock.advance(LOOK)
    assert tick() == 1


def test_a_run_that_waits_for_its_retry_is_found_without_a_look_at_all_that_is_ready(place, monkeypatch):
    def declare(app):
        @app.cron(every=MINUTE)
        @app.job
        def report(at: datetime):
            raise ValueError("no")

    clock, (app,) = processes(place, 1, declare)
    cron, find_jobs, asked = Cron(app, app.crons.values()), app.jobs.find_jobs, []
    cron.step()
    clock.advance(60)
    cron.step()
    place.drain(app)

    def noting(state=None, queue=None):
        asked.append(state)
        return find_jobs(state, queue)

    (job,) = find_jobs("retry")
    monkeypatch.setattr(app.jobs, "find_jobs", noting)
    assert cron._busy(app.crons["report"], job.jid, clock.now())
    assert asked == ["work", "retry"]  # of a million that are ready each look took seconds, in which no schedule ticked


class Nobody:
    size = 10

    def assigned(self, parts): ...

    def revoked(self, parts): ...


def test_a_run_that_moves_while_it_is_looked_for_has_not_ended(place, monkeypatch):
    def declare(app):
        app.cron(every=MINUTE)(app.job(lambda at: None, name="report"))

    clock, (app,) = processes(place, 1, declare)
    cron = Cron(app, app.crons.values())
    cron.step()
    clock.advance(60)
    cron.step()
    source, find_jobs = app.jobs.queues(["default"], Nobody()), app.jobs.find_jobs

    def moving(state=None, queue=None):
        yield from find_jobs("work", queue)
        source.fetch(1, 0.0)  # a worker takes it just now
        for each in ("ready", "scheduled", "retry", "dead"):
            yield from find_jobs(each, queue)

    monkeypatch.setattr(app.jobs, "find_jobs", moving)
    clock.advance(60)
    cron.step()
    monkeypatch.undo()
    assert ticks(app) == [START + 60]
    source.close()


def test_all_that_was_missed_runs_one_after_the_other_without_overlap(place):
    seen = []

    def declare(app):
        @app.cron(every=MINUTE, on_missed="all")
        def report(at: datetime):
            seen.append(at)

    clock, (app,) = processes(place, 1, declare)
    Cron(app, app.crons.values()).step()
    clock.advance(180)
    cron = Cron(app, app.crons.values())
    for _ in range(3):
        cron.step(), cron.step()
        place.drain(app)
        clock.advance(1)
    assert seen == [datetime.fromtimestamp(START + 60 * n, UTC) for n in (1, 2, 3)]


def test_paused_ticks_pass_without_a_job(place):
    def declare(app):
        app.cron(every=MINUTE, on_missed="all", overlap=True)(app.job(lambda at: None, name="report"))

    clock, (app,) = processes(place, 1, declare)
    schedule = app.crons["report"]
    schedule.pause(True)  # before anybody ever ran it
    cron = Cron(app, app.crons.values())
    for paused, expected in ((True, 0), (False, 1), (True, 1), (False, 2)):
        schedule.pause(paused)
        assert schedule.state().paused is paused
        clock.advance(60)
        cron.step()
        assert len(ticks(app)) == expected


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_hook_that_refuses_or_fails_stops_no_other_schedule(place, caplog, error):
    def declare(app):
        for name in ("good", "bad", "refused"):
            app.cron(every=MINUTE)(app.job(lambda at: None, name=name))

        @app.before_enqueue
        def look(job):
            if job["class"] == "bad":
                raise error("the hook broke")
            return job["class"] != "refused"

    clock, (app,) = processes(place, 1, declare)
    cron = Cron(app, app.crons.values())
    cron.step()
    clock.advance(60)
    assert cron.step() == clock.now() + 1
    assert [msgspec.json.decode(job.payload)["class"] for job in app.jobs.find_jobs()] == ["good"]
    assert "cron 'bad': trying again every second: the hook broke" in caplog.text


@pytest.mark.parametrize(
    ("line", "options", "why"),
    [
        ("*/5 * * *", {}, "no cron line"),
        ("61 * * * *", {}, "no cron line"),
        ("0 0 30 2 *", {}, "cron 'report': line='0 0 30 2 [*]'"),
        (7, {}, "no cron line"),
        (None, {}, "a cron line or every="),
        ("* * * * *", {"every": MINUTE}, "a cron line or every="),
        ("* * * * *", {"tz": "Europe/Atlantis"}, "a time zone"),
        ("* * * * *", {"tz": "../etc/passwd"}, "a time zone"),
        ("* * * * *", {"tz": 3}, "a time zone"),
        ("* * * * *", {"on_missed": "never"}, "one of once, skip, all"),
        ("* * * * *", {"overlap": "yes"}, "give True"),
        (b"* * * * *", {}, "no cron line"),
        ("* * * * *", {"tz": ""}, "a time zone"),
        ("* * * * *", {"name": ""}, "printable"),
        ("* * * * *", {"name": "a\nb"}, "printable"),
        ("* * * * *", {"name": "\ud800"}, "printable"),
        ("* * * * *", {"name": "x" * 201}, "printable"),
        (None, {"every": timedelta(days=100_000_000)}, "up to 50 years"),
        (None, {"every": 60}, "a timedelta of whole seconds"),
        (None, {"every": timedelta(seconds=0.5)}, "a timedelta of whole seconds"),
        (None, {"every": timedelta(seconds=-5)}, "a timedelta of whole seconds"),
        (None, {"every": MINUTE, "tz": "UTC"}, "and no tz"),
    ],
)
def test_impossible_schedules_are_refused_where_they_stand(app_in_memory, line, options, why):
    with pytest.raises(DeclarationError, match=why):
        app_in_memory.cron(line, **options)(app_in_memory.job(lambda: None, name="report"))


@pytest.fixture
def app_in_memory():
    from barnabas import App

    app = App("shop", events="memory:", jobs="memory:")
    yield app
    app.close()


def test_a_schedule_needs_a_name_of_its_own_and_a_job_that_it_can_call(app_in_memory):
    app = app_in_memory
    job = app.cron("0 1 * * *")(app.cron("0 2 * * *", name="second")(app.job(lambda: None, name="report")))
    assert set(app.crons) == {"report", "second"} and job() is None
    with pytest.raises(DeclarationError, match="taken by another schedule"):
        app.cron("0 3 * * *")(job)
    with pytest.raises(DeclarationError, match="gets no argument, or one"):
        app.cron("0 3 * * *")(app.job(lambda at, more: None, name="greedy"))


# Europe/Athens: 2026-03-29 03:00 becomes 04:00, 2026-10-25 04:00 becomes 03:00.
@pytest.mark.parametrize(
    ("line", "day", "expected"),
    [
        ("30 3 * * *", "2026-03-28", ["28 03:30", "29 04:00", "30 03:30"]),  # the time that does not exist: as soon as it may
        ("30 3 * * *", "2026-10-24", ["24 03:30", "25 03:30", "26 03:30"]),  # the one that comes twice: the first time
        ("0 2,4 * * *", "2026-03-29", ["29 02:00", "29 04:00", "30 02:00"]),
        ("30 * * * *", "2026-03-29 01", ["29 01:30", "29 02:30", "29 04:30"]),
        ("30 * * * *", "2026-10-25 02", ["25 02:30", "25 03:30", "25 03:30", "25 04:30"]),  # every hour: also the doubled one
        ("*/30 * * * *", "2026-10-25 03", ["25 03:00", "25 03:30", "25 03:00", "25 03:30", "25 04:00"]),
    ],
)
def test_daylight_saving_time_changes(app_in_memory, line, day, expected):
    app_in_memory.cron(line, tz="Europe/Athens")(app_in_memory.job(lambda: None, name="report"))
    schedule = app_in_memory.crons["report"]
    at = datetime.fromisoformat(f"{day}:00" if " " in day else f"{day} 00:00").replace(tzinfo=schedule.zone).timestamp() - 1
    seen, stream = [], schedule.after(at)
    for _ in expected:
        following = next(schedule.after(at))
        assert following == next(stream) > at  # a process that starts at any tick goes on as one that ran all the time
        at = following
        seen.append(datetime.fromtimestamp(at, schedule.zone).strftime("%d %H:%M"))
    assert seen == expected
