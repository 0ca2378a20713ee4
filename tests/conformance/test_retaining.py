"""Retention: what goes, and what stays because a group still needs it."""

from watching import wait_for

from barnabas import Delivery, Retention


def send(topic, values) -> None:
    for value in values:  # one by one: a backend may drop only whole batches
        topic.send(value).result(5)


def test_what_is_older_than_its_age_goes(place, app):
    topic = app.topic("raw", int, partitions=1, retention=Retention(age=3600))
    send(topic, range(5))
    app.clock.advance(3000)
    send(topic, range(5, 8))
    app.clock.advance(1000)
    place.expire(app)
    assert [(m.offset, m.value) for m in place.stored(topic)] == [(5, 5), (6, 6), (7, 7)]
    assert topic.send(8).result(5).offset == 8


def test_what_is_beyond_its_size_goes_oldest_first(place, app):
    topic = app.topic("raw", codec="raw", partitions=1, retention=Retention(age=None, size=10_000))
    send(topic, [bytes([n]) * 1000 for n in range(30)])
    place.expire(app)
    left = [value[0] for value in place.values(topic)]
    assert 8 <= len(left) <= 10 and left == list(range(30 - len(left), 30))


def test_seven_days_are_the_default(place, app):
    topic = app.topic("raw", int, partitions=1)
    send(topic, [1])
    app.clock.advance(6.9 * 86400)
    place.expire(app)
    assert place.values(topic) == [1]
    app.clock.advance(0.2 * 86400)
    place.expire(app)
    assert place.values(topic) == []


def test_nothing_goes_that_the_slowest_group_has_not_settled(place, app):
    topic = app.topic("raw", int, partitions=1, retention=Retention(age=60))
    seen = {"fast": [], "slow": []}
    app.consumer(topic, name="fast")(lambda n: seen["fast"].append(n))
    app.consumer(topic, name="slow")(lambda n: seen["slow"].append(n))
    send(topic, range(3))
    place.drain(app)
    send(topic, range(3, 6))
    place.drain(app, only=["fast"])
    app.clock.advance(1000)
    place.expire(app)
    assert place.values(topic) == [3, 4, 5]
    place.drain(app)
    assert seen == {"fast": [0, 1, 2, 3, 4, 5], "slow": [0, 1, 2, 3, 4, 5]}
    place.expire(app)
    assert place.values(topic) == []


def test_force_drops_what_a_group_has_not_seen_and_the_group_goes_on_behind_it(place, app):
    topic = app.topic("raw", int, partitions=1, retention=Retention(age=60, force=True))
    seen = []

    @app.consumer(topic)
    def read(n: int, delivery: Delivery):
        seen.append((delivery.offset, n))

    send(topic, range(2))
    place.drain(app)
    send(topic, range(2, 5))
    app.clock.advance(1000)
    place.expire(app)
    send(topic, [5, 6])
    assert place.values(topic) == [5, 6]
    place.again(app)
    place.drain(app)
    assert seen == [(0, 0), (1, 1), (5, 5), (6, 6)]


def test_a_new_group_begins_at_what_is_left(place, app):
    topic = app.topic("raw", int, partitions=1, retention=Retention(age=60))
    seen = []
    send(topic, range(3))
    app.clock.advance(1000)
    send(topic, [3])
    place.expire(app)

    @app.consumer(topic)
    def read(n: int):
        seen.append(n)

    with place.running(app) as worker:
        wait_for(worker.drained, worker=worker)
    assert seen == [3]
