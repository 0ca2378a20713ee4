"""What many topics and many groups cost a process that waits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from barnabas import App


@pytest.mark.soak
@pytest.mark.parametrize("groups, megabytes, percent", [(1, 50, 1.0), (100, 120, 5.0)])
def test_a_hundred_topics_are_cheap_to_wait_for(make, tmp_path, groups, megabytes, percent) -> None:
    url = make().events.url
    env = {**os.environ, "MANY_URL": url, "MANY_GROUPS": str(groups)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-m", "barnabas", "run", "many:app"], cwd=tmp_path, env=env) as process:
        try:
            app = App("many", events=url, jobs="memory:")
            end = time.monotonic() + 120
            while len(app.events.positions()) < 200:  # those of the retry topics, too
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.5)
            app.close()
            time.sleep(5)
            before, began = ticks(process.pid), time.monotonic()
            time.sleep(30)
            used = 100 * (ticks(process.pid) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            size = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            print(f"{groups} groups: {size:.0f} MB, {used:.2f} % of a processor")
            assert size < megabytes and used < percent
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0


def ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
