"""A process is stopped beyond every deadline, and goes on: others have its partitions by then, it keeps its jobs, and what it
still does of what it lost counts for nothing."""

import os
import signal
import subprocess
import time
from collections import defaultdict

import pytest
from shops import Shop, opened, until

from barnabas.backends.host import holder

shop = pytest.fixture(name="shop")(opened)
pytestmark = pytest.mark.slow
COUNT = 600


def name_of(shop: Shop, process: "subprocess.Popen[bytes]") -> str:
    """A process's name in the file, once it is there."""
    return until(lambda: next((p.name for p in shop.app.events.processes() if p.pid == process.pid), ""), "the process to begin")


def owners(shop: Shop) -> dict[str, set[str | None]]:
    """The processes that have the partitions of `items`, by group."""
    found = defaultdict(set)
    for position in shop.app.events.positions():
        if position.topic == "items":
            found[position.group].add(position.owner)
    return dict(found)


def has_a_door(shop: Shop, process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has the turn to write; or is next, which shows once who has the turn has given it back."""
    for _ in range(10):
        if holder(str(shop.path)) == process.pid:
            return True
        time.sleep(0.01)
    return False


def freeze(shop: Shop, process: "subprocess.Popen[bytes]") -> None:
    """Stop it in the middle of its work, where it holds up nobody: the other case is another test's."""
    for _ in range(200):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # all its threads
        said = [[{*lines(shop, process.pid, word, name)} for word in ("begin", "end")] for name in ("step", "many", "note")]
        if all(begun - ended for begun, ended in said) and not has_a_door(shop, process):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.003)
    pytest.fail("it always had the turn, or nothing in work")


def lines(shop: Shop, pid: int, word: str, name: str) -> list[int]:
    """The ids that this process began or ended."""
    return [int(words[-1]) for words in shop.said(word, name, str(pid))]


def two_at_work(shop: Shop) -> tuple["subprocess.Popen[bytes]", "subprocess.Popen[bytes]", str, str]:
    """Two workers that share both groups, with messages and jobs in hand."""
    frozen, other = shop.worker(log="frozen"), shop.worker(log="other")
    names = name_of(shop, frozen), name_of(shop, other)
    until(lambda: len(found := owners(shop)) == 2 and all(each == set(names) for each in found.values()), "both to have a share")
    shop.module.note.enqueue_many([(n, 1.0) for n in range(40)]).result(10)
    shop.module.items.send_many(shop.module.Item(n, f"k{n % 50}", 0.01) for n in range(COUNT)).result(10)
    for name, word in (("step", "end"), ("many", "end"), ("note", "begin")):
        until(lambda name=name, word=word: lines(shop, frozen.pid, word, name), "it to be in the middle of it")
    return frozen, other, *names


def test_a_worker_is_frozen_and_goes_on(shop: Shop) -> None:
    frozen, other, own, others = two_at_work(shop)
    freeze(shop, frozen)
    began = time.monotonic()
    at_stop = {name: (lines(shop, frozen.pid, "begin", name), lines(shop, frozen.pid, "end", name)) for name in ("step", "many")}
    until(lambda: all(each == {others} for each in owners(shop).values()), "the other to have all partitions", 12)
    assert time.monotonic() - began > 1.0  # not before its time: twice a second it is looked at
    until(lambda: shop.app.events.open_work({"shop-step": ["items"], "shop-many": ["items"]}, []) == 0, "the other to do it all")
    # Jobs are another matter: nobody takes them from a process that lives.
    kept = [row[0] for row in shop.app.jobs.query("SELECT payload FROM jobs WHERE owner IS NOT NULL")]
    assert kept and {p.name for p in shop.app.jobs.processes()} == {own, others}
    frozen.send_signal(signal.SIGCONT)
    until(lambda: "did not run for" in shop.log("frozen"), "it to notice")
    until(lambda: all(each == {own, others} for each in owners(shop).values()), "it to have a share again")
    for name, (first, last) in at_stop.items():
        new = lines(shop, frozen.pid, "begin", name)[len(first) :]
        assert len(new) <= 1, f"{name}: it ran something new of what it had lost"  # one may have been about to begin
        in_hand = {*first, *new} - set(last)
        assert in_hand and len(in_hand) <= (1 if name == "step" else 20)
        assert set(lines(shop, frozen.pid, "end", name)) <= {*last, *in_hand}
    shop.module.items.send_many(shop.module.Item(n, f"k{n % 50}") for n in range(COUNT, COUNT + 300)).result(10)
    for name in ("step", "many"):
        until(lambda name=name: max(lines(shop, frozen.pid, "end", name)) >= COUNT, "it to go on with what it gets")
    shop.check()
    done = [int(words[-1]) for words in shop.said("end", "note")]
    assert sorted(done) == list(range(40)), "a job was given away, or lost"
    shop.end(frozen, other)
    assert shop.integrity() == "ok"


def test_a_frozen_worker_is_killed(shop: Shop) -> None:
    """Its jobs are given away at once, but not before."""
    frozen, other, own, others = two_at_work(shop)
    freeze(shop, frozen)
    until(lambda: all(each == {others} for each in owners(shop).values()), "the other to have all partitions", 12)
    until(lambda: shop.app.jobs.query("SELECT count(*) FROM jobs WHERE state = 0")[0][0] == 0, "no job to be ready")
    kept = shop.app.jobs.query("SELECT count(*) FROM jobs WHERE owner = ?", (int(own.rpartition(":")[2]),))[0][0]
    assert kept
    frozen.kill()
    until(lambda: [p.name for p in shop.app.jobs.processes()] == [others], "it to be buried", 5)
    shop.check()
    done = [int(words[-1]) for words in shop.said("end", "note")]
    assert set(done) == set(range(40)) and len(done) <= 40 + kept
    shop.end(other)


def test_the_supervisor_is_frozen(shop: Shop) -> None:
    """Its children work on; who dies meanwhile is started again once it goes on."""
    supervisor = shop.worker("--processes", "2")
    pids = until(lambda: len(found := {p.pid for p in shop.app.events.processes()}) == 2 and found, "the children to begin")
    supervisor.send_signal(signal.SIGSTOP)
    sender = shop.sender(log="sender")
    until(lambda: len(shop.said("end", "step")) > 100, "the children to work on")
    victim = pids.pop()
    subprocess.run(["kill", "-KILL", str(victim)], check=True)
    until(lambda: {p.pid for p in shop.app.events.processes()} == pids, "the dead one to be buried by the other", 5)
    seen = len(shop.said("end", "step"))
    until(lambda: len(shop.said("end", "step")) > seen + 200, "the other to work on")
    assert len(shop.app.events.processes()) == 1
    supervisor.send_signal(signal.SIGCONT)
    until(lambda: len(shop.app.events.processes()) == 2, "another to be started in its place")
    shop.end(sender)
    shop.check()
    shop.end(supervisor)
    assert supervisor.returncode == 0 and "ended with SIGKILL" in shop.log(), shop.log()
