"""Limits hold whatever is killed, frozen or restarted, and no slot is lost by that: seen by an outside witness."""

import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer
from test_redis_kill import HERE, Team, blow
from test_unique_kill import QUICK, NoProxy

from barnabas import App

LOAD = {"call": 30, "rated": 10, "byhand": 3}  # jobs before each blow


def check(folder: Path, backend: str, blows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("BARNABAS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"kill test of limits on {backend}: seed {seed}")
    dice, kinds = random.Random(seed), ("worker", "worker", "frozen") + (("redis",) if backend == "redis" else ())
    for name, value in {"KILL_FOLDER": folder, "KILL_TIMES": QUICK}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    server = RedisServer(folder, durable=True) if backend == "redis" else None
    url = server.url if server is not None else f"sqlite:///{folder}/jobs.db"
    app = App("sender", events="memory:", jobs=url)
    jobs = {name: app.foreign_job(name) for name in LOAD}
    app.jobs.queue_states()
    team, done, count = Team(url, folder, "limits_room:app"), Counter[str](), 0
    try:
        for _ in range(blows):
            futures: list[Any] = []
            for name, load in LOAD.items():
                futures += [jobs[name].enqueue(count + n, f"k{dice.randrange(3)}") for n in range(load)]
                count += load
            kind = dice.choice(kinds)
            done[kind] += 1
            blow(kind, team, server, NoProxy(), dice)  # type: ignore[arg-type]
            assert [future.exception(60) for future in futures] == [None] * len(futures)
        work = lambda: sum(1 for job in app.jobs.find_jobs() if job.state != "dead")  # noqa: E731
        end = time.monotonic() + 60 + blows
        while (left := work()) and time.monotonic() < end:
            team.watch()
            time.sleep(0.2)
        team.end()
        lines = [line.split() for line in (folder / "witness").read_text().splitlines()]
        starts = defaultdict(list)
        for what, _, at, name in lines:
            if what == "rated":
                starts[name].append(float(at))
        met = [line for line in lines if line[0] == "met"]
        tail = (folder / "workers.log").read_text()[-3000:]
        print(f"{len(lines)} runs, blows {dict(done)}")
        assert left == 0, f"seed {seed}: {left} jobs are stuck\n{tail}"
        dead = sum(1 for _ in app.jobs.find_jobs("dead"))
        lost = count - dead - len({int(n) for what, n, *_ in lines if what != "met"})
        assert dead <= 3 and lost == 0, f"seed {seed}: {lost} jobs did not run, {dead} are dead\n{tail}"
        assert not met, f"seed {seed}: {met[:10]}\n{tail}"
        for name, times in starts.items():
            most = 6 if name == "hand" else 8
            times.sort()
            near = min((b - a for a, b in zip(times, times[most:], strict=False)), default=9.0)
            assert near >= 1.0, f"seed {seed}: {most + 1} of {name} within {near} s\n{tail}"
        if server is not None:
            client = app.jobs.client  # type: ignore[attr-defined]
            assert client.keys("*:LOCKED") + client.keys("barnabas:running:*") + client.keys("barnabas:waiting:*") == []
    finally:
        team.end() if not team._log.closed else None
        app.close()
        if server is not None:
            server.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 13 if backend == "redis" else 12, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 125, monkeypatch)
