"""What commands print: tables for people, JSON lines for programs."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

# What stored names and texts may hold, and a terminal would obey.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A table of rich; columns whose name ends in "#" hold numbers, which are put to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    for row in rows:
        texts = (f"{cell:,}" if type(cell) is int else "" if cell is None else str(cell) for cell in row)
        drawn.add_row(*(Text(text.translate(CONTROLS)) for text in texts))
    return drawn


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    show(grid(columns, rows))


def show(drawn: Any) -> None:
    """Print a table of rich. Nothing is cut off where the output is not a terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as capture:
        console.print(drawn)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()) + "\n\n")


def json_line(value: Any) -> None:
    """Print one JSON value on a line of its own."""
    line(msgspec.json.encode(value))


def say(as_json: bool, said: str, **fields: Any) -> None:
    """Print what was done: for people, or its fields as JSON."""
    json_line(fields) if as_json else click.echo(said)


def absent(lines: Sequence[str], next_command: str) -> int:
    """Say what is not there, on stderr, and what to try then; the exit status."""
    for text in lines:
        click.echo(f"Error: {text}", err=True)
    if lines:
        click.echo(f"Next, try: {next_command}", err=True)
    return 1 if lines else 0


def found(what: str, warnings: Sequence[str], problems: Sequence[str]) -> None:
    """Say what a check has found."""
    for text in [f"Warning: {warning}" for warning in warnings] + [f"Error: {problem}" for problem in problems]:
        click.echo(text, err=True)
    click.echo(f"{what}: " + (f"{len(problems)} to mend" if problems else "all is well"))


def listing(as_json: bool, items: Sequence[Any], columns: Sequence[str], row: Callable[[Any], Sequence[Any]], none: str) -> None:
    """Print items: as JSON, each on its line, or as a table of `row(item)`; `none` says that there are none."""
    if as_json:
        for item in items:
            json_line(item)
    elif items:
        table(columns, map(row, items))
    else:
        print(none, file=sys.stderr)


def joined(*texts: str) -> str:
    """Those of these that say anything."""
    return ": ".join(filter(None, texts))


def line(data: bytes) -> None:
    """Print bytes as a line. Not click.echo: it flushes each line, and `read` prints millions."""
    sys.stdout.buffer.write(data + b"\n")


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def when(time: float | None, digits: str = "seconds") -> str:
    """A point in time (epoch seconds), local; one that no calendar has, which others can store, as the number it is."""
    try:
        return "-" if not time else datetime.fromtimestamp(time).isoformat(" ", digits)
    except (OverflowError, ValueError, OSError):
        return f"{time:g}"


def span(seconds: float) -> str:
    """A duration in the largest unit that divides it: "7 d", "90 s"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:g} s"


def age(seconds: float) -> str:
    """A duration as it passes: "0.4 s", "12 s", "7:05", "2:07:05", "3 d 04:05"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    if whole < 86400:
        return (f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}") + f":{whole % 60:02}"
    return f"{whole // 86400} d {whole // 3600 % 24:02}:{whole // 60 % 60:02}"


def text(value: Any) -> str:
    """A value for people: a text as it is, all else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def pairs(values: Mapping[str, Any]) -> None:
    """Print names and values, one a line; what is None is left out, long texts are indented below their names."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if value is not None:
            lines = text(value).translate(CONTROLS).rstrip("\n").split("\n")
            print(f"{name:<{width}}  {lines[0]}" if len(lines) == 1 else "\n  ".join([name, *lines]))
