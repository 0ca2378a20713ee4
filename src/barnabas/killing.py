"""The kill test as a tool: real workers of any app are killed at random instants, and nothing may be lost for it.

`barnabas.testing.kill("shop:app", load=send_orders)` starts workers on a fresh file, lets `load` send, kills workers with
SIGKILL meanwhile, then lets the rest finish. Witnesses are lines that hooks write around each handler, with one write a
line: what they say survives any kill, and nobody can settle it away.
"""

import json
import os
import random
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
PAUSE = (0.05, 0.4)  # seconds between kills


class Report(NamedTuple):
    """What a kill test saw. `repeats` counts deliveries that were handled more than once (at-least-once)."""

    seed: int
    handled: int
    repeats: int
    jobs: int


class Lost(AssertionError):
    """The kill test found something lost, out of order or stuck; the text says what, and the seed."""


def kill(
    app: str,
    *,
    load: Callable[[App, int], Any],
    kills: int = 50,
    seed: int | None = None,
    workers: int = 3,
    folder: str | os.PathLike[str] | None = None,
    patience: float = 60.0,
) -> Report:
    """Kill `workers` processes of MODULE:NAME at random instants while `load(app, n)` sends before the n-th kill.

    load: called in this process; waits for the futures of what it sends, or returns one. folder: where the file lies that
    is used instead of the app's own (a temporary one by default). patience: seconds that the workers have to finish after
    the last kill. Prints the seed. Raises Lost if a message was not handled, if first handlings of a key are out of order,
    or if work is stuck.
    """
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"kill test of {app}: seed {seed}", flush=True)
    dice = random.Random(seed)
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder).resolve()
        url = f"sqlite:///{room}/kill.db"
        os.environ[LEAD] = str(room / "witness")
        stack.callback(os.environ.pop, LEAD, None)
        loaded = load_app(app)
        stack.enter_context(_moved(loaded, url))
        log = stack.enter_context(open(room / "workers.log", "ab"))
        command = [sys.executable, "-m", "barnabas.killing", "run", app, "--events", url, "--jobs", url]
        team = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(workers)]
        stack.callback(_end, team)
        for n in range(kills):
            future = load(loaded, n)
            if future is not None:
                future.result(60)
            time.sleep(dice.uniform(*PAUSE))
            victim = dice.randrange(workers)
            team[victim].kill()
            team[victim].wait()
            team[victim] = subprocess.Popen(command, stdout=log, stderr=log)
        left = _drain(loaded, time.monotonic() + patience)
        if left:
            tail = (room / "workers.log").read_text(errors="replace")[-2000:]
            raise Lost(f"seed {seed}: {left} messages or jobs are stuck after {patience} s; the workers said:\n{tail}")
        _end(team)
        return check(loaded, room / "witness", seed)


@contextmanager
def _moved(app: App, url: str) -> Iterator[None]:
    """The app on another file, and as it was before afterwards."""
    settings = app.settings
    app.close()
    app.settings = settings.override(events=url, jobs=url)
    try:
        yield
    finally:
        app.close()
        app.settings = settings


def _end(team: "list[subprocess.Popen[bytes]]") -> None:
    for process in team:
        process.terminate()
    for process in team:
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _drain(app: App, deadline: float) -> int:
    groups = {c.group: [t.name for t in c.subscriptions] for c in app.consumers.values()}
    queues = sorted({job.queue for job in app.job_handlers.values()})
    while (left := app.events.open_work(groups, queues)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


# Witnesses.


def witness(app: App) -> None:
    """Let every handler of this process leave a line in the file that the environment names."""
    fd = os.open(os.environ[LEAD], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def handled(delivery: Any) -> Generator[None, Any, None]:
        yield
        for d in delivery if isinstance(delivery, list) else [delivery]:
            key = d.key.hex() if isinstance(d.key, bytes) else d.key
            os.write(fd, json.dumps([d.group, d.topic, d.partition, d.offset, key]).encode() + b"\n")

    app.hooks.insert(0, handled)


def check(app: App, path: Path, seed: int) -> Report:
    """Compare what is stored with what the witnesses saw. Raises Lost."""
    seen: dict[tuple[str, str, int], dict[int, Any]] = {}
    jids: set[str] = set()
    repeats = handled = 0
    for line in path.read_text().splitlines():
        group, topic, partition, offset, key = json.loads(line)
        if partition < 0:
            repeats += key in jids
            jids.add(key)
        else:
            first = seen.setdefault((group, topic, partition), {})
            repeats += offset in first
            first.setdefault(offset, key)
    backend = app.events
    stored = {state.name: state.partitions for state in backend.topics()}
    for consumer in app.consumers.values():
        dead = _dead(backend, stored, consumer)
        for name in [topic.name for topic in consumer.topics]:
            for partition, (low, high, _) in enumerate(stored[name]):
                first = seen.get((consumer.group, name, partition), {})
                where = f"seed {seed}: {consumer.name} at {name}[{partition}]"
                if missing := [n for n in range(low, high) if n not in first and (name, partition, n) not in dead]:
                    raise Lost(f"{where}: {len(missing)} were never handled: {missing[:10]}")
                handled += high - low
                if consumer.order != "none" and consumer.retry.ordered:
                    _check_order(where, first, consumer.order == "key")
    return Report(seed, handled, repeats, len(jids))


def _check_order(where: str, first: dict[int, Any], by_key: bool) -> None:
    last: dict[Any, int] = {}
    for offset, key in first.items():
        if by_key and key is None:
            continue
        lane = key if by_key else None
        if last.get(lane, -1) > offset:
            raise Lost(f"{where}: key {key!r}: offset {offset} was first handled after {last[lane]}")
        last[lane] = offset


def _dead(backend: Any, stored: dict[str, Any], consumer: Any) -> set[tuple[str, int, int]]:
    """The messages that this consumer's group buried."""
    found = set()
    for name in [topic.dead_topic.name for topic in consumer.topics]:
        for partition, (low, high, _) in enumerate(stored.get(name, ())):
            for row in backend.read(name, partition, low, high - low) if high > low else ():
                headers = {header.removeprefix("barnabas-"): value.decode() for header, value in row[3] or ()}
                if headers.get("group") == consumer.group:
                    found.add((headers["topic"], int(headers["partition"]), int(headers["offset"])))
    return found


def main() -> None:
    """A worker of a kill test: `python -m barnabas.killing run MODULE:NAME ...`, as `barnabas run`."""
    from barnabas.cli import main as command

    witness(load_app(sys.argv[2]))
    command()


if __name__ == "__main__":
    main()
