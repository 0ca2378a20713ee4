"""Limited jobs: what a limit costs a job, and how long one waits behind many of another key."""

from multiprocessing.connection import Connection
from time import perf_counter

from batches import place
from kit import WAIT, Figure, Row, Tally, bench, in_turn, other, tune, work_off
from redis_jobs import shop

from barnabas import Concurrent, Rate

KEYS = 10_000


def run(parent: Connection, url: str, n: int, limited: bool) -> None:
    """The seconds in which n no-op jobs of many keys run."""
    tune()
    with shop(url) as app:
        tally = Tally(n)
        count = tally.job
        options = {"limit": Concurrent(5, by="key")} if limited else {}

        @app.job(**options)
        def noop(number: int, key: int) -> None:
            count(number)

        noop.enqueue_many((number, number % KEYS) for number in range(1, n + 1)).result(WAIT)
        ended = work_off(app, "jobs", n)
        parent.send(ended - tally.marks[0])


def timed(url: str, n: int, limited: bool) -> float:
    with other(run, url, n, limited) as process:
        return process.recv()  # type: ignore[no-any-return]


def _speed(kind: str, n: int, turn: int) -> list[Figure]:
    with place(kind) as (url, client):

        def one(limited: bool) -> float:
            if client is not None:
                client.flushall()
            return n / timed(url, n, limited)

        plain, own = in_turn(turn, lambda: one(False), lambda: one(True))
    return [Figure(own, plain, own)]


@bench(200_000, 2_000, Row("Redis: limited jobs run, 10,000 keys", 20_000, "/s", "/s", note="raw: without a limit"))
def limits_redis(n: int, turn: int) -> list[Figure]:
    return _speed("Redis", n, turn)


@bench(50_000, 2_000, Row("SQLite: limited jobs run, 10,000 keys", None, "/s", "/s", note="raw: without a limit"))
def limits_sqlite(n: int, turn: int) -> list[Figure]:
    return _speed("SQLite", n, turn)


def stand(parent: Connection, url: str, n: int) -> None:
    """The seconds that a job waits behind n of a key that is at its limit."""
    tune()
    with shop(url) as app:
        began: list[float] = []

        @app.job(limit=Rate(1, per=3600, by="key"))
        def noop(number: int, key: int) -> None:
            began.append(perf_counter())

        noop.enqueue_many((number, 0) for number in range(n)).result(WAIT)
        noop.enqueue(n, 1).result(WAIT)
        work_off(app, "jobs", 2)
        parent.send(began[1] - began[0])


@bench(100_000, 2_000, Row("Redis: a job behind 100,000 of a key at its limit", 10, "s", "s", at_most=True))
def limits_crowd(n: int, turn: int) -> list[Figure]:
    with place("Redis") as (url, _), other(stand, url, n) as process:
        seconds = process.recv()
    return [Figure(seconds, None, seconds)]
