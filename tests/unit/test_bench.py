"""The bench runs: with a few messages, its checks hold and the table is drawn. (Figures are for `make bench`.)

The benches of a server are looked at beside that server's own tests.
"""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "bench" / "run.py"
THEMES = ("topics", "processes", "jobs", "failover", "engine", "start")


def test_every_bench_runs():
    pytest.importorskip("huey")
    only = [word for theme in THEMES for word in ("--only", theme)]
    done = subprocess.run([sys.executable, str(RUN), "--quick", *only], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was written" in done.stdout
