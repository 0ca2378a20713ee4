"""The proof "Simulation": 10,000 schedules of the engine, and 1,500 of jobs that need each other, without a broken promise,
and each planted bug found.

A failing seed is printed and kept in build/failing-seeds.txt, which later runs play first. BARNABAS_SEED=n plays one
alone.
"""

import gc
import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import jobs
import simulate
from planted import BUGS, JOB_BUGS, Bug, planted

KEPT = Path(__file__).parents[2] / "build"  # failing-seeds.simulate.txt, failing-seeds.jobs.txt
SCHEDULES = {simulate: 10_000, jobs: 1_500}
both = pytest.mark.parametrize("world", SCHEDULES, ids=lambda world: world.__name__)
MOST = 6_000  # schedules in which a planted bug is to be found


@contextmanager
def _few_collections() -> Iterator[None]:
    """Schedules leave many small cycles: collect them by the thousand."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 5)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _kept(world: ModuleType) -> Path:
    return KEPT / f"failing-seeds.{world.__name__}.txt"


def _play(world: ModuleType, seeds: Iterable[int]) -> None:
    with _few_collections():
        for seed in seeds:
            try:
                world.simulate(seed)
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    KEPT.mkdir(exist_ok=True)
                    with _kept(world).open("a") as kept:
                        kept.write(f"{seed}\n")
                    print(f"BARNABAS_SEED={seed} pytest {__file__} -k {world.__name__}  # {error!r}")
                raise


@pytest.mark.slow
@both
def test_no_schedule_breaks_a_promise(world: ModuleType) -> None:
    one = os.environ.get("BARNABAS_SEED")
    if one is not None:
        return _play(world, [int(one)])
    kept = _kept(world).read_text().split() if _kept(world).exists() else []
    return _play(world, [*dict.fromkeys(map(int, kept)), *range(SCHEDULES[world])])


@pytest.mark.soak
@both
def test_no_schedule_of_fresh_seeds_breaks_a_promise(world: ModuleType) -> None:
    start = random.SystemRandom().randrange(1 << 40)
    _play(world, range(start, start + 20 * SCHEDULES[world]))


@both
def test_a_seed_is_a_schedule(world: ModuleType) -> None:
    assert [world.simulate(seed) for seed in range(20)] == [world.simulate(seed) for seed in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS + JOB_BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug) -> None:
    world = jobs if bug in JOB_BUGS else simulate
    with planted(bug), _few_collections():
        for seed in range(MOST):
            try:
                world.simulate(seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"{bug.what}: found in schedule {seed + 1}: {error}")
                return
    pytest.fail(f"not found in {MOST} schedules: {bug.what}")
