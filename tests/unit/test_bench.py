"""The bench runs: with a few messages, its checks hold and the table is drawn. (Figures are for `make bench`.)"""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "bench" / "run.py"


def test_every_bench_runs():
    pytest.importorskip("huey")
    done = subprocess.run([sys.executable, str(RUN), "--quick"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was written" in done.stdout
