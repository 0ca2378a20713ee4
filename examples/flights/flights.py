"""Departures by airline, and word of the late ones: topics, responders, a table and a job.

departures --route--> by_carrier --count--> (totals)
departures --late---> delays --tell--> [Notify] --> notified
"""

from pathlib import Path

import msgspec

from barnabas import App
from data import LATE, Departure, airlines

URL = f"sqlite:///{Path(__file__).resolve().parents[2] / 'build' / 'flights.db'}"


class Leaving(msgspec.Struct):
    """What an airline's total needs to know of a departure."""

    carrier: str
    delay: int | None


class Totals(msgspec.Struct):
    """An airline's year so far."""

    flights: int = 0
    cancelled: int = 0
    minutes: int = 0  # of delay, over the flights that left

    @property
    def mean_delay(self) -> float | None:
        left = self.flights - self.cancelled
        return self.minutes / left if left else None


class Notice(msgspec.Struct):
    """What somebody at the gate was told."""

    id: str
    text: str


app = App("flights", events=URL, jobs=URL)

departures = app.topic("departures", Departure, key="tailnum")
by_carrier = app.topic("by_carrier", Leaving, key="carrier")
delays = app.topic("delays", Departure, key="tailnum")
notified = app.topic("notified", Notice, key="id")
totals = app.table("totals", Totals)


@app.consumer(departures, responds=[by_carrier])
def route(departure: Departure) -> Leaving:
    """Keyed by aircraft in, keyed by airline out: all that concerns one airline meets in one place."""
    return Leaving(departure.carrier, departure.delay)


@app.consumer(by_carrier, tables=[totals])
def count(leaving: Leaving) -> None:
    total = totals.get(leaving.carrier) or Totals()
    total.flights += 1
    if leaving.delay is None:
        total.cancelled += 1
    else:
        total.minutes += leaving.delay
    totals[leaving.carrier] = total


@app.consumer(departures, responds=[delays])
def late(departure: Departure) -> Departure | None:
    """Answers only for a flight that left two hours late or more."""
    return departure if departure.delay is not None and departure.delay >= LATE else None


@app.consumer(delays)
def tell(delay: Departure) -> None:
    notify.enqueue(delay.id, delay.carrier, delay.dest, delay.delay)


@app.job(queue="notices", name="Notify")  # as a class of Ruby could be named: Sidekiq may do it as well, see notify.rb
def notify(id: str, carrier: str, dest: str, minutes: int) -> None:
    """Tells the gate. A real one would send mail; this one leaves a message that can be counted."""
    notified.send(Notice(id, f"{airlines()[carrier]} to {dest} left {minutes} minutes late"))
