"""`barnabas run`: the app's consumers and jobs, in this process or in several under a supervisor."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from barnabas import inspect
from barnabas.app import App
from barnabas.cli import draw, logs, reload
from barnabas.cli.loading import Wrong, app_options, load, override
from barnabas.cli.process import Stopper, serve
from barnabas.cli.status import Status
from barnabas.supervisor import GRACE, Lifeline, Supervisor, spawner
from barnabas.worker import Worker, chosen

log = logging.getLogger("barnabas")


@click.command()
@click.argument("target", required=False, metavar="[MODULE:NAME]")
@click.option("--only", multiple=True, metavar="NAME", help="Only this consumer, job or queue:NAME; repeatable.")
@click.option("--except", "skip", multiple=True, metavar="NAME", help="Not this one; repeatable.")
@click.option("--processes", type=int, metavar="N", help="Worker processes under a supervisor. [default: 1]")
@click.option("--drain", is_flag=True, help="End when there is nothing left to do.")
@click.option("--reload", "reloads", is_flag=True, help="Start again when a file changes (needs watchfiles).")
@click.option("--child", type=int, hidden=True)
@click.option("--lifeline", type=int, hidden=True)
@app_options
def run(target: str | None, spec: str | None, processes: int | None, **options: Any) -> int:
    """Run the app's consumers and jobs until SIGTERM or Ctrl-C.

    A stop finishes what is in work (setting stop_timeout, 25 s) and gives back the rest; a second Ctrl-C ends at once.
    Nothing is lost either way.
    """
    if target is not None and spec is not None and target != spec:
        raise click.UsageError(f"two apps are named, {target} and {spec}; give one of them")
    child, fd = options.pop("child"), options.pop("lifeline")
    # Before anything else: the supervisor may go while the app is being imported.
    lifeline = None if fd is None else Lifeline(fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopper = Stopper()
    if child is not None:
        stopper.install()
    app = override(load(target or spec), events=options["events"], jobs=options["jobs"], processes=processes)
    logs.set_up(app, child)
    several = child is None and (app.settings.processes > 1 or options["reloads"])
    if child is None:
        _announce(app, options["only"], options["skip"])
    if several:
        return supervise(app, target or spec, **options)
    stopper.install()
    try:
        return alone(app, stopper, lifeline, options["only"], options["skip"], options["drain"])
    finally:
        app.close()


def alone(app: App, stopper: Stopper, lifeline: Lifeline | None, only: Any, skip: Any, drain: bool) -> int:
    """Run a worker in this process."""
    worker = Worker(app, only=only, skip=skip)
    status = None if lifeline is not None else Status()
    code = serve(worker, stopper, drain=drain, lifeline=lifeline, tell=status)
    if status is not None:
        _conclude(app, status, list(worker.queues) if drain and code == 0 else [])
    return code


def supervise(app: App, target: str | None, drain: bool, reloads: bool, **given: Any) -> int:
    """Run workers in processes of their own; `given`: what else the command line said, for each of them."""
    settings = app.settings
    only, skip = given["only"], given["skip"]
    queues = list(chosen(app, only, skip)[1])
    for kind in ("events", "jobs"):
        if getattr(settings, kind).startswith("memory:"):
            what = "--reload" if reloads and settings.processes == 1 else f"processes={settings.processes}"
            raise Wrong(f"{kind}=memory: lives in one process, so it cannot be used with {what}; use sqlite:///FILE.db")
    command = [sys.executable, "-m", "barnabas", "run", target or settings.app or "", "--processes", "1"]
    pairs = [("--only", name) for name in only] + [("--except", name) for name in skip]
    pairs += [(f"--{kind}", given[kind]) for kind in ("events", "jobs") if given[kind] is not None]
    command += [word for pair in pairs for word in pair] + (["--drain"] if drain else [])
    status = Status()
    supervisor = Supervisor(
        spawner(command),
        settings.processes,
        drain=drain,
        reload=reloads,
        patience=settings.stop_timeout + GRACE,
        tell=status,
    )
    end = reload.watch(supervisor.restart) if reloads else None
    try:
        code = supervisor.run()
    finally:
        if end is not None:
            end()
    status(supervisor.counts())
    try:
        _conclude(app, status, queues if drain and code == 0 else [])
    finally:
        app.close()
    return code


def _conclude(app: App, status: Status, queues: list[str]) -> None:
    """Say what was done, and what of these queues waits for a later time."""
    status.clear()
    log.info("%s", status.summary())
    if queues:
        waiting = app.jobs.waiting(queues)
        kinds = (("scheduled", "scheduled"), ("retry", "to be retried"))
        remain = [f"{waiting[kind]:,} {name}" for kind, name in kinds if waiting.get(kind)]
        if remain:
            log.info("drained; of the jobs there remain %s", " and ".join(remain))


def _announce(app: App, only: Any, skip: Any) -> None:
    """Say what runs, and from where: as a table, or as log lines where those are JSON."""
    consumers, queues = chosen(app, only, skip)
    infos = [inspect.consumer_info(consumer) for consumer in consumers]
    weights = queues if isinstance(queues, dict) else dict.fromkeys(queues)
    settings = app.settings
    if settings.log_format == "json":
        for info in infos:
            log.info("runs consumer %s", info.name, extra={"runs": info._asdict(), "url": settings.events})
        for queue, weight in weights.items():
            log.info("runs queue %s", queue, extra={"runs": {"queue": queue, "weight": weight}, "url": settings.jobs})
    else:
        rows: list[Sequence[Any]] = []
        for i in infos:
            how = f"{i.order} order, {i.kind}"
            rows.append((f"consumer {i.name}", ", ".join(i.topics), i.group, i.concurrency, how))
        for queue, weight in weights.items():
            how = f"{settings.threads} threads, {settings.coroutines} coroutines"
            rows.append((f"queue {queue}", _jobs_of(app, queue), "", weight, how))
        columns = ("runs", "topics or jobs", "group", "concurrency or weight#", "how")
        several = f" in {settings.processes} processes" if settings.processes > 1 else ""
        same = settings.jobs == settings.events
        urls = settings.events if same else f"events {settings.events}, jobs {settings.jobs}"
        draw.table(columns, rows)
        click.echo(f"{app.name}{several}: {urls}")
        draw.flush()
    for warning in settings.warnings:
        log.warning("%s", warning)


def _jobs_of(app: App, queue: str) -> str:
    return ", ".join(name for name, job in app.job_handlers.items() if job.queue == queue)
