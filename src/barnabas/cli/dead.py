"""`barnabas dead`: what died, of topics and of queues, and what is to become of it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from barnabas import dead as letters
from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.jobs import dry_option, fields, limit_option, short, show_job
from barnabas.cli.loading import AppGroup, Wrong, declared, known, options
from barnabas.cli.read import as_fields, as_time, shown, text_of
from barnabas.dead import Letter
from barnabas.queues import Entry

COLUMNS = ("address", "time", "of", "by", "key", "runs#", "reason")


@click.group(cls=AppGroup)
def dead() -> None:
    """List, show, retry, drop and export dead letters."""


_filters = options(
    click.option("--topic", metavar="T", help="Only of this topic.", shell_complete=known("topics")),
    click.option("--consumer", metavar="NAME", help="Only of this consumer.", shell_complete=known("consumers")),
    click.option("--group", metavar="G", help="Only of this consumer group.", shell_complete=known("groups")),
    click.option("--queue", metavar="NAME", help="Only of this queue.", shell_complete=known("bare queues")),
    click.option("--class", "name", metavar="NAME", help="Only jobs of this name.", shell_complete=known("jobs")),
    click.option("--error", metavar="TEXT", help="Only those with this text in their reason or exception."),
    click.option("--key", metavar="K", help="Only messages with this key."),
    click.option("--since", callback=as_time, metavar="TIME", help="Only those that died since then (ISO 8601; local)."),
)


def _found(app: App, consumer: str | None, addresses: tuple[str, ...] = (), **which: Any) -> Iterator[Letter]:
    """The letters that are meant; refuses filters that nothing could pass."""
    given = [name for name, value in {**which, "consumer": consumer}.items() if value is not None]
    if addresses and given:
        raise click.UsageError("name letters by their addresses, or give filters, not both")
    of_topics, of_jobs = {"topic", "consumer", "group", "key"} & {*given}, {"queue", "name"} & {*given}
    if of_topics and of_jobs:
        raise click.UsageError("--queue and --class are of jobs, --topic, --consumer, --group and --key of messages: not both")
    if consumer is not None and which["group"] is not None:
        raise click.UsageError("give --consumer or --group, not both")
    if consumer is not None:
        which["group"] = declared(app, "consumer", consumer, app.consumers).group
    topic = which.get("topic")
    if topic is not None and topic not in (names := [state.name for state in app.events.topics()]):
        raise Wrong(f"no topic {topic!r} is stored; {inspect.meant(topic, names, 'topics')}", "barnabas topics")
    return letters.letters(app, addresses, **which)


@dead.command("list")
@_filters
@limit_option
def list_(app: App, as_json: bool, limit: int, **which: Any) -> None:
    """List dead letters. The newest first, then how many died of what; those dealt with are left out."""
    newest, causes = letters.newest(_found(app, **which), limit)
    shown = [_summary(letter) for letter in newest] if as_json else newest
    draw.listing(as_json, shown, COLUMNS, _row, "there are no dead letters" + (" that match" if any(which.values()) else ""))
    if causes and not as_json:
        draw.table(("number#", "died of"), [(count, short(cause)) for cause, count in causes.most_common()])


def _summary(letter: Letter) -> dict[str, Any]:
    values = {name: getattr(letter, name) for name in letter.__struct_fields__ if name not in ("stored", "key")}
    return values | {"kind": "job" if isinstance(letter.stored, Entry) else "message", "key": text_of(letter.key)[0]}


def _row(letter: Letter) -> tuple[Any, ...]:
    key = text_of(letter.key)[0]
    return (letter.address, draw.when(letter.time), letter.source, letter.name, key, letter.runs, short(letter.reason))


@dead.command()
@click.argument("address", nargs=-1, required=True)
def show(app: App, address: tuple[str, ...], as_json: bool) -> int:
    """Show dead letters whole. ADDRESS is TOPIC[PARTITION]@OFFSET, as `dead list` prints it, or a job's id."""
    seen = set()
    for letter in _found(app, None, address):
        seen.add(letter.address)
        if as_json:
            draw.json_line(_whole(letter))
        elif isinstance(letter.stored, Entry):
            show_job(letter.stored)
        else:
            _show_message(letter.stored)
    return _absent(app, address, seen)


def _whole(letter: Letter) -> dict[str, Any]:
    return fields(letter.stored) if isinstance(letter.stored, Entry) else as_fields(letter.stored)


def _show_message(message: inspect.Stored) -> None:
    said = letters.told(message)
    source = f"{said.pop('topic')}[{said.pop('partition')}]@{said.pop('offset')}"
    trace, value = said.pop("traceback", ""), shown(message.value)[0]
    lines = {"letter": f"{message.topic}[{message.partition}]@{message.offset}", "of": source, "key": text_of(message.key)[0]}
    for name in ("time", "timestamp"):
        if name in said:
            said[name] = draw.when(float(said[name]))
    own = {name: text_of(data)[0] for name, data in message.headers if not name.startswith(letters.MARK)}
    draw.pairs(lines | said | {"headers": own or None, "traceback": trace or None, "value": value})
    click.echo()


def _absent(app: App, addresses: tuple[str, ...], seen: set[str]) -> int:
    absent = [each for each in dict.fromkeys(addresses) if each not in seen]
    return draw.absent([f"{each} is no dead letter: {letters.missing(app, each)}" for each in absent], "barnabas dead list")


@dead.command()
@_filters
def export(app: App, as_json: bool, **which: Any) -> None:
    """Print all matching dead letters as JSON lines, with headers and values: messages as `read` does, jobs as `jobs`."""
    for letter in _found(app, **which):
        draw.json_line(_whole(letter))


def _acting(name: str, doc: str, retry: bool, done: str) -> None:
    """Declare `dead retry` or `dead drop`."""

    @dead.command(name, help=doc)
    @click.argument("address", nargs=-1)
    @click.option("--all", "everything", is_flag=True, help="All there are.")
    @_filters
    @dry_option
    def act(app: App, address: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, **which: Any) -> int:
        if not (address or everything or any(value is not None for value in which.values())):
            raise click.UsageError("name letters by their addresses, or give filters, or --all")
        seen: set[str] = set()

        def noted() -> Iterator[Letter]:
            for letter in _found(app, addresses=address, **which):
                if address:
                    seen.add(letter.address)
                if dry_run and not as_json:
                    click.echo(f"{letter.address}  {letter.name}  {short(letter.reason)}")
                yield letter

        dealt = letters.deal(app, noted(), retry=retry, dry_run=dry_run)
        said = {done: dealt.done, "gone": dealt.gone, "refused": dict(dealt.refused), "dry_run": dry_run}
        draw.say(as_json, f"{'would be ' if dry_run else ''}{done}: {dealt.done:,}", **said)
        if not address and dealt == letters.Dealt():
            click.echo(f"not {done}: no dead letter matches", err=True)
        _say_left(done, dealt)
        return 1 if _absent(app, address, seen) or not dealt.done else 0


def _say_left(done: str, dealt: letters.Dealt) -> None:
    """What was not dealt with, on stderr: each reason once."""
    whys = Counter(why for _, why in dealt.refused)
    for where, why in dealt.refused:
        if count := whys.pop(why, 0):
            more = f" and {count - 1:,} more" if count > 1 else ""
            click.echo(f"not {done}: {where}{more}: {why}", err=True)
    if dealt.gone:
        click.echo(f"not {done}: {dealt.gone:,} that somebody else dealt with meanwhile", err=True)


_acting(
    "retry", "Retry dead letters. Messages go to the retry topic of their group, in no order, jobs to their queue.", True,
    "retried",
)
_acting("drop", "Drop dead letters. Jobs are gone; messages stay in their topic and are listed no more.", False, "dropped")
