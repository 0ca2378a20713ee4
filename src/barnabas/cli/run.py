"""`barnabas run`: the app's consumers and jobs, in this process or in several under a supervisor."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import click

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw, logs
from barnabas.cli.loading import Wrong, command, load, override
from barnabas.cli.process import ANEW, Status, Stopper, serve
from barnabas.errors import BackendError, NotAuthorised
from barnabas.lag import abandoned, mixed
from barnabas.supervisor import GRACE, Lifeline, Supervisor, spawner
from barnabas.worker import Worker, chosen

log = logging.getLogger("barnabas")


@command(json=False, loads=False)
@click.argument("target", required=False, metavar="[MODULE:NAME]")
@click.option("--only", multiple=True, metavar="NAME", help="Only this consumer, job or queue:NAME; repeatable.")
@click.option("--except", "skip", multiple=True, metavar="NAME", help="Not this one; repeatable.")
@click.option("--processes", type=int, metavar="N", help="Worker processes under a supervisor. [default: 1]")
@click.option("--create-topics", is_flag=True, help="On Kafka: create missing topics, in development.")
@click.option("--drain", is_flag=True, help="End when there is nothing left to do.")
@click.option("--reload", "reloads", is_flag=True, help="Start again when a file changes (needs watchfiles).")
@click.option("--child", type=int, hidden=True)
@click.option("--lifeline", type=int, hidden=True)
def run(target: str | None, spec: str | None, processes: int | None, **options: Any) -> int:
    """Run the app's consumers and jobs until SIGTERM or Ctrl-C.

    A stop finishes what is in work (setting stop_timeout, 25 s) and gives back the rest; a second Ctrl-C ends at once.
    Nothing is lost either way. SIGTSTP makes it quiet: it finishes what is in work, begins nothing, and waits for its stop.
    """
    if target is not None and spec is not None and target != spec:
        raise click.UsageError(f"two apps are named, {target} and {spec}; give one of them")
    child, fd = options.pop("child"), options.pop("lifeline")
    # Before anything else: the supervisor may go while the app is being imported.
    lifeline = None if fd is None else Lifeline(fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopper = Stopper()
    stopper.install()
    flags = {"create_topics": options.pop("create_topics") or None, "processes": processes}
    app = override(load(target or spec), events=options["events"], jobs=options["jobs"], **flags)
    if child is not None and "group.instance.id" in app.settings.kafka:  # two processes of one name would fence each other
        from barnabas.backends.kafka_options import check_options

        app.settings.kafka["group.instance.id"] = f"{check_options(app.settings.kafka)['group.instance.id']}-{child}"
    logs.set_up(app, child)
    if child is None:
        supervised = app.settings.processes > 1 or options["reloads"]
        _announce(app, options["only"], options["skip"], supervised)
        if supervised:
            app.close()  # each process has its own
            return supervise(app, target or spec, stopper, **options)
    try:
        return alone(app, stopper, lifeline, options["only"], options["skip"], options["drain"])
    finally:
        app.close()


def alone(app: App, stopper: Stopper, lifeline: Lifeline | None, only: Any, skip: Any, drain: bool) -> int:
    """Run a worker in this process."""
    status = Status()
    tell = status if lifeline is None else lambda counts: lifeline.say(json.dumps(counts))
    while (code := serve(worker := Worker(app, only=only, skip=skip), stopper, tell, drain, lifeline)) == ANEW:
        app.close()
    if lifeline is not None:
        return code
    _conclude(app, status, list(worker.queues) if drain and code == 0 else [])
    return code


def supervise(app: App, target: str | None, stopper: Stopper, drain: bool, reloads: bool, **given: Any) -> int:
    """Run workers in processes of their own; `given`: what else the command line said, for each of them."""
    settings = app.settings
    queues = list(chosen(app, given["only"], given["skip"])[1])
    for kind in ("events", "jobs"):
        if getattr(settings, kind).startswith("memory:"):
            what = "--reload" if settings.processes == 1 else f"processes={settings.processes}"
            raise Wrong(f"{kind}=memory: lives in one process, so it cannot be used with {what}; use sqlite:///FILE.db")
    command = [sys.executable, "-m", "barnabas", "run", target or settings.app or "", "--processes", "1"]
    command += [word for name in given["only"] for word in ("--only", name)]
    command += [word for name in given["skip"] for word in ("--except", name)]
    command += [word for kind in ("events", "jobs") if given[kind] for word in (f"--{kind}", given[kind])]
    command += ["--drain"] if drain else []
    command += ["--create-topics"] if settings.create_topics else []
    status = Status()
    patience = settings.stop_timeout + GRACE
    supervisor = Supervisor(spawner(command), settings.processes, reload=reloads, patience=patience, tell=status)
    if reloads:
        _watch(supervisor.restart)
    code = supervisor.run(stopper.came)
    status(supervisor.counts())
    try:
        _conclude(app, status, queues if drain and code == 0 else [])
    finally:
        app.close()
    return code


def _watch(changed: Callable[[], Any]) -> None:
    """Call `changed` after each change of the working directory's Python and settings files, from a thread."""
    try:
        from watchfiles import PythonFilter, watch
    except ImportError:
        raise Wrong("--reload needs watchfiles, which is not installed", "pip install 'barnabas[reload]'") from None

    def loop() -> None:
        for changes in watch(".", watch_filter=PythonFilter(extra_extensions=(".toml",)), raise_interrupt=False):
            log.info("changed: %s; starting again", ", ".join(sorted({os.path.relpath(path) for _, path in changes})))
            changed()

    threading.Thread(target=loop, name="barnabas-reload", daemon=True).start()


def _conclude(app: App, status: Status, queues: list[str]) -> None:
    """Say what was done, and what of these queues waits for a later time."""
    status.conclude()
    # (A backend that keeps the waiting jobs of all queues in one place says so under the name "".)
    states = [state for state in app.jobs.queue_states() if state.name in (*queues, "")] if queues else []
    kinds = (("scheduled", "scheduled"), ("retry", "to be retried"))
    counts = [(sum(getattr(state, kind) for state in states), name) for kind, name in kinds]
    remain = [f"{count:,} {name}" for count, name in counts if count]
    if remain:
        log.info("drained; of the jobs there remain %s", " and ".join(remain))


def _announce(app: App, only: Any, skip: Any, supervised: bool) -> None:
    """Say what runs, and from where: as a table, or as log lines where those are JSON. Raises BackendError where events that
    are to be consumed are out of reach, unless a supervisor will try again."""
    consumers, queues = chosen(app, only, skip)
    infos = [inspect.consumer_info(consumer) for consumer in consumers]
    weights = queues if isinstance(queues, dict) else dict.fromkeys(queues)
    settings = app.settings
    if settings.log_format == "json":
        for info in infos:
            log.info("runs consumer %s", info.name, extra={"runs": info, "url": settings.shown("events")})
        for queue, weight in weights.items():
            log.info("runs queue %s", queue, extra={"runs": {"queue": queue, "weight": weight}, "url": settings.shown("jobs")})
    else:
        rows: list[Sequence[Any]] = [
            (f"consumer {i.name}", ", ".join(i.topics), i.group, i.concurrency, f"{i.order} order, {i.kind}") for i in infos
        ]
        for queue, weight in weights.items():
            jobs = ", ".join(name for name, job in app.job_handlers.items() if job.queue == queue)
            how = f"{settings.threads} threads, {settings.coroutines} coroutines"
            if most := settings.concurrency.get(queue):
                how = f"at most {most} at a time, " + how
            rows.append((f"queue {queue}", jobs, "", weight, how))
        several = f" in {settings.processes} processes" if settings.processes > 1 else ""
        urls = events = settings.shown("events")
        if settings.jobs != settings.events:
            urls = f"events {events}, jobs {settings.shown('jobs')}"
        draw.table(("runs", "topics or jobs", "group", "concurrency or weight#", "how"), rows)
        click.echo(f"{app.name}{several}: {urls}")
        sys.stdout.flush()
    for warning in settings.warnings:
        log.warning("%s", warning)
    goes_on = BackendError if supervised or not consumers else NotAuthorised  # who may not look at groups may run
    with contextlib.suppress(goes_on):
        for consumer, table in mixed(app, consumers):
            what = f"the table {table!r} is not empty, and group {consumer.group!r} is new: it would count again what another has"
            what += ' counted there. If it was renamed, declare group="ITS OLD ONE" (see barnabas lag); else empty the table'
            raise Wrong(what, f"barnabas reset {consumer.name} --to {consumer.start} --clear-tables")
        for group in abandoned(app):
            log.warning(
                "group %s is stored, and no consumer declares it: where one was renamed, group=%r makes it go on there, else "
                "nothing it has not handled is ever removed; see `barnabas lag`, and `barnabas reset %s --forget`",
                *(group, group, group),
            )
