"""`barnabas lag` and `barnabas reset`: how far consumer groups are, and where they go on."""

import shlex
import sys
from collections.abc import Iterable
from typing import Any

import click

from barnabas import inspect
from barnabas import lag as groups
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import Wrong, command, hinted, known
from barnabas.cli.read import as_start


def group_of(app: App, name: str, stored: Iterable[str]) -> str:
    """The group of this consumer or of this name."""
    if name in app.consumers:
        return app.consumers[name].group
    names = {*stored, *(consumer.group for consumer in app.consumers.values())}
    if name not in names:
        hint = inspect.meant(name, [*app.consumers, *names], "consumers")
        raise Wrong(f"there is no consumer and no group {name!r}; {hint}", "barnabas lag")
    return name


@command()
@click.argument("name", required=False, metavar="[GROUP|CONSUMER]", shell_complete=known("consumers", "groups"))
@click.option("--partitions", is_flag=True, help="Show each partition, too.")
def lag(app: App, name: str | None, partitions: bool, as_json: bool) -> None:
    """Show how far each consumer group is: what is open, for how long, and who is at it. JSON has each partition."""
    found = groups.groups(app)
    if name is not None:
        group = group_of(app, name, [each.group for each in found])
        found = [each for each in found if each.group == group]
    columns = ("group", "consumer", "topics", "open#", "behind#", "processes#", "state")
    none = "its consumers' topics are not stored yet: barnabas topics" if app.consumers else "the app declares no consumer"
    draw.listing(
        as_json, found, columns,
        lambda g: (g.group, g.consumer or "-", _topics(g), g.open, draw.age(g.seconds), len(g.processes), g.state),
        f"there is no group, and {none}",
    )  # fmt: skip
    if not as_json and (partitions or name is not None):
        rows = [each for group in found for each in group.partitions if each.end or not _retries(group.group, each.topic)]
        draw.table(
            ("group", "topic", "partition#", "end#", "position#", "open#", "behind#", "owner", "state"),
            [(p.group, p.topic, p.partition, p.end, p.position, p.open, draw.age(p.seconds), p.owner, p.state) for p in rows],
        )


def _retries(group: str, topic: str) -> bool:
    return topic.endswith(f".retry.{group}")


def _topics(group: groups.GroupLag) -> str:
    return ", ".join(topic for topic in group.topics if not _retries(group.group, topic))


@command()
@click.argument("group", metavar="GROUP|CONSUMER", shell_complete=known("consumers", "groups"))
@click.option(
    "--to", callback=as_start, metavar="earliest|latest|OFFSET|TIME",
    help="Where it goes on. An OFFSET needs --partition; a TIME is ISO 8601, local unless it says otherwise.",
)
@click.option("--forget", is_flag=True, help="Forget its positions: a group that is no more, or is to begin as a new one.")
@click.option("--topic", metavar="T", help="Only this topic. [default: all but those of retries]")
@click.option("--partition", type=click.IntRange(0), metavar="N", help="Only this partition.")
@click.option("--clear-tables", is_flag=True, help="Empty the consumer's tables, too: all of them, also with --partition.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(app: App, group: str, dry_run: bool, yes: bool, clear_tables: bool, as_json: bool, **where: Any) -> None:
    """Let a consumer group go on elsewhere. It must be stopped; what it has finished there will be handled again.

    \b
    barnabas reset bill --to 2026-01-31T12:00 --dry-run
    barnabas reset bill --to 1200 --partition 3
    barnabas reset shop-old --forget
    """
    to, forget, partition = where["to"], where.pop("forget"), where["partition"]
    if (to is None) != forget:
        raise click.UsageError("say where the group goes on, by --to earliest|latest|OFFSET|TIME, or --forget it")
    if isinstance(to, int) and partition is None:
        raise click.UsageError(f"--to {to} is an offset and needs --partition N; a time is written as ISO 8601")
    group = group_of(app, group, [at.group for at in app.events.positions()])
    tables = [table.name for each in app.consumers.values() if each.group == group for table in each.tables]
    with hinted(f"barnabas lag {group}"):
        moves = groups.plan(app, group, **where)
    members = groups.members(app, group)
    if members and not dry_run:
        what = f"group {group!r} is at work in {', '.join(members)}; its processes must be stopped first"
        raise Wrong(what, f"barnabas stop {' '.join(members)}")
    if tables and not clear_tables:
        what = f"group {group!r} keeps {', '.join(tables)}, which hold what it has handled: they must be emptied with it"
        raise Wrong(what, shlex.join(["barnabas", *sys.argv[1:], "--clear-tables"]))
    if not as_json:
        rows = [(m.group, m.topic, m.partition, m.position, "(none)" if m.to is None else m.to, m.open) for m in moves]
        draw.table(("group", "topic", "partition#", "from#", "to#", "open then#"), rows)
        if tables:
            click.echo(f"{'Would be' if dry_run else 'To be'} emptied: {', '.join(tables)}")
    if not dry_run:
        if not yes and (as_json or not sys.stdin.isatty()):
            raise Wrong("nothing was changed: add --yes", shlex.join(["barnabas", *sys.argv[1:], "--yes"]))
        if not yes:
            click.confirm("Go on?", abort=True)
        groups.place(app, moves, tables)
    if as_json:
        for move in moves:
            draw.json_line(move)
    else:
        click.echo("nothing was changed (--dry-run)" if dry_run else f"group {group} is {'forgotten' if forget else 'reset'}")
