"""Batches, while processes are killed at random: each callback runs, once or more, and never before the last job of its batch
has ended, as a witness outside sees."""

import importlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from servers import RedisServer
from test_redis_kill import HERE, Team
from test_unique_kill import QUICK

from barnabas.jobs.batch import statuses


def check(folder: Path, backend: str, blows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("BARNABAS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"kill test of batches on {backend}: seed {seed}")
    dice = random.Random(seed)
    for name, value in {"KILL_FOLDER": folder, "KILL_TIMES": QUICK}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    server = RedisServer(folder, durable=True) if backend == "redis" else None
    url = server.url if server is not None else f"sqlite:///{folder}/jobs.db"
    sys.modules.pop("batches_room", None)
    with monkeypatch.context() as here:  # the quick times are the workers' alone
        here.delenv("KILL_TIMES")
        room = importlib.import_module("batches_room")
    app = room.app
    app.settings = app.settings.override(jobs=url)
    app.jobs.queue_states()
    team, families = Team(url, folder, "batches_room:app"), []
    try:
        for number in range(blows):
            families.append(f"f{number}")
            callbacks = {"on_complete": room.ended, "on_success": room.ended.options(tags=["s"]), "on_death": room.death}
            with app.batch(**callbacks, description=f"f{number} 100") as batch:
                batch.enqueue_many(room.work, [(f"f{number}", n) for n in range(100)])
            time.sleep(dice.uniform(0.02, 0.4))
            team.watch()
            team.kill(dice.randrange(len(team.workers)))
        end, looks = time.monotonic() + 90, 0
        while time.monotonic() < end and looks < 3:  # a look may miss a job that moves meanwhile
            known = list(statuses(app))
            quiet = all(each.complete for each in known) and not any(job.state != "dead" for job in app.jobs.find_jobs())
            looks = looks + 1 if quiet else 0
            time.sleep(0.2)
        team.end()
        lines = [line.split() for line in (folder / "witness").read_text().splitlines()]
        calls = Counter((family, id) for what, family, id, *_ in lines if what == "ended")
        deaths = Counter(family for what, family, *_ in lines if what == "death")
        buried = [msgspec.json.decode(job.payload) for job in app.jobs.find_jobs("dead")]
        gone = {tuple(job["args"]) for job in buried}
        tail = f"seed {seed}\n{(folder / 'workers.log').read_text()[-3000:]}"
        states = Counter(each.state for each in known)
        print(f"{len(known)} batches {dict(states)}, {sum(calls.values())} callbacks, {len(buried)} dead, {len(lines)} lines")
        assert all(each.complete for each in known), [each for each in known if not each.complete] + [tail]
        by_family = {each.description.split()[0]: each for each in known}
        assert {f for family in families for f in (family, f"{family}.11")} == by_family.keys(), tail
        for family, each in by_family.items():
            of = [job for job in gone if job[0] == family]
            assert each.dead == len(of) + (each.total > 90 and by_family[f"{family}.11"].dead > 0), (each, of, tail)
            assert each.total == (105 if each.total > 90 else room.INSIDE), (each, tail)
            assert calls[family, each.id] >= (2 if each.state == "success" else 1), (each, calls[family, each.id], tail)
            assert (deaths[family] > 0) == (each.dead > 0 and "." not in family), (each, tail)
        early = [line for line in lines if line[0] == "ended" and line[3] != "-"]
        early = [line for line in early if not {(line[1], int(n)) for n in line[3].split(",")} <= gone]
        assert not early, f"{early}\n{tail}"
        assert len(gone) <= sum(family.endswith("3") for family in families) + 3, f"{gone}\n{tail}"
    finally:
        team.end() if not team._log.closed else None
        app.close()
        if server is not None:
            server.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_a_dozen_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 13, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, backend, 250, monkeypatch)
