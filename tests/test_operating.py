"""The operator's commands on groups and processes, with real worker processes on a SQLite file (or two)."""

import fcntl
import json
import os
import pty
import random
import re
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from time import monotonic, sleep, time
from typing import Any

import msgspec
import pytest
from test_cli import DEADLINE, Shell, shell  # noqa: F401  (the fixture)

from barnabas.cli.top import Look, frame
from barnabas.lag import GroupLag, PartitionLag, groups, state_of, unfinished
from barnabas.ports import Position, QueueState
from barnabas.processes import Pace, ProcessInfo, processes

APP = """
import os, time
from barnabas import App, Retry

app = App("shop", events="sqlite:///shop.db", jobs="sqlite:///shop.db", session_timeout=2, stop_timeout=5)
orders = app.topic("orders", key="of", partitions=2)
totals = app.table("totals", int)

def wait(name):
    while os.path.exists(name):
        time.sleep(0.01)

@app.consumer(orders, name=os.environ.get("NAME", "bill"), concurrency=4, retry=Retry(9, backoff=lambda n: 0.5))
def bill(order: dict) -> None:
    with open("billed", "a") as file:
        file.write(f"{order['n']}\\n")
    if order.get("do") == "wait":
        wait("gate")
    elif order.get("do") == "fail" and os.path.exists("gate"):
        raise ValueError("no")

@app.consumer(orders, name=os.environ.get("COUNT", "count"), tables=[totals])
def count(order: dict) -> None:
    totals[order["of"]] = totals.get(order["of"], 0) + 1

@app.consumer(orders, start="latest")
def late(order: dict) -> None: ...

@app.job(queue="mail")
def notify(n: int) -> None:
    wait("gate")
    with open("notified", "a") as file:
        file.write(f"{n}\\n")
"""


@pytest.fixture
def ops(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:  # noqa: F811
    """The command, and `ops.app`: the same app here, to look at without starting an interpreter each time."""
    (shell.folder / "shop.py").write_text(APP)
    monkeypatch.chdir(shell.folder)
    names: dict[str, Any] = {}
    exec(APP, names)
    shell.app = names["app"]  # type: ignore[attr-defined]
    yield shell
    names["app"].close()


def send(ops: Any, *orders: dict[str, Any]) -> None:
    for future in [ops.app.topics["orders"].send(order) for order in orders]:
        future.result(DEADLINE)


def until(what: Callable[[], Any]) -> Any:
    """Its value, as soon as that is true."""
    deadline = monotonic() + DEADLINE
    while not (found := what()):
        assert monotonic() < deadline, "it never came true"
        sleep(0.05)
    return found


def lag(ops: Any, name: str) -> Any:
    """What `barnabas lag NAME --json` prints."""
    [found] = [msgspec.to_builtins(each) for each in groups(ops.app) if name in (each.group, each.consumer)]
    for each in (found, *found["partitions"]):
        assert each["open"] >= 0
        assert each["seconds"] >= 0
    assert found["open"] == sum(each["open"] for each in found["partitions"])
    return found | {"partitions": [each for each in found["partitions"] if each["topic"] == "orders"]}


def lines(ops: Shell, name: str) -> list[int]:
    path = ops.folder / name
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


# lag.


def test_lag_of_groups_that_do_not_run(ops):
    send(ops, *({"n": n, "of": f"c{n}"} for n in range(8)))
    found = {group["consumer"]: group for group in ops.json("lag")}
    assert {name: (g["group"], g["open"], g["state"]) for name, g in found.items()} == {
        "bill": ("shop-bill", 8, "never ran"),
        "count": ("shop-count", 8, "never ran"),
        "late": ("shop-late", 0, "never ran"),
    }
    assert 0 < found["bill"]["seconds"] < DEADLINE
    assert found["late"]["seconds"] == 0
    ops("run", "--drain", "--only", "bill")
    assert (lag(ops, "bill")["open"], lag(ops, "bill")["state"]) == (0, "stopped")
    send(ops, {"n": 9, "of": "c1"})
    assert re.search(r"^shop-bill +bill +orders +1 +\d.\d s +0 +stopped$", ops("lag").stdout, re.MULTILINE)
    text = ops("lag", "shop-bill").stdout
    assert re.search(r"^shop-bill +orders +\d +\d +\d +1 +\d.\d s +stopped$", text, re.MULTILINE)
    assert "shop-count" not in text
    missing = ops("lag", "shop-bil", status=1).stderr
    assert "there is no consumer and no group 'shop-bil'; did you mean shop-bill" in missing
    assert "Next, try: barnabas lag" in ops("reset", "shop-bil", "--forget", status=1).stderr


def test_lag_counts_what_is_finished_out_of_order_as_finished(ops):
    (ops.folder / "gate").touch()
    send(ops, {"n": 0, "of": "a", "do": "wait"}, *({"n": n, "of": f"c{n}"} for n in range(1, 30)))
    ops.start("run", "--only", "bill")
    until(lambda: len(lines(ops, "billed")) == 30)
    found = until(lambda: (now := lag(ops, "bill"))["open"] == 1 and now)
    assert found["state"] == "ok"
    [name] = found["processes"]
    assert [each["owner"] for each in found["partitions"]] == [name, name]
    stuck = next(each for each in found["partitions"] if each["open"])
    assert (stuck["position"], stuck["seconds"] > 0) == (0, True)
    [sent] = [m for m in ops.json("read", "orders") if m["value"]["n"] == 0]
    assert sent["partition"] == stuck["partition"]
    assert abs(time() - sent["timestamp"] - stuck["seconds"]) < 5
    (ops.folder / "gate").unlink()
    until(lambda: lag(ops, "bill")["open"] == 0)


def test_lag_says_that_a_message_is_being_retried(ops):
    (ops.folder / "gate").touch()
    send(ops, {"n": 0, "of": "a", "do": "fail"})
    ops.start("run", "--only", "bill")
    found = until(lambda: (now := lag(ops, "bill"))["state"] == "retrying" and now)
    assert found["open"] == 1
    (ops.folder / "gate").unlink()
    until(lambda: lag(ops, "bill")["state"] == "ok")


def test_unfinished_counts_like_a_set():
    rand = random.Random(4)
    for _ in range(500):
        first, size = rand.randrange(20), rand.randrange(20)
        end = first + size
        cuts = sorted(rand.sample(range(40), 2 * rand.randrange(4)))
        done = list(zip(cuts[::2], cuts[1::2], strict=True))
        rand.shuffle(done)
        offset = rand.choice([None, rand.randrange(45)])
        for start in ("earliest", "latest"):
            begins = offset if offset is not None else first if start == "earliest" else end
            finished = {n for low, high in done for n in range(low, high)}
            left = [n for n in range(first, end) if n >= begins and n not in finished]
            count, following = unfinished(Position("g", "t", 0, first, end, offset, done, {}, {}, None), start)
            assert count == len(left)
            assert not left or following == left[0]


@pytest.mark.parametrize(
    ("owner", "attempts", "reads", "paused", "says", "state"),
    [
        ("p", {}, ["t"], (), "ok", "ok"),
        ("p", {7: 2}, ["t"], (), "ok", "retrying"),
        ("p", {8: 2}, ["t"], ("queue",), "ok", "ok"),
        ("p", {7: 2}, ["t"], (), "silent", "silent"),
        ("p", {}, None, ("key",), "ok", "keys paused"),
        ("p", {}, ["t"], ("key", "group"), "silent", "paused"),
        (None, {}, ["t"], (), "ok", "waiting"),
        (None, {}, ["u"], ("group",), "ok", "not read"),
        (None, {}, None, (), "ok", "waiting"),
    ],
)
def test_states(owner, attempts, reads, paused, says, state):
    at = Position("g", "t", 0, 0, 9, 7, [], attempts, {}, owner)
    assert state_of(at, 7, reads, paused, {"p": says}) == state


# reset.


def test_reset_is_refused_while_members_live(ops):
    send(ops, *({"n": n, "of": f"c{n}"} for n in range(6)))
    run = ops.start("run", "--only", "bill")
    until(lambda: len(lines(ops, "billed")) == 6)
    [name] = until(lambda: lag(ops, "bill")["processes"])
    error = ops("reset", "bill", "--to", "earliest", "--yes", status=1).stderr
    assert f"group 'shop-bill' is at work in {name}; its processes must be stopped first" in error
    assert f"Next, try: barnabas stop {name}" in error
    ops("reset", "bill", "--to", "earliest", "--dry-run")
    run.signal(signal.SIGTERM)
    assert run.end() == 0
    before = lag(ops, "bill")["partitions"]
    dry = ops("reset", "bill", "--to", "earliest", "--dry-run").stdout
    for part in before:
        pattern = rf"^shop-bill +orders +{part['partition']} +{part['end']} +0 +{part['end']}$"
        assert re.search(pattern, dry, re.MULTILINE)
    assert "nothing was changed (--dry-run)" in dry
    assert lag(ops, "bill")["partitions"] == before
    unsure = ops("reset", "bill", "--to", "earliest", status=1).stderr
    assert "nothing was changed: add --yes" in unsure
    assert "Next, try: barnabas reset bill --to earliest --yes" in unsure
    assert "group shop-bill is reset" in ops("reset", "bill", "--to", "earliest", "--yes").stdout
    assert lag(ops, "bill")["open"] == 6
    ops("run", "--drain", "--only", "bill")
    assert sorted(lines(ops, "billed")) == sorted([*range(6), *range(6)])


def test_reset_to_an_offset_a_time_or_the_end(ops):
    send(ops, *({"n": n, "of": f"c{n}"} for n in range(10)))
    between = datetime.now(UTC).isoformat()
    send(ops, *({"n": n, "of": f"c{n}"} for n in range(10, 13)))
    moves = ops.json("reset", "bill", "--to", between, "--yes")
    assert sum(move["open"] for move in moves) == lag(ops, "bill")["open"] == 3
    ends = {part["partition"]: part["end"] for part in lag(ops, "bill")["partitions"]}
    [move] = ops.json("reset", "shop-bill", "--to", "2", "--partition", "1", "--yes")
    assert (move["partition"], move["to"], move["open"]) == (1, 2, ends[1] - 2)
    error = ops("reset", "bill", "--to", "99", "--partition", "1", "--yes", status=1).stderr
    said = f"orders[1] has no offset 99: it holds 0 to {ends[1] - 1}; {ends[1]} is next"
    assert f"{said}\nNext, try: barnabas lag shop-bill" in error
    assert "needs --partition N" in ops("reset", "bill", "--to", "2", status=2).stderr
    assert "--to earliest|latest|OFFSET|TIME" in ops("reset", "bill", status=2).stderr
    nowhere = ops("reset", "bill", "--to", "latest", "--topic", "order", "--yes", status=1).stderr
    assert "group 'shop-bill' has no such partition; it has orders[0], orders[1]" in nowhere
    ops("reset", "bill", "--to", "latest", "--yes")
    ops("run", "--drain", "--only", "bill")
    assert lines(ops, "billed") == []


def test_reset_of_a_group_with_tables_empties_them(ops):
    send(ops, *({"n": n, "of": "a"} for n in range(5)))
    ops("run", "--drain", "--only", "count")
    error = ops("reset", "count", "--to", "earliest", "--yes", status=1).stderr
    assert "group 'shop-count' keeps totals, which hold what it has handled" in error
    assert "Next, try: barnabas reset count --to earliest --yes --clear-tables" in error
    assert ops.json("table", "totals") == [{"key": "a", "value": 5}]
    assert "To be emptied: totals" in ops("reset", "count", "--to", "earliest", "--yes", "--clear-tables").stdout
    assert ops.json("table", "totals") == []
    ops("run", "--drain", "--only", "count")
    assert ops.json("table", "totals") == [{"key": "a", "value": 5}]


def test_an_abandoned_group_is_named_and_can_be_forgotten(ops):
    send(ops, {"n": 1, "of": "a"})
    ops("run", "--drain", "--only", "bill")
    assert "no consumer declares it" not in ops("run", "--drain").stderr
    for count in ("1", "2"):
        said = ops("run", "--drain", "--processes", count, NAME="charge").stderr
        assert said.count("group shop-bill is stored, and no consumer declares it") == 1
    assert "reset shop-bill --forget" in said
    old = {group["group"]: group for group in ops.json("lag", NAME="charge")}["shop-bill"]
    assert (old["consumer"], old["state"]) == (None, "stopped")
    assert "group shop-bill is forgotten" in ops("reset", "shop-bill", "--forget", "--yes", NAME="charge").stdout
    assert "shop-bill" not in ops("run", "--drain", NAME="charge").stderr
    assert "shop-bill" not in ops("lag", NAME="charge").stdout


def test_a_consumer_that_was_renamed_does_not_count_again_what_its_table_holds(ops):
    send(ops, {"n": 1, "of": "a"})
    ops("run", "--drain")
    error = ops("run", "--drain", COUNT="total", status=1).stderr
    assert "the table 'totals' is not empty, and group 'shop-total' is new" in error
    again = re.search("Next, try: barnabas (.*)", error)[1].split()
    ops("run", "--drain", "--except", "total", COUNT="total")
    ops(*again, "--yes", COUNT="total")
    ops("run", "--drain", COUNT="total")
    assert ops("table", "totals", "a").stdout == "1\n"


def test_run_shows_no_password(ops):
    run = ops.start("run", "--only", "bill", BARNABAS_JOBS_URL="redis://me:geheim@127.0.0.1:1")
    run.until(r"jobs redis://me:\*\*\*@127.0.0.1:1")
    run.signal(signal.SIGTERM).end()
    assert "geheim" not in run.text


# Shell completion.


def complete(ops: Shell, words: str) -> list[str]:
    done = ops(_BARNABAS_COMPLETE="bash_complete", COMP_WORDS=f"barnabas {words}", COMP_CWORD=str(len(words.split())))
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_completion_offers_names(ops):
    ops("enqueue", "notify", "1")
    for words, names in {
        "lag b": ["bill"],
        "reset co": ["count"],
        "pause queue:": ["queue:mail"],
        "resume l": ["late"],
        "read ord": ["orders"],
        "send o": ["orders"],
        "enqueue n": ["notify"],
        "table t": ["totals"],
        "stop a": ["all"],
        "lag --app nowhere:app b": [],
    }.items():
        assert complete(ops, words) == names, words


# Processes: seen, quiet, stopped.

HOMES = pytest.mark.parametrize("jobs", ["sqlite:///shop.db", "sqlite:///jobs.db"], ids=["one-file", "two-files"])


def in_homes(ops: Shell, jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops.environment["BARNABAS_JOBS_URL"] = jobs
    monkeypatch.setenv("BARNABAS_JOBS_URL", jobs)  # ops.app has read nothing yet


def running(ops: Any) -> list[Any]:
    """The processes that have said what they run, as `barnabas processes --json` prints them."""
    return [msgspec.to_builtins(process) for process in processes(ops.app) if process.app]


@HOMES
def test_a_process_is_seen_and_stopped(ops, jobs, monkeypatch):
    in_homes(ops, jobs, monkeypatch)
    assert ops("processes").stderr == "no worker process runs: barnabas run\n"
    (ops.folder / "gate").touch()
    send(ops, {"n": 7, "of": "a", "do": "wait"})
    ops("enqueue", "notify", "1")
    run = ops.start("run")
    [process] = until(lambda: [p for p in running(ops) if len(p["work"]) == 2])
    assert (process["pid"], process["app"], process["asked"]) == (run.process.pid, "shop", None)
    assert sorted(process["groups"]) == ["shop-bill", "shop-count", "shop-late"]
    assert process["queues"] == {"mail": 0}
    assert process["rss"] > 1 << 20
    assert {(work["handler"], work["topic"]) for work in process["work"]} == {("bill", "orders"), ("notify", "mail")}
    assert [process["name"]] == [each["name"] for each in ops.json("processes")]
    assert re.search(rf"^{process['name']} +shop +ok ", ops("processes").stdout, re.MULTILINE)
    assert complete(ops, f"stop {process['pid']}") == [str(process["pid"])]
    missing = ops("stop", "nobody", status=1).stderr
    assert "no process is named 'nobody'; there are " + process["name"] in missing
    assert "Next, try: barnabas processes" in missing
    (ops.folder / "gate").unlink()
    [ended] = ops.json("stop", str(process["pid"]))
    assert (ended["process"], ended["ended"]) == (process["name"], True)
    assert run.end() == 0
    assert "Traceback" not in run.text
    assert (lines(ops, "billed"), lines(ops, "notified")) == ([7], [1])
    assert ops("stop", "all", status=1).stderr.startswith("Error: no process of app 'shop' runs")


def test_stop_all_stops_the_children_of_a_supervisor_for_good(ops):
    run = ops.start("run", "--processes", "2")
    until(lambda: len(running(ops)) == 2)
    assert len(re.findall(r"has ended \(\d+\.\d s\)", ops("stop", "all").stdout)) == 2
    assert run.end() == 0, run.text
    assert ops.json("processes") == []


def test_a_process_that_does_not_stop_is_named(ops):
    run = ops.start("run")
    [process] = until(lambda: running(ops))
    run.signal(signal.SIGSTOP)
    error = ops("stop", process["name"], status=1, BARNABAS_STOP_TIMEOUT="0").stderr
    assert f"{process['name']} has not ended yet" in error
    assert f"kill -KILL {run.process.pid}" in error
    [frozen] = ops.json("processes")
    assert frozen["asked"] == "stop"
    assert re.search(r" shop +silent ", ops("processes").stdout)
    assert run.signal(signal.SIGCONT).end() == 0


def test_a_quiet_process_finishes_and_leaves_the_rest_to_others(ops):
    (ops.folder / "gate").touch()
    send(ops, {"n": 1, "of": "a", "do": "wait"})
    first = ops.start("run", "--only", "bill")
    [process] = until(lambda: [p for p in running(ops) if p["work"]])
    assert ops("quiet", process["name"]).stdout == f"{process['name']} was asked to be quiet\n"
    until(lambda: running(ops)[0]["quiet"])
    assert re.search(r" shop +quiet ", ops("processes").stdout)
    send(ops, {"n": 2, "of": "a"}, {"n": 3, "of": "b"})
    (ops.folder / "gate").unlink()
    until(lambda: lag(ops, "bill")["processes"] == [])
    found = lag(ops, "bill")
    assert (found["open"], found["state"]) == (2, "stopped")
    ops("run", "--only", "bill", "--drain")
    assert sorted(lines(ops, "billed")) == [1, 2, 3]
    assert first.process.poll() is None
    ops("stop", "all")
    assert first.end() == 0


# Pauses.


@HOMES
def test_a_pause_holds_over_restarts_until_it_is_resumed(ops, jobs, monkeypatch):
    in_homes(ops, jobs, monkeypatch)
    assert ops("pause").stderr == "nothing is paused\n"
    assert ops("pause", "bill").stdout == "group shop-bill is paused\n"
    assert ops("pause", "shop-bill").stdout == "group shop-bill was paused already\n"
    ops("pause", "queue:mail")
    paused = [{"kind": "group", "name": "shop-bill", "key": None}, {"kind": "queue", "name": "mail", "key": None}]
    assert ops.json("pause") == paused
    send(ops, {"n": 1, "of": "a"})
    ops("enqueue", "notify", "1")
    for _ in range(2):
        run = ops.start("run")
        run.until("paused by an operator: queue:mail")
        until(lambda: lag(ops, "count")["open"] == 0)
        found = until(lambda: (now := lag(ops, "bill"))["state"] == "paused" and now)
        assert found["open"] == 1
        assert run.signal(signal.SIGTERM).end() == 0
    assert (lines(ops, "billed"), lines(ops, "notified")) == ([], [])
    ops.start("run")
    assert ops("resume", "queue:mail").stdout == "queue mail is resumed\n"
    until(lambda: lines(ops, "notified") == [1])
    assert lines(ops, "billed") == []
    ops("resume", "bill")
    until(lambda: lines(ops, "billed") == [1])
    assert ops("resume", "bill").stdout == "group shop-bill was not paused\n"
    until(lambda: lag(ops, "bill")["state"] == "ok")


def test_a_paused_key_holds_up_its_own_messages_only(ops):
    ops("pause", "bill", "--key", "a")
    assert ops("pause", "bill", "--key", "b").stdout == "key 'b' of group shop-bill is paused\n"
    assert [pause["key"] for pause in ops.json("pause")] == ["a", "b"]
    send(ops, {"n": 1, "of": "a"}, {"n": 2, "of": "b"}, {"n": 3, "of": "c"}, {"n": 4, "of": "a"})
    ops.start("run", "--only", "bill")
    until(lambda: lines(ops, "billed") == [3])
    until(lambda: (found := lag(ops, "bill"))["state"] == "keys paused" and found["open"] == 3)
    ops("resume", "bill", "--key", "b")
    until(lambda: lines(ops, "billed") == [3, 2])
    assert "still paused of it: the keys 'a'; barnabas resume bill --key K" in ops("resume", "bill").stderr
    ops("resume", "bill", "--key", "a")
    until(lambda: lines(ops, "billed") == [3, 2, 1, 4])
    assert ops.json("pause") == []


def test_pausing_what_is_not_there(ops):
    assert "no consumer and no group 'bil'; did you mean bill" in ops("pause", "bil", status=1).stderr
    assert "there is no queue 'mial'; did you mean mail" in ops("resume", "queue:mial", status=1).stderr
    assert "a queue has no keys" in ops("pause", "queue:mail", "--key", "a", status=2).stderr
    assert "say of which consumer or group" in ops("pause", "--key", "a", status=2).stderr


# top.


def test_top_as_frames(ops):
    send(ops, *({"n": n, "of": f"c{n}"} for n in range(20)))
    (ops.folder / "gate").touch()
    ops("enqueue", "notify", "1")
    ops.start("run")
    until(lambda: [p for p in running(ops) if p["work"] and p["done"] == 40])
    [frame] = ops.json("top", "--once")
    groups = {group["group"]: group for group in frame["groups"]}
    assert (groups["shop-bill"]["open"], groups["shop-bill"]["state"], groups["shop-bill"]["processes"]) == (0, "ok", 1)
    [queue] = frame["queues"]
    assert (queue["queue"], queue["ready"], queue["work"]) == ("mail", 0, 1)
    [process] = frame["processes"]
    assert (process["done"], process["work"], process["state"]) == (40, 1, "ok")
    [work] = frame["work"]
    assert (work["handler"], work["topic"], work["seconds"] >= 0) == ("notify", "mail", True)
    assert {each["handler"]: each["done"] for each in frame["handlers"]} == {"bill": 20, "count": 20, "late": 0, "jobs": 0}
    text = ops("top").stdout  # not on a terminal: one frame
    assert re.search(r"^shop-bill +0 +0 s +0/s +1 +ok$", text, re.MULTILINE)
    assert re.search(r"^notify +mail@\d+ +[\d.:]+( s)? ", text, re.MULTILINE)
    stream = ops.start("top", "--json")
    stream.until(r'"groups"', 2)
    assert stream.signal(signal.SIGINT).end() == 0
    first, second = (json.loads(line) for line in stream.text.splitlines()[:2])
    assert 0.5 < second["time"] - first["time"] < DEADLINE


def test_rates_are_differences():
    at = lambda n, owner: Position("g", "t", 0, 0, 100, n, [], {}, {}, owner)  # noqa: E731
    def look(time: float, done: int) -> Look:
        count, _ = unfinished(at(done, "p"))
        part = PartitionLag("g", "t", 0, 100, done, count, 1.0, "p", "ok")
        group = GroupLag("g", "c", ["t"], count, 1.0, ["p"], "ok", [part])
        info = ProcessInfo("p", 1, "h", "a", 0.0, 0.0, 9, done, False, None, ["g"], {"q": 3 * done}, [], {"c": Pace(done, 0.25)})
        return Look(time, [group], [QueueState("q", 5, 0, 0, 0, 0, time - 2)], [info])

    found = frame(look(14.0, 40), look(10.0, 20), 10.0)
    assert found["groups"][0]["rate"] == found["processes"][0]["rate"] == found["handlers"][0]["rate"] == 5.0
    assert (found["queues"][0]["rate"], found["queues"][0]["seconds"]) == (15.0, 2.0)
    assert found["handlers"][0]["pace"] == 0.25
    assert frame(look(14.0, 10), look(10.0, 20), 10.0)["groups"][0]["rate"] == 0  # it was reset meanwhile
    assert frame(look(10.0, 10), look(10.0, 10), 10.0)["groups"][0]["rate"] == 0


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_top_on_a_terminal(ops, key):
    send(ops, {"n": 1, "of": "a"})
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with subprocess.Popen(
        [*ops.command, "top"],
        cwd=ops.folder,
        env=ops.environment | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal of a controlling terminal
    ) as process:
        text = b""
        while text.count(b"never ran") < 6:  # twice three groups
            text += os.read(ours, 65536)
        os.write(ours, key)
        while b"\x1b[?1049l" not in text:  # the screen as it was
            text += os.read(ours, 65536)
        assert process.wait(DEADLINE) == 0
    assert b"\x1b[?1049h" in text
    assert b"q ends" in text
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
