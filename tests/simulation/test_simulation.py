"""The proof "Simulation": 10,000 schedules without a broken promise, and each planted bug found.

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

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planted import BUGS, Bug, planted
from simulate import simulate

KEPT = Path(__file__).parents[2] / "build" / "failing-seeds.txt"
SCHEDULES = 10_000
MOST = 6_000  # schedules in which a planted bug is to be found


@contextmanager
def _few_collections() -> Iterator[None]:
    """Schedules leave many small cycles: collect them by the thousand."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _play(seeds: Iterable[int]) -> None:
    with _few_collections():
        for seed in seeds:
            try:
                simulate(seed)
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    KEPT.parent.mkdir(exist_ok=True)
                    with KEPT.open("a") as kept:
                        kept.write(f"{seed}\n")
                    print(f"BARNABAS_SEED={seed} pytest {__file__}  # {error!r}")
                raise


@pytest.mark.slow
def test_no_schedule_breaks_a_promise() -> None:
    one = os.environ.get("BARNABAS_SEED")
    if one is not None:
        return _play([int(one)])
    kept = KEPT.read_text().split() if KEPT.exists() else []
    return _play([*dict.fromkeys(map(int, kept)), *range(SCHEDULES)])


@pytest.mark.soak
def test_no_schedule_of_fresh_seeds_breaks_a_promise() -> None:
    start = random.SystemRandom().randrange(1 << 40)
    _play(range(start, start + 20 * SCHEDULES))


def test_a_seed_is_a_schedule() -> None:
    assert [simulate(seed) for seed in range(20)] == [simulate(seed) for seed in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with planted(bug), _few_collections():
        for seed in range(MOST):
            try:
                simulate(seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"{bug.what}: found in schedule {seed + 1}: {error}")
                return
    pytest.fail(f"not found in {MOST} schedules: {bug.what}")
