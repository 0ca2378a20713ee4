"""`barnabas topics`, `table`, `flow`, `check`: what there is."""

from typing import Any

import click
import msgspec
from msgspec.structs import astuple

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import Wrong, command, declared, known, load, override
from barnabas.errors import BarnabasError
from barnabas.settings import Row
from barnabas.topic import Retention


@command()
@click.argument("act", type=click.Choice(["list", "plan", "apply"]), default="list")
def topics(app: App, act: str, as_json: bool) -> None:
    """List the stored topics: partitions, messages, bytes, retention, and whether the app declares them.

    Dead-letter and retry topics are shown where they hold something (with --json always). On Kafka `plan` shows what is to
    be done so that they are stored as declared, and `apply` does it: nothing is ever deleted.
    """
    if act != "list":
        return _arrange(app, act, as_json)
    found = inspect.topics(app)
    if as_json:
        for topic in found:
            kept = topic.retention
            limits = {"age": kept.age, "size": kept.size, "force": kept.force} if kept else None
            draw.json_line(topic._asdict() | {"retention": limits})
        return
    shown = [topic for topic in found if topic.messages or topic.declared in ("yes", "no")]
    sizes = ["?" if t.bytes is None else draw.size(t.bytes) for t in shown]
    rows = [(t.name, t.partitions, t.messages, n, _kept(t.retention), t.declared) for t, n in zip(shown, sizes, strict=True)]
    if rows:
        draw.table(("topic", "partitions#", "messages#", "bytes#", "retention", "declared"), rows)
    missing = [name for name in app.topics if name not in {topic.name for topic in found}]
    if missing:
        how = "barnabas topics plan" if hasattr(app.events, "plan") else "the first send or run creates them"
        click.echo(f"not stored yet: {', '.join(missing)} ({how})", err=True)


def _arrange(app: App, act: str, as_json: bool) -> None:
    """`topics plan` and `topics apply`."""
    events: Any = app.events
    if not hasattr(events, "plan"):
        raise Wrong(f"{app.settings.events} creates its topics itself, at the first use", "barnabas topics")
    changes = events.plan(app.all_topics())
    for kind, topic, what, more in changes:
        if as_json:
            draw.json_line({"change": kind, "topic": topic, "what": what, "more": more})
        elif kind == "create":
            click.echo(f"create {topic}: {what} partitions, replication {more[0] if more[0] > 0 else 'as the broker does'}")
        elif kind == "set":
            click.echo(f"set {topic}: {what} from {more[0]} to {more[1]}")
        elif kind == "raise":
            click.echo(f"raise {topic}: from {more} to {what} partitions; most keys move to another one, so their order is")
            click.echo("    kept only if consumers have caught up before")
        elif kind == "differs":
            click.echo(f"keep {topic}: its {what} is {more[0]}, {more[1]} is declared; {more[2]} changes it")
        else:
            click.echo(f"keep {topic}: it has {more} partitions, {what} are declared; Kafka cannot take partitions away")
    changes = [change for change in changes if change.kind not in ("keep", "differs")]
    if act == "apply":
        events.apply(changes)
    if not as_json:
        click.echo("nothing to do" if not changes else "done" if act == "apply" else "to do it: barnabas topics apply")


def _kept(retention: Retention | None) -> str:
    if retention is None:
        return "?"
    limits = [draw.span(retention.age)] if retention.age is not None else []
    limits += [draw.size(retention.size)] if retention.size is not None else []
    return ", ".join(limits) or "for good"


@command()
@click.argument("name", shell_complete=known("tables"))
@click.argument("key", required=False)
def table(app: App, name: str, key: str | None, as_json: bool) -> None:
    """Show a table as it was last settled, or its value under KEY."""
    with declared(app, "table", name, app.tables).open() as view:
        if key is not None:
            if key not in view:
                raise Wrong(f"table {name!r} has nothing under {key!r}", f"barnabas table {name}")
            draw.json_line(view[key])
        elif as_json:
            for cell, value in view.items():
                draw.json_line({"key": _key(cell), "value": value})
        else:
            draw.table(("key", "value"), [(_key(k), msgspec.json.encode(v).decode()) for k, v in view.items()])


def _key(key: Any) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key)


@command()
@click.option("--format", "form", type=click.Choice(["text", "mermaid", "json"]), default="text", show_default=True)
def flow(app: App, form: str, as_json: bool) -> None:
    """Show what flows where: consumed topics and what they are answered on, or the whole graph as Mermaid or JSON."""
    graph = inspect.flow(app)
    if as_json or form == "json":
        draw.json_line(graph)
    else:
        click.echo(inspect.flow_mermaid(graph) if form == "mermaid" else inspect.flow_text(app))


@command(loads=False)
def check(spec: str | None, events: str | None, jobs: str | None, as_json: bool) -> int:
    """Check the settings and what the app declares; show each setting's value and where it came from."""
    try:
        app = override(load(spec), events=events, jobs=jobs)
    except BarnabasError as error:
        if not as_json or getattr(error, "misuse", False):
            raise
        draw.json_line({"ok": False, "problems": [str(error)], "warnings": []})
        return 1
    problems, warnings = inspect.check(app)
    app.close()
    consumers = [inspect.consumer_info(consumer) for consumer in app.consumers.values()]
    handlers = [inspect.job_info(job) for job in app.job_handlers.values()]
    if as_json:
        found = {"ok": not problems, "problems": problems, "warnings": warnings}
        found |= {"settings": [row._asdict() for row in app.settings.rows()], "topics": list(app.topics)}
        draw.json_line(found | {"consumers": consumers, "jobs": handlers, "tables": list(app.tables)})
        return 1 if problems else 0
    draw.table(("setting", "value", "from", "what it is"), [(r.name, _value(r), r.origin, r.doc) for r in app.settings.rows()])
    topics = [(n, _type(t.type), t.partitions or "default", _kept(t.retention)) for n, t in app.topics.items()]
    for columns, rows in (
        (("topic", "type", "partitions", "retention"), topics),
        (inspect.ConsumerInfo.__struct_fields__, [(i.name, ", ".join(i.topics), *astuple(i)[2:]) for i in consumers]),
        (inspect.JobInfo.__struct_fields__, [astuple(info) for info in handlers]),
    ):
        if rows:
            draw.table(columns, rows)
    draw.found(app.name, warnings, problems)
    return 1 if problems else 0


def _type(of: Any) -> str:
    return "any" if of is None else getattr(of, "__name__", str(of))


def _value(row: Row) -> str:
    return "-" if row.value is None or row.value == {} else f"{draw.text(row.value)} {row.unit}".strip()
