"""Every single command is the last one in turn: of a process, that is killed before it leaves, in its middle, or when it is
answered; or of a line, that is cut. Nothing is lost by it, nothing is stuck, and nothing runs more often than at-least-once
allows."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from typing import Any

import mortal
import pytest
import redis
from servers import shared_redis

from barnabas import App, Reject, RetryAfter, until_and_while_executing, while_executing
from barnabas.backends import redis_life
from barnabas.jobs.payload import build
from barnabas.worker import Worker

pytestmark = pytest.mark.slow
DEATHS = ("unsent", "half", "answered")
SOAK = pytest.mark.soak  # the same with unique jobs takes as long again
JOBS, LATER = 40, 10
LANES = 4  # cases at a time
LEFT = """-- of the prefix ARGV[1]: what is in queue a, in the sets, and in hands, in one look
local n = redis.call('LLEN', ARGV[1] .. 'queue:a')
for _, set in ipairs({'retry', 'schedule'}) do n = n + redis.call('ZCARD', ARGV[1] .. set) end
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. 'barnabas:work:*')) do n = n + redis.call('HLEN', key) end
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. 'barnabas:landing:*')) do n = n + redis.call('LLEN', key) end
return n"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in mortal.HASTE.items():
        monkeypatch.setattr(redis_life, name, value)
    monkeypatch.setattr(redis_life.Life, "watch", lambda life: None)  # it is not this process that is to end
    with redis.Redis(port=shared_redis().port, client_name="watch") as client:
        client.flushall()
        yield client


def until_nothing_is_left(client: Any, prefix: str = "") -> None:
    end = time.monotonic() + 20
    while client.eval(LEFT, 0, prefix):
        assert time.monotonic() < end, client.keys(f"{prefix}*")
        time.sleep(0.01)


def each_step(case: Callable[[int, int], bool]) -> int:
    """Call `case(lane, step)` for steps 1, 2, ... until there is none; the number of steps."""
    with ThreadPoolExecutor(LANES) as pool:
        for first in range(1, 400, LANES):
            met = [pool.submit(case, lane, first + lane) for lane in range(LANES)]
            for lane, future in enumerate(met):
                try:
                    future.result()
                except Exception as error:
                    raise AssertionError(f"step {first + lane}") from error
            if not any(future.result() for future in met):
                return first
    raise AssertionError("there is no end to it")


# A process dies.


def fill(client: Any, prefix: str) -> None:
    """Jobs that are ready, due, to be retried, and in the hands of a process that died."""
    job = [build("work", [n], queue="a", retry=10, now=1.0) for n in range(10)]
    pipe = client.pipeline()
    pipe.sadd(f"{prefix}queues", "a").lpush(f"{prefix}queue:a", *job[:6])
    pipe.zadd(f"{prefix}schedule", {job[6]: 2.0}).zadd(f"{prefix}retry", {job[7]: 2.0})
    pipe.hset(f"{prefix}barnabas:workers", "ghost:1:0", "a").hset(f"{prefix}barnabas:work:ghost:1:0", "5:a", job[8])
    pipe.lpush(f"{prefix}barnabas:landing:ghost:1:0:a", job[9]).execute()


def survive(client: Any, url: str, prefix: str, folder: Path, unique: bool) -> None:
    """Another process takes over from one that died, and all is as if nothing had been."""
    for key in client.keys(f"{prefix}barnabas:alive:*"):
        client.delete(key)  # its lease is over
    app = mortal.shop(url, str(folder), unique)
    worker = Worker(app)
    worker.start()
    until_nothing_is_left(client, prefix)
    assert not worker.stop(5.0)
    app.close()
    ran = Counter(map(int, (folder / "ran").read_text().split()))
    assert set(ran) == mortal.JOBS
    assert all(ran[n] <= {1: 3, 100: 3}.get(n, 2) for n in ran), ran
    assert client.zcard(f"{prefix}dead") == 1
    assert not left_over(client, prefix, "crashes")


def left_over(client: Any, prefix: str, *but: str) -> set[str]:
    """What is left of what only workers need; whose turn it is, to claim or to sweep, is forgotten by itself."""
    left = {name.decode().removeprefix(f"{prefix}barnabas:") for name in client.keys(f"{prefix}barnabas:*")}
    left |= {name.decode() for name in client.keys(f"{prefix}uniquejobs:*")}
    return {name for name in left if not name.startswith(("turn:", "sweep", "crowd:"))} - {*but}


@pytest.mark.parametrize(
    ("when", "unique"),
    [*((when, False) for when in DEATHS), *(pytest.param(when, True, marks=SOAK) for when in DEATHS)],
)
def test_a_process_that_dies_at_any_command_loses_nothing(client, when, unique, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("mortal.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    lives = [subprocess.Popen(command, **pipes) for _ in range(LANES)]

    def case(lane: int, step: int) -> bool:
        prefix, folder = f"{when}{step}{unique}:", tmp_path / f"{step}"
        url = f"{shared_redis().url}?prefix={prefix}"
        folder.mkdir()
        fill(client, prefix)
        life = lives[lane]
        print(url, folder, when, step, unique, file=life.stdin, flush=True)
        ended = life.stdout.readline().strip()
        assert ended in ("0", f"{int(signal.SIGKILL)}")
        survive(client, url, prefix, folder, unique)
        return ended != "0"

    try:
        assert each_step(case) > 8  # a life takes fewer commands where there is more for each to do
    finally:
        for life in lives:
            life.communicate(timeout=20)


# A line is cut.


class Line:
    """Counts what goes over the connections to each database, and breaks one of them at the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.count, self.at, lock = Counter[int](), dict[int, int](), threading.Lock()

        def counted(place: Any, real: Any, *args: Any, **options: Any) -> Any:
            connection = getattr(place, "link", place)
            at = self.at.get(connection.db)
            if connection.client_name == "watch" or at is None:
                return real(place, *args, **options)
            with lock:
                self.count[connection.db] += 1
                hit = self.count[connection.db] == at
            if not hit:
                return real(place, *args, **options)
            if what == "read_response":
                real(place, *args, **options)  # so the server has done it
            connection.disconnect()
            raise redis.ConnectionError("cut by the test")

        for place, name in mortal.LINES[what]:
            monkeypatch.setattr(place, name, partialmethod(counted, getattr(place, name)))


def scenario(line: Line, db: int, at: int, unique: Any) -> bool:
    """Enqueue, schedule, claim, settle, retry, bury, move, stop, with the n-th step broken; whether there was one."""
    client = redis.Redis(port=shared_redis().port, db=db, client_name="watch")
    client.flushdb()
    url = shared_redis().url.replace("/0", f"/{db}")
    app = App("steps", events="memory:", jobs=url, threads=4, checkpoint_interval=0.01)
    ran: Counter[int] = Counter()
    failed: set[int] = set()

    @app.job(queue="a", retry=10, unique=unique)
    def work(n: int) -> None:
        ran[n] += 1
        if n % 10 == 3:
            raise Reject("no")
        if n % 5 == 1 and n not in failed:
            failed.add(n)
            raise RetryAfter(0.01)

    try:
        app.jobs  # noqa: B018 - opened before the count begins
        line.count[db], line.at[db] = 0, at
        sent = [work.enqueue_many((n,) for n in range(JOBS - LATER))]
        sent += [work.enqueue_in(0.05, n) for n in range(JOBS - LATER, JOBS)]  # type: ignore[misc]
        worker = Worker(app)
        try:
            worker.start()
        except Exception:  # a worker does not start while Redis is away, and says so
            worker = Worker(app)
            worker.start()
        for future in sent:
            future.result(10)
        until_nothing_is_left(client)
        assert not worker.stop(5.0)
    finally:
        met = line.count[db] >= line.at.pop(db, 0)
        app.close()
    dead = Counter(job.jid for job in app.jobs.find_jobs("dead"))
    app.close()
    assert set(ran) == set(range(JOBS))
    assert len(dead) == JOBS // 10
    extra = sum(ran.values()) - JOBS - len(failed)
    assert extra <= JOBS + 8, ran  # an enqueue whose answer is lost is repeated: a job with the same id
    assert not left_over(client, "")
    client.close()
    return met


@pytest.mark.parametrize(
    "unique",
    [
        pytest.param(None, id="plain"),
        pytest.param(while_executing(by=lambda n: n % 8), id="running", marks=SOAK),
        pytest.param(until_and_while_executing(), id="queued", marks=SOAK),
    ],
)
@pytest.mark.parametrize("what", ["send_packed_command", "read_response"])
def test_a_cut_at_any_command_loses_nothing(client, what, unique, monkeypatch):
    line = Line(monkeypatch, what)
    assert each_step(lambda lane, step: scenario(line, lane + 1, step, unique)) > 16
