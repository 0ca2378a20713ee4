"""Chains, results, schedules, debounced and replaced calls, deadlines, steps, priorities, tags and deploys keep their promises,
all at once, whatever is killed, frozen or restarted: seen by an outside witness."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from team import QUICK, Team

from barnabas.errors import Conflict, JobFailed
from barnabas.queues import jobs

CHAINS, ITEMS = 10, 300  # before each blow; of a walk, of which two begin at every fifth
TICKS = 20  # real ones, at least
LATE = 1.0  # seconds between two looks of the sender at its clock, on a busy machine


def enqueue(room: Any, number: int, futures: list[Any], chains: dict[int, Any], versions: dict[Any, Any]) -> None:
    priority = {"priority": number % 3} if room.app.jobs.ranks else {}
    chain = room.first.options(**priority).then(room.second, room.third)
    for n in range(number * CHAINS, number * CHAINS + CHAINS):
        chains[n] = chain.enqueue(n)
    futures += [room.index.enqueue_debounced(f"page {number}", number, version, wait=0.3) for version in range(4)]
    versions |= {(number, n): room.replace.enqueue_in(0.1 * (n % 2), number, n) for n in range(4)}
    futures.append(room.rare.enqueue(number))
    futures += [room.alarm.enqueue(n, time.time() + 2) for n in range(number * 5, number * 5 + 5)]
    if number % 5 == 0:
        futures += [room.walk.enqueue(number, ITEMS), room.walk_awaited.enqueue(number + 1, ITEMS)]


def check(folder: Path, backend: str, blows: int) -> None:
    team = Team(folder, backend, "beyond_room", QUICK)
    room, kinds = team.room(), ["worker"] * 6 + ["frozen"] + ["redis"] * (backend == "redis")
    app, dice, witness = room.app, team.dice, folder / "witness"
    futures: list[Any] = []
    chains: dict[int, Any] = {}
    versions: dict[Any, Any] = {}

    def stored() -> list[Any]:
        jobs = [(job.state, json.loads(job.payload)) for job in app.jobs.find_jobs()]
        return [(state, job["class"], job["args"], job["jid"]) for state, job in jobs]

    def left() -> Any:
        ticks = len({numbers for what, numbers in room.lines(folder) if what == "tick"})
        return [job for job in stored() if job[0] != "dead" and job[1] != "tick"] or (f"{ticks} ticks" if ticks < TICKS else None)

    with team.at_work(app):
        for number in range(blows):
            enqueue(room, number, futures, chains, versions)
            if number == blows // 3:
                tagged(app, number + 1)
                (folder / "deployed").touch()
            until, size = time.monotonic() + 4, witness.stat().st_size + dice.randrange(100, 2500)
            while time.monotonic() < until and witness.stat().st_size < size:  # else nothing but starts would be hit
                time.sleep(0.01)
            team.blow(kind := dice.choice(kinds), within=0.0 if kind == "worker" else 0.3)
        for future in [*futures, *chains.values()]:
            future.result(60)
        kept = {at for at, future in versions.items() if not isinstance(future.exception(60), Conflict)}
        team.kill(0)  # (one at least knows what was deployed)
        team.drain(left, 120)
        dead, ticks = [job for job in stored() if job[0] == "dead"], [job[2][0] for job in stored() if job[1] == "tick"]
        assert len(dead) <= 1 + blows // 10, f"{dead} are dead\n{team.tail}"
        said: dict[str, list[Any]] = {}
        for what, numbers in room.lines(folder):
            said.setdefault(what, []).append(numbers)
        again = {what: f"{len(set(all_))} and {len(all_) - len(set(all_))} again" for what, all_ in said.items()}
        print(again, dict(team.blows), dead)
        verify(room, blows, said, dead, ticks, chains, team.seed)
        gone = {(name, args[0]) for _, name, args, _ in dead}
        newest = dict(sorted(kept)) if kept else {}
        lost = [at for at in newest.items() if at not in said["replace"] and ("replace", at[0]) not in gone]
        lost += [n for n in range(blows) if (n,) not in said["rare"] and ("rare", n) not in gone]
        assert len(newest) == blows and not lost, f"seed {team.seed}: {lost} did not run"
        names = {f"steps:{jid}" for _, _, _, jid in dead}
        assert notes(app, "steps:") <= names


def verify(room: Any, blows: int, said: Any, dead: list[Any], ticks: list[str], chains: dict[int, Any], seed: int) -> None:
    of = f"seed {seed}"
    gone = Counter(name for _, name, _, _ in dead)
    walks = [n for number in range(0, blows, 5) for n in (number, number + 1)]
    missing = {(n, item) for n in walks for item in range(ITEMS)} - {*said["step"]}
    missing = {at for at in missing if not any(name.startswith("walk") and args[0] == at[0] for _, name, args, _ in dead)}
    assert not missing, f"{of}: {len(missing)} items were left out: {sorted(missing)[:10]}"
    children = {(n, item) for n in walks for item in range(0, ITEMS, 10)} - {*said["child"]}
    assert len(children) <= gone["child"] + 30 * (gone["walk"] + gone["walk_awaited"]), f"{of}: not sent: {sorted(children)}"
    assert len(said["step"]) < 2 * len(walks) * ITEMS + 2000, f"{of}: items come again and again"
    for n, future in chains.items():
        try:
            assert future.outcome(0) == n + 2 and (n + 2,) in said["chain"], f"{of}: the outcome of chain {n}"
        except JobFailed as error:
            assert "crashes of its process" in str(error), f"{of}: {error}"
            gone["chain"] -= 1
    assert gone["chain"] + gone["first"] + gone["second"] + gone["third"] >= 0
    pages = Counter(said["index"])
    assert {version for _, version in pages} == {3} and len(pages) >= blows - gone["index"], f"{of}: {pages}"
    late = [by for _, by in said.get("alarm", []) if by > LATE]
    assert not late, f"{of}: were let in so many seconds after their deadline: {late}"
    ran = Counter(tick for (tick,) in said["tick"])
    assert len(ran) >= TICKS, f"{of}: the clock stands still"
    found = ran + Counter(round(room.datetime.fromisoformat(at).timestamp()) for at in ticks)
    last = json.loads(room.app.jobs.note("cron:room:tick"))["last"]
    assert sorted(found) == list(range(min(found), max(found) + 1)) and max(found) >= last, f"{of}: ticks are missing"
    assert sum(found.values()) - len(found) <= 2 * blows, f"{of}: ticks come twice: {found}"


def tagged(app: Any, count: int) -> None:
    """Jobs that no worker knows yet are found by their tag, and no others, wherever they are. (One look may miss what moves.)"""
    found, end = set[Any](), time.monotonic() + 20
    while len(found) < count and time.monotonic() < end:
        found |= {(each.name, each.args) for each in jobs(app, tag="rare")}
    assert found == {("rare", f"[{n}]") for n in range(count)}


def notes(app: Any, prefix: str) -> set[str]:
    """The names of notes that are kept."""
    home = app.jobs
    if home.url.startswith("redis"):
        return {name.decode().partition("barnabas:note:")[2] for name in home.client.keys(f"*barnabas:note:{prefix}*")}
    return {str(name) for name, _ in home.cells("barnabas.notes") if str(name).startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_twenty_five_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 25)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_hundreds_of_blows(tmp_path: Path, backend: str) -> None:
    check(tmp_path, backend, 600)  # seven of eight are kills
