"""`barnabas processes`, `quiet`, `stop`, `pause` and `resume`: who works, and who is to stop doing so."""

import time
from typing import Any

import click

from barnabas import inspect
from barnabas import processes as workers
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.groups import group_of
from barnabas.cli.loading import Wrong, command, known
from barnabas.processes import Pause, ProcessInfo

LEAVE = 5.0  # seconds that a process needs to stop, beyond its handlers


@command()
def processes(app: App, as_json: bool) -> None:
    """List the worker processes, on SQLite and Redis also those of other apps that use the same."""
    columns = ("process", "app", "state", "up#", "memory#", "done#", "in work#", "groups", "queues")
    draw.listing(as_json, workers.processes(app), columns, lambda p: _row(app, p), "no worker process runs: barnabas run")


def _row(app: App, p: ProcessInfo) -> tuple[Any, ...]:
    state = draw.joined(workers.state(p, app.settings.session_timeout), p.trouble)
    up = draw.age(max(0.0, app.clock.now() - p.started))
    return (p.name, p.app, state, up, draw.size(p.rss), p.done, len(p.work), ", ".join(p.groups), ", ".join(p.queues))


def _named(app: App, names: tuple[str, ...]) -> list[ProcessInfo]:
    """The processes that are meant: by name, by pid where only one has it, or all of this app."""
    running = workers.processes(app)
    found: dict[str, ProcessInfo] = {}
    for name in names:
        meant = [p for p in running if name == p.name or name == str(p.pid) or (name == "all" and p.app == app.name)]
        if len(meant) > 1 and name != "all":
            what = f"{name} is the pid of {', '.join(p.name for p in meant)}; give one of these names"
            raise Wrong(what, "barnabas processes")
        if not meant:
            there = inspect.meant(name, [p.name for p in running], "worker processes")
            of = f"of app {app.name!r} runs" if name == "all" else f"is named {name!r}"
            raise Wrong(f"no process {of}; {there}", "barnabas processes")
        found |= {p.name: p for p in meant}
    return list(found.values())


_WHO = click.argument("names", nargs=-1, required=True, metavar="PROCESS...", shell_complete=known("processes"))


@command()
@_WHO
def quiet(app: App, names: tuple[str, ...], as_json: bool) -> None:
    """Let processes (by name, by pid, or all) finish what they have in work and take nothing new, until they are stopped."""
    for process in _named(app, names):
        workers.ask(app, process, "quiet")
        draw.say(as_json, f"{process.name} was asked to be quiet", process=process.name, asked="quiet")


@command()
@_WHO
def stop(app: App, names: tuple[str, ...], as_json: bool) -> int:
    """Stop processes (by name, by pid, or all) as SIGTERM does, and wait for their end. A supervisor starts none in their
    place, and ends with its last one."""
    waited = {process.name: process for process in _named(app, names)}
    began = time.monotonic()
    for process in waited.values():
        workers.ask(app, process, "stop")
    while waited and time.monotonic() < began + app.settings.stop_timeout + LEAVE:
        running = {(process.host, process.pid) for process in workers.processes(app)}  # it may leave one backend first
        for name in [name for name, process in waited.items() if (process.host, process.pid) not in running]:
            del waited[name]
            seconds = time.monotonic() - began
            draw.say(as_json, f"{name} has ended ({seconds:.1f} s)", process=name, ended=True, seconds=seconds)
        time.sleep(0.2)
    for name, process in waited.items():
        if as_json:
            draw.json_line({"process": name, "ended": False, "seconds": time.monotonic() - began})
        why = f"it gives no sign of life for {process.silent:.0f} s" if process.silent > LEAVE else "it was asked to"
        click.echo(f"Error: {name} has not ended yet ({why}); to end it at once: kill -KILL {process.pid}", err=True)
    return 1 if waited else 0


def _pause(app: App, name: str, key: str | None) -> Pause:
    """What is meant by NAME, queue:NAME, or NAME --key K."""
    kind, colon, queue = name.partition(":")
    names = {job.queue for job in app.job_handlers.values()} | {*(app.settings.queues or ())}
    if kind == "queue" and colon:
        if key is not None:
            raise click.UsageError("a queue has no keys; --key K belongs to a consumer or group")
        names |= {state.name for state in app.jobs.queue_states()}
        if queue not in names:
            raise Wrong(f"there is no queue {queue!r}; {inspect.meant(queue, names, 'queues')}", "barnabas queues")
        return Pause("queue", queue)
    groups = {at.group for at in app.events.positions()} | {each.group for each in app.consumers.values()}
    if name in names - {*app.consumers, *groups}:
        raise Wrong(f"{name!r} is a queue: say queue:{name}", "barnabas pause --help")
    group = group_of(app, name, groups)
    heeding = {each.group for each in app.consumers.values()}.union(*(process.groups for process in workers.processes(app)))
    if hasattr(app.events, "plan") and group not in heeding:  # on Kafka each app has a control topic of its own
        raise Wrong(f"no consumer of app {app.name!r} has the group {group!r}: none would heed this", "barnabas lag")
    return Pause("group" if key is None else "key", group, key)


def _what(pause: Pause) -> str:
    return f"{pause.kind} {pause.name}" if pause.key is None else f"key {pause.key!r} of group {pause.name}"


_NAME = "CONSUMER|GROUP|queue:NAME"
_complete = known("consumers", "groups", "queues")
_key_option = click.option("--key", metavar="K", help="Only messages with this key.")


@command()
@click.argument("name", required=False, metavar=f"[{_NAME}]", shell_complete=_complete)
@_key_option
def pause(app: App, name: str | None, key: str | None, as_json: bool) -> None:
    """Pause a consumer, a queue or a key, in all processes, until it is resumed; without a name, list what is paused.

    \b
    barnabas pause bill
    barnabas pause bill --key ann
    barnabas pause queue:mail
    """
    if name is not None:
        return _change(app, name, key, True, as_json)
    if key is not None:
        raise click.UsageError("say of which consumer or group: barnabas pause NAME --key K")
    draw.listing(as_json, workers.pauses(app), ("paused", "name", "key"), lambda p: (p.kind, p.name, p.key), "nothing is paused")


@command()
@click.argument("name", metavar=_NAME, shell_complete=_complete)
@_key_option
def resume(app: App, name: str, key: str | None, as_json: bool) -> None:
    """Resume what was paused."""
    _change(app, name, key, False, as_json)


def _change(app: App, name: str, key: str | None, on: bool, as_json: bool) -> None:
    wanted = _pause(app, name, key)
    changed, done = workers.set_pause(app, wanted, on), "paused" if on else "resumed"
    word = f"is {done}" if changed else "was paused already" if on else "was not paused"
    draw.say(as_json, f"{_what(wanted)} {word}", **{"kind": wanted.kind, "name": wanted.name, "key": wanted.key, done: changed})
    left = [p.key for p in workers.pauses(app) if (p.kind, p.name) == ("key", wanted.name)]
    if not on and wanted.kind == "group" and left:
        click.echo(f"still paused of it: the keys {', '.join(map(repr, left))}; barnabas resume {name} --key K", err=True)
