"""What a worker has taken and not begun goes to others while one delivery takes long, between any two steps of it."""

import pytest

from barnabas import App
from barnabas.engine.crew import TICK, Crew
from barnabas.ports import Part


class Watched(tuple):
    """A row: whoever asks for its offset is interrupted just before."""

    before = None

    def __getitem__(self, index):
        if index == 0 and self.before is not None:
            act, self.before = self.before, None
            act()
        return super().__getitem__(index)


class Slow:
    """A clock; whoever asks is interrupted just after."""

    time, after = 100.0, None

    def now(self):
        return self.time

    def monotonic(self):
        now = self.time
        if self.after is not None:
            act, self.after = self.after, None
            act()
        return now


@pytest.mark.parametrize("when", ["before it is written down", "before the clock", "in the handler"])
@pytest.mark.parametrize("at", range(4))
def test_a_row_is_run_once_whenever_the_rest_is_taken_back(when, at):
    clock, seen = Slow(), []
    app = App("crew", events="memory:", jobs="memory:")
    topic = app.topic("orders", int)

    @app.consumer(topic, order="none", concurrency=2)
    def handle(n: int):
        seen.append(n)
        if n == at:
            clock.time += 2 * TICK
            if when == "in the handler":
                take_back()
            elif when == "before the clock":
                clock.after = take_back

    crew = Crew(app.consumers["handle"].compile(app.observers, []), "none", 2, clock)
    part = Part("orders", 0, 1, "g")
    part.until, crew.pace = 1e9, 1e-6
    rows, taken = [Watched((n, None, b"%d" % n, None, 1.0)) for n in range(6)], []

    def take_back():
        crew.rescue(clock.time)
        taken.extend(row[0] for run in crew.lanes.ready for row in run.rows)

    if when == "before it is written down":
        rows[at + 1].before = take_back
    crew.put([(part, rows)])
    crew.step()
    assert taken or at == 3
    crew.unpark(clock.time)
    crew.step()
    assert sorted(seen) == [*range(6)]
    assert sorted(row[0] for result in crew.collect() for row in result.rows) == [*range(6)]
