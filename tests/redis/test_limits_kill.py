"""Limits hold whatever is killed, frozen or restarted, and no slot is lost by that: seen by an outside witness."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from team import QUICK, Team, unfinished

from barnabas import App

LOAD = {"call": 30, "rated": 10, "byhand": 3}  # jobs before each blow
MANY = {"call": 30, "rated": 6, "byhand": 1}  # of hundreds: as many as their rates let through


def check(folder: Path, backend: str, blows: int, room: str = "limits_room", names: Sequence[str] = tuple(LOAD)) -> None:
    team = Team(folder, backend, room, QUICK)
    app, dice, kinds = App("sender", events="memory:", jobs=team.url), team.dice, ("worker", "worker", "frozen", "redis")
    jobs, count, load = {name: app.foreign_job(name) for name in names}, 0, LOAD if blows < 100 else MANY
    with team.at_work(app):
        for _ in range(blows):
            futures: list[Any] = []
            for name in names:
                futures += [jobs[name].enqueue(count + n, f"k{dice.randrange(3)}") for n in range(load[name])]
                count += load[name]
            if room == "limits_room":
                team.blow(dice.choice(kinds[: 3 + (backend == "redis")]))
            assert [future.exception(60) for future in futures] == [None] * len(futures)
        team.drain(lambda: unfinished(app), 60 + blows)
        lines, starts = team.said(), defaultdict(list)
        for what, _, at, name in lines:
            if what == "rated":
                starts[name].append(float(at))
        met = [line for line in lines if line[0] == "met"]
        print(f"{len(lines)} runs, blows {dict(team.blows)}")
        dead = {json.loads(job.payload)["args"][0] for job in app.jobs.find_jobs("dead")}
        lost = count - len(dead | {int(n) for what, n, *_ in lines if what != "met"})
        assert len(dead) <= 3 and lost == 0, f"{lost} jobs did not run, {dead} are dead\n{team.tail}"
        assert not met, f"{met[:10]}\n{team.tail}"
        for name, times in starts.items():
            most = 6 if name == "hand" else 8
            times.sort()
            near = min((b - a for a, b in zip(times, times[most:], strict=False)), default=9.0)
            assert near >= 1.0, f"{most + 1} of {name} within {near} s\n{team.tail}"
        if backend == "redis":
            client = app.jobs.client  # type: ignore[attr-defined]
            assert client.keys("*:LOCKED") + client.keys("barnabas:running:*") + client.keys("barnabas:waiting:*") == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 13 if backend == "redis" else 12)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "names"), [("redis", [*LOAD]), ("sqlite", ["call"])])
def test_clocks_that_are_wrong_by_a_minute(tmp_path: Path, backend: str, names: list[str]) -> None:
    """A server has the time; a file has that of its machine, which only a rate needs."""
    check(tmp_path, backend, 5, "skewed_room", names)
    assert len(list(tmp_path.glob("skew*"))) == 3


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 750)  # two of three are kills, at least
