"""Tables: keyed state that is settled together with the position."""

import asyncio

import msgspec
import pytest
from watching import wait_for

from barnabas import Retry
from barnabas.errors import BarnabasError, TableError


class Order(msgspec.Struct):
    customer: str
    n: int = 1


class Total(msgspec.Struct):
    count: int = 0
    seen: list[int] = []


@pytest.fixture
def orders(app):
    return app.topic("orders", Order, key="customer", partitions=3)


@pytest.fixture
def totals(app):
    return app.table("totals", Total)


def view(table) -> dict:
    with table.open() as cells:
        return dict(cells.items())


@pytest.mark.parametrize("kind", ["sync", "threads", "async"])
def test_a_lane_sees_what_its_predecessor_wrote(place, app, orders, totals, kind):
    def handle(order: Order) -> None:
        total = totals.get(order.customer) or Total()
        assert order.n == total.count
        total.count += 1
        totals[order.customer] = total

    if kind == "async":

        @app.consumer(orders, tables=[totals], concurrency=20, retry=Retry(0))
        async def count(order: Order):
            await asyncio.sleep(0)
            handle(order)
            await asyncio.sleep(0)
    else:

        @app.consumer(orders, tables=[totals], concurrency=4 if kind == "threads" else 1, retry=Retry(0))
        def count(order: Order):
            handle(order)

    orders.send_many(Order(f"c{c}", n) for n in range(100) for c in range(10)).result(5)
    place.drain(app)
    assert place.dead(orders) == []
    assert view(totals) == {f"c{c}": Total(100) for c in range(10)}


def test_get_set_in_and_delete(place, app, orders, totals):
    log = []

    @app.consumer(orders, tables=[totals])
    def use(order: Order):
        key = order.customer
        log.append((totals.get(key), totals.get(key, 7), key in totals))
        try:
            totals[key]
        except KeyError as error:
            log.append(error.args)
        try:
            del totals[key]
        except KeyError as error:
            log.append(error.args)
        totals[key] = Total(1)
        log.append((totals[key], key in totals))
        del totals[key]
        log.append(key in totals)
        if order.n == 2:
            totals[key] = Total(2)

    orders.send_many([Order("ann", 1), Order("ann", 2)]).result(5)
    place.drain(app)
    once = [(None, 7, False), ("ann",), ("ann",), (Total(1), True), False]
    assert log == once * 2
    assert view(totals) == {"ann": Total(2)}


def test_reads_are_copies_and_only_assignment_writes(place, app, orders, totals):
    @app.consumer(orders, tables=[totals], retry=Retry(0))
    def use(order: Order):
        if order.n == 0:
            totals[order.customer] = mine = Total(1)
            mine.count = 100
        read = totals[order.customer]
        assert read.count == 1
        read.count = 50
        read.seen.append(1)
        assert totals[order.customer] == Total(1)

    orders.send_many([Order("ann", 0), Order("ann", 1)]).result(5)
    place.drain(app)
    place.again(app)
    assert place.dead(orders) == []
    assert view(totals) == {"ann": Total(1)}


def test_a_failing_handler_writes_nothing(place, app, orders, totals):
    tries = []

    @app.consumer(orders, tables=[totals], retry=Retry(2, backoff=0.01))
    def count(order: Order):
        tries.append(totals.get(order.customer))
        totals[order.customer] = Total(len(tries))
        if order.n == 0 and len(tries) < 3:
            raise ValueError("not yet")
        if order.n == 1:
            del totals[order.customer]
            raise ValueError("never")

    orders.send_many([Order("ann", 0), Order("ann", 1)]).result(5)
    place.drain(app)
    assert tries == [None, None, None, Total(3), Total(3), Total(3)]
    assert view(totals) == {"ann": Total(3)}


def test_another_key_than_the_messages_is_refused(place, app, orders, totals):
    @app.consumer(orders, tables=[totals], retry=Retry(5, backoff=60))  # none of which can mend that
    def count(order: Order):
        totals["somebody else"] = Total(1)

    orders.send(Order("ann")).result(5)
    place.drain(app)
    headers = dict(place.dead(orders)[0].headers)
    assert headers["barnabas-exception"] == b"TableError"
    assert b"'somebody else'" in headers["barnabas-reason"] and b"rekeyed=True" in headers["barnabas-reason"]
    assert view(totals) == {}


def test_a_rekeyed_topic_may_use_other_keys(place, app, totals):
    orders = app.topic("rekeyed", Order, key="customer", partitions=1, rekeyed=True)

    @app.consumer(orders, tables=[totals])
    def count(order: Order):
        total = totals.get("all") or Total()
        total.count += order.n
        totals["all"] = total

    orders.send_many([Order("ann"), Order("bob"), Order("ann")]).result(5)
    place.drain(app)
    assert view(totals) == {"all": Total(3)}


def test_a_table_cannot_be_used_outside_of_its_handlers(place, app, orders, totals):
    with pytest.raises(TableError, match=r"'totals'.*tables=\[\.\.\.\].*totals\.open\(\)"):
        totals["ann"] = Total()
    for use in (lambda: totals["ann"], lambda: totals.get("ann"), lambda: "ann" in totals):
        with pytest.raises(TableError):
            use()

    @app.consumer(orders, retry=Retry(0))
    def stranger(order: Order):
        totals.get(order.customer)

    orders.send(Order("ann")).result(5)
    place.drain(app)
    assert dict(place.dead(orders)[0].headers)["barnabas-exception"] == b"TableError"


def test_the_view_from_outside_is_a_read_only_mapping(place, app, orders, totals):
    @app.consumer(orders, tables=[totals])
    def count(order: Order):
        totals[order.customer] = Total(order.n)

    orders.send_many(Order(f"c{n}", n) for n in range(5)).result(5)
    place.drain(app)
    with totals.open() as cells:
        assert cells["c3"] == Total(3) and cells.get("nobody") is None and "c1" in cells
        assert len(cells) == 5 and sorted(cells) == [f"c{n}" for n in range(5)]
        assert sorted(cells.keys()) == sorted(cells) and Total(4) in list(cells.values())
        assert dict(cells) == {f"c{n}": Total(n) for n in range(5)}
        with pytest.raises(KeyError):
            cells["nobody"]
        with pytest.raises(TypeError):
            cells["c3"] = Total()
        with pytest.raises(TypeError):
            del cells["c3"]


def test_the_view_can_be_read_while_work_goes_on(place, app, orders, totals):
    @app.consumer(orders, tables=[totals])
    def count(order: Order):
        totals[order.customer] = Total(order.n)

    with place.running(app) as worker:
        for n in range(1, 6):
            orders.send(Order("ann", n))
            wait_for(lambda n=n: view(totals) == {"ann": Total(n)}, worker=worker)


def test_a_cell_of_another_type_is_named(place, app, orders, totals):
    """As after a deploy with another type."""
    said = []

    @app.consumer(orders, tables=[totals], retry=Retry(0))
    def count(order: Order):
        with pytest.raises(TypeError, match="not iterable"):
            list(totals)
        totals[order.customer] = Total()
        totals._decode = msgspec.msgpack.Decoder(str).decode
        try:
            totals[order.customer]
        except BarnabasError as error:
            said.append(str(error))

    orders.send(Order("ann", 1)).result(5)
    place.drain(app)
    with totals.open() as cells, pytest.raises(BarnabasError) as caught:
        cells["ann"]
    assert said == [str(caught.value)]
    assert "table 'totals' holds under 'ann' what is no" in said[0] and "--clear-tables" in said[0]


def test_values_of_another_type_than_the_tables_are_refused(place, app, orders, totals):
    many, ratio = app.table("many", list[int]), app.table("ratio", float | None)

    @app.consumer(orders, tables=[totals, many, ratio])
    def count(order: Order) -> None:
        totals[order.customer] = Total(1)
        many[order.customer] = [order.n]
        ratio[order.customer] = order.n
        if order.n == 2:
            totals[order.customer] = {"count": "two"}

    orders.send_many([Order("ann"), Order("bob", 2)]).result(5)
    place.drain(app)
    (letter,) = place.dead(orders)
    assert letter.key == "bob" and b"the table 'totals' is one of <class" in dict(letter.headers)["barnabas-reason"]
    assert view(totals) == {"ann": Total(1)} and view(many) == {"ann": [1]} and view(ratio) == {"ann": 1.0}


def test_an_empty_table_is_empty(place, totals):
    assert view(totals) == {}
    with totals.open() as cells:
        assert len(cells) == 0 and cells.get("x") is None


def test_a_table_is_exact_after_restarts(place, app, orders, totals):
    @app.consumer(orders, tables=[totals], concurrency=4)
    def count(order: Order):
        total = totals.get(order.customer) or Total()
        total.count += order.n
        totals[order.customer] = total

    for _ in range(5):
        orders.send_many(Order(f"c{c}") for _ in range(20) for c in range(7)).result(5)
        with place.running(app) as worker:  # stopped wherever it happens to be
            wait_for(lambda: view(totals), worker=worker)
        place.again(app)
    place.drain(app)
    assert view(totals) == {f"c{c}": Total(100) for c in range(7)}


def test_a_table_and_what_is_sent_and_enqueued_belong_together(place, app, orders, totals):
    out = app.topic("out", int, partitions=1)
    ran = []

    @app.job
    def tell(n: int):
        ran.append(n)

    @app.consumer(orders, tables=[totals], retry=Retry(1, backoff=0.01), responds=[out])
    def count(order: Order) -> int:
        total = totals.get(order.customer) or Total()
        total.count += 1
        totals[order.customer] = total
        tell.enqueue(order.n)
        if order.n % 4 == 0:
            raise ValueError("dead")
        return order.n

    orders.send_many(Order("ann", n) for n in range(20)).result(5)
    place.drain(app)
    good = [n for n in range(20) if n % 4]
    assert view(totals) == {"ann": Total(len(good))}
    assert place.values(out) == good and sorted(ran) == good


def test_keys_of_tables_are_messages_keys(place, app):
    numbers = app.topic("numbers", dict, key=lambda v: v["k"], partitions=1)
    table = app.table("plain", int)

    @app.consumer(numbers, tables=[table], retry=Retry(0))
    def count(value: dict):
        table[value["k"]] = 1

    numbers.send_many([{"k": 5}, {"k": "text"}]).result(5)
    place.drain(app)
    assert place.dead(numbers) == []
    assert view(table) == {"5": 1, "text": 1}
    with table.open() as cells:
        assert cells[5] == 1


@pytest.mark.parametrize(
    ("type_", "value"), [(int, 0), (str, ""), (list[int], []), (dict, {"a": None}), (None, {"x": [1]})]
)
def test_values_of_any_type_come_back(place, app, orders, type_, value):
    table = app.table("any", type_)

    @app.consumer(orders, tables=[table], retry=Retry(0))
    def put(order: Order):
        assert table.get(order.customer, "nothing") == ("nothing" if order.n == 0 else value)
        table[order.customer] = value
        assert table[order.customer] == value

    orders.send_many([Order("ann", 0), Order("ann", 1)]).result(5)
    place.drain(app)
    assert place.dead(orders) == []
    place.again(app)
    assert view(table) == {"ann": value}


def test_two_consumers_keep_tables_of_their_own_apart(place, app, orders, totals):
    others = app.table("others", Total)

    @app.consumer(orders, tables=[totals])
    def one(order: Order):
        totals[order.customer] = Total(1)

    @app.consumer(orders, tables=[others])
    def two(order: Order):
        others[order.customer] = Total(2)

    orders.send(Order("ann")).result(5)
    place.drain(app)
    assert view(totals) == {"ann": Total(1)} and view(others) == {"ann": Total(2)}
