"""Sends a year of departures, runs two worker processes until nothing is left, shows what they found."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import data

HERE = Path(__file__).resolve().parent
COMMAND = Path(sys.executable).with_name("barnabas")
CHUNK = 5_000
console = Console()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--limit", type=int, help="only so many departures")
    options.add_argument("--build", type=Path, default=HERE.parents[1] / "build", help="where flights.db and .json go")
    options.add_argument("--events", metavar="URL", help="where topics live, e.g. kafka://127.0.0.1:9092?prefix=demo-")
    given = options.parse_args()
    build = given.build.resolve()
    build.mkdir(parents=True, exist_ok=True)
    for old in build.glob("flights.db*"):
        old.unlink()
    # For this process and its children alike; the environment overrides the URL in flights.py.
    os.environ["BARNABAS_EVENTS_URL"] = os.environ["BARNABAS_JOBS_URL"] = f"sqlite:///{build / 'flights.db'}"

    kept = given.events is None
    if not kept:
        os.environ |= {"BARNABAS_EVENTS_URL": given.events, "BARNABAS_CREATE_TOPICS": "true"}
        console.print("Tables are kept in SQLite only, so the airlines' totals are left out here.")

    began = perf_counter()
    send(given.limit)
    sent = perf_counter()
    barnabas("run", "flights:app", "--processes", "2", "--drain", *([] if kept else ["--except", "count"]))
    ran = perf_counter()
    figures = collect(kept)
    # Read by `route` and by `late`, then once each in by_carrier, in delays and as a job.
    handled = (2 + kept) * figures["departures"] + figures["delays"] + figures["jobs_done"]
    figures |= {
        "seconds": ran - began,
        "send_seconds": sent - began,
        "run_seconds": ran - sent,
        "messages": handled,
        "messages_per_second": handled / (ran - sent),
    }
    (build / "flights.json").write_text(json.dumps(figures, indent=2) + "\n")
    show(figures, build)


def send(limit: int | None) -> None:
    """Sends the departures; the bar moves when they are durable."""
    import flights  # only now: it reads the environment

    with console.status("Reading flights.csv"):
        departures = data.departures(limit)
    columns = TextColumn("Sending departures"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(departures))
        for start in range(0, len(departures), CHUNK):
            count = flights.departures.send_many(departures[start : start + CHUNK]).result()
            progress.advance(bar, count)


def collect(kept: bool) -> dict[str, Any]:
    """The figures, read from outside: the table (if it was kept) through Python, the topics through the command."""
    import flights

    totals = {}
    if kept:
        with flights.totals.open() as view:
            totals = dict(view.items())
    stored = {state.name: sum(end - first for first, end, _ in state.partitions) for state in flights.app.events.topics()}
    return {
        "departures": sum(total.flights for total in totals.values()) if kept else stored["by_carrier"],
        "carriers": {
            carrier: {
                "name": data.airlines()[carrier],
                "flights": total.flights,
                "cancelled": total.cancelled,
                "mean_delay": total.mean_delay,
            }
            for carrier, total in totals.items()
        },
        "delays": sum(1 for _ in read("delays")),
        # A job may run twice after a crash; its message then carries the same flight.
        "jobs_done": len({notice["id"] for notice in read("notified")}),
    }


def read(topic: str) -> Iterator[dict[str, Any]]:
    lines = barnabas("read", topic, "--app", "flights:app", "--from", "earliest", "--json", capture=True)
    return (json.loads(line)["value"] for line in lines.splitlines())


def barnabas(*arguments: str, capture: bool = False) -> str:
    """Runs the command as a user would, in this folder; returns what it printed if asked to."""
    output = subprocess.PIPE if capture else None
    done = subprocess.run([COMMAND, *arguments], cwd=HERE, stdout=output, text=True, check=False)
    if done.returncode:
        sys.exit(f"`barnabas {' '.join(arguments)}` ended with status {done.returncode}")
    return done.stdout or ""


def show(figures: dict[str, Any], build: Path) -> None:
    command = os.path.relpath(COMMAND, HERE)
    table = Table("Airline", title="Departures from New York, 2013")
    for heading in ("Flights", "Cancelled", "Mean delay (min)"):
        table.add_column(heading, justify="right")
    for each in sorted(figures["carriers"].values(), key=lambda each: -each["flights"]):
        mean = "" if each["mean_delay"] is None else f"{each['mean_delay']:.1f}"
        table.add_row(each["name"], f"{each['flights']:,}", f"{each['cancelled']:,}", mean)
    if figures["carriers"]:
        console.print(table)
    console.print(
        f"{figures['departures']:,} departures, {figures['delays']:,} at least {data.LATE} minutes late, "
        f"{figures['jobs_done']:,} notices given by jobs\n"
        f"{figures['seconds']:.1f} s in all: read and sent in {figures['send_seconds']:.1f} s, then handled by two "
        f"processes in {figures['run_seconds']:.1f} s\n"
        f"{figures['messages']:,} messages and jobs handled, {figures['messages_per_second']:,.0f}/s\n"
        f"the same figures: {build / 'flights.json'}\n\n"
        "Next, try:\n"
        f"  cd {os.path.relpath(HERE)}; export BARNABAS_APP=flights:app\n"
        f"  {command} flow\n"
        f"  {command} topics\n"
        f"  {command} table totals UA\n"
        f"  {command} read notified --from earliest --limit 3\n"
        "  and read flights.py, which is all of it",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
