"""What commands print: tables for people, JSON lines for programs."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns whose name ends in "#" hold numbers, which are put to the right. Nothing is cut off
    where the output is not a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(f"{cell:,}" if type(cell) is int else "" if cell is None else str(cell)) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as capture:
        console.print(drawn)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()) + "\n\n")


def json_line(value: Any) -> None:
    """Print one JSON value on a line of its own."""
    line(msgspec.json.encode(value))


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


def span(seconds: float) -> str:
    """A duration in the largest unit that divides it: "7 d", "90 s"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:g} s"
