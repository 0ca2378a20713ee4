"""Somebody holds the file: another program its lock, or a frozen process of ours the turn. It is waited for, and said who."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from shops import Shop, opened, until

shop = pytest.fixture(name="shop")(opened)
pytestmark = pytest.mark.slow


def holding(path: Path, *sql: str) -> "subprocess.Popen[str]":
    """Another program, with a transaction open on the file until its stdin is closed."""
    command = ["sqlite3", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("PRAGMA busy_timeout = 10000;\n" + "\n".join(sql) + "\nSELECT 'held';\n")
    process.stdin.flush()
    assert any(line == "held\n" for line in iter(process.stdout.readline, ""))
    return process


def ended(process: "subprocess.Popen[str]") -> None:
    process.communicate("ROLLBACK;\n", timeout=10)


def at_work(shop: Shop) -> tuple[list, list]:
    workers = [shop.worker(log=f"worker{n}") for n in range(2)]
    until(lambda: len(shop.app.events.processes()) == 2, "the workers to begin")
    senders = [shop.sender(n, 2, log=f"sender{n}") for n in range(2)]
    until(lambda: len(shop.said("end", "step")) > 50, "work to begin")
    return workers, senders


def test_another_program_holds_the_write_lock(shop: Shop) -> None:
    """It is waited for; once it takes too long it is said; and nobody loses its partitions or its senders' messages for it."""
    workers, senders = at_work(shop)
    other = holding(shop.path, "BEGIN EXCLUSIVE;")
    acked = len(shop.ids("acked"))
    logs = ("worker0", "worker1", "sender0", "sender1")
    until(lambda: any("another program holds it locked" in shop.log(name) for name in logs), "somebody to say so")
    assert len(shop.ids("acked")) - acked < 25  # what was stored before, and said a little later
    ended(other)
    acked = len(shop.ids("acked"))
    until(lambda: len(shop.ids("acked")) > acked + 100, "sends to be stored again")
    shop.end(*senders)
    shop.check()
    assert shop.ids("acked") == set(shop.stored())
    shop.end(*workers)
    for name in logs:
        log = shop.log(name)
        assert "to others" not in log and "did not run" not in log and "Traceback" not in log, log


def test_a_reader_that_does_not_end_holds_nobody_up(shop: Shop) -> None:
    """The log cannot begin anew behind a reader, so it grows; when the reader ends it grows no more."""
    workers, senders = at_work(shop)
    other = holding(shop.path, "BEGIN;", "SELECT count(*) FROM heads;")
    wal = Path(f"{shop.path}-wal")

    def grow(count: int) -> int:
        size = wal.stat().st_size
        shop.module.items.send_many(shop.module.Item(-1 - n, "pad", pad="x" * 1000) for n in range(count)).result(20)
        until(shop.drained, "all to be handled")
        return wal.stat().st_size - size

    shop.end(*senders)
    until(shop.drained, "all to be handled")
    grow(4000)
    assert grow(4000) > 4_000_000
    ended(other)
    grow(4000)
    assert sum(grow(4000) for _ in range(3)) < 4_000_000
    shop.end(*workers)
    assert shop.integrity() == "ok"


FREEZE = """
import os, signal, sys, shop
from barnabas.backends import host
home = shop.app.events
def act(db=None):
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[1] == "transaction":
    home.write(act)
else:
    with home.file.turn.take():
        act()
shop.items.send(shop.Item(10**6, "k0")).result(20)
print("went on", flush=True)
"""


@pytest.mark.parametrize(("where", "end"), [("turn", "KILL"), ("transaction", "CONT")])
def test_a_process_is_frozen_while_it_has_the_turn(shop: Shop, where: str, end: str) -> None:
    """Nobody can write: it may be in the middle of a transaction. Who waits says which process has the turn, and what to do."""
    workers, senders = at_work(shop)
    frozen = shop.start("-c", FREEZE, where, log="frozen")
    until(lambda: "frozen" in shop.log("frozen"), "the process to freeze")
    began = time.monotonic()
    acked = len(shop.ids("acked"))
    said = f"process {frozen.pid} has the turn and is stopped: kill -CONT {frozen.pid}"
    logs = ("worker0", "worker1", "sender0", "sender1")
    until(lambda: all(said in shop.log(name) for name in logs), "all to say who has the turn", 15)
    assert time.monotonic() - began > 1.5 and len(shop.ids("acked")) - acked < 5
    if end == "KILL":
        senders.append(shop.sender(100_001, 2, log="late"))  # opens the file only now
        until(lambda: said in shop.log("late"), "who comes now to say so, too", 15)
        senders[1].terminate()  # a stop is not held up forever
        assert senders.pop(1).wait(30) == 0 and "could not be stored before the end" in shop.log("sender1"), shop.log("sender1")
    frozen.send_signal(getattr(signal, f"SIG{end}"))
    acked = len(shop.ids("acked"))
    until(lambda: len(shop.ids("acked")) > acked + 100, "sends to be stored again")
    until(lambda: all("the turn to write came after" in shop.log(name) for name in logs[:3]), "all to say that it is over")
    assert frozen.wait(20) == (0 if end == "CONT" else -signal.SIGKILL), shop.log("frozen")
    shop.end(*senders)
    shop.check()
    assert shop.ids("acked") <= set(shop.stored()) and not shop.ids("acked") & shop.ids("failed")
    shop.end(*workers)
    for name in logs[:3]:
        log = shop.log(name)
        assert log.count(said) == 1 and "Traceback" not in log, log
    assert shop.integrity() == "ok"
