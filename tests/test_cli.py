"""The real command, run as a user runs it: in an empty folder with one small app on one SQLite file."""

import contextlib
import importlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import click
import pytest

import barnabas
from barnabas.cli import COMMANDS, commands

SOURCE = Path(__file__).parents[1] / "src"
DEADLINE = 30.0  # seconds that anything may take
APP = """
import logging, os, signal, time
import msgspec
from barnabas import App, Reject, Respond, Retry, respond_to

app = App("shop", events="sqlite:///shop.db", jobs="sqlite:///shop.db", stop_timeout=2)
log = logging.getLogger("shop")
noapp = 7

class Order(msgspec.Struct):
    id: int
    customer: str
    total: float = 0.0
    do: str = ""

class Receipt(msgspec.Struct):
    id: int

orders = app.topic("orders", Order, key="customer", partitions=3)
receipts = app.topic("receipts", Receipt, partitions=1)
alerts = app.topic("alerts", partitions=1)
raw = app.topic("raw", codec="raw", partitions=1)
totals = app.table("totals", float)

def wait(deep: int) -> None:
    wait(deep - 1) if deep else time.sleep(60)

@app.consumer(orders, responds=[receipts, respond_to(alerts, required=False, multiple=True)], retry=Retry(0),
              timeout=float(os.environ.get("LIMIT", 100)), on_dead=os.environ.get("ON_DEAD", "topic"))
def bill(order: Order, respond: Respond) -> None:
    first = order.do == "once" and not os.path.exists("once")
    if first:  # marked before it is logged: the test kills as soon as it reads that line
        open("once", "w").close()
    log.info("bill %d", order.id, extra={"customer": order.customer})
    if order.do == "hang" or first:
        wait(5)
    elif order.do == "die" and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    elif order.do == "fail":
        raise ValueError("no")
    respond(receipts, Receipt(order.id))

@app.consumer(orders, tables=[totals])
def count(order: Order) -> None:
    totals[order.customer] = totals.get(order.customer, 0.0) + order.total

@app.consumer(receipts, concurrency=4)
async def mail(receipt: Receipt) -> None:
    notify.enqueue(receipt.id)

@app.job(queue="mail", retry=3)
def notify(order_id: int, how: str = "mail") -> None:
    log.info("notify %d", order_id)
    if order_id < 0:
        raise ValueError("negative")
    raw.send(b"%d" % order_id)

@app.before_enqueue
def refuse(job):
    return job["args"][0] != 13

@app.on_start
def begin() -> None:
    if "BAD_START" in os.environ:
        raise RuntimeError("no pool")
"""


Done = subprocess.CompletedProcess[str]


class Running:
    """A command that runs on; its stdout and stderr together, line by line."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.text = ""
        self._over = False
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.text += line
                self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()

    def until(self, pattern: str, count: int = 1) -> "re.Match[str]":
        """Wait until it has printed `count` matches; the last of them."""
        deadline = monotonic() + DEADLINE
        with self._more:
            while len(found := list(re.finditer(pattern, self.text))) < count:
                left = deadline - monotonic()
                if left <= 0 or self._over:
                    raise AssertionError(f"no {pattern!r} in:\n{self.text}")
                self._more.wait(left)
            return found[count - 1]

    def signal(self, *numbers: int) -> "Running":
        for number in numbers:
            self.process.send_signal(number)
        return self

    def end(self) -> int:
        """Wait for its end; its status."""
        code = self.process.wait(DEADLINE)
        self._thread.join(DEADLINE)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._thread.join(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Shell:
    """`barnabas ...` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "barnabas"]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BARNABAS_")}
        self.environment = clean | {"PYTHONPATH": str(SOURCE), "BARNABAS_APP": "shop:app", "PYTHONUNBUFFERED": "1"}
        self.running: list[Running] = []
        (folder / "shop.py").write_text(APP)

    def __call__(self, *arguments: str, status: int = 0, input: str = "", **environment: str) -> Done:
        """Run it to its end; a status other than `status` fails the test."""
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            input=input,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert arguments[:1] == ("run",) or "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *arguments: str, **more: Any) -> list[Any]:
        """Its output, a JSON value a line."""
        return [json.loads(line) for line in self(*arguments, "--json", **more).stdout.splitlines()]

    def start(self, *arguments: str, **environment: str) -> Running:
        """Start it and let it run."""
        process = subprocess.Popen(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(Running(process))
        return self.running[-1]

    def order(self, id: int, customer: str = "ada", **fields: Any) -> None:
        self("send", "orders", json.dumps({"id": id, "customer": customer, **fields}))


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for running in made.running:
        running.close()


# Help, and finding the app.


def test_help_names_every_command_and_every_status(shell):
    text = shell("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)
    assert "Exit status: 0 it worked, 1 it failed" in text
    assert "Shell completion" in text


def test_help_of_a_command_begins_with_its_line():
    shared = {"--app", "--events", "--jobs"}
    for name, (module, line) in COMMANDS.items():
        command = getattr(importlib.import_module(f"barnabas.cli.{module}"), name)
        assert command.name == name
        # The first sentence may say more than the line has room for, but it says the same.
        assert command.help.split()[0] == line.split()[0]
        group = getattr(command, "commands", {})
        with click.Context(command) as context:
            shown = " ".join(command.get_help(context).split())
        for each in group.values():  # each with its first sentence, whole
            assert f"{each.name} {' '.join(each.help.split()).partition('. ')[0].rstrip('.')}." in shown
        for each in group.values() or [command]:
            assert shared <= {option for parameter in each.params for option in parameter.opts}


def test_version(shell):
    assert shell("--version").stdout == f"barnabas, version {barnabas.__version__}\n"


def test_completion_offers_commands(shell):
    done = shell(_BARNABAS_COMPLETE="bash_complete", COMP_WORDS="barnabas topi", COMP_CWORD="1")
    assert done.stdout == "plain,topics\n"


def test_a_mistyped_command_names_the_one_that_was_meant(shell):
    assert "no command 'tpoics'; did you mean topics?" in shell("tpoics", status=2).stderr


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shp:app", "no module 'shp' in .*; did you mean shop:app\\?"),
        ("elsewhere:app", "no module 'elsewhere' in .*; go to the folder that has it, or check PYTHONPATH"),
        ("shop:ap", "shop:ap: shop was imported from .*/shop.py, but it has no 'ap'; did you mean shop:app\\?"),
        ("shop:noapp", "noapp is int, not an App; did you mean shop:app\\?"),
        ("shop", "'shop' is not MODULE:NAME; did you mean shop:app\\?"),
        ("shop.py:", "'shop.py:' is not MODULE:NAME; did you mean shop:app\\?"),
    ],
)
def test_an_app_that_is_not_there(shell, spec, says):
    assert re.search(says, shell("flow", "--app", spec, status=2).stderr)


def test_no_app_at_all(shell):
    del shell.environment["BARNABAS_APP"]
    assert 'give --app MODULE:NAME (such as --app shop:app), put app = "MODULE:NAME"' in shell("flow", status=2).stderr
    (shell.folder / "barnabas.toml").write_text('app = "shop:app"\n')
    assert "orders =>" in shell("flow").stdout


def test_an_app_whose_code_fails_shows_the_line_of_its_author(shell):
    (shell.folder / "bad.py").write_text("import json\njson.loads('{')\n")
    error = shell.json("check", "--app", "bad:app", status=1)[0]["problems"][0]
    assert 'bad.py", line 2' in error
    assert "JSONDecodeError" in error
    assert "loading.py" not in error
    assert "bad cannot be imported" in shell("flow", "--app", "bad:app", status=1).stderr
    (shell.folder / "bad.py").write_text("import sys\nsys.exit(0)\n")
    assert 'bad.py:2): put that under if __name__' in shell("flow", "--app", "bad:app", status=1).stderr
    assert "did you mean shop:app?" in shell("flow", "--app", "./shop:app", status=2).stderr


def test_a_declaration_that_cannot_work_says_where(shell):
    (shell.folder / "bad.py").write_text("from barnabas import App\napp = App('x')\napp.topic('t', partitions=0)\n")
    error = shell("topics", "--app", "bad:app", status=1).stderr
    assert "partitions=0: give a whole number from 1 to 10000" in error
    assert "bad.py:3)" in error
    assert "Next, try: barnabas check" in error


def test_a_module_that_an_app_misses_is_not_taken_for_the_app(shell):
    (shell.folder / "bad.py").write_text("import not_there\n")
    assert "No module named 'not_there'" in shell.json("check", "--app", "bad:app", status=1)[0]["problems"][0]


# send and read.


def test_send_and_read(shell):
    assert re.fullmatch(r"orders\[\d\]@0\n", shell("send", "orders", '{"id": 1, "customer": "ada"}').stdout)
    [sent] = shell.json("send", "orders", '{"id": 2, "customer": "bob"}', "--key", "eve")
    assert (sent["topic"], sent["key"]) == ("orders", "eve")
    first, second = shell.json("read", "orders")
    assert first["key"] == "ada"
    assert first["value"] == {"id": 1, "customer": "ada", "total": 0.0, "do": ""}
    assert first["headers"] == []
    assert sent.items() <= second.items()
    line = shell("read", "orders").stdout.splitlines()[1]
    assert re.match(rf"orders\[{sent['partition']}\]@{sent['offset']} .* eve {{\"id\":2,", line)


def test_send_refuses_what_does_not_fit(shell):
    assert "is not" not in shell("topics").stderr
    wrong = shell("send", "orders", '{"id": "x"}', status=1).stderr
    assert "the value does not fit Order of topic 'orders': Expected `int`, got `str` - at `$.id`" in wrong
    assert "the value does not fit" in shell("send", "alerts", "not json", status=1).stderr
    assert "did you mean orders?" in shell("send", "order", "1", status=1).stderr
    assert "a tombstone needs one" in shell("send", "orders", "null", status=1).stderr
    assert "give a VALUE, or - for standard input, or --file FILE" in shell("send", "orders", status=2).stderr
    assert shell.json("read", "orders") == []


def test_a_tombstone(shell):
    shell("send", "orders", "null", "--key", "ada")
    assert [m["value"] for m in shell.json("read", "orders")] == [None]
    assert shell("read", "orders").stdout.endswith(" ada (null)\n")


def test_a_file_is_sent_line_by_line(shell):
    lines = [json.dumps({"id": n, "customer": f"c{n % 7}"}) for n in range(12_000)]
    (shell.folder / "orders.jsonl").write_text("\n".join([*lines, "", ""]))
    assert shell.json("send", "orders", "--file", "orders.jsonl") == [{"topic": "orders", "sent": 12_000}]
    found: dict[str, list[int]] = {}
    for message in shell.json("read", "orders"):
        found.setdefault(message["key"], []).append(message["value"]["id"])
    assert found == {f"c{k}": list(range(k, 12_000, 7)) for k in range(7)}


def test_a_bad_line_of_a_file_is_named_and_nothing_is_sent(shell):
    (shell.folder / "orders.jsonl").write_text('{"id": 1, "customer": "ada"}\n\n{"id": 2}\n')
    error = shell("send", "orders", "--file", "orders.jsonl", status=1).stderr
    assert "orders.jsonl:3 does not fit Order of topic 'orders': Object missing required field `customer`" in error
    assert shell.json("read", "orders") == []


def test_standard_input_is_sent_line_by_line_up_to_a_bad_one(shell):
    good = "".join(f'{{"n": {n}}}\n' for n in range(3))
    assert "sent 3 messages to alerts" in shell("send", "alerts", "-", input=good).stdout
    error = shell("send", "alerts", "-", input=good + "{\n", status=1).stderr
    assert "line:4 does not fit" in error
    assert "(3 messages before it were sent)" in error
    assert [m["value"]["n"] for m in shell.json("read", "alerts")] == [0, 1, 2, 0, 1, 2]


def test_read_from_somewhere(shell):
    shell("send", "alerts", "-", input="".join(f"{n}\n" for n in range(10)))
    values = lambda *options: [m["value"] for m in shell.json("read", "alerts", *options)]  # noqa: E731
    assert values("--limit", "3") == [0, 1, 2]
    assert values("--from", "7", "--partition", "0") == [7, 8, 9]
    assert values("--from", "2000-01-01") == list(range(10))
    assert values("--from", "2999-01-01T00:00:00Z") == []
    assert values("--from", "latest") == []
    assert "add --follow to wait for new ones" in shell("read", "alerts", "--from", "latest").stderr
    assert "is an offset and needs --partition N" in shell("read", "alerts", "--from", "7", status=2).stderr
    never = shell("read", "alerts", "--from", "soon", status=2).stderr
    assert "'soon' is not earliest, latest, an offset, or a time" in never
    assert "has no partition 5; it has 1, from 0" in shell("read", "alerts", "--partition", "5", status=1).stderr
    assert "did you mean alerts" in shell("read", "alert", status=1).stderr


def test_read_one_key(shell):
    for id, customer in enumerate(["ada", "bob", "ada"]):
        shell.order(id, customer)
    assert [m["value"]["id"] for m in shell.json("read", "orders", "--key", "ada")] == [0, 2]
    assert [m["value"]["id"] for m in shell.json("read", "orders", "--key", "ada", "--limit", "1")] == [0]
    assert shell("read", "orders", "--key", "eve").stderr == "nothing: no message matches\n"


def test_read_what_is_not_json(shell):
    shell("send", "raw", "plain text")
    (shell.folder / "bytes").write_bytes(b"\xff\xfe\n")
    shell("send", "raw", "--file", "bytes")
    text, data = shell.json("read", "raw")
    assert (text["value"], text["encoding"]) == ("plain text", "text")
    assert (data["value"], data["encoding"]) == ("//4=", "base64")
    assert shell("read", "raw").stdout.splitlines()[1].endswith("(2 bytes) //4=")


def test_read_follows(shell):
    shell("send", "alerts", "0")
    reader = shell.start("read", "alerts", "--follow", "--from", "earliest", "--json")
    reader.until('"value":0')
    for n in (1, 2):
        shell("send", "alerts", str(n))
        reader.until(f'"value":{n}')
    assert reader.signal(signal.SIGINT).end() == 0
    assert [json.loads(line)["value"] for line in reader.text.splitlines()] == [0, 1, 2]
    limited = shell.start("read", "alerts", "--follow", "--from", "earliest", "--limit", "3")
    assert limited.end() == 0


def test_a_read_that_is_cut_short_says_so(shell):
    (shell.folder / "numbers").write_text("".join(f"{n:01000}\n" for n in range(300)))
    shell("send", "raw", "--file", "numbers")
    command = [*shell.command, "read", "raw", "--json"]  # more than a pipe takes
    with subprocess.Popen(command, cwd=shell.folder, env=shell.environment, stdout=subprocess.PIPE) as reader:
        reader.stdout.read(1)
        reader.send_signal(signal.SIGINT)
        assert reader.wait(10) == 130


# enqueue.


def test_enqueue(shell):
    jid = shell("enqueue", "notify", "1").stdout.strip()
    assert re.fullmatch("[0-9a-f]{24}", jid)
    [told] = shell.json("enqueue", "notify", "2", "a text", "--queue", "slow", "--in", "60")
    assert (told["job"], told["queue"]) == ("notify", "slow")
    assert told["at"] > 60
    assert shell.json("enqueue", "notify", "--at", "2100-01-01T00:00:00+00:00", "3")[0]["at"] == 4102444800
    assert shell.json("enqueue", "notify", "4")[0]["at"] is None
    done = shell("run", "--drain", "--only", "notify").stderr
    assert [int(n) for n in re.findall(r"notify (\d) ", done)] == [1, 4]
    assert "drained; of the jobs there remain 1 scheduled" in done


def test_enqueue_refuses_what_would_be_dead(shell):
    error = shell("enqueue", "notify", "x", status=1).stderr
    assert "the arguments [\"x\"] do not fit notify(order_id: int, how: str = 'mail')" in error
    assert "write '\"42\"' for the text 42" in shell("enqueue", "notify", "1", "42", status=1).stderr
    assert "did you mean notify?" in shell("enqueue", "notfy", "1", status=1).stderr
    assert "a before_enqueue hook of the app refused job 'notify'" in shell("enqueue", "notify", "13", status=1).stderr
    both = shell("enqueue", "notify", "1", "--in", "1", "--at", "2100-01-01", status=2).stderr
    assert "give --in or --at, not both" in both
    assert "queue='a b'" in shell("enqueue", "notify", "1", "--queue", "a b", status=1).stderr


# topics, table, flow, check.


def test_topics(shell):
    shell.order(1)
    shell("send", "alerts", "12345")
    by_name = {topic["name"]: topic for topic in shell.json("topics")}
    assert {k: v for k, v in by_name["orders"].items() if k != "bytes"} == {
        "name": "orders",
        "partitions": 3,
        "messages": 1,
        "retention": {"age": 604800.0, "size": None, "force": False},
        "declared": "yes",
    }
    assert by_name["orders.dead"]["declared"] == "dead letters of orders"
    text = shell("topics").stdout
    assert re.search(r"^orders +3 +1 +\d+ B +7 d +yes$", text, re.MULTILINE)
    assert "orders.dead" not in text  # empty, and the app's own affair
    (shell.folder / "other.py").write_text(
        "from barnabas import App\napp = App('o', events='sqlite:///shop.db', jobs='sqlite:///shop.db')"
    )
    assert re.search(r"^orders .* \? +no$", shell("topics", "--app", "other:app").stdout, re.MULTILINE)


def test_table(shell):
    shell("send", "orders", '{"id": 1, "customer": "ada", "total": 2.5}')
    shell("send", "orders", '{"id": 2, "customer": "bob", "total": 1}')
    shell("run", "--drain", "--only", "count")
    assert shell("table", "totals", "ada").stdout == "2.5\n"
    assert shell.json("table", "totals") == [{"key": "ada", "value": 2.5}, {"key": "bob", "value": 1.0}]
    assert re.search(r"^ada +2.5$", shell("table", "totals").stdout, re.MULTILINE)
    missing = shell("table", "totals", "eve", status=1).stderr
    assert "table 'totals' has nothing under 'eve'" in missing
    assert "Next, try: barnabas table totals" in missing
    assert "did you mean totals?" in shell("table", "total", status=1).stderr


def test_flow_is_karafkas(shell):
    assert shell("flow").stdout == (
        "orders =>\n"
        "  - receipts:             (always, exactly once)\n"
        "  - alerts:               (conditionally, one or more)\n"
        "receipts => (nothing)\n"
    )


def test_flow_as_a_graph(shell):
    [graph] = shell.json("flow")
    edges = {(e["kind"], e["source"]["name"], e["target"]["name"]) for e in graph["edges"]}
    assert edges == {
        ("reads", "orders", "bill"),
        ("answers", "bill", "receipts"),
        ("answers", "bill", "alerts"),
        ("reads", "orders", "count"),
        ("keeps", "count", "totals"),
        ("reads", "receipts", "mail"),
        ("sends", "mail", "notify"),
        ("sends", "notify", "raw"),
    }
    assert [n for n in graph["nodes"] if n["name"] == "notify"] == [{"kind": "job", "name": "notify"}]
    lines = shell("flow", "--format", "mermaid").stdout.splitlines()
    assert lines[0] == "flowchart LR"
    assert '    n0[/"orders"/]' in lines
    assert len(lines) == 1 + len(graph["nodes"]) + len(graph["edges"])


def test_check(shell):
    (shell.folder / "barnabas.toml").write_text("[jobs]\nthreads = 3\n")
    [report] = shell.json("check", "--events", "sqlite:///else.db", BARNABAS_STOP_TIMEOUT="7", BARNABAS_STOP_TIMEOT="8")
    origins = {row["name"]: (row["value"], row["origin"]) for row in report["settings"]}
    assert report["ok"]
    assert origins["threads"] == (3, f"barnabas.toml:{shell.folder}/barnabas.toml")
    assert origins["stop_timeout"] == (7.0, "BARNABAS_STOP_TIMEOUT")
    assert origins["events"] == (f"sqlite:///{shell.folder}/else.db", "--events")
    assert origins["jobs"][1] == "code"
    assert origins["send_timeout"][1] == "default"
    assert "BARNABAS_STOP_TIMEOT is set, is not a setting, and is ignored" in report["warnings"][0]
    done = shell("check")
    assert re.search(r"^threads +3 +barnabas.toml:", done.stdout, re.MULTILINE)
    assert re.search(r"^mail +receipts +shop-mail +4 +key +async$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("shop: all is well\n")


def test_check_finds_what_is_wrong(shell):
    shell("topics")
    (shell.folder / "barnabas.toml").write_text(
        '[topics.orders]\npartitions = 5\n[topics.order]\npartitions = 5\n[jobs]\n'
        'queues = ["slow"]\nconcurrency = {mial = 1}\n'
    )
    [report] = shell.json("check", status=1)
    assert "partitions" in report["problems"][0]
    assert "jobs.concurrency names mial: no job has such a queue" in report["problems"][1]
    assert report["warnings"] == [
        "[topics.order] in the settings has no effect: did you mean orders?",
        "nothing here runs job 'notify': its queue 'mail' is not in the setting queues",
    ]
    assert "Error: " in shell("check", status=1).stderr
    (shell.folder / "barnabas.toml").write_text("thread = 5\n")
    error = shell("check", status=1).stderr
    assert "thread = 5" in error
    assert "Next, try" not in error  # than check


# db.


def test_db_check(shell):
    shell.order(1)
    [found] = shell.json("db", "check")
    assert (found["file"], found["ok"], found["messages"], found["problems"]) == (f"{shell.folder}/shop.db", True, 1, [])
    done = shell("db", "check")
    assert re.search(r"^schema +4$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f"{shell.folder}/shop.db: all is well\n")
    subprocess.run(["sqlite3", shell.folder / "shop.db", "UPDATE heads SET next = next + 7 WHERE partition = 0"], check=True)
    done = shell("db", "check", status=1)
    assert "Error: orders[0] has " in done.stderr
    assert done.stdout.endswith("to mend\n")
    [found] = shell.json("db", "check", status=1)
    assert not found["ok"]
    assert "there is no such file" in shell("db", "check", "--events", "sqlite:///none.db", status=1).stderr
    assert not (shell.folder / "none.db").exists()


def test_db_backup_and_compact(shell):
    shell.order(1)
    run = shell.start("run", "--only", "bill")
    run.until("bill 1")
    [copied] = shell.json("db", "backup", "copy.db")
    assert copied["bytes"] == (shell.folder / "copy.db").stat().st_size
    assert "copied to other.db and checked" in shell("db", "backup", "other.db").stdout
    assert "copy.db exists, and nothing is overwritten" in shell("db", "backup", "copy.db", status=1).stderr
    refused = shell("db", "compact", status=1).stderr
    assert "Next, try: barnabas processes" in refused
    shell("stop", re.search(r"is in use by (\S+); stop them first: barnabas stop NAME", refused)[1])
    run.end()
    [sizes] = shell.json("db", "compact")
    assert sizes["after"] <= sizes["before"]
    assert " now" in shell("db", "compact").stdout
    assert len(shell.json("read", "receipts", "--events", "sqlite:///copy.db")) <= 1
    two = ("--jobs", "sqlite:///other.db")
    assert len(shell.json("db", "check", *two)) == 2
    assert "name one: --of events, --of jobs" in shell("db", "backup", "third.db", *two, status=2).stderr
    shell("db", "backup", "third.db", "--of", "jobs", *two)
    memory = ("--events", "memory:", "--jobs", "memory:")
    assert "`barnabas db` cares for sqlite: files, and this app uses memory:" in shell("db", "check", *memory, status=1).stderr


# run, in one process.


def test_run_says_what_it_runs_and_drains(shell):
    for id in range(3):
        shell.order(id, total=1.5)
    done = shell("run", "shop:app", "--drain", BARNABAS_STOP_TIMEOT="8")
    assert re.search(r"^consumer bill +orders +shop-bill +1 +partition order, sync$", done.stdout, re.MULTILINE)
    assert re.search(r"^consumer mail +receipts +shop-mail +4 +key order, async$", done.stdout, re.MULTILINE)
    assert re.search(r"^queue mail +notify +10 threads, 100 coroutines$", done.stdout, re.MULTILINE)
    assert f"shop: sqlite:///{shell.folder}/shop.db\n" in done.stdout
    assert "BARNABAS_STOP_TIMEOT is set, is not a setting" in done.stderr
    assert re.search(r"12 done \([\d,]+/s\)", done.stderr)
    assert re.search(r"INFO +bill 0 \(bill orders\[\d\]@0\)", done.stderr)
    assert sorted(m["value"] for m in shell.json("read", "raw")) == [0, 1, 2]
    assert shell("table", "totals", "ada").stdout == "4.5\n"


def test_run_only_and_except(shell):
    shell.order(1)
    assert "bill 1" not in shell("run", "--drain", "--except", "bill", "--except", "queue:mail").stderr
    assert "bill 1" in shell("run", "--drain", "--only", "bill").stderr
    assert "nothing is named 'bil'" in shell("run", "--only", "bil", status=1).stderr
    nothing = shell("run", "--processes", "2", "--only", "bill", "--except", "bill", status=1)
    assert nothing.stderr.count("there is nothing to run") == 1 and nothing.stdout == ""


def test_run_reports_what_waits(shell):
    shell("enqueue", "notify", "--", "-1")
    assert "drained; of the jobs there remain 1 to be retried" in shell("run", "--drain").stderr


def test_log_lines_as_json(shell):
    shell.order(1)
    done = shell("run", "--drain", BARNABAS_LOG_FORMAT="json")
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    of = {line["message"]: line for line in lines}
    assert of["runs consumer bill"]["runs"]["group"] == "shop-bill"
    bill = of["bill 1"]
    assert {k: bill[k] for k in ("level", "logger", "app", "consumer", "topic", "offset", "customer")} == {
        "level": "INFO",
        "logger": "shop",
        "app": "shop",
        "consumer": "bill",
        "topic": "orders",
        "offset": 0,
        "customer": "ada",
    }
    assert of["notify 1"]["job"] == "notify"
    assert of["notify 1"]["queue"] == "mail"
    assert re.fullmatch("[0-9a-f]{24}", of["notify 1"]["jid"])
    quiet = shell("run", "--drain", BARNABAS_LOG_LEVEL="error")
    assert quiet.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it(shell, number):
    shell.order(1)
    run = shell.start("run")
    run.until("notify 1")
    assert run.signal(number).end() == 0
    assert f"{number.name}: finishing what is in work, within 2 s" in run.text


SIGNALLED = """
import random, signal
from barnabas.cli.process import Stopper
for n in range(3000):
    stopper = Stopper()
    signal.signal(signal.SIGALRM, stopper.asked)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
    while not stopper.wait(0.00002):
        pass
"""


def test_a_signal_is_heard_at_any_instant_of_the_wait_for_it():
    environ = os.environ | {"PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", SIGNALLED], env=environ, check=True, timeout=DEADLINE)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_stops_it_also_while_the_app_is_imported(shell, processes):
    with (shell.folder / "shop.py").open("a") as code:
        code.write("import time\nprint('so far', flush=True)\ntime.sleep(1.0)\n")
    run = shell.start("run", "--processes", processes)
    run.until("so far")
    assert run.signal(signal.SIGTERM).end() == 0
    assert processes == "2" or "SIGTERM: finishing what is in work" in run.text


LATE = """
class Late:
    def __del__(self, write=os.write, kill=os.kill, own=os.getpid()):
        write(2, b"at its end")
        kill(own, self.number)
import sys
sys.late = Late()  # the last to go
"""


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTERM])
def test_a_signal_at_its_very_end_neither_suspends_it_nor_changes_its_status(shell, number):
    with (shell.folder / "shop.py").open("a") as code:
        code.write(LATE + f"Late.number = {number.value}\n")
    run = shell.start("run", "--drain")
    assert run.end() == 0 and "at its end" in run.text


def test_a_stop_that_overruns_says_what_held_it_and_gives_it_back(shell):
    shell.order(1, do="once")
    run = shell.start("run", "--only", "bill")
    run.until("bill 1")
    assert run.signal(signal.SIGTERM).end() == 0
    assert re.search(r"the stop was held up by bill, at orders\[\d\]@0:", run.text)
    assert "time.sleep(60)" in run.text and re.search(r":\n  File .*, in bill\n", run.text) and "work.py" not in run.text
    again = shell("run", "--only", "bill", "--drain").stderr
    assert "bill 1" in again
    assert len(shell.json("read", "receipts")) == 1


def test_a_second_ctrl_c_ends_it_at_once_and_loses_nothing(shell):
    shell.order(1, do="once")
    run = shell.start("run", "--only", "bill")
    run.until("bill 1")
    run.signal(signal.SIGINT).until("SIGINT: finishing")
    assert run.signal(signal.SIGINT).end() == 130
    assert "bill 1" in shell("run", "--only", "bill", "--drain").stderr


def test_a_runner_that_fails_ends_it(shell):
    shell.order(1, do="fail")
    done = shell("run", "--drain", status=1, ON_DEAD="stop")
    assert 'is dead and on_dead="stop"' in done.stderr
    assert "bill 1" in shell("run", "--drain").stderr


def test_a_handler_that_hangs_recycles_the_process(shell):
    shell.order(1, do="hang")
    done = shell("run", "--only", "bill", "--drain", status=75, LIMIT="0.2")
    assert "this process ends and lets another go on" in done.stderr
    assert len(shell.json("read", "orders.dead")) == 1


def test_a_start_hook_that_fails_ends_it(shell):
    error = shell("run", status=1, BAD_START="1").stderr
    assert "ERROR   the start failed: RuntimeError: no pool\nTraceback" in error and "in begin" in error
    assert "worker.py" not in error and "click" not in error
    shell("send", "receipts", '{"id": 1}')
    error = shell("replay", "receipts[0]@0", status=1, BAD_START="1").stderr
    assert "in begin" in error and "no pool" in error and "worker.py" not in error


def test_two_different_apps(shell):
    assert "two apps are named" in shell("run", "shop:app", "--app", "shop:other", status=2).stderr


def test_the_status_line_on_a_terminal(shell):
    shell.order(1)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*shell.command, "run", "--only", "bill"],
        cwd=shell.folder,
        env=shell.environment | {"TERM": "xterm", "COLUMNS": "60"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        text = ""
        try:
            while not re.search(r"\r\x1b\[K1 done \([\d,]+/s\) · 0:00:0\d\r", text):
                text += os.read(ours, 4096).decode()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):  # what a terminal says when its last user has left
                while data := os.read(ours, 4096):
                    text += data.decode()
        finally:
            os.close(ours)
        assert process.wait(DEADLINE) == 0
    assert "bill 1" in text
    assert "\r\x1b[K20" in text  # log lines clear it first


# run, in several processes.


def test_processes_share_the_work_and_drain(shell):
    lines = "".join(json.dumps({"id": n, "customer": f"c{n}", "total": 1}) + "\n" for n in range(300))
    shell("send", "orders", "-", input=lines)
    done = shell("run", "--processes", "2", "--drain")
    assert "shop in 2 processes: sqlite:///" in done.stdout
    assert done.stdout.count("consumer bill") == 1
    assert len(re.findall(r"process \d \(pid \d+\) has nothing left to do", done.stderr)) == 2
    assert re.search(r"1,199 done", done.stderr)
    jobs = sorted(m["value"] for m in shell.json("read", "raw"))
    assert jobs == [n for n in range(300) if n != 13]  # which the hook refuses
    assert len(shell.json("table", "totals")) == 300


def test_a_child_that_dies_is_started_again(shell):
    shell.order(1, do="die")
    done = shell("run", "--processes", "2", "--drain")
    assert len(re.findall(r"ended with SIGKILL after \d+\.\d s; starting it again in 0\.1 s", done.stderr)) == 1
    assert sorted(m["value"]["id"] for m in shell.json("read", "receipts")) == [1]


def test_a_child_that_hangs_makes_way(shell):
    shell.order(1, do="hang")
    done = shell("run", "--processes", "2", "--drain", "--only", "bill", LIMIT="0.2")
    assert re.search(r"process \d \(pid \d+\) made way for another", done.stderr)
    assert len(shell.json("read", "orders.dead")) == 1


def test_children_that_cannot_live(shell):
    error = shell("run", "--processes", "2", status=1, BAD_START="1").stderr
    assert "at its start, 5 times in a row: giving up" in error
    assert "RuntimeError: no pool" in error


def test_a_signal_reaches_the_children_once(shell):
    shell.order(1, do="once")
    run = shell.start("run", "--processes", "2")
    run.until("bill 1")
    assert run.signal(signal.SIGINT).end() == 0, run.text
    # Once each; the second may be told before it listens.
    assert 1 <= len(re.findall(r"SIG\w+: finishing what is in work", run.text)) <= 2
    assert "the stop was held up by bill" in run.text


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
def test_children_end_when_their_supervisor_is_killed(shell):
    shell.order(1)
    run = shell.start("run", "--processes", "2", BARNABAS_LOG_FORMAT="json")
    run.until("notify 1")
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    watches = [os.pidfd_open(int(pid)) for pid in children]
    assert len(watches) == 2
    run.signal(signal.SIGKILL)
    for watch in watches:
        assert select.select([watch], [], [], DEADLINE)[0]
        os.close(watch)
    run.end()
    assert "SIGTERM: finishing what is in work" in run.text  # the other may not have come so far as to say it


def test_memory_is_refused(shell):
    error = shell("run", "--processes", "2", "--events", "memory:", status=1).stderr
    assert "events=memory: lives in one process, so it cannot be used with processes=2" in error


# --reload.


def test_reload(shell):
    shell.order(1)
    run = shell.start("run", "--reload")
    run.until("notify 1")
    code = shell.folder / "shop.py"
    code.write_text(APP.replace('"bill %d"', '"billed %d"'))
    run.until("changed: shop.py; starting again")
    shell.order(2)
    run.until("billed 2")
    code.write_text("nonsense(")
    run.until("it is started again when a file changes")
    code.write_text(APP.replace('"bill %d"', '"once more %d"'))
    shell.order(3)
    run.until("once more 3")
    assert run.signal(signal.SIGINT).end() == 0, run.text


def test_reload_without_watchfiles_says_what_is_missing(shell):
    start = "import sys; sys.modules['watchfiles'] = None; from barnabas.cli import main; main()"
    shell.command = [sys.executable, "-c", start]
    error = shell("run", "--reload", status=1).stderr
    assert "--reload needs watchfiles, which is not installed" in error
    assert "Next, try: pip install 'barnabas[reload]'" in error


def test_commands_is_a_group_that_tests_may_drive():
    from click.testing import CliRunner

    result = CliRunner().invoke(commands, ["--version"])
    assert result.exit_code == 0
