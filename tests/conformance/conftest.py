"""One suite for every backend: a test asks for `place`, which makes apps on the backend under test and runs real
workers.

A new backend joins by being listed in BACKENDS: its name, and the URLs of topics and queues for one test. Times out
rather than hangs: every wait has a deadline, and says what all threads were doing when it passes.
"""

import faulthandler
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import shared_redis

from barnabas import App, Message
from barnabas.clock import Clock
from barnabas.engine.observe import Failed, Settled
from barnabas.topic import Topic
from barnabas.worker import Worker

BACKENDS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "memory": lambda folder: ("memory:", "memory:"),
    "sqlite": lambda folder: (f"sqlite:///{folder}/barnabas.db",) * 2,
    "redis": lambda folder: ("memory:", f"{shared_redis().url}?prefix={folder.name}:"),
}
JOBS_ONLY = {"redis"}  # their topics are another backend's, whose tests need no repetition
DEADLINE = 20.0  # seconds any wait of a test may take; it usually takes milliseconds


class ShiftedClock(Clock):
    """The real time, which a test can move forward for whatever waits for a time of day (scheduled jobs)."""

    def __init__(self) -> None:
        self.shift = 0.0
        self.now = lambda: time.time() + self.shift

    def advance(self, seconds: float) -> None:
        self.shift += seconds


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


class Place:
    """A backend under test."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.events, self.jobs = BACKENDS[name](folder)
        self.apps: list[App] = []

    def app(self, name: str = "shop", **settings: Any) -> App:
        """A new app on this backend; its clock can be moved, `app.records` has what its observers were told."""
        app = App(name, events=self.events, jobs=self.jobs, **{"checkpoint_interval": 0.02, **settings})
        app.clock = ShiftedClock()
        app.records = []  # type: ignore[attr-defined]
        app.observe(app.records.append)  # type: ignore[attr-defined]
        self.apps.append(app)
        return app

    def again(self, app: App) -> None:
        """Let go of the backend; the next use opens it again. (`memory:` ends with its process, so it stays open.)"""
        if not app.events.url.startswith("memory:"):
            app.close()

    @contextmanager
    def running(self, app: App, *, fails: bool = False, **options: Any) -> Iterator[Worker]:
        """A real worker, with its threads, for as long as the block lasts."""
        worker = Worker(app, **options)
        worker.start()
        try:
            yield worker
        finally:
            held = worker.stop(10.0)
        assert not held, held
        if not fails and worker.failed() is not None:
            raise worker.failed()  # type: ignore[misc]

    def drain(self, app: App, **options: Any) -> None:
        """Run a worker until nothing is left to do."""
        with self.running(app, **options) as worker:
            wait_for(worker.drained, "drained", worker)

    def stored(self, topic: Topic[Any]) -> list[Message[Any]]:
        """What a topic has, partition by partition."""
        events = topic.app.events
        found = []
        for state in events.topics():
            for number, (first, following, _) in enumerate(state.partitions if state.name == topic.name else ()):
                rows = events.read(topic.name, number, first, following - first)
                assert len(rows) == following - first
                found += [topic.stored((topic, number, *row)) for row in rows]
        return found

    def values(self, topic: Topic[Any]) -> list[Any]:
        return [message.value for message in self.stored(topic)]

    def expire(self, app: App) -> None:
        """Let retention do now what it does in the background."""
        if self.name == "sqlite":
            from barnabas.backends.sqlite_expire import expire

            expire(app.events, app.clock.now())
        else:
            app.events.expire(app.clock.now())  # type: ignore[attr-defined]

    def dead(self, topic: Topic[Any]) -> list[Message[Any]]:
        """The dead letters of a topic."""
        return self.stored(topic.dead_topic)


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of topics alone to backends that have topics."""

    def wanted(item: Any) -> bool:
        name = getattr(item, "callspec", None) and item.callspec.params.get("place")
        return name not in JOBS_ONLY or ".job" in inspect.getsource(item.function) or "stocked" in item.fixturenames

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=list(BACKENDS))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The backend under test."""
    monkeypatch.chdir(tmp_path)
    place = Place(request.param, tmp_path)
    yield place
    for app in place.apps:
        app.close()
