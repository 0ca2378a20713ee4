"""The benches on Kafka run, with a few messages. (Peers and the take-over are left out: they take long.)"""

import os
import subprocess
import sys
from pathlib import Path

from servers import shared_kafka

RUN = Path(__file__).parents[2] / "bench" / "run.py"
BENCHES = ("handlers", "slow", "send", "wake_up", "share", "backlog")


def test_every_bench_on_kafka_runs():
    only = [word for name in BENCHES for word in ("--only", f"kafka_{name}")]
    keep = os.environ | {"BENCH_KAFKA": shared_kafka()}
    done = subprocess.run([sys.executable, str(RUN), "--quick", *only], capture_output=True, text=True, timeout=240, env=keep)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was written" in done.stdout
