"""What only the SQLite backend has to prove."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from barnabas import App, Concurrent, Rate, while_executing
from barnabas.backends.host import Bell
from barnabas.clock import FakeClock
from barnabas.jobs.unique import Guard, Late, refused
from barnabas.ports import Result
from barnabas.verdict import Again
from barnabas.worker import Worker


class Nobody:
    """A listener that lets partitions come and go."""

    def assigned(self, parts: list) -> None: ...

    def revoked(self, parts: list) -> None: ...


def test_a_partition_whose_bytes_in_flight_are_at_their_bound_lets_its_fetch_wait(tmp_path: Path) -> None:
    app = App("heavy", events=f"sqlite:///{tmp_path}/heavy.db", jobs=f"sqlite:///{tmp_path}/heavy.db")
    topic = app.topic("blobs", codec="raw", partitions=1)
    topic.send_many(bytes(500_000) for _ in range(60)).result(30)
    source = app.events.log("g", [topic], start="earliest", ordered=True, listener=Nobody())
    try:
        taken = 0
        while found := source.fetch(2000, 0.0):
            taken += sum(len(rows) for _, rows in found)
        assert 8 < taken < 40  # bounded in bytes long before it is in messages
        began = time.monotonic()
        assert source.fetch(2000, 0.3) == []
        assert time.monotonic() - began >= 0.25  # it slept: there is more, but no room for it
    finally:
        source.close()
        app.close()


def test_stored_jobs_are_found_in_time_in_proportion_to_their_number(tmp_path: Path) -> None:
    app = App("shop", events="memory:", jobs=f"sqlite:///{tmp_path}/shop.db")
    mail, took, turns = app.foreign_job("mail"), [], []
    try:
        for _ in range(2):  # all of one rank
            mail.enqueue_many((n,) for n in range(2000)).result(30)
            reader = app.jobs.file.reader
            reader.set_progress_handler(lambda: turns.append(1) or False, 100)
            assert len(list(app.jobs.find_jobs())) == 2000 * (len(took) + 1)
            reader.set_progress_handler(None)
            took.append(len(turns))
            turns.clear()
        assert took[0] > 10 and took[1] < 2.5 * took[0]
    finally:
        app.close()


@pytest.mark.parametrize("way", ["inotify", "polling"])
def test_who_waits_is_woken_by_the_commit_of_another(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bell.watch, "__defaults__", (60.0, 0.005))  # nobody looks without being woken, within this test
    if way == "polling":
        monkeypatch.setattr(Bell, "_inotify", lambda bell: None)
    apps = [App("shop", events=f"sqlite:///{tmp_path}/shop.db") for _ in range(2)]
    (mine, yours) = (app.topic("numbers", int, partitions=1) for app in apps)
    yours.send(0).result(5)
    source = apps[0].events.log("g", [mine], start="latest", ordered=True, listener=Nobody())
    try:
        assert source.fetch(10, 0.0) == []
        for n in range(1, 4):
            timer = threading.Timer(0.1, yours.send, (n,))
            timer.start()
            ((_, rows),) = source.fetch(10, 10.0)
            assert [row[0] for row in rows] == [n]
    finally:
        source.close()
        for app in apps:
            app.close()


OPEN = """
import sys, time
from barnabas import App, while_executing
from barnabas.clock import FakeClock
from barnabas.backends.sqlite import open_backend
from barnabas.clock import Clock
settings = App("new").settings
folder, at = sys.argv[1], float(sys.argv[2])
for n in range(40):
    while time.time() < at + n * 0.02: pass
    open_backend(f"sqlite:///{folder}/{n}.db", settings, Clock()).close()
"""


def test_many_may_open_a_new_file_at_the_same_instant(tmp_path: Path) -> None:
    """SQLite answers BUSY, without waiting, to one of two that turn a new file to WAL at once."""
    command = [sys.executable, "-c", OPEN, str(tmp_path), str(time.time() + 1.0)]
    team = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[1] for process in team] == ["", "", ""]


def test_a_job_that_is_given_back_unbegun_keeps_its_crashes_and_its_place(tmp_path: Path) -> None:
    url, seen = f"sqlite:///{tmp_path}/shop.db", []
    app = App("shop", events=url, jobs=url)
    app.job(seen.append, name="mail").enqueue_many((n,) for n in range(3)).result(5)
    home: Any = app.jobs
    home.write(lambda db: db.execute("UPDATE jobs SET crashes = 2"))
    source = home.queues(["default"], Nobody())
    ((part, rows),) = source.fetch(2, 0)
    source.fetch(0, 0)  # as a quiet process does
    source.settle([Result(part, rows, [], {}, {row[0]: Again(time.time(), None) for row in rows})])
    jobs = list(home.find_jobs())
    assert [(job.state, job.crashes, job.ref[0]) for job in jobs] == [("ready", 2, n) for n in (1, 2, 3)]
    source.close()
    app.close()


def test_a_report_is_stored_when_it_changed_and_at_most_every_two_seconds(tmp_path: Path) -> None:
    app = App("new", events=f"sqlite:///{tmp_path}/new.db")
    app.clock = clock = FakeClock()
    home = app.events
    home.box(1)  # be a worker process
    told = []
    for seconds, rss in ((0, 1), (1, 2), (0.9, 3), (0.2, 3), (5, 3), (0, 4), (1.9, 5)):
        clock.advance(seconds)
        home.report({"rss": rss})
        told.append(home.processes()[0].info["rss"])
    assert told == [1, 1, 1, 3, 3, 4, 4]
    app.close()


STOP = """
import os, signal, sys, time
from barnabas import App, while_executing
app = App("stops", events=sys.argv[1], jobs=sys.argv[1])
if sys.argv[2] == "worker":
    app.events.box(1)
app.events.write(lambda db: os.kill(os.getpid(), signal.SIGSTOP))
"""


@pytest.mark.parametrize("kind", ["worker", "sender"])
def test_a_process_stopped_in_the_middle_of_a_transaction(kind: str, tmp_path: Path, caplog: Any) -> None:
    """A worker is ended after a session: nothing else gives back its locks, and nobody could write. Of others we only say."""
    url = f"sqlite:///{tmp_path}/stops.db"
    app = App("waits", events=url, jobs=url, session_timeout=2.0)
    app.events.box(1)  # as a worker does: it looks after its neighbours
    stopped = subprocess.Popen([sys.executable, "-c", STOP, url, kind])
    try:
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        began = time.monotonic()
        future = app.topic("t", int).send(1)
        if kind == "worker":
            future.result(20)
            assert 1.0 < time.monotonic() - began < 6.0
            assert stopped.wait(10) == -signal.SIGKILL
            assert "lets nobody write, silent for 2" in caplog.text
        else:
            with pytest.raises(TimeoutError):
                future.result(4)
            assert f"nobody could write for 2 s; process {stopped.pid} has the turn" in caplog.text
            stopped.send_signal(signal.SIGCONT)
            future.result(20)
            assert stopped.wait(10) == 0
    finally:
        stopped.kill()
        app.close()


def test_who_waits_in_front_of_a_dead_process_s_run_is_woken(tmp_path: Path) -> None:
    def enter() -> tuple[App, Any]:
        """A process, as the file sees it."""
        app = App("shop", events="memory:", jobs=f"sqlite:///{tmp_path}/shop.db")

        @app.job(unique=while_executing(by="kind"))
        def charge(n: int, kind: str) -> None: ...

        if not apps:
            charge.enqueue_many((n, "a") for n in range(2)).result(10)
        apps.append(app)
        return app, app.jobs.queues(["default"], Nobody(), Guard(app.job_handlers))

    apps: list[App] = []
    (dying, first), (app, second) = enter(), enter()
    try:
        ((part, (row,)),) = first.fetch(10, 0.0)
        first.settle([Result(part, [row], [], {}, {row[0]: Again(time.time() + 60, row[2])})])
        ((part, (row,)),) = first.fetch(10, 0.0)  # its end woke the other
        assert app.jobs.move_jobs([job.ref for job in app.jobs.find_jobs("retry")], "ready") == 1
        assert second.fetch(10, 0.0) == []  # it waits for the other
        assert [job.state for job in app.jobs.find_jobs()] == ["work", "scheduled"]
        dying.jobs.neighbours.abandon()  # the system, at its death
        app.jobs.neighbours.look_around()
        for at in range(2):
            ((part, (found,)),) = second.fetch(10, 5.0)
            assert (found[0] == row[0]) == bool(at)
            second.settle([Result(part, [found], [], {}, {})])
        assert app.jobs.query("SELECT * FROM slots") == app.jobs.query("SELECT * FROM jobs") == []
    finally:
        for each in apps:
            each.close()


def test_a_process_frozen_while_it_takes_the_slot_of_a_rate_has_begun_too_late(tmp_path: Path) -> None:
    app = App("shop", events="memory:", jobs=f"sqlite:///{tmp_path}/shop.db")
    app.clock = clock = FakeClock()

    @app.job(limit=Rate(1, per=1.0))
    def call() -> None: ...

    guard = Guard(app.job_handlers)
    try:
        call.enqueue().result(10)
        source = app.jobs.queues(["default"], Nobody(), lambda payload: clock.advance(0.5) or guard(payload))
        ((_, (row,)),) = source.fetch(10, 0.0)
        assert isinstance(refused(call.owner, row[3], clock.monotonic()), Late)
        source.close()
    finally:
        app.close()


def test_who_waits_for_what_others_gave_up_is_woken(tmp_path: Path) -> None:
    door = Concurrent(1, name="door")
    other, app = apps = [App("shop", events="memory:", jobs=f"sqlite:///{tmp_path}/shop.db") for _ in range(2)]
    charge, _ = (each.job(limit=door, name="charge")(lambda: None) for each in apps)
    first, second = (each.jobs.queues(["default"], Nobody(), Guard(each.job_handlers)) for each in apps)
    try:
        charge.enqueue_many([(), ()]).result(10)
        assert len(first.fetch(10, 0.0)[0][1]) == 1
        first.close()  # with a job in hand, at the end of its grace
        assert [job.state for job in app.jobs.find_jobs()] == ["ready", "ready"]
        ((part, rows),) = second.fetch(10, 5.0)
        assert len(rows) == 1 and other.jobs.hold("by hand", door.need([], "")) > 0
        second.settle([Result(part, rows, [], {}, {})])
        assert second.fetch(10, 0.0) == []  # the next slot is his who waits by hand
        other.jobs.neighbours.abandon()  # but he is dead
        app.jobs.neighbours.look_around()
        assert len(second.fetch(10, 5.0)[0][1]) == 1
        second.close()
    finally:
        app.close()
        other.close()

@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python lets nobody begin a thread in an exit function, and says so")
@pytest.mark.parametrize("before", [0, 1])
def test_a_send_of_an_exit_function_is_stored(tmp_path, before):
    """One that was registered before Barnabas opened the file runs after it was flushed and closed, or opens it first."""
    code = f"""
import atexit
from barnabas import App
topic = App("shop").topic("numbers", int)
atexit.register(lambda: topic.send(2))
topic.send_many([1] * {before}).result(5)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=30)
    stored = App("shop", events=f"sqlite:///{tmp_path}/barnabas.db").events.topics()
    assert sum(end - first for first, end, _ in stored[0].partitions) == before + 1


def test_what_is_stored_is_no_failure_because_nobody_could_be_told(tmp_path: Path, caplog: Any) -> None:
    """Else a settlement would be repeated, and what its handlers sent be there twice."""
    app = App("told", events=f"sqlite:///{tmp_path}/told.db", jobs="memory:")
    app.events._wake_own = lambda: {}["a thread changed it meanwhile"]
    assert app.events.write(lambda db: 7) == 7
    assert "told.db: what was stored could not be told of" in caplog.text
    app.close()


def test_a_callback_that_fails_repeats_nothing(tmp_path: Path, caplog: Any) -> None:
    url = f"sqlite:///{tmp_path}/calls.db"
    app = App("calls", events=url, jobs=url)
    one, two = app.topic("one", int), app.topic("two", int)

    @app.consumer(one)
    def read(n: int) -> None:
        two.send(n).add_done_callback(lambda future: 1 / 0)

    one.send(1).result(5)
    worker = Worker(app)
    worker.start()
    until = time.monotonic() + 10
    while not worker.drained() and time.monotonic() < until:
        time.sleep(0.02)
    worker.stop(5.0)
    assert sum(end - first for state in app.events.topics() if state.name == "two" for first, end, _ in state.partitions) == 1
    assert "a callback of a future failed" in caplog.text
    app.close()
