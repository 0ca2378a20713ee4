"""The operator's commands on dead letters and stored jobs, and replay: the real CLI and real workers on a SQLite file."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from test_cli import Shell

from barnabas import App, Retry
from barnabas.dead import deal, letters, newest
from barnabas.errors import DeclarationError
from barnabas.queues import jobs
from barnabas.replay import replay
from barnabas.worker import Worker

APP = """
import os, time
import msgspec
from barnabas import App, Delivery, Reject, Respond, Retry, respond_to

app = App("shop", events="sqlite:///shop.db", jobs="sqlite:///shop.db", checkpoint_interval=0.02, stop_timeout=5)
orders = app.topic("orders", key="of", partitions=2, limit=100_000)
receipts = app.topic("receipts", partitions=1)
audits = app.topic("audits", partitions=1)
totals = app.table("totals", int)
log = []

def note(name, *words):
    with open(name, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

@app.consumer(orders, retry=Retry(1, backoff=0.01), responds=[respond_to(receipts, required=False)])
def bill(order: dict, delivery: Delivery) -> dict | None:
    if order["do"] == "reject":
        raise Reject("unwanted")
    if order["do"] == "fail" and not os.path.exists("mended"):
        raise ValueError(f"no {order['n']}")
    own = [name for name, _ in delivery.headers]
    note("billed", delivery.topic, delivery.partition, delivery.offset, delivery.attempt, delivery.timestamp, order["n"], own)
    mail.enqueue(order["n"])
    mail.enqueue_in(3600, -order["n"])
    sent = audits.send(["now", order["n"]], now=True).result(5)
    log.append(sent.value)
    return {"n": order["n"]}

@app.consumer(orders, tables=[totals], retry=Retry(0))
def count(order: dict) -> None:
    totals[order["of"]] = totals.get(order["of"], 0) + 1
    if order["do"] == "count":
        raise KeyError("of")

@app.consumer(receipts, retry=Retry(0))
class Filer:
    async def set_up(self):
        self.at = "set up"
    async def process(self, receipts: list[msgspec.Raw]):
        print(self.at, len(receipts), len(log))
    async def tear_down(self):
        print("torn down")

@app.job(queue="mail", retry=0)
def mail(n: int):
    if n % 2 and not os.path.exists("mended"):
        raise RuntimeError(f"odd {n}")
    note("mailed", n)

@app.job(queue="slow", retry=3)
def slow(n: int):
    while n > 8 and not os.path.exists("mended"):
        time.sleep(0.01)
    raise ValueError(f"slow {n}")

@app.on_start
def begin():
    log.append("begun")

@app.before
def look(delivery):
    log.append(delivery)
"""
ORDERS = ["fail", "fail", "fail", "reject", "ok", "count"]  # from 1 on


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four messages of `bill` are dead, one of `count`, and the job of order 5 (which is odd), too."""
    shell = Shell(tmp_path_factory.mktemp("worked"))
    (shell.folder / "shop.py").write_text(APP)
    lines = [json.dumps({"n": n, "of": f"k{n}", "do": do}) for n, do in enumerate(ORDERS, 1)]
    shell("send", "orders", "-", input="\n".join(lines))
    shell("run", "--drain", "--only", "bill", "--only", "count", "--only", "mail")
    return shell.folder


@pytest.fixture
def shop(tmp_path: Path, worked: Path) -> Iterator[Shell]:
    """A copy of that."""
    made = Shell(tmp_path)
    shutil.copytree(worked, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    yield made
    for running in made.running:
        running.close()


def lines_of(shop: Shell, name: str) -> list[str]:
    path = shop.folder / name
    return path.read_text().splitlines() if path.exists() else []


def by_reason(shop: Shell, *arguments: str) -> dict[str, str]:
    """The addresses of dead letters, by the end of their reasons."""
    return {each["reason"].rpartition(": ")[2]: each["address"] for each in shop.json("dead", "list", *arguments)}


def test_dead_letters_of_topics_and_queues_are_listed_together(shop):
    found = shop.json("dead", "list")
    assert [each["time"] for each in found] == sorted((each["time"] for each in found), reverse=True)
    assert sorted((each["kind"], each["source"], each["name"], each["key"], each["runs"]) for each in found) == [
        ("job", "mail", "mail", None, 1),
        *(("message", "orders", "bill", f"k{n}", 2) for n in (1, 2, 3)),
        ("message", "orders", "bill", "k4", 1),
        ("message", "orders", "count", "k6", 1),
    ]
    text = shop("dead", "list", "--limit", "1").stdout
    assert sum(" 2026-" in line or " 20" in line for line in text.splitlines()) == 1
    assert "     3   failed 2 times, last with ValueError\n" in text and "     1   rejected\n" in text


@pytest.mark.parametrize(
    ("filters", "reasons"),
    [
        (["--topic", "orders"], {"no 1", "no 2", "no 3", "unwanted", "'of'"}),
        (["--topic", "orders.dead", "--key", "k4"], {"unwanted"}),
        (["--consumer", "count"], {"'of'"}),
        (["--group", "shop-bill", "--error", "ValueError"], {"no 1", "no 2", "no 3"}),
        (["--queue", "mail"], {"odd 5"}),
        (["--class", "slow"], set()),
        (["--error", "no 2"], {"no 2"}),
        (["--since", "2999-01-01"], set()),
        (["--since", "2001-01-01", "--error", "odd"], {"odd 5"}),
    ],
)  # fmt: skip
def test_filters(shop, filters, reasons):
    assert by_reason(shop, *filters).keys() == reasons


def test_what_cannot_be_meant_is_refused(shop):
    for arguments, says in (
        (["list", "--queue", "mail", "--topic", "orders"], "not both"),
        (["list", "--consumer", "bill", "--group", "g"], "not both"),
        (["retry"], "or --all"),
        (["drop", "orders.dead[0]@0", "--key", "k"], "not both"),
    ):
        assert says in shop("dead", *arguments, status=2).stderr
    assert "no topic 'order' is stored; did you mean orders" in shop("dead", "list", "--topic", "order", status=1).stderr
    assert "no consumer 'bil'; did you mean bill?" in shop("dead", "list", "--consumer", "bil", status=1).stderr


def test_show_and_export_tell_all_that_is_stored(shop):
    address = by_reason(shop)["no 1"]
    (letter,) = shop.json("dead", "show", address)
    at = f"{letter['topic']}[{letter['partition']}]@{letter['offset']}"
    headers = dict(letter["headers"])
    assert at == address and letter["value"] == {"n": 1, "of": "k1", "do": "fail"}
    assert headers["barnabas-exception"] == "ValueError" and "raise ValueError" in headers["barnabas-traceback"]
    assert "engine" not in headers["barnabas-traceback"]  # nothing of what called it, which is ours
    assert len(shop("dead", "export", "--consumer", "bill").stdout.splitlines()) == 4
    exported = [json.loads(line) for line in shop("dead", "export").stdout.splitlines()]
    assert [each for each in exported if "topic" in each] == sorted(
        shop.json("read", "orders.dead"), key=lambda each: (each["partition"], each["offset"])
    )
    (job,) = [each for each in exported if "jid" in each]
    assert job["payload"]["args"] == [5]
    assert shop.json("dead", "show", job["jid"]) == [job] == shop.json("jobs", "show", job["jid"])
    text = shop("dead", "show", address, job["jid"]).stdout
    parts = ("of         orders[", "group      shop-bill", "reason     failed", "    raise ValueError(", "args           [5]")
    for line in parts:
        assert line in text
    says = shop("dead", "show", "orders[0]@0", "orders.dead[0]@99", "none", status=1).stderr
    parts = ("orders[0]@0 is no dead letter: this", "@99 is no dead letter: nothing", "none is no dead letter: no dead")
    for line in parts:
        assert line in says


def test_who_finds_nothing_to_deal_with_is_told(shop):
    for words, said in (("dead drop --queue", "dropped: no dead letter"), ("jobs retry --all --json --queue", "retried: no job")):
        came = shop(*words.split(), "x", status=1)
        assert came.stderr == f"not {said} matches\n"
    assert "'mail' is a queue: say queue:mail\n" in shop("pause", "mail", status=1).stderr


def test_a_retried_letter_runs_again_and_is_done(shop):
    before = by_reason(shop)
    stored = {(m["partition"], m["offset"]): m["timestamp"] for m in shop.json("read", "orders")}
    assert "would be retried: 1" in shop("dead", "retry", before["no 1"], "--dry-run").stdout
    assert by_reason(shop) == before
    (shop.folder / "mended").touch()
    assert shop.json("dead", "retry", before["no 1"], before["odd 5"]) == [
        {"retried": 2, "gone": 0, "refused": {}, "dry_run": False}
    ]
    says = shop("dead", "retry", before["no 1"], before["odd 5"], status=1).stderr
    assert "it was dealt with already" in says and "no dead job has this id" in says
    shop("run", "--drain", "--only", "bill", "--only", "mail")
    (run,) = [line.split() for line in lines_of(shop, "billed") if line.endswith("1 []")]
    assert run[:1] + run[3:] == ["orders", "1", str(stored[int(run[1]), int(run[2])]), "1", "[]"]  # with its first address
    assert sorted(lines_of(shop, "mailed")) == ["1", "5", "6"]
    assert by_reason(shop).keys() == {"no 2", "no 3", "unwanted", "'of'"}
    assert shop.json("queues")[0] | {"latency": 0} == {
        "name": "mail", "ready": 0, "work": 0, "scheduled": 3, "retry": 0, "dead": 0, "latency": 0, "paused": False,
    }  # fmt: skip
    assert "retried: 2" in shop("dead", "retry", "--error", "ValueError").stdout
    shop("run", "--drain", "--only", "bill", "--only", "mail")
    assert by_reason(shop).keys() == {"unwanted", "'of'"}
    assert sorted(lines_of(shop, "mailed")) == ["1", "2", "3", "5", "6"]


def test_a_letter_that_fails_again_is_dead_again(shop):
    assert "retried: 1" in shop("dead", "retry", "--key", "k1").stdout
    shop("run", "--drain", "--only", "bill")
    (letter,) = shop.json("dead", "list", "--key", "k1")
    assert letter["runs"] == 2 and letter["source"] == "orders"
    assert [m["headers"][0][0] for m in shop.json("read", "orders.retry.shop-bill")] == ["barnabas-retry-topic"]


def test_dropped_letters_are_listed_no_more(shop):
    before = by_reason(shop)
    assert "would be dropped: 6" in shop("dead", "drop", "--all", "--dry-run").stdout
    assert "dropped: 2" in shop("dead", "drop", before["no 2"], before["odd 5"]).stdout
    assert by_reason(shop).keys() == before.keys() - {"no 2", "odd 5"}
    assert len(shop.json("read", "orders.dead")) == 5  # the log is as it was
    assert "dropped: 4" in shop("dead", "drop", "--all").stdout
    assert "shop-dead" not in shop("run", "--drain", "--only", "bill").stderr  # no group that was abandoned
    assert shop.json("dead", "list") == [] and "there are no dead letters" in shop("dead", "list").stderr
    assert shop.json("dead", "drop", "--all", status=1) == [{"dropped": 0, "gone": 0, "refused": {}, "dry_run": False}]


def test_what_cannot_be_retried_says_why(shop):
    says = shop("dead", "retry", "--consumer", "count", status=1)
    assert "retried: 0" in says.stdout and "consumer 'count' keeps tables" in says.stderr
    text = (shop.folder / "shop.py").read_text()
    (shop.folder / "shop.py").write_text(text.replace("def bill(", "def charge("))
    says = shop("dead", "retry", "--group", "shop-bill", status=1).stderr
    assert "orders.dead[" in says and "and 3 more: no consumer of app 'shop' has the group 'shop-bill'" in says
    assert len(by_reason(shop)) == 6


def test_a_letter_without_its_value_gets_it_from_its_source(shop):
    app = App("shop", events=f"sqlite:///{shop.folder}/shop.db")  # whose topic allows more than that of the workers
    big = {"n": 99, "of": "big", "do": "fail", "x": "y" * 200_000}
    message = app.topic("orders", partitions=2, limit=1_000_000).send(big, key="big").result(5)
    size = len(json.dumps(big, separators=(",", ":")))
    app.close()
    shop("run", "--drain", "--only", "bill", "--only", "count")
    (letter,) = shop.json("dead", "show", shop.json("dead", "list", "--key", "big")[0]["address"])
    assert letter["value"] is None and ["barnabas-value-left-out", str(size)] in letter["headers"]
    (shop.folder / "mended").touch()
    with apsw.Connection(str(shop.folder / "shop.db")) as db:
        (gid,) = db.execute("SELECT gid FROM heads WHERE topic = 'orders' AND partition = ?", (message.partition,)).fetchone()
        (first,) = db.execute("SELECT first FROM heads WHERE gid = ?", (gid,)).fetchone()
        db.execute("UPDATE heads SET first = next WHERE gid = ?", (gid,))
    says = shop("dead", "retry", "--key", "big", status=1).stderr
    where = f"orders[{message.partition}]@{message.offset}"
    assert f"its value of {size} bytes was too large to be kept, and {where} is stored no more" in says
    with apsw.Connection(str(shop.folder / "shop.db")) as db:
        db.execute("UPDATE heads SET first = ? WHERE gid = ?", (first, gid))
    assert "retried: 1" in shop("dead", "retry", "--key", "big").stdout
    shop("run", "--drain", "--only", "bill")
    assert [line.split()[5] for line in lines_of(shop, "billed")][-1] == "99"


def test_operators_at_the_same_time_lose_and_repeat_nothing(shop):
    lines = [json.dumps({"n": n, "of": f"m{n}", "do": "reject"}) for n in range(300)]
    shop("send", "orders", "-", input="\n".join(lines))
    shop("run", "--drain", "--only", "bill")
    addresses = [each["address"] for each in shop.json("dead", "list", "--error", "unwanted", "--limit", "1000")]
    assert len(addresses) == 301
    commands = [["retry", "--error", "unwanted"]] * 3 + [["drop", *addresses[n::2]] for n in (0, 1)]
    started = [
        subprocess.Popen(
            [*shop.command, "dead", *command, "--json"], cwd=shop.folder, env=shop.environment, stdout=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    told = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    retried, dropped = (sum(each.get(done, 0) for each in told) for done in ("retried", "dropped"))
    assert retried + dropped == 301  # each was dealt with by one of them
    sent = shop.json("read", "orders.retry.shop-bill")
    assert len(sent) == retried and len({dict(m["headers"])["barnabas-retry-offset"] + m["key"] for m in sent}) == retried
    assert "unwanted" not in by_reason(shop)


# Jobs.


def test_jobs_are_listed_by_state_and_filter(shop):
    shop("enqueue", "slow", "1")
    found = shop.json("jobs", "list")
    assert [(each["state"], each["payload"]["args"]) for each in found] == [
        ("ready", [1]), ("scheduled", [-5]), ("scheduled", [-6]), ("dead", [5]),
    ]  # fmt: skip
    for filters, args in (
        (["--queue", "mail"], [[-5], [-6], [5]]),
        (["--queue", "mail", "--state", "scheduled", "--limit", "1"], [[-5]]),
        (["--class", "slow"], [[1]]),
        (["--error", "RuntimeError"], [[5]]),
        (["--error", "odd 5", "--state", "ready"], []),
        (["--since", "2999-01-01"], []),
    ):
        assert [each["payload"]["args"] for each in shop.json("jobs", "list", *filters)] == args
    done = shop("jobs", "list", "--limit", "2")
    assert len(done.stdout.splitlines()) == 5 and "more than 2" in done.stderr
    assert "no job matches" in shop("jobs", "list", "--queue", "none").stderr
    says = shop("jobs", "show", found[0]["jid"], "nobody", status=1)
    assert "class        slow" in says.stdout and "no job nobody is stored" in says.stderr and "barnabas jobs list" in says.stderr


def test_a_dead_job_that_is_retried_ends_done(shop):
    (dead,) = shop.json("jobs", "list", "--state", "dead")
    (waits, _) = shop.json("jobs", "list", "--state", "scheduled")
    (shop.folder / "mended").touch()
    assert "would be retried: 1" in shop("jobs", "retry", "--all", "--dry-run").stdout  # no scheduled ones, unless asked for
    assert "retried: 2" in shop("jobs", "retry", dead["jid"], waits["jid"]).stdout
    (again,) = [each for each in shop.json("jobs", "list", "--state", "ready") if each["jid"] == dead["jid"]]
    assert again["payload"]["retry_count"] == dead["payload"]["retry_count"] - 1
    assert again["payload"]["enqueued_at"] > dead["payload"]["enqueued_at"]
    says = shop("jobs", "retry", dead["jid"], status=1)
    assert "retried: 0" in says.stdout and "1 ready already" in says.stderr
    shop("run", "--drain", "--only", "queue:mail")
    assert sorted(lines_of(shop, "mailed")) == ["-5", "5", "6"]
    assert "no job" in shop("jobs", "retry", dead["jid"], status=1).stderr


def test_jobs_are_moved_to_another_queue(shop):
    shop("enqueue", "slow", "1")
    assert "would be moved: 1" in shop("jobs", "move", "--to", "low", "--all", "--class", "slow", "--dry-run").stdout
    (told,) = shop.json("jobs", "move", "--to", "mail", "--all")
    assert told == {"moved": 1, "in_work": 0, "in_queue": 3, "gone": 0, "dry_run": False}
    says = shop("jobs", "move", "--to", "mail", "--all", "--class", "slow", status=1)
    assert "moved: 0" in says.stdout and "1 in that queue already" in says.stderr
    assert {each["queue"] for each in shop.json("jobs", "list")} == {"mail"}
    (job,) = shop.json("jobs", "list", "--class", "slow")
    assert (job["state"], job["payload"]["queue"]) == ("ready", "mail")
    assert "Missing option '--to'" in shop("jobs", "move", job["jid"], status=2).stderr
    assert "--to='a b': a queue's name has up to 200 letters" in shop("jobs", "move", job["jid"], "--to", "a b", status=1).stderr


def test_jobs_in_work_are_left_alone_and_others_dropped(shop):
    shop("enqueue", "slow", "9")
    running = shop.start("run", "--only", "slow")
    running.until("shop: sqlite")
    while not (found := shop.json("jobs", "list", "--state", "work")):
        pass
    (job,) = found
    assert job["owner"] and shop.json("queues")[1]["work"] == 1
    for command, what in (("retry", "retried"), ("drop", "dropped")):
        done = shop("jobs", command, job["jid"], status=1)
        assert f"{what}: 0" in done.stdout and "1 in work, which is left alone" in done.stderr
    assert "3" in shop("jobs", "drop", "--all", "--dry-run").stdout
    assert shop.json("jobs", "drop", "--all") == [{"dropped": 3, "in_work": 1, "ready": 0, "gone": 0, "dry_run": False}]
    assert [each["state"] for each in shop.json("jobs", "list")] == ["work"]
    (shop.folder / "mended").touch()
    while shop.json("jobs", "list")[0]["state"] != "retry":
        pass
    running.signal(15).end()
    assert "retried: 1" in shop("jobs", "retry", "--all", "--error", "slow 9").stdout
    for arguments in ([], [job["jid"], "--all"], ["--queue", "mail"], [job["jid"], "--queue", "mail"]):
        assert "--all with filters" in shop("jobs", "drop", *arguments, status=2).stderr


# Replay.


def contents(shop: Shell) -> list[Any]:
    """All that is stored, but for who is there."""
    with apsw.Connection(str(shop.folder / "shop.db")) as db:
        tables = ("names", "heads", "records", "positions", "members", "cells", "jobs")
        return [db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]


def test_a_replay_shows_all_and_keeps_nothing(shop):
    (ok,) = [m for m in shop.json("read", "orders") if m["value"]["n"] == 5]
    before = contents(shop)
    where = f"orders[{ok['partition']}]@{ok['offset']}"
    (came,) = shop.json("replay", where, "--consumer", "bill")
    assert (came["consumer"], came["address"], came["verdict"], came["traceback"]) == ("bill", where, "done", None)
    assert [(o["topic"], o["key"], o["value"], o["answer"], o["now"]) for o in came["outputs"]] == [
        ("receipts", None, {"n": 5}, True, False), ("audits", None, ["now", 5], False, True),
    ]  # fmt: skip
    assert [(job["class"], job["queue"], job["state"], job["payload"]["args"]) for job in came["jobs"]] == [
        ("mail", "mail", "ready", [5]), ("mail", "mail", "scheduled", [-5]),
    ]  # fmt: skip
    (came,) = shop.json("replay", "orders", str(ok["offset"]), "--partition", str(ok["partition"]), "--consumer", "count")
    assert came["writes"] == [{"table": "totals", "key": "k5", "before": 1, "after": 2}] and came["verdict"] == "done"
    text = shop("replay", where, "--consumer", "bill").stdout
    assert 'answer: receipts - {"n":5}\nsent at once: audits - ["now",5]\nenqueued: mail[5] to mail\n' in text
    text = shop("replay", where, "--consumer", "count").stdout
    assert text == f"written: totals[k5] 1 -> 2\ncount, {where}: done (nothing of it is kept)\n"
    text = shop("replay", "receipts", "0", "--partition", "0").stdout  # the only consumer, an async batch in a class; hooks run
    assert text == "set up 1 2\ntorn down\nFiler, receipts[0]@0: done (nothing of it is kept)\n"
    assert contents(shop) == before


def test_a_replay_of_what_fails_shows_where(shop):
    before, found = contents(shop), by_reason(shop)
    done = shop("replay", found["no 2"], status=1)
    assert done.stdout.startswith("Traceback") and 'line 22, in bill\n    raise ValueError(f"no' in done.stdout
    assert "bill, orders[" in done.stdout and ": again in 0.0 s: ValueError: no 2 (nothing of it is kept)" in done.stdout
    done = shop("replay", found["no 2"], "--pdb", status=1, input="p order['n'] * 1000\nq\n")
    assert "shop.py(22)bill()" in done.stdout and "(Pdb) 2000" in done.stdout
    (came,) = shop.json("replay", found["'of'"], status=1)
    assert (came["consumer"], came["verdict"], came["writes"], came["outputs"]) == ("count", "dead", [], [])
    shop("dead", "drop", found["unwanted"])
    assert "rejected: unwanted" in shop("replay", found["unwanted"], status=1).stdout
    shop("dead", "retry", found["no 1"])
    (sent,) = shop.json("read", "orders.retry.shop-bill")
    (shop.folder / "mended").touch()
    assert ": done" in shop("replay", f"orders.retry.shop-bill[{sent['partition']}]@0").stdout
    assert [len(rows) for rows in contents(shop)[4:]] == [len(rows) for rows in before[4:]]


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["orders", "0"], "say which message", 2),
        (["orders[0]@0"], "is read by bill, count; say which: --consumer NAME", 1),
        (["orders[0]@99"], "nothing is stored at orders[0]@99 (any more)\nNext, try: barnabas read orders", 1),
        (["orders[0]@0", "--consumer", "bil"], "no consumer 'bil'; did you mean bill?", 1),
        (["orders[0]@0", "--consumer", "Filer"], "these do: bill, count", 1),
    ],
)
def test_a_replay_that_cannot_be_says_why(shop, arguments, says, status):
    assert says in shop("replay", *arguments, status=status).stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dead list --consumer ", {"bill", "count", "Filer"}),
        ("dead list --topic or", {"orders"}),
        ("jobs list --queue ", {"mail", "slow"}),
        ("jobs drop --class s", {"slow"}),
        ("replay re", {"receipts"}),
        ("dead ", {"list", "show", "retry", "drop", "export"}),
    ],
)
def test_completion(shop, words, offered):
    environment = {"_BARNABAS_COMPLETE": "bash_complete", "COMP_WORDS": f"barnabas {words}"}
    environment["COMP_CWORD"] = str(words.count(" ") + 1)
    code = "import sys; from barnabas.cli import commands; sys.exit(commands(prog_name='barnabas'))"
    shop.command[1:] = ["-c", code]
    assert {line.partition(",")[2] for line in shop(**environment).stdout.splitlines()} == offered


# The functions, in memory.


def drain(app):
    worker, pause = Worker(app), threading.Event()
    worker.start()
    while not worker.drained():
        assert worker.failed() is None
        pause.wait(0.005)
    assert worker.stop(5.0) == []


def test_in_memory_as_well():
    app, seen, broken = App("shop", events="memory:", jobs="memory:", checkpoint_interval=0.02), [], [True]
    steps = app.topic("steps", int, partitions=2)

    @app.consumer(steps, retry=Retry(0))
    def step(n: int):
        if broken:
            raise ValueError(f"broken {n}")
        seen.append(n)

    @app.job(retry=0)
    def mail(n: int):
        step(n)

    steps.send_many(range(10)).result(5)
    mail.enqueue_many([(n,) for n in range(10, 15)]).result(5)
    drain(app)
    first, causes = newest(letters(app), 7)
    assert len(first) == 7 and causes == {"failed 1 times, last with ValueError": 10, "ValueError": 5}
    assert sorted(e.error for e in jobs(app, state="dead")) == [f"ValueError: broken {n}" for n in range(10, 15)]
    assert deal(app, letters(app, error="broken 7"), retry=False).done == 1
    broken.clear()
    threads = [threading.Thread(target=lambda: deal(app, letters(app), retry=True)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(letters(app)) == []
    drain(app)
    assert sorted(seen) == [n for n in range(15) if n != 7]
    app.close()


@pytest.mark.parametrize("marks", [
    *({"at": at} for at in (b"x", b"\xff", b"nan", b"inf", b"9e99")), {}, {"topic": b"\xff"}, {"attempts": b"-"},
    {"topic": b"steps", "partition": b"", "offset": b"z", "attempts": b"1"},
], ids=str)  # fmt: skip
def test_rubbish_in_a_retry_topic_is_dead_or_handled(marks):
    app, seen = App("shop", events="memory:", jobs="memory:", checkpoint_interval=0.02), []
    steps = app.topic("steps", int, partitions=1)
    app.consumer(steps, name="step", retry=Retry(0))(seen.append)
    app.events.declare(app.all_topics())
    headers = [(f"barnabas-retry-{name}", data) for name, data in marks.items()]
    for topic in (steps, steps.retry_topic("shop-step")):
        app.events.send([(topic, None, None, value, headers, time.time(), None) for value in (b"rubbish", b"5")])
    app.events.send([(steps.dead_topic, None, None, b"5", [("barnabas-group", b"shop-step")], time.time(), None)])
    drain(app)
    assert seen == [5, 5]
    dead = list(letters(app))
    assert [letter.reason[:11] for letter in dead] == ["undecodable"] * 2
    assert replay(app, "steps", 0, 1).verdict == replay(app, "steps", 0, 1, "step").verdict == "done"
    for topic, offset in (("steps.dead", 0), ("steps.retry.shop-step", 1)):
        with pytest.raises(DeclarationError, match=f"reads topic '{re.escape(topic)}'"):
            replay(app, topic, 0, offset)
    app.close()


def test_batches_are_listed_watched_shown_and_cancelled(tmp_path):
    shop, app = Shell(tmp_path), App("shop", events=f"sqlite:///{tmp_path}/shop.db", jobs=f"sqlite:///{tmp_path}/shop.db")
    (tmp_path / "shop.py").write_text(APP)
    mail = app.job(name="mail", queue="mail")(lambda n: None)
    with app.batch(description="letters") as letters:
        letters.enqueue_many(mail, [(n,) for n in (2, 4)])
    with app.batch() as later:
        later.enqueue_many(mail, [(n,) for n in range(3)])
    assert "there is no batch" in shop("batches", "show", "b-0", status=1).stderr
    listed = {each["id"]: each for each in shop.json("batches", "list")}
    assert listed.keys() == {letters.id, later.id} and listed[letters.id]["description"] == "letters"
    assert "there are more than 1" in shop("batches", "list", "--limit", "1").stderr
    assert shop.json("batches", "cancel", later.id) == [{"id": later.id, "cancelled": True}]
    watched = shop.start("batches", "watch", letters.id)
    shop("run", "--drain", "--only", "mail")
    watched.until("2 of 2, 0 dead: success\n")
    assert watched.process.wait(20) == 0
    watched.close()
    (shown,) = shop.json("batches", "show", later.id)
    assert (shown["state"], shown["open"], shown["dead"]) == ("cancelled", 0, 3)
    assert "state      cancelled" in shop("batches", "show", later.id).stdout
    stderr = shop("batches", "cancel", letters.id, status=1).stderr
    assert "has ended" in stderr and "try: barnabas batches list" in stderr
    assert shop("batches", "watch", later.id, status=1).stdout == "3 of 3, 3 dead: cancelled\n"
    app.close()


LIMITED = """
from barnabas import App, Concurrent, Rate

app = App("shop", events="sqlite:///shop.db", jobs="sqlite:///shop.db")

@app.job(limit=[Rate(2, per=3600, by="customer"), Concurrent(5, name="stripe")])
def charge(customer: str) -> None: pass
"""


def test_limits_are_shown_with_who_has_slots_and_who_waits(tmp_path):
    shop, app = Shell(tmp_path), App("shop", events=f"sqlite:///{tmp_path}/shop.db", jobs=f"sqlite:///{tmp_path}/shop.db")
    (tmp_path / "shop.py").write_text(LIMITED)
    assert "by hand" in shop("limits", "--help").stdout
    idle = {"limit": "stripe", "key": "", "rule": "5 at once", "taken": 0, "waiting": 0, "next": None}
    assert shop.json("limits") == [idle]
    app.foreign_job("charge").enqueue_many([("ann",)] * 3 + [("ben",)] * 4 + [("cid",)]).result(5)
    shop("run", "--drain")
    ben, ann, stripe = shop.json("limits")
    assert (ben["key"], ben["rule"], ben["taken"], ben["waiting"]) == ("ben", "2 in 3600 s", 2, 2) and stripe == idle
    assert (ann["key"], ann["taken"], ann["waiting"]) == ("ann", 2, 1) and 3000 < ann["next"] - time.time() < 3700
    few = shop("limits", "--limit", "1")
    assert "ben" in few.stdout and "ann" not in few.stdout and "the busiest of 3" in few.stderr
    app.close()
