"""Two jobs of one kind never run at once, whatever is killed, frozen or restarted, and no lock outlives that: seen by an
outside witness. Only a process that is frozen for longer than its lease may be met, and only once; what it did is not settled.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from servers import RedisServer
from test_redis_kill import HERE, Team, blow, frozen

from barnabas import App, until_executed
from barnabas.errors import Conflict

KINDS, LOAD = 5, 40  # of `charge`; jobs before each blow
QUICK = "LEASE=6 RENEW=0.8 SCAN=1.0 CALM=6.0 TICK=0.2 BLOCK=2"


class NoProxy:
    """No line to cut: blows of that kind have no effect."""

    down = False


def check(folder: Path, backend: str, blows: int, times: str, freeze: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("BARNABAS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"kill test of unique jobs on {backend}: seed {seed}")
    dice, kinds = random.Random(seed), ("worker", "frozen") + (("redis",) if backend == "redis" else ())
    for name, value in {"KILL_FOLDER": folder, "KILL_TIMES": times}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    server = RedisServer(folder, durable=True) if backend == "redis" else None
    url = server.url if server is not None else f"sqlite:///{folder}/jobs.db"
    app = App("sender", events="memory:", jobs=url)
    charge = app.foreign_job("charge")

    @app.job(unique=until_executed(by="n"))
    def once(n: int) -> None: ...

    app.jobs.queue_states()
    team, done = Team(url, folder, "unique_room:app"), Counter[str]()
    frozen_pids, refused = set(), 0
    try:
        for number in range(blows):
            futures = [charge.enqueue(n, f"k{dice.randrange(KINDS)}") for n in range(number * LOAD, number * LOAD + LOAD)]
            futures += [once.enqueue(number * 10 + n) for n in [0, 1, 2, 0, 1]]
            if number == blows // 2:  # one that is frozen beyond its lease, and thaws while others work
                frozen_pids.add(team.workers[0].pid)
                with frozen(team, 0, freeze):
                    time.sleep(freeze / 2)
            kind = dice.choice(kinds)
            done[kind] += 1
            blow(kind, team, server, NoProxy(), dice)  # type: ignore[arg-type]
            refused += sum(isinstance(future.exception(60), Conflict) for future in futures)
        work = lambda: sum(1 for job in app.jobs.find_jobs() if job.state != "dead")  # noqa: E731
        end = time.monotonic() + 2 * freeze + 90
        while (left := work()) and time.monotonic() < end:
            team.watch()
            time.sleep(0.2)
        team.end()
        lines = [line.split() for line in (folder / "witness").read_text().splitlines()]
        ran = Counter(int(n) for what, n, *_ in lines if what == "ran")
        met = [(int(pid), int(holder)) for what, _, pid, holder in lines if what == "met"]
        print(f"{len(lines)} runs, {refused} refused, {len(met)} met another, blows {dict(done)}")
        tail = (folder / "workers.log").read_text()[-3000:]
        assert left == 0, f"seed {seed}: {left} jobs are stuck\n{tail}"
        dead = [job.payload for job in app.jobs.find_jobs("dead")]
        assert len(dead) <= 3, f"seed {seed}: {dead}"
        assert len(ran) >= blows * LOAD - len(dead) - len(met), f"seed {seed}: {blows * LOAD - len(ran)} jobs did not run\n{tail}"
        strangers = [pair for pair in met if not frozen_pids & set(pair)]
        assert not strangers and (backend == "redis" or not met), f"seed {seed}: {met}\n{tail}"
        thawed = [pair for pair in met if pair[0] in frozen_pids]  # (its own run is met by each that comes meanwhile)
        assert len(thawed) <= len(frozen_pids), f"seed {seed}: {thawed}\n{tail}"
        assert refused <= 2 * blows and refused > blows / 4
        assert all(app.jobs.holder(once.lock.key((n,))) is None for n in range(blows * 10))
        if server is not None:
            client = app.jobs.client  # type: ignore[attr-defined]
            assert client.keys("uniquejobs:*") + client.keys("barnabas:running:*") + client.keys("barnabas:locks") == []
    finally:
        team.end() if not team._log.closed else None
        app.close()
        if server is not None:
            server.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 12, QUICK, 9.0, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 300, "", 50.0, monkeypatch)
