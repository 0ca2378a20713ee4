"""What tests of the suite send and wait for, and what observers were told."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from barnabas import App
from barnabas.engine.observe import Failed, Settled
from barnabas.worker import Worker

DEADLINE = 20.0  # seconds any wait of a test may take; it usually takes milliseconds


class Step(msgspec.Struct):
    """The n-th message of a key."""

    key: str
    n: int = 0


def wait_for(condition: Callable[[], Any], what: str = "", worker: Worker | None = None) -> None:
    """Wait until `condition()`; fail at the deadline, or when a runner of the worker has failed."""
    pause, end = threading.Event(), time.monotonic() + DEADLINE
    while not condition():
        if worker is not None and worker.failed() is not None:
            raise worker.failed()  # type: ignore[misc]
        if time.monotonic() > end:
            faulthandler.dump_traceback(file=sys.__stderr__)
            pytest.fail(f"waited {DEADLINE} s for {what or condition}")
        pause.wait(0.002)


def failures(app: App, outcome: str | None = None) -> list[Failed]:
    """The failures that observers were told of."""
    records = [r for r in app.records if isinstance(r, Failed)]  # type: ignore[attr-defined]
    return [r for r in records if outcome in (None, r.outcome)]


def waiting(app: App, queue: str = "default") -> dict[str, int]:
    """How many jobs of a queue wait for a time to come, or are dead."""
    return {kind: sum(1 for _ in app.jobs.find_jobs(kind, queue)) for kind in ("scheduled", "retry", "dead")}


def settled(app: App, name: str) -> int:
    """How many deliveries of this consumer observers saw settled."""
    return sum(r.count for r in app.records if isinstance(r, Settled) and r.name == name)  # type: ignore[attr-defined]
