"""Jobs on a real Redis, against a real Sidekiq and against Python's peers (peers.py): running, enqueueing, waking up."""

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Thread
from time import perf_counter, process_time, sleep, time
from typing import Any

from kit import WAIT, Figure, Missing, Row, Tally, bench, expect, in_turn, other, tune, work_off
from peers import BATCHES, PEERS

from barnabas import App
from barnabas.cli.process import Stopper
from barnabas.cli.run import alone
from barnabas.worker import Worker, memory

HERE = Path(__file__).resolve().parent
QUEUES = [f"queue{number}" for number in range(5)]
FILL = """
local made = {}
for i = ARGV[1], ARGV[2] do
  local job = string.format('{"retry":25,"queue":"default","class":"%s","args":[%d%s],"jid":"%024x","created_at":%s',
    ARGV[3], i, ARGV[5], i, ARGV[4])
  if KEYS[1] == 'schedule' then made[#made + 1] = ARGV[4] + i / 1e6 end
  made[#made + 1] = job .. (KEYS[1] == 'schedule' and '}' or ',"enqueued_at":' .. ARGV[4] .. '}')
end
redis.call(KEYS[1] == 'schedule' and 'ZADD' or 'LPUSH', KEYS[1], unpack(made))
"""


@contextmanager
def server() -> Iterator[Any]:
    """A client of a redis-server of its own, which keeps nothing on disk."""
    if shutil.which("redis-server") is None or find_spec("redis") is None:
        raise Missing("Redis needs redis-server and redis-py")
    import redis

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client, until = redis.Redis(port=port), perf_counter() + WAIT
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                expect("redis-server", (process.poll(), perf_counter() < until), (None, True))
                sleep(0.02)
        client.url = f"redis://127.0.0.1:{port}/0"
        yield client
        client.close()
    finally:
        process.kill()
        process.wait()


def fill(client: Any, key: str, n: int, name: str = "Noop", more: str = "") -> None:
    """Jobs 1 to n, in a queue's list or in the schedule, where they are due."""
    script = client.register_script(FILL)
    for first in range(1, n + 1, 2_000):
        script(keys=[key], args=[first, min(n, first + 1_999), name, time() - 60, more])
    expect("filled", client.zcard(key) if key == "schedule" else client.llen(key), n)


def ruby(client: Any, code: str) -> subprocess.Popen[str]:
    """A Ruby process that has Sidekiq's client."""
    command = ["ruby", "-r", str(HERE / "noop.rb"), "-e", code]
    return subprocess.Popen(command, env=os.environ | {"REDIS_URL": client.url}, stdout=subprocess.PIPE, text=True)


def need_sidekiq() -> None:
    if shutil.which("sidekiq") is None:
        raise Missing("the comparisons with Sidekiq need sidekiq and ruby")


def wait_until(condition: Callable[[], Any], pause: float = 0.002) -> float:
    """When it held first."""
    until = perf_counter() + WAIT
    while not condition():
        expect("in time", perf_counter() < until, True)
        sleep(pause)
    return perf_counter()


@contextmanager
def shop(client: Any, **settings: Any) -> Iterator[App]:
    app = App("bench", events="memory:", jobs=client if isinstance(client, str) else client.url, **settings)
    app.jobs.flush(0)  # it is open
    yield app
    app.close()


def most(what: str, target: float | None, unit: str, percent: int | None = None) -> Row:
    return Row(what, target, unit, unit, True, percent=percent)


# Other clients.


def ask(parent: Connection, port: int) -> None:
    """The milliseconds that each of another client's commands takes, one a millisecond, until the parent speaks."""
    link, times = socket.create_connection(("127.0.0.1", port)), []
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    parent.send("ready")
    while not parent.poll():
        began = perf_counter()
        link.sendall(b"*2\r\n$3\r\nGET\r\n$5\r\nother\r\n")
        link.recv(100)
        times.append(1000 * (perf_counter() - began))
        sleep(0.001)
    parent.send(times)


def beside(client: Any, act: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What `act` gives, and what another client's commands took meanwhile."""
    with other(ask, client.connection_pool.connection_kwargs["port"]) as probe:
        probe.recv()
        found = act()
        probe.send("end")
        return found, probe.recv()


# Running.


def run_all(parent: Connection, url: str, n: int) -> None:
    """Jobs a second, from the first one's start to the last one's settlement; megabytes at the peak, and grown by after a
    fifth."""
    tally, sizes, seen = Tally(n), [], 0
    count = tally.job

    def noop(number: int) -> None:
        nonlocal seen
        seen += 1
        if seen in (n // 5, n):
            sizes.append(memory())
        count(number)

    with shop(url) as app:
        app.job(name="Noop")(noop)
        seconds = work_off(app, "jobs", n, lambda _: tune()) - tally.marks[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parent.send((n / seconds, peak / 1e6, (sizes[1] - sizes[0]) / 1e6))


def run_ours(client: Any, n: int) -> tuple[float, float, float]:
    fill(client, "queue:default", n)
    with other(run_all, client.url, n) as worker:
        found = worker.recv()
    expect("processed", int(client.get("stat:processed")), n)
    client.flushall()
    return found  # type: ignore[no-any-return]


def run_sidekiq(client: Any, n: int) -> float:
    """Jobs a second, between the first and the last taken from the queue."""
    fill(client, "queue:default", n)
    command = ["sidekiq", "-r", str(HERE / "noop.rb"), "-c", "10", "-q", "default"]
    env, left = os.environ | {"REDIS_URL": client.url}, lambda: client.llen("queue:default")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, cwd=os.getcwd())
    try:
        began = wait_until(lambda: left() < n)
        return n / (wait_until(lambda: not left()) - began)
    finally:
        process.kill()
        process.wait()
        client.flushall()


@bench(
    1_000_000,
    20_000,
    Row("Redis: no-op sync jobs run, 10 threads", 15, "x", "/s", note="raw: Sidekiq -c 10, which loses what it runs if killed"),
    most("of which: another client's commands meanwhile, p99", 5, "ms", 99),
    most("of which: peak memory at a backlog of 1,000,000", 120, "MB"),
    most("of which: grown after the first 200,000", 10, "MB"),
)
def sidekiq(n: int, turn: int) -> list[Figure]:
    need_sidekiq()
    with server() as client:
        raw, own = in_turn(turn, lambda: run_sidekiq(client, n // 50), lambda: beside(client, lambda: run_ours(client, n)))
    (rate, peak, grown), times = own
    return [Figure(rate / raw, raw, rate), Figure(times, None, None), *(Figure(mb, None, mb) for mb in (peak, grown))]


# Enqueueing.


def enqueue_ours(parent: Connection, url: str, n: int) -> None:
    """The seconds of n jobs one by one, and of 20 n at once."""
    with shop(url) as app:
        noop = app.job(name="Noop")(Tally(n).job)
        tune()
        began = perf_counter()
        for number in range(n):
            noop.enqueue(number).result()
        middle = perf_counter()
        ids = noop.enqueue_many((number,) for number in range(20 * n)).result(WAIT)
        seconds = middle - began, perf_counter() - middle
        expect("distinct ids", len(set(ids)), 20 * n)
    parent.send(seconds)


@bench(
    10_000,
    500,
    Row("Redis: jobs enqueued one by one, each `.result()`", 3, "x", "/s", note="raw: Sidekiq's perform_async, warnings off"),
    Row("Redis: `enqueue_many`", 3, "x", "/s", note="raw: Sidekiq's push_bulk"),
)
def enqueue(n: int, turn: int) -> list[Figure]:
    need_sidekiq()

    def raw() -> Any:
        with ruby(client, f"enqueue({n}, {20 * n})") as process:
            found = json.loads(process.communicate()[0])
        expect("stored", client.llen("queue:default"), 21 * n)
        client.flushall()
        return found

    def ours() -> Any:
        with other(enqueue_ours, client.url, n) as process:
            found = process.recv()
        expect("stored", client.llen("queue:default"), 21 * n)
        client.flushall()
        return found

    with server() as client:
        theirs, own = in_turn(turn, raw, ours)
    return [Figure(a / b, count / a, count / b) for a, b, count in zip(theirs, own, (n, 20 * n), strict=True)]


# Async jobs.


def run_sleeping(parent: Connection, url: str, n: int) -> None:
    """Jobs a second."""
    tally = Tally(n)

    async def nap(number: int) -> None:
        await asyncio.sleep(0.01)
        tally.job(number)

    with shop(url, coroutines=1_000) as app:
        app.job(name="Noop")(nap)
        seconds = work_off(app, "jobs", n, lambda _: tune()) - tally.marks[0] + 0.01
    parent.send(n / seconds)


@bench(150_000, 2_000, Row("Redis: async jobs that sleep 10 ms, 1,000 at a time", 40_000, "/s", "/s", note="ideal: 100 k/s"))
def sleeping(n: int, turn: int) -> list[Figure]:
    with server() as client:
        fill(client, "queue:default", n)
        with other(run_sleeping, client.url, n) as worker:
            rate = worker.recv()
    return [Figure(rate, None, rate)]


# The schedule.


def move_due(parent: Connection, url: str) -> None:
    """A worker that moves what is due, and else has nothing to do."""
    with shop(url, queues=QUEUES) as app:
        app.job(name="ring", queue=QUEUES[0])(Tally(1).job)
        worker = Worker(app)
        worker.start()
        tune()
        parent.recv()
        expect("handlers that held the stop up", worker.stop(5.0), [])


def moved(client: Any, n: int, more: str = "") -> tuple[float, float]:
    """Jobs a second, and the longest that another client's command took, in milliseconds."""

    def act() -> float:
        left = lambda: client.zcard("schedule")  # noqa: E731
        with other(move_due, client.url) as worker:
            began = wait_until(lambda: left() < n)
            ended = wait_until(lambda: not left())
            worker.send("end")
        return n / (ended - began)

    fill(client, "schedule", n, more=more)
    rate, times = beside(client, act)
    expect("moved", client.llen("queue:default"), n)
    client.flushall()
    return rate, max(times)


@bench(
    1_000_000,
    20_000,
    Row("Redis: due jobs moved from the schedule to their queue, 1,000,000 of them", 100_000, "/s", "/s"),
    most("of which: another client's commands meanwhile, worst", 20, "ms"),
    most("the same with jobs of 10 kB, 10,000 of them", 100, "ms"),
)
def due(n: int, turn: int) -> list[Figure]:
    with server() as client:
        rate, small = moved(client, n)
        _, large = moved(client, n // 100, f',"{"x" * 10_000}"')
    return [Figure(value, None, value) for value in (rate, small, large)]


# Waking up, and sleeping.


def hear(parent: Connection, url: str, n: int, seconds: int) -> None:
    """`barnabas run` on five queues: the percentage of a core that it takes while there is nothing to do, and the
    milliseconds from a job's push to its start."""
    times: list[float] = []
    last = Event()
    with shop(url, queues=QUEUES) as app:

        @app.job(name="ring", queue=QUEUES[0])
        def ring(pushed: float) -> None:
            times.append(1000 * (perf_counter() - pushed))
            if len(times) == n:
                last.set()

        stopper = Stopper()

        def look() -> None:
            sleep(2.0)  # it has started
            parent.send("ready")
            began, used = perf_counter(), process_time()
            sleep(seconds)
            parent.send(100 * (process_time() - used) / (perf_counter() - began))
            expect("the last job in time", last.wait(WAIT), True)
            stopper.asked(signal.SIGTERM)

        Thread(target=look, daemon=True).start()
        expect("exit status", alone(app, stopper, None, (), (), False), 0)
    parent.send(times)


def commands(client: Any) -> int:
    """How many the server has run, those of scripts included."""
    return sum(found["calls"] for found in client.info("commandstats").values())


@bench(
    400,
    20,
    most("Redis: from a push by Ruby to the job's start, five queues, nothing else to do, p50", 1, "ms", 50),
    most("the same, p99", 5, "ms", 99),
    most("an idle worker with five queues, of a core", 1, "%"),
    most("its commands", 30, "a second"),
)
def ring(n: int, turn: int) -> list[Figure]:
    need_sidekiq()
    seconds = 8 if n > 100 else 1
    with server() as client, other(hear, client.url, n, seconds) as worker:
        worker.recv()
        before = commands(client)
        part = worker.recv()
        rate = (commands(client) - before) / seconds
        with ruby(client, f"ring({n}, {json.dumps(QUEUES)})") as process:
            expect("exit status of ruby", process.wait(WAIT), 0)
        times = worker.recv()
    expect("heard", len(times), n)
    return [Figure(times, None, None)] * 2 + [Figure(value, None, value) for value in (part, rate)]


# Python's peers.


def peer(name: str) -> Callable[[int, int], list[Figure]]:
    def run(n: int, turn: int) -> list[Figure]:
        missing = [module for module in PEERS[name].modules if find_spec(module) is None]
        if missing:
            raise Missing(f"the comparison with {name} needs the extra bench ({', '.join(missing)})")
        with server() as client:
            raw, (rate, *_) = in_turn(turn, lambda: run_peer(client, name, n), lambda: run_ours(client, min(100_000, 200 * n)))
        return [Figure(rate / raw, raw, rate)]

    run.__name__ = f"redis_{name}"  # (SQLite has a huey, too)
    return run


def run_peer(client: Any, name: str, n: int) -> float:
    """Jobs a second, from the first one's start to the last one's end."""
    more = {"PEER": name, "PEER_URL": client.url, "PEER_JOBS": str(n), "RQ_REDIS_URL": client.url}
    env = os.environ | more | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])}
    subprocess.run([sys.executable, "-c", "import peers; peers.enqueue_all()"], env=env, check=True, timeout=WAIT)
    with TemporaryFile("w+") as log:
        command = [sys.executable, *(PEERS | BATCHES)[name].command]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: process.poll() is not None or client.exists("bench:seconds"), 0.05)
            log.seek(0)
            expect(f"{name} at its end\n{log.read()[-2000:]}", process.poll(), None)
            return n / float(client.lpop("bench:seconds"))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            client.flushall()


for name, each in PEERS.items():
    bench(each.jobs, 100, Row(f"Redis: no-op sync jobs run, against {name}", 15, "x", "/s", note=f"raw: {each.how}"))(peer(name))
