"""`barnabas db check`, `backup`, `compact`: care for the SQLite file."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click

from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import AppGroup, Wrong, hinted


@click.group(cls=AppGroup)
def db() -> None:
    """Check, back up or compact the SQLite file of an app."""


def files(app: App) -> list[str]:
    """The app's SQLite files. Raises Wrong where there is none."""
    urls = dict.fromkeys((app.settings.events, app.settings.jobs))
    found = [url.removeprefix("sqlite:///") for url in urls if url.startswith("sqlite:///")]
    if not found:
        schemes = " and ".join(f"{url.partition(':')[0]}:" for url in urls)
        raise Wrong(f"`barnabas db` cares for sqlite: files, and this app uses {schemes}; use that server's own tools")
    return found


@db.command()
def check(app: App, as_json: bool) -> int:
    """Check the file: SQLite's integrity_check, and that what is stored fits together.

    Workers may go on meanwhile. Exit status 1 if there is something to mend.
    """
    from barnabas.backends.sqlite_care import check

    found = [check(path) for path in files(app)]
    for state in found:
        if as_json:
            draw.json_line(state._asdict())
            continue
        sizes = {name: draw.size(getattr(state, name)) for name in ("size", "free", "wal")}
        rows = [(name, value) for name, value in (state._asdict() | sizes).items() if name not in ("ok", "problems", "notes")]
        draw.table(("what", "value"), rows)
        draw.found(state.file, state.notes, state.problems)
    return 0 if all(state.ok for state in found) else 1


@db.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--of", type=click.Choice(["events", "jobs"]), help="Which file, where events and jobs have one each.")
def backup(app: App, file: str, of: str | None, as_json: bool) -> None:
    """Copy the file as it is at this instant to FILE, which must not exist, and check the copy.

    Workers may go on meanwhile. To restore: stop all processes, remove the old file and its -wal and -shm, and put a copy of
    FILE in its place.
    """
    from barnabas.backends.sqlite_care import backup

    paths = files(app)
    if of is not None:
        paths = [path for path in paths if getattr(app.settings, of) == f"sqlite:///{path}"]
    if len(paths) != 1:
        what = "events and jobs have a file each; name one: --of events, --of jobs"
        raise Wrong(what if paths else f"{of} are not in a sqlite: file", misuse=True)
    began = monotonic()
    with hinted("barnabas db backup --help"), _bar(as_json) as tell:
        size = backup(paths[0], os.path.abspath(file), tell)
    seconds = monotonic() - began
    said = f"{paths[0]}: {draw.size(size)} copied to {file} and checked, in {seconds:.1f} s"
    draw.say(as_json, said, file=paths[0], backup=os.path.abspath(file), bytes=size, seconds=seconds)


@contextmanager
def _bar(as_json: bool) -> Iterator[Callable[[int, int], Any]]:
    """On a terminal a bar over the bytes."""
    if as_json or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)


@db.command()
def compact(app: App, as_json: bool) -> None:
    """Give the file's free space back to the system.

    Refused while workers live. Who only sends waits until it is done. As much room as the file will have is needed beside it.
    """
    from barnabas.backends.sqlite_care import compact

    for path in files(app):
        before, after = compact(path)
        said = f"{path}: {draw.size(before)} before, {draw.size(after)} now"
        draw.say(as_json, said, file=path, before=before, after=after)
