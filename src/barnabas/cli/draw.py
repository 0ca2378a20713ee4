"""What commands print: tables for people, JSON lines for programs."""

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


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
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 10_000)
    with console.capture() as capture:
        console.print(drawn)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    sys.stdout.write("\n".join(line for line in lines if line) + "\n\n")


def json_line(value: Any) -> None:
    """Print one JSON value on a line of its own."""
    line(_encode(value))


def line(data: bytes) -> None:
    """Print bytes as a line. Not click.echo: it flushes each line, and `read` prints millions."""
    sys.stdout.buffer.write(data + b"\n")


def flush() -> None:
    """Let what was printed be seen: it is followed by a wait."""
    sys.stdout.flush()


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024 or unit == "GiB":
            break
    return f"{amount:,.1f} {unit}"


def span(seconds: float) -> str:
    """A duration in the largest unit that divides it: "7 d", "90 s"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:g} s"


def moment(timestamp: float) -> str:
    """Local time, to the millisecond."""
    return datetime.fromtimestamp(timestamp).isoformat(" ", "milliseconds")
