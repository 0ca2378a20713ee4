"""Topics in one home, queues in another: what leaves for elsewhere is durable before its cause is settled."""

import pytest
from watching import failures, wait_for

from barnabas import App, Retry
from barnabas.errors import BackendError


@pytest.fixture
def app(place, tmp_path):
    app = place.app()
    apart = App("shop", events=place.events, jobs=f"sqlite:///{tmp_path}/jobs.db", checkpoint_interval=0.02)
    apart.clock, apart.records = app.clock, []
    apart.observe(apart.records.append)
    place.apps.append(apart)
    assert apart.jobs is not apart.events
    return apart


class Broken:
    """A sink that fails for some time."""

    def __init__(self, backend, times: int) -> None:
        self._send, self.times, self.sent = backend.send, times, 0
        backend.send = self

    def __call__(self, outgoing, block=True) -> None:
        if self.times > 0:
            self.times -= 1
            raise BackendError("out of reach")
        self.sent += len(outgoing)
        self._send(outgoing, block)


def test_jobs_of_a_handler_and_messages_of_a_job_arrive(place, app):
    numbers = app.topic("numbers", int, partitions=2)
    out = app.topic("out", int, partitions=1)
    ids, ran = [], []

    @app.job
    def double(n: int):
        ran.append(n)
        out.send(2 * n)

    @app.consumer(numbers)
    def read(n: int):
        ids.append(double.enqueue(n))
        ids.append(out.send(-n))

    numbers.send_many(range(50)).result(5)
    place.drain(app)
    assert sorted(ran) == list(range(50))
    assert sorted(place.values(out)) == sorted([*(2 * n for n in range(50)), *(-n for n in range(50))])
    assert all(future.result(5) is not None for future in ids)


def test_a_failing_handler_enqueues_nothing_elsewhere(place, app):
    numbers = app.topic("numbers", int, partitions=1)
    ran, tries = [], []

    @app.job
    def job(n: int):
        ran.append(n)

    @app.consumer(numbers, retry=Retry(2, backoff=0.01))
    def read(n: int):
        tries.append(n)
        job.enqueue(len(tries))
        if len(tries) < 3:
            raise ValueError("not yet")

    numbers.send(1).result(5)
    place.drain(app)
    assert ran == [3]


def test_while_the_other_home_is_out_of_reach_nothing_is_settled_and_nothing_is_lost(place, app, caplog):
    numbers = app.topic("numbers", int, partitions=1)
    out = app.topic("out", int, partitions=1)
    runs, ran = [], []

    @app.job
    def job(n: int):
        ran.append(n)

    @app.consumer(numbers)
    def read(n: int):
        runs.append(n)
        job.enqueue(n)
        out.send(n)

    broken = Broken(app.jobs, times=1)
    numbers.send_many(range(20)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: broken.times == 0, worker=worker)
        assert place.values(out) == [] and not worker.drained()
        wait_for(worker.drained, worker=worker)
    assert runs == list(range(20))  # the settlement is repeated, not the work
    assert sorted(ran) == place.values(out) == list(range(20))
    assert "the backend failed, trying again every second: out of reach" in caplog.text
    assert "the backend works again" in caplog.text and not failures(app)


def test_a_stop_while_the_other_home_is_out_of_reach_loses_nothing(place, app):
    numbers = app.topic("numbers", int, partitions=1)
    runs, ran = [], []

    @app.job
    def job(n: int):
        ran.append(n)

    @app.consumer(numbers)
    def read(n: int):
        runs.append(n)
        job.enqueue(n)

    broken = Broken(app.jobs, times=10**6)
    numbers.send_many(range(5)).result(5)
    with place.running(app) as worker:
        wait_for(lambda: len(runs) == 5 and broken.times < 10**6, worker=worker)
    broken.times = 0
    assert ran == []
    place.drain(app)
    assert sorted(set(ran)) == list(range(5))


def test_jobs_of_a_handler_arrive_in_memory(place, tmp_path):
    place.events = f"sqlite:///{tmp_path}/events.db" if place.events == "memory:" else place.events
    place.jobs = "memory:"
    app, ran = place.app(), []
    numbers = app.topic("numbers", int)
    job = app.job(ran.append, name="double")

    @app.consumer(numbers)
    def read(n: int):
        job.enqueue(2 * n)

    numbers.send(1).result(5)
    place.drain(app)
    assert ran == [2]
