"""The line is cut at every single command in turn, before it arrives or before its answer does: nothing is lost by it,
nothing is stuck, and nothing runs more often than at-least-once allows."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.connection import AbstractConnection
from servers import shared_redis

from barnabas import App, Reject, RetryAfter
from barnabas.backends import redis_life
from barnabas.errors import BackendError
from barnabas.worker import Worker

JOBS, LATER = 40, 10


class Line:
    """Counts what goes over all connections, and breaks one of them at the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.count, self.at, self._lock = 0, 0, threading.Lock()
        real = getattr(AbstractConnection, what)

        def counted(connection: Any, *args: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                hit = self.count == self.at
            if not hit:
                return real(connection, *args, **options)
            if what == "read_response":
                real(connection, *args, **options)  # so the server has done it
            connection.disconnect()
            raise redis.ConnectionError("cut by the test")

        monkeypatch.setattr(AbstractConnection, what, counted)


@pytest.fixture
def client() -> Iterator[Any]:
    with redis.Redis(port=shared_redis().port, db=8) as client:
        yield client


def scenario(line: Line, at: int, client: Any) -> None:
    """Enqueue, schedule, claim, settle, retry, bury, move, stop, with the n-th step broken."""
    client.flushdb()
    app = App("steps", events="memory:", jobs=shared_redis().url.replace("/0", "/8"), threads=4, checkpoint_interval=0.01)
    ran: Counter[int] = Counter()
    failed: set[int] = set()

    @app.job(queue="a", retry=10)
    def work(n: int) -> None:
        ran[n] += 1
        if n % 10 == 3:
            raise Reject("no")
        if n % 5 == 1 and n not in failed:
            failed.add(n)
            raise RetryAfter(0.01)

    try:
        app.jobs  # noqa: B018 - opened before the count begins
        line.count, line.at = 0, at
        sent = [work.enqueue_many((n,) for n in range(JOBS - LATER))]
        sent += [work.enqueue_in(0.05, n) for n in range(JOBS - LATER, JOBS)]  # type: ignore[misc]
        worker = Worker(app)
        for _ in range(2):  # a worker does not start while Redis is away, and says so
            try:
                worker.start()
                break
            except Exception:
                worker = Worker(app)
        for future in sent:
            future.result(10)
        end = time.monotonic() + 20

        def left() -> int:
            try:
                return app.jobs.open_work({}, ["a"])
            except BackendError:  # it was this one that was cut
                return 1

        while left() or client.zcard("retry") + client.zcard("schedule") or left():  # (in hand, waiting, in a queue again)
            assert time.monotonic() < end, (client.keys("*"), app.jobs.queue_states(), ran)
            time.sleep(0.01)
        assert not worker.stop(5.0)
    finally:
        line.at = 0
        app.close()
    dead = Counter(job.jid for job in app.jobs.find_jobs("dead"))
    app.close()
    assert set(ran) == set(range(JOBS))
    assert len(dead) == JOBS // 10 and client.llen("queue:a") == 0
    extra = sum(ran.values()) - JOBS - len(failed)
    assert extra <= JOBS + 8, ran  # an enqueue whose answer is lost is repeated: a job with the same id
    assert client.keys("barnabas:*") == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["send_packed_command", "read_response"])
def test_a_cut_at_any_step_loses_nothing(client, what, monkeypatch):
    for name, value in {"LEASE": 2, "RENEW": 0.3, "SCAN": 0.2, "CALM": 0.0, "TICK": 0.1}.items():
        monkeypatch.setattr(redis_life, name, value)
    line = Line(monkeypatch, what)
    for at in range(1, 61, 2):
        try:
            scenario(line, at, client)
        except Exception as error:
            raise AssertionError(f"with {what} number {at} cut") from error
