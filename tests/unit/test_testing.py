"""barnabas.testing: what it promises to whoever tests an application."""

import asyncio
import threading
import traceback
from datetime import timedelta

import msgspec
import pytest

import barnabas.testing
from barnabas import App, Batch, Delivery, Message, Reject, Retry, RetryAfter
from barnabas.cli.process import _line
from barnabas.engine.observe import Settled
from barnabas.errors import BarnabasError, DeclarationError, SendError
from barnabas.future import Future
from barnabas.worker import Worker


class Order(msgspec.Struct):
    id: int
    customer: str = "ann"
    total: float = 1.0


class Receipt(msgspec.Struct):
    order: int


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An app as one would declare it, in a folder whose settings file must not matter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "barnabas.toml").write_text(
        f'[events]\nurl = "sqlite:///{tmp_path}/real.db"\n[topics.orders]\npartitions = 3\n'
    )
    monkeypatch.setenv("BARNABAS_VALUE_LIMIT", "100")
    app = App("shop")
    app.orders = app.topic("orders", Order, key="customer")
    app.receipts = app.topic("receipts", Receipt)
    yield app
    app.close()


def test_sent_messages_are_handled_and_answers_seen(shop):
    @shop.consumer(shop.orders, responds=[shop.receipts])
    def bill(order: Order) -> Receipt:
        return Receipt(order.id)

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        shop.orders.send(Order(2, "bob"), headers={"trace": b"x"})
        assert t.sent(shop.receipts) == []
        t.drain()
        assert [m.value for m in t.sent(shop.orders)] == [Order(1), Order(2, "bob")]
        assert [m.key for m in t.sent(shop.orders)] == ["ann", "bob"]
        assert list(t.sent(shop.orders)[1].headers) == [("trace", b"x")]
        assert sorted(m.value.order for m in t.sent(shop.receipts)) == [1, 2]  # partitions have no order among them
        assert isinstance(t.sent(shop.receipts)[0], Message)
        shop.orders.send(Order(3))
        t.drain()
        assert t.sent(shop.receipts)[-1].value == Receipt(3)


def test_messages_are_seen_in_the_order_they_came_over_all_partitions(shop):
    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(i, f"customer {i}") for i in range(50)]).result(1)
        assert [m.value.id for m in t.sent(shop.orders)] == list(range(50))
        assert len({m.partition for m in t.sent(shop.orders)}) > 1


def test_a_chain_of_handlers_is_drained_to_its_end(shop):
    steps = [shop.topic(f"step{i}", int) for i in range(5)]
    ends = []
    for here, there in zip(steps, [*steps[1:], None], strict=True):

        @shop.consumer(here, name=f"from-{here.name}")
        def step(n: int, there=there):
            there.send(n + 1) if there else ends.append(n)

    with barnabas.testing.run(shop) as t:
        steps[0].send(10)
        t.drain()
        assert ends == [14]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_failing_handler_fails_the_test_with_its_own_traceback(shop, kind):
    class Bug(Exception):
        pass

    def deep_inside():
        raise Bug("here")

    if kind == "sync":

        @shop.consumer(shop.orders)
        def bill(order):
            deep_inside()
    else:

        @shop.consumer(shop.orders)
        async def bill(order):
            await asyncio.sleep(0)
            deep_inside()

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        with pytest.raises(Bug, match="here") as caught:
            t.drain()
        frames = [frame.name for frame in traceback.extract_tb(caught.tb)]
        assert frames[-2:] == ["bill", "deep_inside"] and not {"work", "step"} & {*frames}  # the engine's own are left out
        assert "attempt 1" in caught.value.__notes__[0]


def test_what_succeeds_beside_a_failure_is_settled(shop):
    done = []

    @shop.consumer(shop.orders, order="key", concurrency=2)
    def bill(order: Order):
        if order.id == 1:
            raise ValueError("one")
        done.append(order.id)

    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(i, f"c{i}") for i in range(4)])
        with pytest.raises(ValueError, match="one"):
            t.drain()
        assert sorted(done) == [0, 2, 3]
        t.drain()  # 1 is parked for its retry: nothing else fails
        assert sorted(done) == [0, 2, 3]


def test_without_raising_failures_are_retried_by_the_clock_and_die(shop):
    runs = []

    @shop.consumer(shop.orders, retry=Retry(2, backoff=10, jitter=0))
    def bill(order: Order):
        runs.append(order.id)
        raise ValueError("always")

    with barnabas.testing.run(shop, raises=False) as t:
        shop.orders.send(Order(7))
        t.drain()
        assert (runs, t.dead(shop.orders)) == ([7], [])
        t.clock.advance(9)
        t.drain()
        assert runs == [7]
        t.clock.advance(1)
        t.drain()
        assert runs == [7, 7]
        t.clock.advance(10)
        t.drain()
        assert runs == [7, 7, 7]
        (letter,) = t.dead(shop.orders)
        assert letter.value == Order(7)
        headers = dict(letter.headers)
        assert headers["barnabas-exception"] == b"ValueError" and headers["barnabas-attempts"] == b"3"
        t.clock.advance(1000)
        t.drain()
        assert runs == [7, 7, 7]


def test_raising_can_be_left_out_for_one_drain(shop):
    @shop.consumer(shop.orders, retry=Retry(0))
    def bill(order: Order):
        raise Reject("no such customer")

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain(raises=False)
        assert dict(t.dead(shop.orders)[0].headers)["barnabas-reason"] == b"rejected: no such customer"
        shop.orders.send(Order(2))
        with pytest.raises(Reject):
            t.drain()


def test_undecodable_messages_fail_the_test_and_are_seen_as_bytes(shop):
    raw = shop.topic("raw", codec="raw")

    @shop.consumer(raw)
    def read(order: bytes): ...

    bad = shop.topic("bad")

    @shop.consumer(bad, name="other")
    def other(text: str): ...

    with barnabas.testing.run(shop) as t:
        raw.send(b"\x00 anything")
        t.drain()
        bad.send(5)
        with pytest.raises(msgspec.ValidationError):
            t.drain()
        assert [m.value for m in t.dead(bad)] == [5]


def test_null_values_are_skipped_without_failing_the_test(shop):
    seen = []

    @shop.consumer(shop.orders)
    def bill(order: Order):
        seen.append(order)

    with barnabas.testing.run(shop) as t:
        shop.orders.send(None, key="ann")
        shop.orders.send(Order(1))
        t.drain()
        assert seen == [Order(1)]
        assert shop.observers.counts["bill", "skipped"] == 1


def test_jobs_wait_run_and_die(shop):
    sent = []

    @shop.job(queue="mail", retry=1)
    def mail(order: int, text: str = "hello"):
        if text == "bad":
            raise RuntimeError("smtp")
        sent.append((order, text))

    with barnabas.testing.run(shop, raises=False) as t:
        mail.enqueue(1)
        mail.enqueue_in(timedelta(hours=1), 2, text="later")
        mail.enqueue(3, "bad")
        assert t.enqueued(mail) == [(1,), (3, "bad"), (2, "later")]
        t.drain()
        assert sent == [(1, "hello")]
        assert t.enqueued(mail) == [(3, "bad"), (2, "later")]
        t.clock.advance(3600)
        t.drain()
        assert sent == [(1, "hello"), (2, "later")]
        (dead,) = t.dead(mail)
        assert dead["args"] == [3, "bad"] and dead["error_message"] == "smtp" and dead["retry_count"] == 1
        assert t.enqueued(mail) == []


def test_a_failing_job_fails_the_test(shop):
    @shop.job
    def mail(order: int):
        raise RuntimeError("smtp")

    with barnabas.testing.run(shop) as t:
        mail.enqueue(1)
        with pytest.raises(RuntimeError, match="smtp"):
            t.drain()
        mail.enqueue("not a number")
        with pytest.raises(BarnabasError, match="do not fit"):
            t.drain()


def test_async_consumers_and_jobs_run_on_one_loop(shop):
    loops = set()

    @shop.consumer(shop.orders, concurrency=10)
    async def bill(order: Order):
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        await mail_async(order.id)
        mail.enqueue(order.id)

    async def mail_async(order): ...

    @shop.job
    async def mail(order: int):
        loops.add(asyncio.get_running_loop())

    @shop.job
    def note(order: int): ...

    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(i, str(i)) for i in range(20)])
        note.enqueue(1)
        t.drain()
        assert t.enqueued(mail) == t.enqueued(note) == []
        shop.orders.send(Order(1))
        t.drain()
    assert len(loops) == 1 and loops.pop().is_closed()


def test_async_tests_drain_async_handlers_too(shop):
    seen = []

    @shop.consumer(shop.orders)
    async def bill(order: Order):
        await asyncio.sleep(0)
        seen.append(order.id)

    async def test():
        with barnabas.testing.run(shop) as t:
            assert (await shop.orders.send(Order(1))).value == Order(1)
            t.drain()
            assert seen == [1]
            shop.orders.send(Order(2))
            await asyncio.to_thread(t.drain)
            assert seen == [1, 2]

    asyncio.run(test())


def test_sync_handlers_can_be_drained_on_a_loop(shop):
    @shop.consumer(shop.orders, responds=[shop.receipts])
    def bill(order: Order) -> Receipt:
        return Receipt(order.id)

    async def test():
        with barnabas.testing.run(shop) as t:
            await shop.orders.send(Order(1))
            t.drain()
            assert len(t.sent(shop.receipts)) == 1

    asyncio.run(test())


def test_tables_are_seen(shop):
    totals = shop.table("totals", float)

    @shop.consumer(shop.orders, tables=[totals])
    def count(order: Order):
        totals[order.customer] = totals.get(order.customer, 0.0) + order.total

    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(1), Order(2, "bob", 5.0), Order(3)])
        assert t.table(totals) == {}
        t.drain()
        assert t.table(totals) == {"ann": 2.0, "bob": 5.0}


def test_a_batch_does_not_wait_to_fill_up(shop):
    batches = []

    @shop.consumer(shop.orders, batch=Batch(max=3, wait=60))
    def bill(orders: list[Order], deliveries: list[Delivery]):
        batches.append([o.id for o in orders])

    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(i) for i in range(7)])
        t.drain()
        assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_hooks_of_the_process_and_of_classes_run_once(shop):
    log = []
    shop.on_start(lambda: log.append("start"))
    shop.on_stop(lambda: log.append("stop"))

    @shop.on_start
    async def pool():
        log.append("pool")

    @shop.consumer(shop.orders)
    class Bill:
        def set_up(self):
            log.append("set_up")

        def process(self, order: Order):
            log.append(order.id)

        def tear_down(self):
            log.append("tear_down")

        def assigned(self, partitions):
            log.append(("assigned", len(partitions)))

        def revoked(self, partitions):
            log.append(("revoked", len(partitions)))

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain()
        t.drain()
    expected = ["start", "pool", "set_up", ("assigned", 6), 1, ("revoked", 6), "tear_down", "stop"]
    assert log == expected


def test_an_error_of_tear_down_is_seen(shop):
    @shop.consumer(shop.orders)
    class Bill:
        def process(self, order: Order): ...

        def tear_down(self):
            raise RuntimeError("pool is busy")

    with pytest.raises(RuntimeError, match="pool is busy"), barnabas.testing.run(shop):
        pass


def test_async_classes_are_set_up_on_the_loop(shop):
    log = []

    @shop.consumer(shop.orders)
    class Bill:
        async def set_up(self):
            self.loop = asyncio.get_running_loop()

        async def process(self, order: Order):
            log.append(asyncio.get_running_loop() is self.loop)

        async def tear_down(self):
            log.append(asyncio.get_running_loop() is self.loop)

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain()
    assert log == [True, True]


def test_settings_file_and_environment_do_not_matter(shop, tmp_path):
    # (the first look at them was at the declaration of the topics)
    assert (shop.orders.partitions, shop.orders.limit) == (3, 100)
    with barnabas.testing.run(shop) as t:
        assert shop.settings.events == shop.settings.jobs == "memory:"
        assert shop.settings.value_limit == 1 << 20
        shop.orders.send(Order(1, "x" * 1000)).result(1)
        assert len(shop.events.topics()[0].partitions) == 6
        assert len(t.sent(shop.orders)) == 1
    assert (shop.orders.partitions, shop.orders.limit) == (3, 100)
    assert shop.settings.events == f"sqlite:///{tmp_path}/real.db"
    assert not (tmp_path / "real.db").exists()


def test_afterwards_everything_is_as_before(shop):
    @shop.consumer(shop.orders)
    def bill(order: Order):
        raise ValueError(order.id)

    seen = []
    shop.observe(seen.append)
    before = {name: value for name, value in vars(shop).items() if name not in ("_events", "_jobs")}
    clock, watchers = shop.clock, list(shop.observers.watchers)
    with pytest.raises(ValueError), barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain()
    assert seen  # observers see what happens in a test
    assert {name: value for name, value in vars(shop).items() if name not in ("_events", "_jobs")} == before
    assert vars(shop)["_events"] is vars(shop)["_jobs"] is None
    assert shop.clock is clock and shop.observers.watchers == watchers and shop.observers.counts == {}


def test_what_is_stored_is_not_stored_again_where_ctrl_c_comes_just_then(shop):
    @shop.consumer(shop.orders, responds=[shop.receipts])
    def bill(order: Order) -> Receipt:
        return Receipt(order.id)

    presses = [KeyboardInterrupt()]

    def press(record):
        if isinstance(record, Settled) and presses:
            raise presses.pop()

    shop.observe(press)
    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        with pytest.raises(KeyboardInterrupt):
            t.drain()
        t.drain()
        assert [m.value for m in t.sent(shop.receipts)] == [Receipt(1)]


def test_each_run_begins_empty_and_runs_can_be_nested(shop):
    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        with barnabas.testing.run(shop) as inner:
            assert inner.sent(shop.orders) == []
            shop.orders.send(Order(2))
        assert [m.value.id for m in t.sent(shop.orders)] == [1]
    with barnabas.testing.run(shop) as t:
        assert t.sent(shop.orders) == []


def test_an_app_that_only_sends_can_be_tested(shop):
    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1)).result(1)
        t.drain()
        assert len(t.sent(shop.orders)) == 1


def test_consumers_from_latest_see_what_the_test_sends(shop):
    seen = []

    @shop.consumer(shop.orders, start="latest")
    def bill(order: Order):
        seen.append(order.id)

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain()
        assert seen == [1]


def test_no_thread_is_started(shop):
    @shop.consumer(shop.orders, concurrency=8)
    def bill(order: Order):
        assert threading.current_thread() is threading.main_thread()

    @shop.job
    async def mail(order: int):
        assert threading.current_thread() is threading.main_thread()

    before = threading.active_count()
    with barnabas.testing.run(shop) as t:
        shop.orders.send_many([Order(i, str(i)) for i in range(100)])
        mail.enqueue(1)
        t.drain()
        assert threading.active_count() == before


def test_handlers_that_feed_themselves_are_found(shop, monkeypatch):
    monkeypatch.setattr(barnabas.testing, "ROUNDS", 50)

    @shop.consumer(shop.orders)
    def bill(order: Order):
        shop.orders.send(order)

    with barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        with pytest.raises(AssertionError, match="leads back"):
            t.drain()


def test_retry_after_waits_for_the_clock(shop):
    runs = []

    @shop.consumer(shop.orders)
    def bill(order: Order, delivery: Delivery):
        runs.append(delivery.attempt)
        if delivery.attempt == 1:
            raise RetryAfter(30)

    @shop.job
    def mail(n: int):
        runs.append("job")
        if runs.count("job") == 1:
            raise RetryAfter(30)

    with barnabas.testing.run(shop, raises=False) as t:
        shop.orders.send(Order(1))
        mail.enqueue(1)
        t.drain()
        t.clock.advance(29.9)
        t.drain()
        assert runs == [1, "job"]
        t.clock.advance(0.2)
        t.drain()
        assert runs == [1, "job", 2, "job"]


def test_a_stopping_consumer_stops_the_test(shop):
    from barnabas.engine.handler import Stop

    @shop.consumer(shop.orders, retry=Retry(0), on_dead="stop")
    def bill(order: Order):
        raise ValueError("end")

    with barnabas.testing.run(shop, raises=False) as t:
        shop.orders.send(Order(1))
        with pytest.raises(Stop):
            t.drain()


def test_what_pytest_raises_in_a_handler_ends_the_test(shop):
    @shop.consumer(shop.orders)
    def bill(order: Order):
        pytest.fail("not this one")

    with pytest.raises(pytest.fail.Exception, match="not this one"), barnabas.testing.run(shop) as t:
        shop.orders.send(Order(1))
        t.drain()
    with barnabas.testing.run(shop):
        assert shop.orders.send(Order(2)).result(1).value.id == 2  # what sends now is no handler


def test_the_clock_of_a_test_makes_schedules_tick() -> None:
    app, seen = App("shop"), []

    @app.cron(every=timedelta(hours=1))
    def report() -> None:
        seen.append(app.clock.now())

    with barnabas.testing.run(app) as t:
        t.drain()
        assert seen == []
        t.clock.advance(3600)
        t.drain()
        t.drain()
        assert len(seen) == 1
        t.clock.advance(3 * 3600)  # nobody ran meanwhile
        t.drain()
    assert len(seen) == 2


@pytest.mark.parametrize("ask", ["sent", "enqueued", "dead", "table"])
def test_who_asks_by_name_is_told_what_to_give(ask):
    with barnabas.testing.run(App("shop")) as t, pytest.raises(DeclarationError, match=rf"{ask}: \w+='orders': give "):
        getattr(t, ask)("orders")


def test_the_clock_does_not_go_back():
    with barnabas.testing.run(App("shop")) as t, pytest.raises(DeclarationError, match="seconds=-5: time does not go back"):
        t.clock.advance(-5)


def test_a_failed_send_that_nobody_looks_at_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    app = App("calls", events="memory:", jobs="memory:")
    app.job(name="mail")(lambda: None)
    worker = Worker(app)
    assert "unseen" not in worker.counts()
    future = Future[None]()
    future.fail(SendError("no room"))
    del future
    assert "a send failed and nobody looked at its future: SendError: no room" in caplog.text
    assert worker.counts()["unseen"] == 1 and "1 failed sends" in _line(worker.counts(), 0.0, 0.0)
