"""What becomes of a delivery."""

from typing import TypeAlias

import msgspec


class Done(msgspec.Struct, frozen=True):
    """It was handled; it will not be delivered to this group again."""


class Again(msgspec.Struct, frozen=True):
    """It failed; run it again at `at` (epoch seconds; 0: a job that has not failed goes behind all others). `payload` is the
    job's new JSON, None for topics. `queue`: which queue it goes to by then, None for its own."""

    at: float
    payload: bytes | None = None
    queue: str | None = None


class Dead(msgspec.Struct, frozen=True):
    """It will not run again: it goes to the dead letters with this reason."""

    reason: str
    payload: bytes | None = None


class Release(msgspec.Struct, frozen=True):
    """It was not handled (a stop, a rebalance): it is given back and counts for nothing."""


Verdict: TypeAlias = Done | Again | Dead | Release
