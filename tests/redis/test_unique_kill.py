"""Two jobs of one kind never run at once, whatever is killed, frozen or restarted, and no lock outlives that: seen by an
outside witness. Only a process that is frozen for longer than its lease may be met, and only once; what it did is not settled.
"""

import time
from collections import Counter
from pathlib import Path

import pytest
from team import QUICK, Team, unfinished

from barnabas import App, until_executed
from barnabas.errors import Conflict

KINDS, LOAD = 5, 40  # of `charge`; jobs before each blow


def check(folder: Path, backend: str, blows: int, times: str, freeze: float) -> None:
    team = Team(folder, backend, "unique_room", times)
    app, dice, kinds = App("sender", events="memory:", jobs=team.url), team.dice, ("worker", "frozen", "redis")
    charge = app.foreign_job("charge")

    @app.job(unique=until_executed(by="n"))
    def once(n: int) -> None: ...

    frozen_pids, refused = set(), 0
    with team.at_work(app):
        for number in range(blows):
            futures = [charge.enqueue(n, f"k{dice.randrange(KINDS)}") for n in range(number * LOAD, number * LOAD + LOAD)]
            futures += [once.enqueue(number * 10 + n) for n in [0, 1, 2, 0, 1]]
            if number == blows // 2:  # one that is frozen beyond its lease, and thaws while others work
                frozen_pids.add(team.workers[0].pid)
                with team.frozen(0, freeze):
                    time.sleep(freeze / 2)
            team.blow(dice.choice(kinds[: 2 + (backend == "redis")]), spared=1)
            refused += sum(isinstance(future.exception(60), Conflict) for future in futures)
        team.drain(lambda: unfinished(app), freeze + 45)  # a wake-up that is lost costs 60 s
        lines = team.said()
        ran = Counter(int(n) for what, n, *_ in lines if what == "ran")
        met = [(int(pid), int(holder)) for what, _, pid, holder in lines if what == "met"]
        print(f"{len(lines)} runs, {refused} refused, {len(met)} met another, blows {dict(team.blows)}")
        dead = [job.payload for job in app.jobs.find_jobs("dead")]
        assert len(dead) <= 3, f"{dead}\n{team.tail}"
        assert len(ran) >= blows * LOAD - len(dead) - len(met), f"{blows * LOAD - len(ran)} jobs did not run\n{team.tail}"
        strangers = [pair for pair in met if not frozen_pids & set(pair)]
        assert not strangers and (backend == "redis" or not met), f"{met}\n{team.tail}"
        thawed = [pair for pair in met if pair[0] in frozen_pids]  # (its own run is met by each that comes meanwhile)
        assert len(thawed) <= len(frozen_pids), f"{thawed}\n{team.tail}"
        assert refused <= 2 * blows and refused > blows / 4
        assert all(app.jobs.holder(once.lock.key((n,))) is None for n in range(blows * 10))
        if backend == "redis":
            client = app.jobs.client  # type: ignore[attr-defined]
            assert client.keys("uniquejobs:*") + client.keys("barnabas:running:*") + client.keys("barnabas:locks") == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 12, QUICK, 9.0)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 300, "", 50.0)
