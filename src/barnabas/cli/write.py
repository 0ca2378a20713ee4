"""`barnabas send` and `barnabas enqueue`: the write side, for shells and scripts."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import click
import msgspec

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import Wrong, json_option, with_app
from barnabas.cli.read import as_time
from barnabas.errors import SendError, UnknownTopic
from barnabas.future import Future
from barnabas.job import Job
from barnabas.message import Message
from barnabas.topic import Topic

AHEAD = 5000  # messages on their way at a time


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _headers(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> list[tuple[str, bytes]]:
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise click.BadParameter(f"{name!r} is not NAME=VALUE", ctx, param)
    return [(name, value.encode()) for name, _, value in pairs]


@click.command()
@click.argument("topic")
@click.argument("value", required=False)
@click.option("--file", type=_FILE, help="Send each line of this file.")
@click.option("--key", metavar="K", help="The key, in place of the one that the topic takes from the value.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", callback=_headers, help="Repeatable.")
@json_option
@with_app
def send(app: App, topic: str, value: str | None, file: Path | None, as_json: bool, **fields: Any) -> None:
    """Send VALUE (JSON) to a topic; "-" sends each line of standard input, --file each line of a file.

    Values are checked against the topic's type. A file is checked as a whole before its first line is sent.
    """
    if (value is None) == (file is None):
        raise click.UsageError("give a VALUE, or - for standard input, or --file FILE: one of them")
    target = _topic(app, topic)
    if value is not None and value != "-":
        _print_message(next(_sent(target, [("the value", value.encode())], **fields)), as_json)
        return
    began, count = monotonic(), 0
    if file is not None:
        for where, data in _lines(file.name, file.open("rb")):
            _value(target, data, where, fields["key"])
    name, stream = (file.name, file.open("rb")) if file is not None else ("line", sys.stdin.buffer)
    with stream, _progress(f"Sending to {topic}", file, as_json) as advance:
        for count, _ in enumerate(_sent(target, _lines(name, stream), **fields, moved=advance), 1):  # noqa: B007
            pass
    if as_json:
        draw.json_line({"topic": topic, "sent": count})
    else:
        click.echo(f"sent {count:,} messages to {topic} ({count / max(1e-9, monotonic() - began):,.0f}/s)")


def _topic(app: App, name: str) -> Topic[Any]:
    known = {topic.name: topic for topic in app.all_topics()}
    if name not in known:
        raise UnknownTopic(f"app {app.name!r} declares no topic {name!r}; {inspect.meant(name, app.topics, 'topics')}")
    return known[name]


def _lines(name: str, stream: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The lines that are not empty, each with its name and number."""
    for number, line in enumerate(stream, 1):
        line = line.rstrip(b"\r\n")
        if line:
            yield f"{name}:{number}", line


def _value(topic: Topic[Any], data: bytes, where: str, key: str | None) -> Any:
    if topic.codec == "json" and data.strip() == b"null":
        if key is None:
            raise SendError(f"{where}: null is a tombstone, which needs a key: add --key K")
        return None
    try:
        return topic.decode(data)
    except Exception as error:  # msgspec's or pydantic's
        shape = "JSON" if topic.type is None else getattr(topic.type, "__name__", str(topic.type))
        raise SendError(f"{where} does not fit {shape} of topic {topic.name!r}: {error}") from None


def _sent(
    topic: Topic[Any],
    lines: Iterable[tuple[str, bytes]],
    key: str | None = None,
    headers: Any = None,
    moved: Callable[[int], Any] = lambda size: None,
) -> Iterator[Message[Any]]:
    """Send lines; yields the stored messages. A line that cannot be sent says how many before it are."""
    pending: deque[tuple[Future[Message[Any]], int]] = deque()
    patience = topic.app.settings.send_timeout

    def settled(most: int) -> Iterator[Message[Any]]:
        while len(pending) > most:
            future, size = pending.popleft()
            yield future.result(patience)
            moved(size)

    for count, (where, data) in enumerate(lines):
        try:
            future = topic.send(_value(topic, data, where, key), key=key, headers=headers)
        except SendError as error:
            yield from settled(0)
            before = f" ({count:,} messages before it were sent)" if count else ""
            text = str(error) if where in str(error) else f"{where}: {error}"
            raise type(error)(f"{text}{before}") from error
        pending.append((future, len(data) + 1))
        yield from settled(AHEAD)
    yield from settled(0)


def _print_message(message: Message[Any], as_json: bool) -> None:
    if as_json:
        fields = ("topic", "partition", "offset", "key", "timestamp")
        draw.json_line({field: getattr(message, field) for field in fields})
    else:
        click.echo(f"{message.topic}[{message.partition}]@{message.offset}")


@contextmanager
def _progress(title: str, file: Path | None, as_json: bool) -> Iterator[Callable[[int], Any]]:
    """A bar over a file's bytes, on a terminal; what is called moves it on."""
    if file is None or as_json or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=os.path.getsize(file))
        yield lambda size: bar.advance(task, size)


@click.command()
@click.argument("job")
@click.argument("args", nargs=-1)
@click.option("--in", "delay", type=click.FloatRange(0), metavar="SECONDS", help="Run it that much later.")
@click.option("--at", callback=as_time, metavar="TIME", help="Run it then (ISO 8601).")
@click.option("--queue", metavar="NAME", help="Another queue than the job's own.")
@json_option
@with_app
def enqueue(
    app: App,
    job: str,
    args: tuple[str, ...],
    delay: float | None,
    at: datetime | None,
    queue: str | None,
    as_json: bool,
) -> int:
    """Enqueue a job. Each of ARGS is JSON, or else a text; put -- before negative numbers."""
    if delay is not None and at is not None:
        raise click.UsageError("give --in or --at, not both")
    found = app.job_handlers.get(job)
    if found is None:
        hint = inspect.meant(job, app.job_handlers, "jobs")
        raise Wrong(f"app {app.name!r} declares no job {job!r}; {hint}", "barnabas check")
    values = [_argument(text) for text in args]
    _check_arguments(found, values)
    with_options = found.options(queue=queue)
    if delay is not None:
        future = with_options.enqueue_in(delay, *values)
    elif at is not None:
        future = with_options.enqueue_at(at, *values)
    else:
        future = with_options.enqueue(*values)
    jid = future.result(app.settings.send_timeout)
    if jid is None:
        click.echo(f"Error: a before_enqueue hook of the app refused job {job!r}", err=True)
        return 1
    due = app.clock.now() + delay if delay is not None else at.timestamp() if at is not None else None
    if as_json:
        draw.json_line({"job": job, "jid": jid, "queue": queue or found.queue, "at": due})
    else:
        click.echo(jid)
    return 0


def _argument(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text


def _check_arguments(job: Job, values: list[Any]) -> None:
    """Refuse what would be dead on arrival."""
    data = msgspec.json.encode(values)
    try:
        job.decode_args(data)
    except msgspec.ValidationError as error:
        raise SendError(
            f"the arguments {data.decode()} do not fit {job.name}{inspect.job_info(job).signature}: {error}; an "
            "argument is read as JSON first: write '\"42\"' for the text 42"
        ) from None
