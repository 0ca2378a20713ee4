"""Responders: what a handler answers, and what happens when it breaks its word."""

import asyncio

import msgspec
import pytest
from watching import failures, wait_for

from barnabas import Delivery, Message, Respond, Retry, respond_to
from barnabas.engine.hand import ID
from barnabas.errors import ResponderError


class Order(msgspec.Struct):
    id: int
    customer: str = "ann"


class Receipt(msgspec.Struct):
    order: int


@pytest.fixture
def orders(app):
    return app.topic("orders", Order, key="customer", partitions=1)


@pytest.fixture
def receipts(app):
    return app.topic("receipts", Receipt, partitions=1)


@pytest.fixture
def alerts(app):
    return app.topic("alerts", str, partitions=1)


def reasons(place, topic):
    return [dict(m.headers)["barnabas-reason"].decode() for m in place.dead(topic)]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_return_value_is_sent_before_the_position_moves_on(place, app, orders, receipts, kind):
    if kind == "sync":

        @app.consumer(orders, responds=[receipts])
        def bill(order: Order) -> Receipt:
            return Receipt(order.id)
    else:

        @app.consumer(orders, responds=[receipts])
        async def bill(order: Order) -> Receipt:
            await asyncio.sleep(0)
            return Receipt(order.id)

    orders.send_many(Order(i) for i in range(50)).result(5)
    place.drain(app)
    assert place.values(receipts) == [Receipt(i) for i in range(50)]


def test_answers_can_be_consumed_in_turn(place, app, orders, receipts, alerts):
    seen = []

    @app.consumer(orders, responds=[receipts])
    def bill(order: Order) -> Receipt:
        return Receipt(order.id)

    @app.consumer(receipts, responds=[alerts])
    def alert(receipt: Receipt) -> str:
        return f"order {receipt.order}"

    @app.consumer(alerts)
    def read(text: str):
        seen.append(text)

    orders.send_many(Order(i) for i in range(20)).result(5)
    place.drain(app)
    assert seen == [f"order {i}" for i in range(20)]


def test_respond_answers_on_several_topics(place, app, orders, receipts, alerts):
    @app.consumer(orders, responds=[receipts, alerts])
    def bill(order: Order, respond: Respond):
        respond(receipts, Receipt(order.id), key="own key")
        respond(alerts, "billed")

    orders.send(Order(1)).result(5)
    place.drain(app)
    (receipt,) = place.stored(receipts)
    assert (receipt.key, receipt.value) == ("own key", Receipt(1))
    assert place.values(alerts) == ["billed"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_one_method_answers_is_not_sent_again_by_another(place, app, orders, alerts, receipts, fails):
    seen, kept = [], []

    @app.consumer([orders, alerts], responds=[respond_to(receipts, required=False)], retry=Retry(0))
    class Bill:
        def orders(self, order: Order, respond: Respond):
            respond(receipts, Receipt(order.id))
            kept.append(respond)
            if fails:
                raise ValueError("no")

        def alerts(self, text: str):
            seen.append(text)

    with place.running(app):
        orders.send(Order(1)).result(5)
        wait_for(lambda: place.dead(orders) if fails else place.values(receipts))
        alerts.send_many(["a", "b"]).result(5)
        wait_for(lambda: len(seen) == 2)
    assert place.values(receipts) == [Receipt(1)] * (not fails)
    if not fails:
        with pytest.raises(ResponderError, match="after its handler has returned"):
            kept[0](receipts, Receipt(2))


def test_parameters_come_in_any_order(place, app, orders, receipts):
    @app.consumer(orders, responds=[receipts])
    def bill(respond: Respond, delivery: Delivery, order: Order):
        respond(receipts, Receipt(order.id * 10 + delivery.attempt))

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert place.values(receipts) == [Receipt(11)]


def test_an_answer_is_keyed_by_its_topic(place, app, orders):
    keyed = app.topic("keyed", Receipt, key="order", partitions=1)

    @app.consumer(orders, responds=[keyed])
    def bill(order: Order) -> Receipt:
        return Receipt(order.id)

    orders.send(Order(7)).result(5)
    place.drain(app)
    assert [m.key for m in place.stored(keyed)] == ["7"]


def test_an_answer_can_be_a_message_with_headers(place, app, orders, receipts):
    @app.consumer(orders, responds=[receipts])
    def bill(order: Order) -> Message[Receipt]:
        return Message(value=Receipt(1), key="k", headers=[("a", b"1")], timestamp=9.0)

    orders.send(Order(1)).result(5)
    place.drain(app)
    (m,) = place.stored(receipts)
    assert (m.key, [tuple(h) for h in m.headers if h[0] != ID], m.timestamp) == ("k", [("a", b"1")], 9.0)


def test_each_method_of_a_class_says_whether_it_must_answer(place, app, orders, alerts, receipts):
    @app.consumer([orders, alerts], responds=[receipts])
    class Bill:
        def orders(self, order: Order) -> Receipt | None:
            return None

        def alerts(self, text: str) -> Receipt:
            return None

    orders.send(Order(1)).result(5)
    alerts.send("a").result(5)
    place.drain(app)
    assert place.dead(orders) == [] and len(place.dead(alerts)) == 1 and place.values(receipts) == []


def test_none_means_no_answer_where_the_annotation_says_so(place, app, orders, receipts):
    @app.consumer(orders, responds=[receipts])
    def bill(order: Order) -> Receipt | None:
        return Receipt(order.id) if order.id % 2 else None

    orders.send_many(Order(i) for i in range(6)).result(5)
    place.drain(app)
    assert [r.order for r in place.values(receipts)] == [1, 3, 5]
    assert place.dead(orders) == []


def test_an_answer_that_is_not_required_may_be_missing(place, app, orders, receipts, alerts):
    @app.consumer(orders, responds=[receipts, respond_to(alerts, required=False)])
    def bill(order: Order, respond: Respond):
        respond(receipts, Receipt(order.id))
        if order.id == 2:
            respond(alerts, "two")

    orders.send_many(Order(i) for i in range(4)).result(5)
    place.drain(app)
    assert len(place.values(receipts)) == 4 and place.values(alerts) == ["two"]


def test_multiple_allows_several_answers_in_order(place, app, orders, alerts):
    @app.consumer(orders, responds=[respond_to(alerts, multiple=True)])
    def bill(order: Order, respond: Respond):
        for n in range(order.id):
            respond(alerts, f"{order.id}.{n}")

    orders.send_many([Order(2), Order(3)]).result(5)
    place.drain(app)
    assert place.values(alerts) == ["2.0", "2.1", "3.0", "3.1", "3.2"]


VIOLATIONS = {
    "an unregistered topic": (lambda r, receipts, alerts: r(alerts, "x"), r"<topic alerts>, which is not in its responds"),
    "a second use": (
        lambda r, receipts, alerts: (r(receipts, Receipt(1)), r(receipts, Receipt(2))),
        r"'receipts' twice.*multiple=True",
    ),
    "a missing one": (lambda r, receipts, alerts: None, r"did not answer on 'receipts'.*required=False"),
}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_broken_word_is_dead_at_once_and_nothing_is_sent(place, app, orders, receipts, alerts, violation, kind):
    act, message = VIOLATIONS[violation]
    other = app.topic("other", int)
    runs = []

    def handle(respond: Respond) -> None:
        runs.append(1)
        other.send(1)
        act(respond, receipts, alerts)

    if kind == "sync":

        @app.consumer(orders, responds=[receipts], retry=Retry(5, backoff=0.01))
        def bill(order: Order, respond: Respond):
            handle(respond)
    else:

        @app.consumer(orders, responds=[receipts], retry=Retry(5, backoff=0.01))
        async def bill(order: Order, respond: Respond):
            handle(respond)

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert len(runs) == 1
    assert place.values(receipts) == place.values(alerts) == place.values(other) == []
    import re

    (reason,) = reasons(place, orders)
    assert reason.startswith("responder: bill") and re.search(message, reason)
    assert [f.outcome for f in failures(app)] == ["dead"]


def test_a_return_value_must_have_one_topic_to_go_to(place, app, orders, receipts, alerts):
    @app.consumer(orders, responds=[respond_to(receipts, required=False), respond_to(alerts, required=False)])
    def bill(order: Order):
        return Receipt(1)

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert "answers on 2 topics" in reasons(place, orders)[0]
    assert place.values(receipts) == place.values(alerts) == []


def test_one_bad_answer_keeps_all_of_them_back(place, app, orders, receipts, alerts):
    @app.consumer(orders, responds=[receipts, alerts], retry=Retry(0))
    def bill(order: Order, respond: Respond):
        respond(receipts, Receipt(1))
        respond(alerts, object())

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert place.values(receipts) == []
    assert "cannot be encoded" in reasons(place, orders)[0]


def test_a_failing_handlers_answers_are_not_sent(place, app, orders, receipts):
    tries = []

    @app.consumer(orders, responds=[receipts], retry=Retry(3, backoff=0.01))
    def bill(order: Order, respond: Respond):
        tries.append(1)
        respond(receipts, Receipt(len(tries)))
        if len(tries) < 3:
            raise ValueError("not yet")

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert place.values(receipts) == [Receipt(3)]


def test_without_responds_a_return_value_goes_nowhere(place, app, orders):
    @app.consumer(orders)
    def bill(order: Order) -> int:
        return 1

    orders.send(Order(1)).result(5)
    place.drain(app)
    assert place.dead(orders) == []
