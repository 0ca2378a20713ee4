"""The kill test as a tool: real workers of any app are killed at random instants, and nothing may be lost for it.

`barnabas.testing.kill("shop:app", load=send_orders)` starts workers on a fresh file, lets `load` send, kills workers with
SIGKILL meanwhile, then lets the rest finish. Witnesses are lines that hooks write around each handler, with one write a
line: what they say survives any kill, and nobody can settle it away.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from barnabas.app import App
from barnabas.cli.loading import load as load_app

LEAD = "KILL_WITNESS"


class Report(NamedTuple):
    """What a kill test saw. `repeats` counts deliveries that were handled more than once (at-least-once)."""

    seed: int
    kills: int
    handled: int
    repeats: int
    jobs: int
    seconds: float


class Lost(AssertionError):
    """The kill test found something lost, out of order or stuck; the text says what, and the seed."""


def kill(
    app: str,
    *,
    load: Callable[[App, int], Any],
    kills: int = 50,
    seed: int | None = None,
    workers: int = 3,
    pause: tuple[float, float] = (0.05, 0.4),
    folder: str | os.PathLike[str] | None = None,
    patience: float = 60.0,
    victims: Callable[[random.Random, list[Any]], Any] | None = None,
) -> Report:
    """Kill `workers` processes of MODULE:NAME at random instants while `load(app, n)` sends before the n-th kill.

    load: called in this process; waits for the futures of what it sends (or returns them, one or a list). pause: seconds
    between kills. folder: where the module is, and where the file lies that is used instead of the app's own (a
    temporary one by default). patience: seconds that the workers have to finish after the last kill. Prints the seed.
    Raises Lost if a message was not handled, if first handlings of a key are out of order, or if work is stuck.
    """
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"kill test of {app}: seed {seed}", flush=True)
    dice = random.Random(seed)
    began = time.monotonic()
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder).resolve()
        url = f"sqlite:///{room}/kill.db"
        os.environ[LEAD] = str(room / "witness")
        stack.callback(os.environ.pop, LEAD, None)
        loaded = load_app(app)
        stack.enter_context(_moved(loaded, url))
        witness(loaded)
        log = stack.enter_context(open(room / "workers.log", "ab"))
        team = [_start(app, url, log) for _ in range(workers)]
        stack.callback(_end, team)
        for n in range(kills):
            _wait_for(load(loaded, n))
            time.sleep(dice.uniform(*pause))
            victim = dice.randrange(workers)
            team[victim].send_signal(signal.SIGKILL)
            team[victim].wait()
            team[victim] = _start(app, url, log)
        _drain(loaded, seed, patience, room)
        _end(team)
        handled, repeats, jobs = check(loaded, room / "witness", seed)
    return Report(seed, kills, handled, repeats, jobs, round(time.monotonic() - began, 1))


@contextmanager
def _moved(app: App, url: str) -> Iterator[None]:
    """The app on another file, and as it was before afterwards."""
    settings, hooks, enqueue_hooks = app.settings, list(app.hooks), list(app.enqueue_hooks)
    app.close()
    app.settings = settings.override(events=url, jobs=url)
    try:
        yield
    finally:
        app.close()
        app.settings, app.hooks, app.enqueue_hooks = settings, hooks, enqueue_hooks


def _start(app: str, url: str, log: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "barnabas.killing", app, url], stdout=log, stderr=log)


def _end(team: "list[subprocess.Popen[bytes]]") -> None:
    for process in team:
        process.terminate()
    for process in team:
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(futures: Any) -> None:
    for future in futures if isinstance(futures, list | tuple) else [futures]:
        if future is not None:
            future.result(60)


def _drain(app: App, seed: int, patience: float, room: Path) -> None:
    deadline = time.monotonic() + patience
    groups = {c.group: [t.name for t in c.subscriptions] for c in app.consumers.values()}
    queues = sorted({job.queue for job in app.job_handlers.values()})
    while left := app.events.open_work(groups, queues):
        if time.monotonic() > deadline:
            tail = (room / "workers.log").read_text(errors="replace")[-2000:]
            raise Lost(f"seed {seed}: {left} messages or jobs are stuck {patience} s after the last kill; the workers said:\n{tail}")
        time.sleep(0.05)


# Witnesses.


def witness(app: App) -> None:
    """Let every handler of this process, and every enqueue, leave a line in the file that the environment names."""
    fd = os.open(os.environ[LEAD], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def say(*words: Any) -> None:
        os.write(fd, json.dumps(words).encode() + b"\n")

    def handled(delivery: Any) -> Generator[None, Any, None]:
        yield
        for d in delivery if isinstance(delivery, list) else [delivery]:
            key = d.key.hex() if isinstance(d.key, bytes) else d.key
            say("handled", d.group, d.topic, d.partition, d.offset, key)

    def enqueued(job: dict[str, Any]) -> None:
        say("enqueued", job["jid"])

    app.hooks.insert(0, handled)
    app.enqueue_hooks.append(enqueued)


def check(app: App, path: Path, seed: int) -> tuple[int, int, int]:
    """Compare what is stored with what the witnesses saw: (deliveries handled, repeats, jobs). Raises Lost."""
    seen: dict[tuple[str, str, int], dict[int, Any]] = {}
    jids: set[str] = set()
    repeats = 0
    for line in path.read_text().splitlines():
        what, *words = json.loads(line)
        if what != "handled":
            continue
        group, topic, partition, offset, key = words
        if partition < 0:
            repeats += key in jids
            jids.add(key)
            continue
        first = seen.setdefault((group, topic, partition), {})
        repeats += offset in first
        first.setdefault(offset, key)
    backend = app.events
    stored = {state.name: state.partitions for state in backend.topics()}
    handled = 0
    for consumer in app.consumers.values():
        dead = _dead(backend, stored, consumer)
        for topic in consumer.topics:
            for partition, (low, high, _) in enumerate(stored[topic.name]):
                first = seen.get((consumer.group, topic.name, partition), {})
                missing = [n for n in range(low, high) if n not in first and (topic.name, partition, n) not in dead]
                if missing:
                    raise Lost(f"seed {seed}: {consumer.name} never handled {topic.name}[{partition}]@{missing[:10]} ({len(missing)} in all)")
                handled += high - low
                if consumer.order != "none" and consumer.retry.ordered:
                    _check_order(seed, f"{consumer.name} at {topic.name}[{partition}]", first, consumer.order)
    return handled, repeats, len(jids)


def _check_order(seed: int, where: str, first: dict[int, Any], order: str) -> None:
    last: dict[Any, int] = {}
    for offset, key in first.items():
        lane = key if order == "key" else None
        if order == "key" and key is None:
            continue
        if last.get(lane, -1) > offset:
            raise Lost(f"seed {seed}: {where}: key {key!r}: offset {offset} was first handled after {last[lane]}")
        last[lane] = offset


def _dead(backend: Any, stored: dict[str, Any], consumer: Any) -> set[tuple[str, int, int]]:
    """The messages that this consumer's group buried."""
    found = set()
    for topic in consumer.topics:
        name = topic.dead_topic.name
        for partition, (low, high, _) in enumerate(stored.get(name, ())):
            for row in backend.read(name, partition, low, high - low) if high > low else ():
                headers = {header: value.decode() for header, value in row[3] or ()}
                if headers.get("barnabas-group") == consumer.group:
                    found.add((headers["barnabas-topic"], int(headers["barnabas-partition"]), int(headers["barnabas-offset"])))
    return found


def main() -> None:
    """A worker of a kill test: `python -m barnabas.killing MODULE:NAME URL`."""
    witness(load_app(sys.argv[1]))
    cli = importlib.import_module("barnabas.cli")
    sys.argv[1:] = ["run", sys.argv[1], "--events", sys.argv[2], "--jobs", sys.argv[2]]
    cli.main()


if __name__ == "__main__":
    main()
