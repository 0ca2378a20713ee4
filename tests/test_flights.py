"""The example on real data: every figure of the demo equals the same figure computed straight from the CSV."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from servers import need, shared_kafka

import data

DEMO = Path(__file__).parents[1] / "examples" / "flights" / "demo.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (data.FOLDER / "flights.csv").exists() and not os.environ.get("CI"), reason="no data: `make data`"
    ),
]


def test_the_csv_is_the_one_we_know():
    figures = data.expected()
    assert (figures["departures"], figures["delays"], len(figures["carriers"])) == (336_776, 9_888, 16)
    assert sum(each["cancelled"] for each in figures["carriers"].values()) == 8_255


def test_departures_are_in_order_of_time_and_distinct():
    departures = data.departures()
    times = [each.time for each in departures]
    assert times == sorted(times)
    assert len({each.id for each in departures}) == len(departures) == 336_776
    assert sum(each.tailnum is None for each in departures) == 2_512


def test_the_demo_finds_them_on_kafka(tmp_path: Path):
    url = f"kafka://{shared_kafka()}?prefix={secrets.token_hex(4)}-"
    command = [sys.executable, DEMO, f"--build={tmp_path}", "--limit=5000", f"--events={url}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found, wanted = json.loads((tmp_path / "flights.json").read_text()), data.expected(5000)
    assert "left out here" in done.stdout and found["carriers"] == {}
    assert {name: found[name] for name in wanted if name != "carriers"} == {n: v for n, v in wanted.items() if n != "carriers"}


def test_half_of_the_notices_are_given_by_sidekiq(tmp_path: Path):
    need("redis-server", "sidekiq", "puma")
    command = [sys.executable, DEMO.with_name("demo_sidekiq.py"), f"--build={tmp_path}", "--limit=50000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    found, late = json.loads((tmp_path / "sidekiq.json").read_text()), data.expected(50_000)["delays"]
    assert found["delays"] == found["told"] == late and found["ruby"] >= 0.3 * late and found["python"] > 0
    assert f"web page: {found['page']}" in done.stdout


@pytest.mark.parametrize("limit", [5_000, None], ids=["part", "all"])
def test_the_demo_finds_the_figures_of_the_csv(limit: int | None, tmp_path: Path):
    some = [] if limit is None else [f"--limit={limit}"]
    done = subprocess.run(
        [sys.executable, DEMO, f"--build={tmp_path}", *some], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "flights.json").read_text())
    wanted = data.expected(limit)
    assert {name: found[name] for name in wanted} == wanted
