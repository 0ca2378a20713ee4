"""`barnabas send` and `barnabas enqueue`: the write side, for shells and scripts."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import click
import msgspec

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import command, declared, known
from barnabas.cli.read import as_time
from barnabas.errors import SendError
from barnabas.future import Future
from barnabas.job import Job
from barnabas.message import Message
from barnabas.topic import Topic

AHEAD = 5000  # messages on their way at a time


@command()
@click.argument("topic", shell_complete=known("topics"))
@click.argument("value", required=False)
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Send each line of this file.")
@click.option("--key", metavar="K", help="The key, in place of the one that the topic takes from the value.")
def send(app: App, topic: str, value: str | None, file: Path | None, key: str | None, as_json: bool) -> None:
    """Send VALUE (JSON) to a topic; "-" sends each line of standard input, --file each line of a file.

    Values are checked against the topic's type. A file is checked as a whole before its first line is sent.

    \b
    barnabas send orders '{"id": 1, "customer": "ann"}'
    barnabas send orders --file orders.jsonl
    """
    if (value is None) == (file is None):
        raise click.UsageError("give a VALUE, or - for standard input, or --file FILE: one of them")
    target = {each.name: each for each in app.all_topics()}.get(topic) or declared(app, "topic", topic, app.topics)
    app.events.open_work({}, [])  # a question that only a server in reach answers: what is sent would wait for it
    if value is not None and value != "-":
        [message] = _sent(target, [("the value", value.encode())], key)
        said = {name: getattr(message, name) for name in ("topic", "partition", "offset", "key", "timestamp")}
        return draw.say(as_json, f"{message.topic}[{message.partition}]@{message.offset}", **said)
    if file is not None:
        with file.open("rb") as stream:
            for where, data in _lines(file.name, stream):
                _value(target, data, where, key)
    began = monotonic()
    with _opened(file, f"Sending to {topic}", as_json) as stream:
        count = sum(1 for _ in _sent(target, _lines(file.name if file is not None else "line", stream), key))
    rate = count / max(1e-9, monotonic() - began)
    draw.say(as_json, f"sent {count:,} messages to {topic} ({rate:,.0f}/s)", topic=topic, sent=count)


def _opened(file: Path | None, title: str, as_json: bool) -> AbstractContextManager[Iterable[bytes]]:
    """The file or standard input; on a terminal with a bar over the file's bytes."""
    if file is None:
        return nullcontext(sys.stdin.buffer)
    if as_json or not sys.stderr.isatty():
        return file.open("rb")
    from rich import progress
    from rich.console import Console

    return progress.open(file, "rb", description=title, console=Console(stderr=True), transient=True)


def _lines(name: str, stream: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The lines that are not empty, each with its name and number."""
    for number, line in enumerate(stream, 1):
        if line := line.rstrip(b"\r\n"):
            yield f"{name}:{number}", line


def _value(topic: Topic[Any], data: bytes, where: str, key: str | None) -> Any:
    if topic.codec == "json" and data.strip() == b"null":
        return None
    try:
        return topic.decode(data)
    except Exception as error:  # msgspec's or pydantic's
        shape = "JSON" if topic.type is None else getattr(topic.type, "__name__", str(topic.type))
        raise SendError(f"{where} does not fit {shape} of topic {topic.name!r}: {error}") from None


def _sent(topic: Topic[Any], lines: Iterable[tuple[str, bytes]], key: str | None) -> Iterator[Message[Any]]:
    """Send lines; yields the stored messages. A line that cannot be sent says how many before it are."""
    pending: deque[Future[Message[Any]]] = deque()
    patience = topic.app.settings.send_timeout
    for count, (where, data) in enumerate(lines):
        try:
            pending.append(topic.send(_value(topic, data, where, key), key=key))
        except SendError as error:
            for future in pending:
                future.result(patience)
            before = f" ({count:,} messages before it were sent)" if count else ""
            text = str(error) if where in str(error) else f"{where}: {error}"
            raise type(error)(f"{text}{before}") from error
        if len(pending) > AHEAD:
            yield pending.popleft().result(patience)
    for future in pending:
        yield future.result(patience)


@command()
@click.argument("job", shell_complete=known("jobs"))
@click.argument("args", nargs=-1)
@click.option("--in", "delay", type=click.FloatRange(0), metavar="SECONDS", help="Run it that much later.")
@click.option("--at", callback=as_time, metavar="TIME", help="Run it then (ISO 8601; local).")
@click.option("--queue", metavar="NAME", help="Another queue than the job's own.")
def enqueue(
    app: App, job: str, args: tuple[str, ...], delay: float | None, at: datetime | None, queue: str | None, as_json: bool
) -> int:
    """Enqueue a job. Each of ARGS is JSON, or else a text; put -- before negative numbers.

    \b
    barnabas enqueue welcome ann --in 60
    barnabas enqueue refund 42 '{"why": "late"}' -- -9.5
    """
    if delay is not None and at is not None:
        raise click.UsageError("give --in or --at, not both")
    found = declared(app, "job", job, app.job_handlers)
    values = [_argument(text) for text in args]
    _check_arguments(found, values)
    due = app.clock.now() + delay if delay is not None else at.timestamp() if at is not None else None
    with_options = found.options(queue=queue)
    future = with_options.enqueue(*values) if due is None else with_options.enqueue_at(due, *values)
    jid = future.result(app.settings.send_timeout)
    if jid is None:
        click.echo(f"Error: a before_enqueue hook of the app refused job {job!r}, or another of its kind is there", err=True)
        return 1
    draw.say(as_json, jid, job=job, jid=jid, queue=queue or found.queue, at=due)
    return 0


def _argument(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):  # not JSON
        return text


def _check_arguments(job: Job, values: list[Any]) -> None:
    """Refuse what would be dead on arrival."""
    data = msgspec.json.encode(values)
    try:
        job.decode_args(data)
    except msgspec.ValidationError as error:
        what, how = f"{job.name}{inspect.job_info(job).signature}: {error}", "write '\"42\"' for the text 42"
        raise SendError(f"the arguments {data.decode()} do not fit {what}; an argument is read as JSON first: {how}") from None
