"""Real workers and handlers that leak, hang, or kill their process: nothing is lost, neighbours are handled, one at a time."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_cli import Shell

APP = """
import asyncio, ctypes, os, time
from barnabas import App, Retry

app = App("care", events="sqlite:///care.db", jobs="sqlite:///care.db", stop_timeout=5, session_timeout=3)
things = app.topic("things", key="key", partitions=2)
batches = app.topic("batches", key="key", partitions=1)
loops = app.topic("loops", key="key", partitions=2)
sums = app.table("sums", int)
witness = os.open("witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
LIMIT = float(os.environ.get("LIMIT", 100))
leaked = []

def act(kind, what):
    do, number = what["do"], what["id"]
    os.write(witness, f"{kind} {number} {os.getpid()}\\n".encode())
    if do == "leak":
        leaked.append(os.urandom(1 << 20))
        time.sleep(0.01)
    elif do == "hang":
        while True:
            time.sleep(1)
    elif do == "exit":
        os._exit(int(os.environ.get("STATUS", 3)))
    elif do == "crash":
        ctypes.string_at(0)

@app.consumer(things, name="handle", tables=[sums], timeout=LIMIT, retry=Retry(1, backoff=0.01))
def handle(thing: dict) -> None:
    act("handle", thing)
    sums[thing["key"]] = sums.get(thing["key"], 0) + thing["id"]

@app.consumer(batches, name="several", timeout=LIMIT, retry=Retry(1, backoff=0.01))
def several(things: list[dict]) -> None:
    for thing in things:
        act("several", thing)

@app.consumer(loops, name="swing", timeout=LIMIT, retry=Retry(1, backoff=0.01), concurrency=4)
async def swing(thing: dict) -> None:
    if thing["do"] == "stubborn":
        while True:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass
    if not thing["do"]:
        await asyncio.sleep(0.1)  # some are in work when another hangs, and are not to blame
    act("swing", thing)

@app.job(queue="jobs", timeout=LIMIT, retry=0)
def work(do: str, id: int) -> None:
    act("work", {"do": do, "id": id})

@app.on_start
def begin() -> None:
    if os.environ.get("BAD_START"):
        ctypes.string_at(0)

@app.on_stop
async def end() -> None:  # a loop that hangs cannot run it, which must not hold the end up
    await asyncio.sleep(0)
"""
TOPIC = {"handle": "things", "several": "batches", "swing": "loops"}


class Room(Shell):
    """A folder with this app, and what its handlers have left there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "care.py").write_text(APP)
        self.environment["BARNABAS_APP"] = "care:app"

    def load(self, kind: str, count: int, *odd: int, do: str) -> None:
        """Send or enqueue `count` numbered things of nine keys; the `odd` ones (all, if none is named) do that."""
        does = [do if number in odd or not odd else "" for number in range(count)]
        if kind == "work":
            code = f"care.work.enqueue_many((do, n) for n, do in enumerate({does}))"
        else:
            things = f"{{'id': n, 'do': do, 'key': f'k{{n % 9}}'}} for n, do in enumerate({does})"
            code = f"care.{TOPIC[kind]}.send_many({things})"
        self.python(f"import care; {code}.result(30)")

    def python(self, code: str) -> list[str]:
        """The lines that some code prints."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()

    def run(self, kind: str, *more: str, status: int = 0, **environment: str) -> str:
        """Run what handles a kind to its end; what it logged."""
        only = "queue:jobs" if kind == "work" else kind
        return self("run", "--drain", "--only", only, *more, status=status, **environment).stderr

    def handled(self, kind: str) -> Counter[int]:
        """How often each of its things was begun."""
        lines = (line.split() for line in (self.folder / "witness").read_text().splitlines())
        return Counter(int(number) for name, number, _ in lines if name == kind)

    def dead(self, kind: str) -> list[tuple[int, str]]:
        """What is in the dead letters, and why."""
        if kind == "work":
            code = "import care\nfor job in care.app.jobs.find_jobs('dead'): print(job.payload.decode())"
            jobs = map(json.loads, self.python(code))
            return [(job["args"][1], job["error_message"]) for job in jobs]
        found = self.json("read", f"{TOPIC[kind]}.dead")
        return [(letter["value"]["id"], dict(letter["headers"])["barnabas-reason"]) for letter in found]


@pytest.fixture
def room(tmp_path):
    made = Room(tmp_path)
    yield made
    for running in made.running:
        running.close()
    assert made.json("db", "check")[0]["problems"] == []


# Too much memory.


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_handler_that_leaks_is_recycled_and_nothing_is_lost_or_repeated(room, processes):
    room.load("handle", 500, do="leak")
    limit = {"BARNABAS_MAX_MEMORY": str(120 << 20)}
    if processes == 2:
        text = room.run("handle", "--processes", "2", **limit)
        ways = len(re.findall(r"process \d \(pid \d+\) made way for another after", text))
    else:  # whoever started it, systemd say, starts it again
        codes = [75]
        while codes[-1] == 75:
            codes.append(room.start("run", "--drain", "--only", "handle", **limit).end())
        assert codes[-1] == 0
        text, ways = "".join(running.text for running in room.running), len(codes) - 2
    over = len(re.findall(r"this process uses [\d.]+ MiB, over max_memory \(120\.0 MiB\)", text))
    assert 2 <= ways <= over <= ways + processes  # (each may say so when the last of the work has just ended)
    assert room.handled("handle") == Counter(range(500))
    assert sum(row["value"] for row in room.json("table", "sums")) == sum(range(500))


def test_a_limit_that_the_app_cannot_keep_is_refused(room):
    room.load("handle", 1, do="")
    text = room.run("handle", status=1, BARNABAS_MAX_MEMORY="1000000")
    assert re.search(r"max_memory is 976\.6 KiB, but this app uses \d\d\.\d MiB before its first message", text)


# Handlers that hang.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "do", "begun"),
    [
        ("handle", "hang", 2),
        ("several", "hang", 3),  # twice in its batch, once alone
        ("swing", "hang", 2),  # it blocks the event loop
        ("swing", "stubborn", 0),  # it swallows what is to cancel it
        ("work", "hang", 1),
    ],
)
def test_a_handler_that_hangs_for_good_is_recycled_and_only_its_message_is_dead(room, kind, do, begun):
    room.load(kind, 40, 17, do=do)
    text = room.run(kind, "--processes", "2", LIMIT="0.4")
    [(number, why)] = room.dead(kind)
    assert number == 17
    assert "did not return after twice its timeout of 0.4 s" in why
    handled = room.handled(kind)
    assert handled.pop(17, 0) == begun
    assert set(handled) == set(range(40)) - {17}
    if kind == "handle":
        assert set(handled.values()) == {1}
        assert sum(row["value"] for row in room.json("table", "sums")) == sum(range(40)) - 17
    ways, hung = len(re.findall("made way for another", text)), begun or 2
    assert hung - 1 <= ways <= hung  # after the last it may end because all is done
    assert "ended with" not in text


# Messages that kill their process.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "do", "how"),
    [
        ("handle", "exit", "status 0"),
        ("handle", "crash", "SIGSEGV"),
        ("several", "crash", "SIGSEGV"),
        ("swing", "exit", "status 3"),
        ("work", "exit", "status 3"),
        ("work", "crash", "SIGSEGV"),
    ],
)
def test_a_message_that_kills_its_process_is_dead_after_three_crashes_and_one_alone(room, kind, do, how):
    room.load(kind, 40, 17, do=do)
    text = room.run(kind, "--processes", "2", STATUS=how[-1])
    assert room.dead(kind) == [(17, "was in work at 4 crashes of its process, the last time alone")]
    handled = room.handled(kind)
    assert handled.pop(17) == 4
    assert set(handled) == set(range(40)) - {17}
    if kind == "handle":
        assert sum(row["value"] for row in room.json("table", "sums")) == sum(range(40)) - 17
    assert len(re.findall(rf"process \d \(pid \d+\) ended with {how} after \d+\.\d s; starting it again in", text)) == 4
    alone = len(re.findall("was in work at 3 crashes of its process: it runs alone", text))
    assert alone == 1 or kind == "several"  # a batch is in work as a whole


@pytest.mark.slow
def test_children_that_crash_at_their_start_back_off_and_end_it(room):
    room.load("handle", 1, do="")
    text = room.run("handle", "--processes", "2", status=1, BAD_START="1")
    for number in (1, 2):
        waits = re.findall(rf"process {number} \(pid \d+\) ended with SIGSEGV after \d+\.\d s; starting it again in (.*) s", text)
        assert waits == ["0.1", "0.2", "0.4", "0.8"][: len(waits)]
    assert len(waits) >= 3
    assert len(re.findall(r"ended with SIGSEGV after .*, at its start, 5 times in a row: giving up", text)) == 1
    assert room.run("handle") != ""  # its message is there
    assert room.handled("handle") == {0: 1}
