"""Run an app in a test: no broker, no threads to wait for, no sleeps, and a clock that only the test moves.

    with barnabas.testing.run(app) as t:
        orders.send(Order(...))
        t.drain()
        assert [m.value for m in t.sent(receipts)] == [Receipt(...)]

Topics, queues and tables live in `memory:` for as long as the block lasts; settings come from the code alone. Handlers
run in the thread that calls `drain()`, async ones on an event loop of their own (which shares no locks and pools with
that of an async test). Not here: a `timeout=` is not enforced (nobody watches), and a batch does not wait to fill up
(nothing else is coming).
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import msgspec

from barnabas.app import App
from barnabas.backends.memory import MemoryBackend
from barnabas.clock import FakeClock
from barnabas.codec import make_codec
from barnabas.engine.observe import Failed, Observers
from barnabas.engine.runner import Runner
from barnabas.errors import BarnabasError, must, own_part
from barnabas.inspect import span
from barnabas.job import Job
from barnabas.jobs.payload import parse
from barnabas.jobs.work import name_of
from barnabas.killing import kill
from barnabas.message import Message, Outgoing
from barnabas.settings import Settings
from barnabas.state.table import Table
from barnabas.topic import Topic
from barnabas.worker import Worker

__all__ = ["FakeClock", "Trial", "kill", "run"]
ROUNDS = 10_000  # turns of one drain; whoever needs more goes round in circles


@contextlib.contextmanager
def run(app: App, *, raises: bool = True) -> Iterator["Trial"]:
    """Put `app` into a test: on_start hooks and set_up run here, tear_down and on_stop at the end of the block.

    raises: a failing handler fails the test, `drain` raises its exception; False: retries and dead letters take their
    usual road. Afterwards everything about the app is as it was before.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_isolated(app))
        trial = Trial(app, raises)
        stack.callback(trial._end)
        trial._begin()
        yield trial


@contextlib.contextmanager
def _isolated(app: App) -> Iterator[None]:
    """The app with the code's settings, empty `memory:` backends, a fake clock and observers' counts of its own."""
    settings, clock = app.settings, FakeClock()
    memory = _Memory("memory:", clock)
    with contextlib.closing(memory):
        app.adopt(Settings({**settings.code, "events": "memory:", "jobs": "memory:"}, ignore_file=True, ignore_env=True))
        try:
            memory.declare(app.all_topics())
            with app.lent(_events=memory, _jobs=memory, clock=clock, observers=Observers(app.observers.watchers)):
                yield
        finally:
            app.adopt(settings)


class _Memory(MemoryBackend):
    """`memory:`, which also knows in which order messages came, over all partitions."""

    def __init__(self, url: str, clock: FakeClock) -> None:
        super().__init__(url, clock)
        self.came: dict[str, list[tuple[int, int]]] = {}

    def _append(self, out: Outgoing) -> tuple[int, int] | None:
        at = super()._append(out)
        if at is not None:
            self.came.setdefault(out[0].name, []).append(at)
        return at


class Trial:
    """An app in a test, as `run` hands it out. `clock` stands still: `t.clock.advance(seconds)` moves it."""

    clock: FakeClock

    def __init__(self, app: App, raises: bool) -> None:
        self.app = app
        self.clock = app.clock  # type: ignore[assignment]
        self._memory: _Memory = app.events  # type: ignore[assignment]
        self._raises = raises
        self._failed: list[Failed] = []
        self._runner = asyncio.Runner()
        self._worker: Worker | None = None

    def drain(self, *, raises: bool | None = None) -> None:
        """Run handlers until nothing is ready. What waits for a time to come stays; move the clock and drain again.

        Raises the exception of the first handler that failed, after what succeeded beside it is settled; with
        raises=False none but that of on_dead="stop".
        """
        raises = self._raises if raises is None else raises
        self._failed = []
        runners = self._worker.runners if self._worker is not None else []
        if self._worker is not None and self._worker.cron:
            self._worker.cron.step()
        for _ in range(ROUNDS):
            moved = [self._turn(runner) for runner in runners]
            for runner in runners:
                if raises and self._failed:
                    for each in runners:
                        each.settle()
                    raise _cause(self._failed[0])
                for crew in runner.crews:
                    if crew.error is not None:
                        raise crew.error
            if not any(moved) and not (self._worker is not None and self._worker.batches and self._worker.batches.step()):
                return
        raise AssertionError(f"not drained after {ROUNDS} turns: does a handler send to a topic that leads back to it?")

    def sent(self, topic: Topic[Any]) -> list[Message[Any]]:
        """The messages on a topic, in the order in which they came."""
        must(isinstance(topic, Topic), "sent", "topic", topic, "give what app.topic(...) returned")
        return [self._message(topic, topic.decode, (), *at) for at in self._memory.came.get(topic.name, ())]

    def enqueued(self, job: Job) -> list[tuple[Any, ...]]:
        """The arguments of each job that waits: ready ones first, then by time those scheduled or to be retried."""
        must(isinstance(job, Job), "enqueued", "job", job, "give the decorated function")
        memory = self._memory
        payloads = [out.payload for queue in memory.ready.values() for _, out in sorted(queue, key=lambda row: row[0])]
        payloads += [out.payload for _, _, _, out in sorted(memory.later, key=lambda row: row[:2])]
        return [job.decode_args(parse(payload).args) for payload in payloads if _is_of(job, payload)]

    def dead(self, source: Topic[Any] | Job) -> list[Any]:
        """The dead letters of a topic, as Messages whose headers give the reason (the value decoded if it can be, else
        bytes), or the dead jobs of a job, as dicts with `args`, `error_class`, `error_message` and so on."""
        if isinstance(source, Job):
            decode = make_codec("a dead job", dict, "json")[1]
            return [decode(out.payload) for out in self._memory.buried.values() if _is_of(source, out.payload)]
        must(isinstance(source, Topic), "dead", "source", source, "give a topic or a job, as they were declared")
        name = source.dead_topic.name
        return [self._message(source.dead_topic, source.decode, (Exception,), *at) for at in self._memory.came.get(name, ())]

    def table(self, table: Table[Any]) -> dict[Any, Any]:
        """A table as it was last settled."""
        must(isinstance(table, Table), "table", "table", table, "give what app.table(...) returned")
        with table.open() as view:
            return dict(view.items())

    # What `run` calls.

    def _begin(self) -> None:
        self.app.observers.watchers.append(self._saw)
        if not self.app.consumers and not self.app.job_handlers:
            return
        worker = Worker(self.app, inline=True)
        worker.drive = lambda coroutine: _off_loop(lambda: self._runner.run(coroutine))
        worker.start()
        self._worker = worker
        for runner in worker.runners:
            runner.step(0.0)  # partitions are assigned: from here on a consumer from "latest" gets what is sent

    def _end(self) -> None:
        try:
            if self._worker is not None:
                self._worker.stop(0.0)
        finally:
            _off_loop(self._runner.close)

    def _saw(self, record: Any) -> None:
        quiet = ("skipped", "expired", "superseded", "cancelled")
        if isinstance(record, Failed) and (record.outcome not in quiet or record.error is not None):
            self._failed.append(record)

    # One turn.

    def _turn(self, runner: Runner) -> bool:
        """Fetch, run what is ready; True if there was anything to do."""
        moved = runner.step(0.0)
        for crew in runner.crews:
            if crew.lanes.ready or crew.solo is not None:
                moved = True
                crew.step()
        return moved

    def _message(self, topic: Topic[Any], decode: Any, odd: Any, partition: int, offset: int) -> Message[Any]:
        (stored,) = span(self._memory, topic.name, partition, offset, offset + 1)
        with contextlib.suppress(*odd):
            return stored if stored.value is None else msgspec.structs.replace(stored, value=decode(stored.value))
        return stored


def _off_loop(act: Callable[[], Any]) -> Any:
    """Call `act`, which runs an event loop; an async test has one in this thread, so there it takes another thread."""
    if asyncio._get_running_loop() is None:
        return act()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, act).result()


def _cause(failure: Failed) -> BaseException:
    """The handler's own exception, with a note on where it happened."""
    at = f"[{failure.partition}]@{failure.offset}" if failure.partition >= 0 else " (a queue)"
    where = f"{failure.name}, {failure.topic}{at}, attempt {failure.attempt}"
    error = failure.error or BarnabasError(f"{failure.name}: {failure.reason}")
    error.add_note(f"{where}: {failure.outcome}; t.drain(raises=False) lets retries and dead letters go their way")
    return error.with_traceback(own_part(error) or error.__traceback__)


def _is_of(job: Job, payload: bytes) -> bool:
    return name_of((0, None, payload, None, 0.0)) == job.name
