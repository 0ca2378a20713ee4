# ruff: noqa: F401, F811 (a fixture is imported, and asked for by its name)
"""Operators and real processes: pauses, quiet, stop, reports and the dead, as `barnabas run` has them."""

import os
import signal
import time
from pathlib import Path

import pytest
from test_cli import DEADLINE, Running, Shell, shell

from barnabas import App
from barnabas.errors import Refused
from barnabas.ports import Backend


@pytest.fixture
def home(shell):
    """The file of the processes, as an operator's command has it."""
    app = App("operator", events=f"sqlite:///{shell.folder}/shop.db")
    orders = app.topic("orders", partitions=3)
    shell.order = lambda id: orders.send({"id": id, "customer": "ada"}, key="ada").result(DEADLINE)
    yield app.events
    app.close()


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def begun(shell: Shell, home: Backend, count: int, *more: str) -> tuple[Running, list[str]]:
    """Processes that run and have reported; their names."""
    run = shell.start("run", "--processes", str(count), "--only", "bill", *more)
    until(lambda: len([process for process in home.processes() if process.info]) == count)
    return run, [process.name for process in home.processes()]


@pytest.mark.parametrize(("how", "count"), [("SIGTSTP", 1), ("SIGTSTP", 2), ("an operator", 2)])
def test_quiet_processes_live_and_leave_their_partitions(shell, home, how, count):
    run, names = begun(shell, home, count)
    shell.order(1)
    run.until("bill 1")
    if how == "SIGTSTP":
        run.signal(signal.SIGTSTP)
    else:
        for name in names:
            home.set_control(f"process:{name}", "quiet")
    run.until(f"{how}: this process is quiet", count)
    until(lambda: {position.owner for position in home.positions()} == {None})
    until(lambda: all(process.info["quiet"] for process in home.processes()))
    shell.order(2)
    other = shell("run", "--drain", "--only", "bill")
    assert "bill 2" in other.stderr and "bill 2" not in run.text
    assert [process.name for process in home.processes()] == names and run.process.poll() is None
    assert run.signal(signal.SIGTERM).end() == 0, run.text
    assert home.processes() == [] and home.control() == {}


def test_a_child_that_begins_when_all_are_quiet_is_quiet_too(shell, home):
    run, _ = begun(shell, home, 2)
    run.signal(signal.SIGTSTP).until("this process is quiet", 2)
    os.kill(home.processes()[0].pid, signal.SIGKILL)
    run.until("this process is quiet", 3)
    assert run.signal(signal.SIGTERM).end() == 0, run.text


def test_processes_that_an_operator_stops_end_one_by_one(shell, home):
    run, (first, second) = begun(shell, home, 2)
    home.set_control(f"process:{first}", "stop")
    run.until(r"stopped by an operator: finishing what is in work")
    run.until(r"process \d \(pid \d+\) was stopped by an operator; it is not started again")
    until(lambda: [process.name for process in home.processes()] == [second])
    shell.order(1)
    run.until("bill 1")
    home.set_control(f"process:{second}", "stop")
    assert run.end() == 0, run.text
    assert home.control() == {}


def test_a_single_process_that_an_operator_stops(shell, home):
    run, (name,) = begun(shell, home, 1)
    home.set_control(f"process:{name}", "stop")
    assert run.end() == 0, run.text
    assert "stopped by an operator: finishing what is in work" in run.text


def test_a_pause_holds_a_drain_and_the_next_process(shell, home):
    shell.order(1)
    home.set_control("pause group:shop-bill", "")
    run = shell.start("run", "--drain", "--only", "bill")
    run.until("paused by an operator: bill")
    run.until("--drain does not end while there is work for what is paused: bill")
    assert until(lambda: home.processes() and home.processes()[0].info)["paused"] == ["bill"]
    assert run.text.count("--drain does not end") == 1 and "bill 1" not in run.text
    home.set_control("pause group:shop-bill", None)
    assert run.end() == 0, run.text
    assert "resumed: bill" in run.text and "bill 1" in run.text


def test_a_process_reports_and_an_idle_one_writes_nothing(shell, home):
    run, _ = begun(shell, home, 1)
    shell.order(1)
    info = until(lambda: (info := home.processes()[0].info)["counts"] and info)
    assert info["counts"] == {"done": 1} and info["handlers"]["bill"]["done"] == 1 and info["groups"] == ["shop-bill"]
    bell = Path(f"{shell.folder}/shop.db-bell")  # touched by every commit

    def quiet_for_three_seconds():
        before = bell.stat().st_mtime_ns
        time.sleep(3.0)
        return bell.stat().st_mtime_ns == before

    until(quiet_for_three_seconds)
    assert run.signal(signal.SIGTERM).end() == 0, run.text


def test_the_dead_are_no_members_and_nothing_is_asked_of_them_any_more(shell, home):
    shell.order(1)
    run, (name,) = begun(shell, home, 1)
    run.until("bill 1")
    home.set_control('pause key:["shop-bill", "eve"]', "")
    home.set_control(f"process:{name}", "quiet")
    until(lambda: home.positions()[0].owner is None)
    positions = [position._replace(offset=0) for position in home.positions()]
    run.signal(signal.SIGKILL)
    run.end()
    assert home.processes() == []
    home.place(positions)
    assert home.control() == {'pause key:["shop-bill", "eve"]': ""}
    with pytest.raises(Refused, match="no worker process"):
        home.set_control(f"process:{name}", "stop")
    assert "bill 1" in shell("run", "--drain", "--only", "bill").stderr


def test_members_that_live_hold_a_placement(shell, home):
    run, (name,) = begun(shell, home, 1)
    with pytest.raises(Refused, match=f"group 'shop-bill' has members: {name}; stop them first"):
        home.place(home.positions())
    assert {position.owner for position in home.positions()} == {name}
    run.signal(signal.SIGKILL)
    run.end()
    assert {position.owner for position in home.positions()} == {None}  # nobody has tidied up after it
    assert "stopped" in shell("lag", "bill").stdout
    assert "shop-bill is reset" in shell("reset", "bill", "--to", "latest", "--yes").stdout
    home.place(home.positions())
