"""`barnabas batches`: batches of jobs, how far they are, and their end."""

import sys
import time
from itertools import islice
from typing import Any

import click
from msgspec.structs import asdict

from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.jobs import limit_option
from barnabas.cli.loading import AppGroup, options
from barnabas.jobs.batch import Status, cancel, status, statuses

TICK = 0.5  # seconds between two looks of `watch`
COLUMNS = ("batch", "state", "done#", "open#", "dead#", "total#", "created", "description")


@click.group(cls=AppGroup)
def batches() -> None:
    """List, show, watch and cancel batches of jobs."""


def _row(of: Status) -> tuple[Any, ...]:
    return (of.id, of.state, of.done, of.open, of.dead, of.total, draw.when(of.created), of.description)


@batches.command("list")
@options(limit_option)
def list_(app: App, as_json: bool, limit: int) -> None:
    """List the batches: those under way, then those that have ended. They are forgotten 30 days after their last change."""
    found = list(islice(statuses(app), limit + 1))
    draw.listing(as_json, found[:limit], COLUMNS, _row, "there is no batch")
    if len(found) > limit:
        click.echo(f"there are more than {limit}: add --limit N", err=True)


@batches.command()
@click.argument("id")
def show(app: App, id: str, as_json: bool) -> None:
    """Show a batch."""
    of = status(app, id)
    if as_json:
        return draw.json_line(of)
    times = ("created", "death", "complete", "success", "cancelled")
    said = {name: draw.when(value) if value and name in times else value for name, value in asdict(of).items() if value != ""}
    draw.pairs({"batch": said.pop("id"), **said})


@batches.command()
@click.argument("id")
def watch(app: App, id: str, as_json: bool) -> int:
    """Show how far a batch is until all of its jobs have ended: as a bar on a terminal, else a line for each change. The exit
    status is 0 for a success."""
    if sys.stdout.isatty() and not as_json:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        times = (TextColumn("{task.fields[dead]}"), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times) as bar:
            task = bar.add_task(id, dead="")
            for of in _looks(app, id):
                dead = f"{of.dead:,} dead" if of.dead else ""
                bar.update(task, total=of.total, completed=of.total - of.open, description=of.description or id, dead=dead)
    else:
        for of in _looks(app, id):
            draw.json_line(of) if as_json else click.echo(f"{of.total - of.open:,} of {of.total:,}, {of.dead:,} dead: {of.state}")
            sys.stdout.flush()
    return 0 if of.state == "success" else 1


def _looks(app: App, id: str) -> Any:
    """How far it is, at each change, until it has ended."""
    before = None
    while before is None or before.complete is None:
        if (of := status(app, id)) != before:
            yield of
        before = of
        time.sleep(TICK if of.complete is None else 0)


@batches.command("cancel")
@click.argument("id")
def cancel_(app: App, id: str, as_json: bool) -> None:
    """Cancel a batch and those inside it: jobs that have not begun are skipped when they are met, and no callback runs."""
    cancel(app, id)
    draw.say(as_json, f"{id} is cancelled", id=id, cancelled=True)
