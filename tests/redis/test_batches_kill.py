"""Batches, while processes are killed at random: each callback runs, once or more, and never before the last job of its batch
has ended, as a witness outside sees."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from team import QUICK, Team, unfinished

from barnabas.jobs.batch import statuses


def check(folder: Path, backend: str, blows: int) -> None:
    team = Team(folder, backend, "batches_room", QUICK)
    room = team.room()
    app, families = room.app, [f"f{number}" for number in range(blows)]
    with team.at_work(app):
        for family in families:
            callbacks = {"on_complete": room.ended, "on_success": room.ended.options(tags=["s"]), "on_death": room.death}
            with app.batch(**callbacks, description=f"{family} 100") as batch:
                batch.enqueue_many(room.work, [(family, n) for n in range(100)])
            team.blow("worker", within=0.4)
        team.drain(lambda: [each for each in statuses(app) if not each.complete] or unfinished(app), 90)
        known, lines, tail = [*statuses(app)], team.said(), team.tail
        calls = Counter((family, id) for what, family, id, *_ in lines if what == "ended")
        deaths = Counter(family for what, family, *_ in lines if what == "death")
        buried = [msgspec.json.decode(job.payload) for job in app.jobs.find_jobs("dead")]
        gone = {tuple(job["args"]) for job in buried}
        states = Counter(each.state for each in known)
        print(f"{len(known)} batches {dict(states)}, {sum(calls.values())} callbacks, {len(buried)} dead, {len(lines)} lines")
        by_family = {each.description.split()[0]: each for each in known}
        assert {f for family in families for f in (family, f"{family}.11")} == by_family.keys(), tail
        for family, each in by_family.items():
            of = [job for job in gone if job[0] == family]
            assert each.complete, (each, tail)
            assert each.dead == len(of) + (each.total > 90 and by_family[f"{family}.11"].dead > 0), (each, of, tail)
            assert each.total == (105 if each.total > 90 else room.INSIDE), (each, tail)
            assert calls[family, each.id] >= (2 if each.state == "success" else 1), (each, calls[family, each.id], tail)
            assert (deaths[family] > 0) == (each.dead > 0 and "." not in family), (each, tail)
        early = [line for line in lines if line[0] == "ended" and line[3] != "-"]
        early = [line for line in early if not {(line[1], int(n)) for n in line[3].split(",")} <= gone]
        assert not early, f"{early}\n{tail}"
        assert len(gone) <= sum(family.endswith("3") for family in families) + 3, f"{gone}\n{tail}"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 13)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 500)
