"""Sending: what a send promises, whoever calls it."""

import asyncio
import threading
import uuid

import msgspec
import pytest

from barnabas import Message
from barnabas.errors import SendError, UnknownTopic, ValueTooLarge


class Order(msgspec.Struct):
    id: int
    customer: str = "ann"


@pytest.fixture
def orders(place):
    return place.app().topic("orders", Order, key="customer", partitions=4)


def test_a_send_gives_the_stored_message(place, orders):
    message = orders.send(Order(1), headers={"trace": b"\x00\xff"}, timestamp=1700000000.25).result(5)
    assert isinstance(message, Message)
    partition = place.partition("ann", 4)
    assert message == Message(
        topic="orders",
        value=Order(1),
        key="ann",
        headers=[("trace", b"\x00\xff")],
        timestamp=1700000000.25,
        partition=partition,
        offset=0,
    )
    again = orders.send(Order(2)).result(5)
    assert (again.partition, again.offset) == (partition, 1)
    assert place.values(orders) == [Order(1), Order(2)]


def test_a_send_can_be_awaited(orders):
    async def main():
        first, second = await asyncio.gather(orders.send(Order(1)), orders.send(Order(2)))
        return sorted([first.offset, second.offset])

    assert asyncio.run(main()) == [0, 1]


def test_a_resolved_future_can_be_asked_again_in_any_way(orders):
    future = orders.send(Order(1))
    message = future.result(5)
    seen = []
    future.add_done_callback(lambda f: seen.append(f.result()))

    async def main():
        return await future

    assert future.done() and future.exception() is None
    assert seen == [message] and asyncio.run(main()) == message


def test_the_timestamp_is_now_unless_given(orders):
    before = orders.app.clock.now()
    message = orders.send(Order(1)).result(5)
    assert before - 0.001 <= message.timestamp <= orders.app.clock.now() + 0.001  # Kafka keeps milliseconds


def test_the_beginning_of_time_is_no_now(place, orders):
    sent = [orders.send(Order(n), timestamp=time).result(5) for n, time in enumerate([0.0, 0, 0.0004, -0.0004])]
    orders.send_many([Message(value=Order(4), timestamp=0.0), Message(value=Order(5), timestamp=0)]).result(5)
    stored = {m.value.id: m for m in place.stored(orders)}
    assert [stored[m.value.id] for m in sent] == sent
    assert [round(stored[n].timestamp, 2) for n in range(6)] == [0.0] * 6


def test_send_many_gives_the_count(place, orders):
    assert orders.send_many(Order(i, str(i % 50)) for i in range(5000)).result(10) == 5000
    assert orders.send_many([]).result(5) == 0
    stored = place.stored(orders)
    assert sorted(m.value.id for m in stored) == list(range(5000))
    for key in map(str, range(50)):
        ids = [m.value.id for m in stored if m.key == key]
        assert ids == sorted(ids) and len(ids) == 100


def test_send_many_takes_messages_with_keys_headers_and_timestamps(place, orders):
    count = orders.send_many(
        [
            Message(value=Order(1), key="bob", headers=[("a", b"1")], timestamp=5.0),
            Order(2),
            Message(value=Order(3), key="bob", partition=3),
        ]
    ).result(5)
    assert count == 3
    by_id = {m.value.id: m for m in place.stored(orders)}
    assert (by_id[1].key, list(by_id[1].headers), by_id[1].timestamp) == ("bob", [("a", b"1")], 5.0)
    assert by_id[2].key == "ann"
    assert by_id[3].partition == 3


def test_a_message_of_another_topic_is_refused(orders):
    with pytest.raises(SendError, match=r"'receipts'.*'orders'"):
        orders.send_many([Message(topic="receipts", value=Order(1))])


def test_sends_from_many_threads_at_once_are_all_stored_in_each_threads_order(place, orders):
    def send(thread: int) -> None:
        futures = [orders.send(Order(i, f"t{thread}")) for i in range(200)]
        results[thread] = [future.result(10) for future in futures]

    results: dict[int, list[Message]] = {}
    threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    places = {(m.partition, m.offset) for found in results.values() for m in found}
    assert len(places) == 1600
    stored = place.stored(orders)
    for n in range(8):
        assert [m.value.id for m in stored if m.key == f"t{n}"] == list(range(200))
        assert [m.offset for m in results[n]] == sorted(m.offset for m in results[n])


def test_sends_from_many_event_loops_at_once_are_all_stored(place, orders):
    async def main(n: int) -> list[Message]:
        return await asyncio.gather(*(orders.send(Order(i, f"l{n}")) for i in range(100)))

    results: list[list[Message]] = []
    threads = [threading.Thread(target=lambda n=n: results.append(asyncio.run(main(n)))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({(m.partition, m.offset) for found in results for m in found}) == 400
    assert len(place.stored(orders)) == 400


def test_a_key_always_goes_to_the_same_partition(place, orders):
    keys = [f"customer-{i}" for i in range(40)]
    first = {key: orders.send(Order(1, key)).result(5).partition for key in keys}
    place.again(orders.app)
    second = {key: orders.send(Order(2, key)).result(5).partition for key in keys}
    assert first == second == {key: place.partition(key, 4) for key in keys}
    assert len(set(first.values())) == 4


def test_messages_without_a_key_are_spread(place):
    topic = place.app().topic("plain", int, partitions=3)
    topic.send_many(range(30)).result(5)
    assert {m.partition for m in place.stored(topic)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("text", "text"),
        ("", ""),
        (b"\x00\xfe", b"\x00\xfe"),
        (b"", b""),
        (42, "42"),
        (uuid.UUID(int=7), str(uuid.UUID(int=7))),
        ("ünï", "ünï"),
    ],
)
def test_keys_come_back_as_they_were_sent(place, key, stored):
    topic = place.app().topic("plain", int)
    if place.name == "kafka" and key == b"":
        stored = ""  # it keeps a key's bytes; what is text comes back as text
    assert topic.send(1, key=key).result(5).key == stored
    (message,) = place.stored(topic)
    assert message.key == stored and type(message.key) is type(stored)


def test_a_key_can_be_taken_from_the_value_by_a_function(place):
    topic = place.app().topic("orders", Order, key=lambda order: f"{order.customer}/{order.id}")
    assert topic.send(Order(3)).result(5).key == "ann/3"
    assert topic.send(Order(3), key="other").result(5).key == "other"


def test_a_key_of_another_kind_is_refused(orders):
    with pytest.raises(SendError, match="float"):
        orders.send(Order(1), key=1.5)


def test_an_explicit_partition_is_kept(orders):
    assert [orders.send(Order(i), partition=i).result(5).partition for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("partition", [4, -1])
def test_an_unknown_partition_is_refused(place, orders, partition):
    orders.send(Order(1), partition=0).result(5)
    with pytest.raises(UnknownTopic, match=rf"'orders'.*{partition}.*4"):
        orders.send(Order(2), partition=partition).result(5)
    assert place.values(orders) == [Order(1)]


def test_a_tombstone_has_a_key_and_no_value(place, orders):
    message = orders.send(None, key="ann").result(5)
    assert message.value is None and message.key == "ann"
    assert place.stored(orders) == [message]


def test_none_without_a_key_is_refused_where_values_have_one(place, orders):
    with pytest.raises(SendError, match=r"'orders'.*a tombstone needs one: give key="):
        orders.send(None)
    assert place.app().topic("ticks").send(None).result(5).value is None


def test_an_empty_value_is_not_a_tombstone(place):
    raw = place.app().topic("raw", codec="raw", partitions=1)
    raw.send_many([b"", Message(value=None, key="k"), b"\x00"]).result(5)
    assert place.values(raw) == [b"", None, b"\x00"]


def test_headers_keep_their_order_and_repeats(place, orders):
    pairs = [("b", b"1"), ("a", b"2"), ("b", b"3"), ("", b"")]
    orders.send(Order(1), headers=pairs).result(5)
    orders.send(Order(2), headers={"text": "as bytes"}).result(5)
    first, second = place.stored(orders)
    assert [tuple(pair) for pair in first.headers] == pairs
    assert [tuple(pair) for pair in second.headers] == [("text", b"as bytes")]


@pytest.mark.parametrize("headers", [{"a": 1}, [(1, b"x")], {"a": None}])
def test_headers_of_another_kind_are_refused(orders, headers):
    with pytest.raises(SendError, match="header"):
        orders.send(Order(1), headers=headers)


def test_a_value_over_the_limit_is_refused_at_once(place):
    topic = place.app().topic("raw", codec="raw", limit=1000)
    assert topic.send(b"x" * 1000).result(5).offset == 0
    with pytest.raises(ValueTooLarge, match=r"1001 bytes.*limit is 1000.*limit=BYTES"):
        topic.send(b"x" * 1001)
    assert len(place.stored(topic)) == 1


def test_the_limit_is_one_mebibyte_unless_set(place):
    raw = place.app().topic("raw", codec="raw")
    raw.send(b"x" * (1 << 20)).result(5)
    with pytest.raises(ValueTooLarge):
        raw.send(b"x" * ((1 << 20) + 1))
    small = place.app("small", value_limit=10).topic("small", codec="raw")
    with pytest.raises(ValueTooLarge, match="value_limit"):
        small.send(b"x" * 11)


@pytest.mark.parametrize("value", [object(), lambda: 1, {1: {2, object()}}])
def test_a_value_that_cannot_be_encoded_is_refused_at_once(place, value):
    topic = place.app().topic("plain")
    with pytest.raises(SendError, match=r"'plain' cannot be encoded"):
        topic.send(value)
    assert place.stored(topic) == []


def test_what_was_sent_survives_a_restart(place, orders):
    orders.send_many(Order(i) for i in range(100)).result(5)
    place.again(orders.app)
    assert place.values(orders) == [Order(i) for i in range(100)]


def test_closing_stores_what_nobody_waited_for(place, orders):
    futures = [orders.send(Order(i)) for i in range(500)]
    place.again(orders.app)
    assert place.name == "memory" or all(future.done() for future in futures)
    assert len(place.stored(orders)) == 500


def test_large_and_small_messages_mix(place):
    raw = place.app().topic("raw", codec="raw", partitions=1)
    sizes = [1, 500_000, 10, 1_000_000, 0, 70_000] * 3
    raw.send_many(bytes([i]) * size for i, size in enumerate(sizes)).result(20)
    assert [len(value) for value in place.values(raw)] == sizes


def test_typed_values_keep_their_type(place):
    app = place.app()
    typed = app.topic("typed", Order | int)
    free = app.topic("free")
    typed.send(Order(1)).result(5)
    typed.send(7).result(5)
    free.send({"a": [1, None, 2.5, "ü"]}).result(5)
    assert sorted(map(repr, place.values(typed))) == sorted(map(repr, [Order(1), 7]))
    assert place.values(free) == [{"a": [1, None, 2.5, "ü"]}]
