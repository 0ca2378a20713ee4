"""The benches on Redis run: see tests/unit/test_bench.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from servers import need

RUN = Path(__file__).parents[2] / "bench" / "run.py"
pytestmark = pytest.mark.slow


def test_every_bench_on_redis_runs():
    need("redis-server", "ruby", "sidekiq")
    command = [sys.executable, str(RUN), "--quick", "--only", "redis_jobs", "--only", "batches", "--only", "limits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was written" in done.stdout and "left out: the comparisons" not in done.stdout
