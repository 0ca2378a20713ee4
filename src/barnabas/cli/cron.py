"""`barnabas cron`: the schedules of an app, how far they have come, and what is to become of them."""

from typing import Any

import click

from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import AppGroup, Wrong, known
from barnabas.inspect import meant
from barnabas.jobs.cron import Schedule
from barnabas.jobs.payload import new_jid


@click.group(cls=AppGroup)
def cron() -> None:
    """List, run, pause and resume what is enqueued by the clock."""


def fields(schedule: Schedule, now: float) -> dict[str, Any]:
    """A schedule for JSON; "last" is None where it never ticked, "next" may lie in the past while nobody runs it."""
    state, job = schedule.state(), schedule.job
    known: dict[str, Any] = {"name": schedule.name, "schedule": schedule.text, "job": job.name, "queue": job.queue}
    known |= {"on_missed": schedule.on_missed, "overlap": schedule.overlap}
    begun = state is not None and state.text == schedule.text
    known["last"] = state.last if state and state.jid else None
    known["next"] = next(schedule.after(state.last if begun and state else now))
    return known | {"state": "paused" if state and state.paused else "ok" if begun else "new"}


@cron.command("list")
def list_(app: App, as_json: bool) -> None:
    """List the schedules: when each ticked last, and when it is to tick next."""
    found = [fields(schedule, app.clock.now()) for schedule in app.crons.values()]
    columns = ("name", "schedule", "job", "queue", "last", "next", "state")
    times = ("last", "next")
    row = lambda f: [draw.when(f[name]) if name in times else f[name] for name in columns]  # noqa: E731
    draw.listing(as_json, found, columns, row, "the app declares no schedule")


def _acting(command: str, doc: str) -> None:
    @cron.command(command, help=doc)
    @click.argument("name", shell_complete=known("crons"))
    def act(app: App, name: str, as_json: bool) -> None:
        schedule = app.crons.get(name)
        if schedule is None:
            raise Wrong(f"there is no schedule {name!r}; {meant(name, app.crons, 'schedules')}", "barnabas cron list")
        if command != "run":
            schedule.pause(command == "pause")
            return draw.say(as_json, f"{name} is {command}d", **{"name": name, f"{command}d": True})
        out = schedule.outgoing(app.clock.now(), new_jid())
        if out is None:
            raise Wrong(f"{name}: a before_enqueue hook refused its job")
        app.jobs.send([out])
        if app.jobs.flush(app.settings.send_timeout):
            raise Wrong(f"{name}: its job could not be stored within {app.settings.send_timeout} s", "barnabas check")
        draw.say(as_json, out.jid, name=name, jid=out.jid)


_acting("run", "Enqueue a schedule's job now; when it ticks next stays as it is.")
_acting("pause", "Let a schedule's ticks pass without a job, in all processes, until it is resumed.")
_acting("resume", "Let a schedule tick again. What passed while it was paused is not made up for.")
