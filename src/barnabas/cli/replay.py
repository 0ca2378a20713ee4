"""`barnabas replay`: one stored message through a consumer, and nothing kept."""

import contextlib
import sys
import traceback
from typing import Any

import click

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw, logs
from barnabas.cli.jobs import fields
from barnabas.cli.loading import Wrong, command, known
from barnabas.cli.read import as_fields
from barnabas.errors import BarnabasError, UnknownTopic, own_part
from barnabas.replay import Replay
from barnabas.replay import replay as run


@command()
@click.argument("topic", shell_complete=known("topics"))
@click.argument("offset", type=click.IntRange(0), required=False)
@click.option("--partition", type=click.IntRange(0), metavar="N", help="The partition of OFFSET.")
@click.option("--consumer", metavar="NAME", help="Through this one. [default: the only one]", shell_complete=known("consumers"))
@click.option("--pdb", is_flag=True, help="If it fails, look at where: the debugger, in the frame that raised.")
def replay(
    app: App, topic: str, offset: int | None, partition: int | None, consumer: str | None, pdb: bool, as_json: bool
) -> int:
    """Run one stored message through a consumer, and keep nothing.

    TOPIC OFFSET --partition N, or TOPIC[N]@OFFSET in one, also of a dead letter. on_start, set_up, hooks and the handler
    run as in a worker (but with no timeout). Messages, jobs and table writes are shown and not kept, also those of
    send(..., now=True); what the handler does elsewhere (a database, a call) it does.

    \b
    barnabas replay 'orders[3]@17' --consumer bill --pdb
    """
    where = inspect.address(topic) if offset is None else (topic, partition, offset)
    if where is None or where[1] is None:
        raise click.UsageError(f"say which message: TOPIC[PARTITION]@OFFSET in one, or {topic} OFFSET --partition N")
    logs.set_up(app)
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            came = run(app, where[0], where[1], where[2], consumer)
    except UnknownTopic as error:
        raise Wrong(str(error), f"barnabas read {where[0]}") from error
    except Exception as error:  # of an on_start, a set_up or a class
        if isinstance(error, BarnabasError):
            raise
        raise Wrong("the start failed:\n" + str(_trace(error)).partition("\n")[2].rstrip()) from error
    if as_json:
        draw.json_line(_fields(came))
    else:
        _show(came)
    if pdb and came.error is not None:
        _debug(came.error)
    return 0 if came.verdict in ("done", "skipped") else 1


def _trace(error: BaseException | None) -> str | None:
    return None if error is None else "".join(traceback.format_exception(type(error), error, own_part(error)))


def _fields(came: Replay) -> dict[str, Any]:
    names = ("consumer", "address", "verdict", "reason", "wait", "writes")
    values = {name: getattr(came, name) for name in names} | {"traceback": _trace(came.error)}
    outputs = [as_fields(output.message) | {"answer": output.answer, "now": output.now} for output in came.outputs]
    for each in outputs:
        del each["offset"]
    return values | {"outputs": outputs, "jobs": [fields(entry) for entry in came.jobs]}


def _show(came: Replay) -> None:
    wait = f" in {draw.age(came.wait)}" if came.wait is not None else ""
    if came.error is not None:
        click.echo(_trace(came.error))
    for output in came.outputs:
        said = as_fields(output.message)
        what = "answer" if output.answer else "sent at once" if output.now else "sent"
        key = "-" if said["key"] is None else said["key"]
        click.echo(f"{what}: {said['topic']} {key} {draw.text(said['value'])}")
    for entry in came.jobs:
        at = f" at {draw.when(entry.job.at)}" if entry.job.at is not None else ""
        click.echo(f"enqueued: {entry.name}{entry.args} to {entry.job.queue}{at}")
    for write in came.writes:
        click.echo(f"written: {write.table}[{write.key}] {draw.text(write.before)} -> {draw.text(write.after)}")
    reason = f": {came.reason}" if came.reason else ""
    click.echo(f"{came.consumer}, {came.address}: {came.verdict}{wait}{reason} (nothing of it is kept)")


def _debug(error: BaseException) -> None:
    """The debugger where it failed, beginning with the user's own frames."""
    import pdb

    part = own_part(error)
    if part is None:
        click.echo("no line of yours is in the traceback: there is nothing to look at", err=True)
    else:
        pdb.post_mortem(part)
