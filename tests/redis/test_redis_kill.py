"""Real processes and a real Redis that writes every answer to disk; all of them killed, frozen and cut off at random.

No job whose enqueueing was answered is lost, none is stuck, repeats are counted and bounded.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from team import Team

from barnabas import App

LOAD = 200  # jobs before each blow
STUCK = 110.0  # seconds the rest may take: a lease, the calm after a restart, the scan, and the work


def check(folder: Path, kills: int) -> None:
    team = Team(folder, "redis", "room", line=True, options=("--auto-aof-rewrite-min-size", "1mb"))  # or it loads for ever longer
    app, dice = App("sender", events="memory:", jobs=team.url, send_timeout=120.0), team.dice
    note, task = app.foreign_job("note", queue="notes"), app.foreign_job("task", queue="tasks")
    with team.at_work(app):
        with team.frozen(0, 36.0):  # for longer than its lease
            for number in range(kills):
                first = number * LOAD
                futures: list[Any] = [note.enqueue(n) if n % 3 else task.enqueue(n) for n in range(first, first + LOAD // 2)]
                futures.append(note.enqueue_many((n,) for n in range(first + LOAD // 2, first + LOAD - 20)))
                futures += [task.enqueue_in(dice.uniform(0.1, 3.0), n) for n in range(first + LOAD - 20, first + LOAD)]
                team.blow(dice.choices(("worker", "redis", "cut", "frozen"), (6, 2, 1, 1))[0], spared=1)
                for future in futures:
                    future.result(150)
        client = app.jobs.client
        team.drain(lambda: app.jobs.open_work({}, ["notes", "tasks"]) + client.zcard("retry") + client.zcard("schedule"), STUCK)
        ran = Counter(int(n) for n, _ in team.said())
        buried = {json.loads(job.payload)["args"][0] for job in app.jobs.find_jobs("dead")}
        repeats, total = sum(ran.values()) - len(ran), kills * LOAD
        print(f"{total} jobs, {repeats} repeats, {len(buried)} dead, blows {dict(team.blows)}")
        most = 3 * (team.blows["redis"] + team.blows["cut"])  # who begins without a Redis says so and ends; so does the next
        assert team.refused <= most, f"workers ended by themselves\n{team.tail}"
        lost = set(range(total)) - ran.keys() - buried
        assert not lost, f"{len(lost)} jobs were lost: {sorted(lost)[:10]}\n{team.tail}"
        assert len(buried) <= 3, f"{buried} were buried\n{team.tail}"
        assert repeats < total / 2, f"{repeats} repeats of {total}\n{team.tail}"
        assert client.keys("barnabas:work:*") + client.keys("barnabas:landing:*") + client.keys("barnabas:alone:*") == []


@pytest.mark.slow
def test_fifty_blows_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path, 50)


@pytest.mark.soak
def test_a_thousand_blows_lose_nothing(tmp_path: Path) -> None:
    check(tmp_path, 1000)
