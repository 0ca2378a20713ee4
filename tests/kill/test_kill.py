"""Real processes, SIGKILL at random instants. Nothing is lost, order holds, tables and outputs are exact."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import data
from barnabas import App
from barnabas.killing import Lost, Report, check, read_witness
from barnabas.testing import kill

HERE = Path(__file__).parent
SEED = int(os.environ["BARNABAS_SEED"]) if "BARNABAS_SEED" in os.environ else None
STILL = 15.0  # seconds that a partition with work in it may stand still


def kills(few: int, many: int) -> Any:
    return pytest.mark.parametrize(
        "kills", [pytest.param(few, marks=pytest.mark.slow), pytest.param(many, marks=pytest.mark.soak)]
    )


def sqlite3(path: Path, sql: str) -> str:
    """What the outside witness says: the sqlite3 shell, read-only, after the workers have ended."""
    if shutil.which("sqlite3") is None and not os.environ.get("CI"):
        pytest.skip("no sqlite3 shell: apt-get install sqlite3")
    return subprocess.run(["sqlite3", "-readonly", str(path), sql], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file lies; the apps can be imported, afresh, here and in the workers."""
    monkeypatch.syspath_prepend(str(HERE))
    path = [str(HERE), str(Path(data.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    for name in ("room", "flights"):
        sys.modules.pop(name, None)
    return tmp_path


@contextmanager
def reading(app: App, folder: Path) -> Iterator[App]:
    """The app on the file that is left."""
    url = f"sqlite:///{folder}/kill.db"
    settings, app.settings = app.settings, app.settings.override(events=url, jobs=url)
    try:
        yield app
    finally:
        app.close()
        app.settings = settings


def stored(app: App, topic: str) -> list[bytes]:
    """All values of a topic, in the order of each partition."""
    [parts] = [state.partitions for state in app.events.topics() if state.name == topic]
    return [row[2] for n, (low, high, _) in enumerate(parts) for row in app.events.read(topic, n, low, high - low)]


def values(app: App, topic: Any) -> list[Any]:
    return [topic.decode(value) for value in stored(app, topic.name)]


def run(app: str, folder: Path, **options: Any) -> Report:
    report = kill(app, folder=folder, seed=SEED, **options)
    print(report)
    assert report.still < STILL
    if Path("/proc/locks").exists():
        assert len(report.kills) == 3, report.kills
    return report


def check_room(room: ModuleType, folder: Path, report: Report) -> set[int]:
    """The figures that follow from the items stored; returns their ids."""
    with reading(room.app, folder) as app:
        items = values(app, room.items)
        ids = {item.id for item in items}
        assert len(ids) == len(items)
        with room.counts.open() as view:
            assert dict(view.items()) == dict(Counter(item.key for item in items))
        sums: Counter[str] = Counter()
        for item in items:
            sums[item.key] += item.id
        with room.sums.open() as view:
            assert dict(view.items()) == dict(sums)
        assert {item.id for item in values(app, room.steps)} == ids == {item.id for item in values(app, room.seen)}
        ends = {state.name: sum(high - low for low, high, _ in state.partitions) for state in app.events.topics()}
        assert {name: n for name, n in ends.items() if n} == dict.fromkeys(["items", "steps", "seen"], len(ids))
        assert report.handled == 3 * len(ids)
    check_file(folder)
    return ids


def check_file(folder: Path) -> None:
    assert sqlite3(folder / "kill.db", "PRAGMA integrity_check") == "ok\n"
    assert sqlite3(folder / "kill.db", "SELECT count(*) FROM jobs") == "0\n"


@kills(50, 1000)
def test_workers_are_killed(kills: int, folder: Path) -> None:
    import room

    report = run("room:app", folder, load=room.load, kills=kills)
    assert check_room(room, folder, report) == set(range(kills * 1000))
    assert report.jobs == kills * 100


@kills(20, 300)
def test_supervisors_and_their_children_are_killed(kills: int, folder: Path) -> None:
    """None of the children outlives its supervisor: `kill` sees to that."""
    import room

    report = run("room:app", folder, load=room.load, kills=kills, workers=2, processes=2)
    assert check_room(room, folder, report) == set(range(kills * 1000))
    assert report.jobs == kills * 100


@kills(20, 300)
def test_senders_are_killed(kills: int, folder: Path) -> None:
    """What was durable by a sender's own word is there and handled, whenever it died."""
    import room

    acks = folder / "acks"
    acks.touch()
    sender: list[subprocess.Popen[bytes]] = []

    def load(app: App, n: int) -> None:
        if sender:
            sender[-1].kill()
            sender[-1].wait()
        if n < kills - 1:
            before = acks.stat().st_size
            command = [sys.executable, HERE / "room.py", app.settings.events, str(n), acks]
            sender.append(subprocess.Popen(command))
            while acks.stat().st_size == before:  # it has begun
                assert sender[-1].poll() is None
                time.sleep(0.001)

    report = run("room:app", folder, load=load, kills=kills)
    killed = Counter(process.returncode for process in sender)
    assert killed[-9] > 0 and set(killed) <= {0, -9}, killed
    said = acks.read_text().splitlines()
    durable = {int(line[1:]) for line in said if line[0] == "i"}
    assert durable <= check_room(room, folder, report)
    lines = read_witness(folder / "witness")
    assert {line[1:] for line in said if line[0] == "j"} <= {line[4] for line in lines if line[2] < 0}


@kills(15, 300)
@pytest.mark.skipif(not (data.FOLDER / "flights.csv").exists() and not os.environ.get("CI"), reason="no data: `make data`")
def test_the_flights_example_is_killed(kills: int, folder: Path) -> None:
    """The figures of the demo, with kills."""
    import flights

    limit = 30_000 if kills < 100 else None
    departures = data.departures(limit)

    def load(app: App, n: int) -> Any:
        return flights.departures.send_many(departures[n * len(departures) // kills : (n + 1) * len(departures) // kills])

    report = run("flights:app", folder, load=load, kills=kills)
    wanted = data.expected(limit)
    with reading(flights.app, folder) as app, flights.totals.open() as view:
        totals = dict(view.items())
        figures = {
            "departures": sum(total.flights for total in totals.values()),
            "carriers": {
                carrier: {
                    "name": data.airlines()[carrier],
                    "flights": total.flights,
                    "cancelled": total.cancelled,
                    "mean_delay": total.mean_delay,
                }
                for carrier, total in totals.items()
            },
            "delays": len(values(app, flights.delays)),
            "jobs_done": len({notice.id for notice in values(app, flights.notified)}),
        }
    assert figures == wanted
    assert report.jobs == wanted["jobs_done"]
    check_file(folder)


@pytest.mark.slow
def test_the_tool_sees_what_is_lost_or_out_of_order(folder: Path) -> None:
    import room

    kill("room:app", load=room.load, kills=2, workers=2, folder=folder, seed=SEED)
    path = folder / "witness"
    (folder / "empty").touch()
    with pytest.raises(Lost, match="nothing was sent"):
        check(App("none", events="memory:"), folder / "empty", 0, {})
    lines = path.read_text().splitlines(keepends=True)
    item = [(n, json.loads(line)) for n, line in enumerate(lines) if "kill-step" in line]
    first = next(n for n, line in item if line[2:4] == [3, 0])
    last = [n for n, line in item if line[4] == json.loads(lines[first])[4]][-1]
    torn = lines[first][:9]  # by a kill, in front of the next line and at the end
    path.write_text("".join([*lines[:first], torn, *lines[first:], torn]))
    assert read_witness(path) == [json.loads(line) for line in lines]
    with reading(room.app, folder) as app:
        without = [line for line in lines if json.loads(line)[:4] != json.loads(lines[first])[:4]]
        for wrong, error in (
            (without, r"step at items\[3\]: 1 were never handled: \[0\]"),
            ([*without[:last], lines[first], *without[last:]], "offset 0 was first handled after"),
        ):
            path.write_text("".join(wrong))
            with pytest.raises(Lost, match=error):
                check(app, path, 0, {})


@pytest.mark.slow
def test_of_a_batch_that_kills_its_process_one_message_dies(folder: Path) -> None:
    """It comes again in smaller batches, so that few are suspected; those run alone, and the culprit is dead."""
    import room

    url = f"sqlite:///{folder}/kill.db"
    with reading(room.app, folder) as app:
        sent = [room.Item(n, "poison" if n == 1500 else f"k{n % room.KEYS}") for n in range(3000)]
        room.items.send_many(sent).result(10)
        command = [sys.executable, "-m", "barnabas", "run", "room:app", "--processes", "2", "--drain"]
        done = subprocess.run([*command, "--events", url, "--jobs", url], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert [room.steps.decode(value).id for value in stored(app, "steps.dead")] == [1500]
        assert stored(app, "items.dead") == []
    assert 1 <= done.stderr.count("batches: steps") <= 30, done.stderr
    assert "at 4 crashes of its process, the last time alone" in done.stderr
