"""`barnabas read`: what a topic holds, as text or as JSON lines."""

import base64
import sys
from datetime import datetime
from typing import Any

import click
import msgspec

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import command, known

_decode = msgspec.json.Decoder().decode


def as_start(ctx: click.Context, param: click.Parameter, text: str | None) -> inspect.Start | None:
    """An option's place in a topic: earliest, latest, an offset or a time."""
    if text is None or text in ("earliest", "latest"):
        return text
    return int(text) if text.isdecimal() else as_time(ctx, param, text, "earliest, latest, an offset, or ")


def as_time(ctx: click.Context, param: click.Parameter, text: str | None, others: str = "") -> datetime | None:
    """An option's ISO 8601 time (local time unless it says otherwise)."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not {others}a time such as 2026-01-31T12:00:00", ctx, param) from None


@command()
@click.argument("topic", shell_complete=known("topics"))
@click.option(
    "--from", "start", callback=as_start, metavar="earliest|latest|OFFSET|TIME",
    help="Where to begin; an OFFSET needs --partition, a TIME is ISO 8601 (local). [default: earliest; with --follow latest]",
)
@click.option("--partition", type=click.IntRange(0), metavar="N", help="Only this partition.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="At most so many messages.")
@click.option("--key", metavar="K", help="Only messages with this key.")
def read(app: App, topic: str, start: inspect.Start | None, follow: bool, as_json: bool, **which: Any) -> None:
    """Show the messages of a topic: each partition in its order, between partitions the oldest first."""
    start = start if start is not None else "latest" if follow else "earliest"
    if isinstance(start, int) and which["partition"] is None:
        raise click.UsageError(f"--from {start} is an offset and needs --partition N; a time is written as ISO 8601")
    shown = 0
    try:
        for message in inspect.read(app, topic, start, follow=follow, **which):
            draw.json_line(as_fields(message)) if as_json else draw.line(as_text(message))
            shown += 1
            if follow:
                sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(0 if follow else 130) from None  # --follow ends so; else it is cut short
    if not shown and not as_json:
        why = "latest begins behind the last message; add --follow to wait for new ones, or use --from earliest"
        click.echo(f"nothing: {why if start == 'latest' else 'no message matches'}", err=True)


def as_fields(message: inspect.Stored) -> dict[str, Any]:
    """A message for JSON. `value` is the JSON that is stored; "encoding" says so where it is other text, or base64."""
    value, encoding = shown(message.value)
    key, key_encoding = text_of(message.key)
    headers = [[name, text_of(data)[0]] for name, data in message.headers]
    fields = {
        "topic": message.topic, "partition": message.partition, "offset": message.offset, "key": key, "value": value,
        "headers": headers, "timestamp": message.timestamp,
    }
    if encoding:
        fields["encoding"] = encoding
    if key_encoding == "base64":
        fields["key_encoding"] = key_encoding
    return fields


def as_text(message: inspect.Stored) -> bytes:
    """A message as a line: address, time, key, value."""
    key, _ = text_of(message.key)
    text, encoding = text_of(message.value)
    if encoding == "base64":
        text = f"({len(message.value or b'')} bytes) {text}"
    where = f"{message.topic}[{message.partition}]@{message.offset}"
    time = draw.when(message.timestamp, "milliseconds")
    return f"{where} {time} {'-' if key is None else key} {'(null)' if text is None else text}".encode()


def shown(data: bytes | None) -> tuple[Any, str]:
    """Stored bytes for JSON, and what they are if no JSON: "text" or "base64"."""
    if data is None:
        return None, ""
    try:
        value = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return text_of(data)
    # As it is stored, so that no number changes on its way; but a line is to stay one line.
    return (value if b"\n" in data else msgspec.Raw(data)), ""


def text_of(data: str | bytes | None) -> tuple[str | None, str]:
    """Bytes as text, and whether they had to be written as base64."""
    if not isinstance(data, bytes):
        return data, ""
    try:
        return data.decode(), "text"
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), "base64"
