"""Python's peers on Redis, each as its own documents run it, in one process. The module that their workers load: PEER says
which, PEER_URL where, PEER_JOBS how many no-op jobs `enqueue_all` enqueues."""

import asyncio
import os
from time import perf_counter
from typing import Any, NamedTuple


class Peer(NamedTuple):
    """Its modules, its worker's command line (after `python`), how many jobs take it a second or two, what runs."""

    modules: tuple[str, ...]
    command: list[str]
    jobs: int
    how: str


def m(line: str) -> list[str]:
    return ["-m", *line.split()]


PEERS = {
    "dramatiq": Peer(("dramatiq",), m("dramatiq peers -p 1 -t 10"), 4_000, "1 process, 10 threads"),
    "taskiq": Peer(("taskiq", "taskiq_redis"), m("taskiq worker peers:broker -w 1"), 2_000, "Redis streams, 1 process"),
    "celery": Peer(
        ("celery", "kombu"),
        m("celery -A peers worker -P solo -l ERROR --without-gossip --without-mingle --without-heartbeat"),
        1_000,
        "its solo pool",
    ),
    "rq": Peer(("rq",), m("rq.cli worker -w rq.worker.SimpleWorker -q bench"), 500, "SimpleWorker, which does not fork"),
    "arq": Peer(("arq",), m("arq peers.Settings"), 1_000, "max_jobs 100"),
    "huey": Peer(("huey",), m("huey.bin.huey_consumer peers.huey -w 10 -q"), 4_000, "10 threads"),
}

BATCHES = {  # those that have something like a batch with a callback
    "dramatiq_group": PEERS["dramatiq"]._replace(jobs=2_000, how="a group with a completion callback, 1 process, 10 threads"),
    "celery_chord": PEERS["celery"]._replace(jobs=500, how="a chord, its solo pool"),
}


def declare(name: str, url: str, n: int) -> Any:
    """Make what the worker looks for in this module; a function that enqueues all jobs."""
    from kit import Tally

    tally, own = Tally(n), globals()

    def told(seconds: float) -> None:
        import redis

        redis.Redis.from_url(url).lpush("bench:seconds", seconds)

    def noop(number: int) -> None:
        tally.job(number)
        if len(tally.marks) == 2 and name not in BATCHES:
            told(tally.seconds)

    def end(*_: Any) -> None:
        assert tally.seconds
        told(perf_counter() - tally.marks[0])

    async def noop_async(_: Any, number: int) -> None:
        noop(number)

    numbers = range(1, n + 1)
    if name == "dramatiq":
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        dramatiq.set_broker(RedisBroker(url=url))
        send = dramatiq.actor(noop).send
        return lambda: [send(number) for number in numbers]
    if name == "dramatiq_group":
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker
        from dramatiq.middleware import GroupCallbacks
        from dramatiq.rate_limits.backends import RedisBackend

        broker = RedisBroker(url=url)
        broker.add_middleware(GroupCallbacks(RedisBackend(url=url)))
        dramatiq.set_broker(broker)
        message, last = dramatiq.actor(noop).message, dramatiq.actor(end).message

        def run_group() -> None:
            group = dramatiq.group([message(number) for number in numbers])
            group.add_completion_callback(last())
            group.run()

        return run_group
    if name == "celery_chord":
        from celery import Celery, chord

        own["app"] = app = Celery("peers", broker=url, backend=url)
        app.conf.update(worker_prefetch_multiplier=100)
        task, last = app.task(name="noop")(noop), app.task(name="end")(end)
        return lambda: chord([task.s(number) for number in numbers])(last.s())
    if name == "taskiq":
        from taskiq_redis import RedisStreamBroker

        own["broker"] = broker = RedisStreamBroker(url)
        task = broker.task(task_name="noop")(noop)

        async def send_all() -> None:
            await broker.startup()
            for number in numbers:
                await task.kiq(number)
            await broker.shutdown()

        return lambda: asyncio.run(send_all())
    if name == "celery":
        from celery import Celery

        own["app"] = app = Celery("peers", broker=url)
        app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=100)
        delay = app.task(name="noop")(noop).delay
        return lambda: [delay(number) for number in numbers]
    if name == "rq":
        import redis
        from rq import Queue

        own["noop"] = noop
        queue = Queue("bench", connection=redis.Redis.from_url(url))
        return lambda: queue.enqueue_many([Queue.prepare_data("peers.noop", (number,), result_ttl=0) for number in numbers])
    if name == "arq":
        from arq import create_pool
        from arq.connections import RedisSettings
        from arq.worker import func

        settings = RedisSettings.from_dsn(url)
        own["Settings"] = type(
            "Settings",
            (),
            {"functions": [func(noop_async, name="noop", keep_result=0)], "redis_settings": settings, "max_jobs": 100},
        )

        async def send_all_to_arq() -> None:
            pool = await create_pool(settings)
            for number in numbers:
                await pool.enqueue_job("noop", number)

        return lambda: asyncio.run(send_all_to_arq())
    from huey import RedisHuey

    own["huey"] = peer = RedisHuey("peers", url=url, results=False)
    task = peer.task(name="noop")(noop)
    return lambda: [task(number) for number in numbers]


if "PEER" in os.environ:
    enqueue_all = declare(os.environ["PEER"], os.environ["PEER_URL"], int(os.environ["PEER_JOBS"]))
