"""One suite for every backend: a test asks for `place`, which makes apps on the backend under test and runs real
workers.

A new backend joins by being listed in BACKENDS: its name, and the URLs of topics and queues for one test. Times out
rather than hangs: every wait has a deadline, and says what all threads were doing when it passes.
"""

import asyncio
import inspect
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from servers import murmur2, shared_kafka, shared_redis
from watching import wait_for

from barnabas import App, Message
from barnabas.clock import Clock
from barnabas.topic import Topic
from barnabas.worker import Worker

BACKENDS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "memory": lambda folder: ("memory:", "memory:"),
    "sqlite": lambda folder: (f"sqlite:///{folder}/barnabas.db",) * 2,
    "kafka": lambda folder: (f"kafka://{shared_kafka()}?prefix={secrets.token_hex(4)}-", "memory:"),
    "redis": lambda folder: ("memory:", f"{shared_redis().url}?prefix=%2A%5B%3F%5D%5C{folder.name}:"),
}
JOBS_ONLY = {"redis"}  # their topics are another backend's, whose tests need no repetition
EVENTS_ONLY = {"kafka"}  # their jobs are
# The same cluster with the group protocol of KIP-848, in the tests that it could fail: who has what, from where on, and who next
# (the others are in `make soak`).
PROTOCOL = re.compile("steering|pausing|partition|worker|owner|handled_once|assigned|revoked|retry_topic|apart|restart|latest")


class ShiftedClock(Clock):
    """The real time, which a test can move forward for whatever waits for a time of day (scheduled jobs)."""

    def __init__(self) -> None:
        self.shift = 0.0
        self.now = lambda: time.time() + self.shift

    def advance(self, seconds: float) -> None:
        self.shift += seconds


class Place:
    """A backend under test."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, _, protocol = name.partition("-")
        self.events, self.jobs = BACKENDS[self.name](folder)
        self.settings: dict[str, Any] = {"kafka": {"group.protocol": protocol}} if protocol else {}
        self.apps: list[App] = []

    def app(self, name: str = "shop", **settings: Any) -> App:
        """A new app on this backend; its clock can be moved, `app.records` has what its observers were told."""
        app = App(name, events=self.events, jobs=self.jobs, **{"checkpoint_interval": 0.02, **self.settings, **settings})
        if self.name == "kafka":
            from barnabas.backends.kafka import NO_TABLES

            app.table = lambda *args: pytest.skip(NO_TABLES)  # type: ignore[method-assign]
        app.clock = ShiftedClock()
        app.records = []  # type: ignore[attr-defined]
        app.observe(app.records.append)  # type: ignore[attr-defined]
        self.apps.append(app)
        return app

    def partition(self, key: str | bytes, count: int) -> int:
        """Where a key belongs."""
        data = key.encode() if isinstance(key, str) else key
        return (murmur2(data) & 0x7FFFFFFF if self.name == "kafka" else crc32(data)) % count

    def leave(self) -> None:
        """Close all apps; remove what outlives them."""
        if self.name == "kafka" and self.apps:
            events = self.apps[0].events
            names = [events.prefix + name for name in events.metadata()]  # type: ignore[attr-defined]
            if names:
                events.admin.delete_topics(names)  # type: ignore[attr-defined]
        for app in self.apps:
            app.close()

    def again(self, app: App) -> None:
        """Let go of the backend; the next use opens it again. (`memory:` ends with its process, so it stays open.)"""
        if self.events == self.jobs and not app.events.url.startswith("memory:"):
            app.close()
        for home in (app.events, app.jobs):
            if not home.url.startswith("memory:"):
                home.close()

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
                assert len(rows) == following - first or self.name == "kafka"  # the end of a transaction has an offset there
                found += [topic.stored((topic, number, *row)) for row in rows]
        return found

    def values(self, topic: Topic[Any]) -> list[Any]:
        return [message.value for message in self.stored(topic)]

    def expire(self, app: App) -> None:
        """Let retention do now what it does in the background."""
        if self.name == "kafka":
            pytest.skip("Kafka expires what it keeps, and when it likes")
        if self.name == "sqlite":
            from barnabas.backends.sqlite_care import expire

            expire(app.events, app.clock.now())
        else:
            app.events.expire(app.clock.now())  # type: ignore[attr-defined]

    def dead(self, topic: Topic[Any]) -> list[Message[Any]]:
        """The dead letters of a topic."""
        return self.stored(topic.dead_topic)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of topics alone to backends that have topics."""

    def wanted(item: Any) -> bool:
        name = getattr(item, "callspec", None) and item.callspec.params.get("place")
        if name in EVENTS_ONLY and "jobs" in item.path.name:
            return "topic(" in inspect.getsource(item.function)
        jobs = "jobs" in item.path.name or "stocked" in item.fixturenames or ".job" in inspect.getsource(item.function)
        if name == "kafka-consumer":
            if not PROTOCOL.search(item.path.name + item.originalname):
                item.add_marker("soak")
            return not jobs and "sending" not in item.path.name
        return name not in JOBS_ONLY or jobs

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=[*BACKENDS, "kafka-consumer"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The backend under test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BARNABAS_CREATE_TOPICS", "true")
    place = Place(request.param, tmp_path)
    yield place
    place.leave()


@pytest.fixture
def app(place: Place) -> App:
    return place.app()


@pytest.fixture
def numbers(app: App) -> Topic[int]:
    return app.topic("numbers", int, partitions=1)


@pytest.fixture(params=["sync", "async"])
def consume(request: pytest.FixtureRequest, app: App) -> Callable[..., None]:
    """Declare a consumer with this body, as a sync or an async handler."""

    def declare(topic: Topic[int], body: Callable[[int], Any], **options: Any) -> None:
        if request.param == "sync":

            @app.consumer(topic, **options)
            def read(n: int) -> Any:
                return body(n)
        else:

            @app.consumer(topic, **options)
            async def read(n: int) -> Any:
                await asyncio.sleep(0)
                return body(n)

    return declare
