"""Real processes, SIGKILL at random instants. Nothing is lost, order holds, tables and outputs are exact."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from barnabas.testing import kill

HERE = Path(__file__).parent
SEED = int(os.environ["BARNABAS_SEED"]) if "BARNABAS_SEED" in os.environ else None


def sqlite3(path: Path, sql: str) -> str:
    """What the outside witness says: the sqlite3 shell, read-only, after the workers have ended."""
    return subprocess.run(["sqlite3", "-readonly", str(path), sql], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    for name in [name for name in sys.modules if name == "room"]:
        del sys.modules[name]
    return tmp_path


def check_kill(room: Path, kills: int) -> None:
    import room as module

    report = kill("room:app", load=module.load, kills=kills, folder=room, seed=SEED)
    print(report)
    total = kills * 1000
    app, url = module.app, f"sqlite:///{room}/kill.db"
    settings, app.settings = app.settings, app.settings.override(events=url, jobs=url)
    try:
        with module.counts.open() as view:
            assert dict(view.items()) == dict(Counter(f"k{i % module.KEYS}" for i in range(total)))
        with module.sums.open() as view:
            assert sum(dict(view.items()).values()) == total * (total - 1) // 2
        ends = {state.name: sum(high - low for low, high, _ in state.partitions) for state in app.events.topics()}
        assert (ends["steps"], ends["seen"], ends["items.dead"], ends["steps.dead"]) == (total, total, 0, 0)
        assert report.handled == 3 * total
        assert report.jobs == total // 10
    finally:
        app.close()
        app.settings = settings
    assert sqlite3(room / "kill.db", "PRAGMA integrity_check") == "ok\n"
    assert sqlite3(room / "kill.db", "SELECT count(*) FROM jobs") == "0\n"


@pytest.mark.slow
def test_fifty_kills_lose_nothing(room: Path) -> None:
    check_kill(room, 50)


@pytest.mark.soak
def test_a_thousand_kills_lose_nothing(room: Path) -> None:
    check_kill(room, 1000)
