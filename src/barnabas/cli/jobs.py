"""`barnabas queues` and `barnabas jobs`: what waits, what is in work, what failed, and what is to become of it."""

from collections import Counter
from itertools import chain, islice
from typing import Any

import click
import msgspec

from barnabas import queues as stored
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import AppGroup, command, known, options
from barnabas.cli.read import as_time, shown
from barnabas.consumer import check_queue
from barnabas.jobs.beyond import how_far
from barnabas.jobs.payload import backtrace
from barnabas.queues import Entry

STATES = ("ready", "work", "scheduled", "retry", "dead")
COLUMNS = ("job", "queue", "state", "class", "arguments", "failed#", "when", "error")
WIDTH = 100  # characters of a long text in a table


@command()
def queues(app: App, as_json: bool) -> None:
    """Show the queues: their jobs by state, and how long the first that is ready waits (latency)."""
    columns = ("queue", "ready#", "work#", "scheduled#", "retry#", "dead#", "latency#", "state")

    def row(queue: stored.QueueInfo) -> tuple[Any, ...]:
        counts = (queue.ready, queue.work, queue.scheduled, queue.retry, queue.dead)
        return (queue.name or "(all)", *counts, draw.age(queue.latency), "paused" if queue.paused else "ok")

    found = stored.queues(app)
    draw.listing(as_json, found, columns, row, "there is no queue, and the app declares no job")
    if found and not found[0].name and not as_json:
        click.echo("(all): what waits for its time or is dead is kept together for all queues here, by time", err=True)


@click.group(cls=AppGroup)
def jobs() -> None:
    """List, show, retry, move and drop stored jobs."""


_FILTERS = [
    click.option("--queue", metavar="NAME", help="Only of this queue.", shell_complete=known("bare queues")),
    click.option("--class", "name", metavar="NAME", help="Only jobs of this name.", shell_complete=known("jobs")),
    click.option("--tag", metavar="TAG", help="Only jobs with this tag."),
    click.option("--error", metavar="TEXT", help="Only those that failed with this text in class or message."),
    click.option("--since", callback=as_time, metavar="TIME", help="Only what moved or failed since then (ISO 8601; local)."),
]


state_option = click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
limit_option = click.option("--limit", type=click.IntRange(0), default=50, metavar="N", help="At most so many. [50]")
dry_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@command()
@options(limit_option)
def limits(app: App, as_json: bool, limit: int) -> None:
    """Show the limits of jobs, the busiest first: how many slots are taken, how many jobs wait for one, and when a rate that has
    none free has the next. Of a limit with by= those kinds are shown of which jobs are in work or wait.

    A limit taken by hand alone (app.limiter) is not known here; one that a job has by the same name is, with all its slots."""
    found, total = stored.limits(app, limit)
    columns = ("limit", "key", "rule", "taken#", "waiting#", "next")
    row = lambda of: (of.limit, short(of.key), of.rule, of.taken, of.waiting, draw.when(of.next))  # noqa: E731
    draw.listing(as_json, found, columns, row, "no job of the app has a limit that is in use")
    if total > limit:
        click.echo(f"these are the busiest of {total:,}: add --limit N", err=True)


@jobs.command("list")
@options(*_FILTERS, state_option, limit_option)
def list_(app: App, as_json: bool, limit: int, **which: Any) -> None:
    """List stored jobs. Those in work come first; of each state, those that run first."""
    found = islice(stored.jobs(app, **which), limit + 1)
    if as_json:
        for entry in islice(found, limit):
            draw.json_line(fields(entry))
        return
    shown = list(found)
    draw.listing(False, shown[:limit], COLUMNS, _row, "no job matches")
    if len(shown) > limit:
        click.echo(f"there are more than {limit}: add --limit N, or filters; --json streams them", err=True)


def short(text: str) -> str:
    """As much of a text as a table bears."""
    line = text.partition("\n")[0]
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _row(entry: Entry) -> tuple[Any, ...]:
    job = entry.job
    at = draw.when(job.at if job.at is not None else entry.time)
    return (job.jid, job.queue, job.state, entry.name, short(entry.args), entry.runs, at, short(entry.error))


def fields(entry: Entry) -> dict[str, Any]:
    """A stored job for JSON; `payload` is what is stored."""
    job = entry.job
    known = {name: getattr(job, name) for name in ("jid", "queue", "state", "at", "crashes", "owner")}
    payload, encoding = shown(job.payload)
    more = {"encoding": encoding} if encoding else {}
    return known | {"class": entry.name, "failed": entry.runs, "error": entry.error, "payload": payload} | more


@jobs.command()
@click.argument("jid", nargs=-1, required=True)
def show(app: App, jid: tuple[str, ...], as_json: bool) -> int:
    """Show jobs by their ids, with all that is stored of them."""
    found = list(stored.jobs(app, jid))
    for entry in found:
        progress = how_far(app.jobs, entry.job.jid)
        if as_json:
            draw.json_line(fields(entry) | ({"progress": progress} if progress else {}) | stored.locks(app, entry))
        else:
            show_job(entry, progress, stored.locks(app, entry))
    return _absent(set(jid) - {entry.job.jid for entry in found})


def show_job(entry: Entry, progress: str = "", locks: dict[str, str] | None = None) -> None:
    """Print a job: what the backend knows of it, then what it says itself."""
    job = entry.job
    lines: dict[str, Any] = {"job": job.jid, "state": job.state, "progress": progress or None}
    lines |= {"queue": job.queue, "owner": job.owner, "crashes": job.crashes or None}
    lines |= {"due" if job.state in ("scheduled", "retry") else "died": draw.when(job.at)} if job.at is not None else {}
    said = msgspec.json.decode(job.payload) if entry.name != "?" else {"payload": entry.args, "error": entry.error}
    if trace := backtrace(said.get("error_backtrace")):
        said["error_backtrace"] = "\n".join(trace)
    draw.pairs(lines | (locks or {}) | said)
    click.echo()


def _absent(jids: set[str]) -> int:
    return draw.absent([f"no job {jid} is stored (it is done, or was dropped)" for jid in sorted(jids)], "barnabas jobs list")


def _acting(name: str, doc: str, to: str | None, done: str, *added: Any) -> None:
    """Declare `jobs retry`, `jobs drop` or `jobs move`."""

    @jobs.command(name, help=doc)
    @click.argument("jid", nargs=-1)
    @click.option("--all", "everything", is_flag=True, help="All, or all that match the filters.")
    @options(*added, *_FILTERS, state_option, dry_option)
    def act(app: App, jid: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, **which: Any) -> int:
        queue = which.pop("to", None)
        if queue is not None:
            check_queue("jobs move", queue, "--to")
        filtered = any(value is not None for value in which.values())
        if bool(jid) == everything or (jid and filtered):
            raise click.UsageError("name jobs by their ids, or give --all with filters (--queue, --class, --error, ...)")
        found = stored.jobs(app, jid, **which)
        if to == "ready" and everything and which["state"] is None:
            found = chain.from_iterable(stored.jobs(app, **which | {"state": state}) for state in ("retry", "dead"))
        named = list(found) if jid else []
        first = named or list(islice(found, 50 if dry_run else 0))
        if dry_run and not as_json:
            draw.listing(False, first, COLUMNS, _row, "no job matches")
        counts = stored.move(app, chain(first, found), to if queue is None else f"queue:{queue}", dry_run=dry_run)
        tell(done, counts, dry_run, as_json)
        absent = _absent({*jid} - {entry.job.jid for entry in named})
        return 0 if counts["moved"] and not absent else 1


def tell(done: str, counts: Counter[str], dry_run: bool, as_json: bool) -> None:
    """Say what was done: "retried", "moved" or "dropped"."""
    there = "in_queue" if done == "moved" else "ready"
    if not counts.total():
        click.echo(f"not {done}: no job matches", err=True)
    if as_json:
        names = {"in work": "in_work", "there": there, "gone": "gone"}
        draw.json_line({done: counts["moved"]} | {name: counts[key] for key, name in names.items()} | {"dry_run": dry_run})
        return
    left = {
        "in work": "in work, which is left alone: it ends by itself, or with its process (barnabas stop)",
        "there": there.replace("_", " that ") + " already",
        "gone": "changed meanwhile, by a worker or another operator",
    }
    click.echo(f"{'would be ' if dry_run else ''}{done}: {counts['moved']:,}")
    for key, text in left.items():
        if counts[key]:
            click.echo(f"not {done}: {counts[key]:,} {text}", err=True)


_RETRY = "Make jobs ready now: by their ids, or --all of these filters that are to be retried or dead (or in --state)."
_acting("retry", _RETRY, "ready", "retried")
_TO = click.option("--to", required=True, metavar="QUEUE", help="The queue.", shell_complete=known("bare queues"))
_acting("move", "Put jobs into another queue, in the state they are in; they keep their time.", None, "moved", _TO)
_acting("drop", "Drop jobs for good. Those in work are left alone.", None, "dropped")
