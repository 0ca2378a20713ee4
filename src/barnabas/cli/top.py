"""`barnabas top`: all that moves, live."""

import contextlib
import select
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
from msgspec.structs import asdict

from barnabas import lag, processes
from barnabas.app import App
from barnabas.cli import draw
from barnabas.cli.loading import command
from barnabas.errors import BackendError
from barnabas.ports import QueueState

TICK = 1.0  # seconds between two frames
SPAN = 4  # ticks that rates are taken over: processes report every 2 s
_KINDS = ("work", "scheduled", "retry", "dead")  # of jobs
Frame = dict[str, list[dict[str, Any]]]


class Look(NamedTuple):
    """What there is at one moment (epoch seconds)."""

    at: float
    groups: list[lag.GroupLag]
    queues: list[QueueState]
    processes: list[processes.ProcessInfo]


def _counts(of: Look) -> Counter[tuple[str, str]]:
    """What was done until then, by kind and name."""
    found = Counter({("group", g.group): sum(p.end - p.open for p in g.partitions) for g in of.groups})
    for process in of.processes:
        found["process", process.name] += process.done
        found.update({("queue", name): n for name, n in process.queues.items()})
        found.update({("handler", name): each.done for name, each in process.handlers.items()})
    return found


def frame(now: Look, before: Look, session: float) -> Frame:
    """What is shown of two looks: their difference gives rates (per second)."""
    span, old = max(1e-3, now.at - before.at), _counts(before)
    rates = {at: max(0, n - old.get(at, n)) / span for at, n in _counts(now).items()}
    groups = [
        {"group": g.group, "state": g.state, "open": g.open, "seconds": g.seconds, "rate": rates["group", g.group]}
        | {"processes": len(g.processes)}
        for g in sorted(now.groups, key=lambda g: -g.open)
    ]
    queues = [
        {"queue": q.name, "ready": q.ready}
        | {kind: getattr(q, kind) for kind in _KINDS}
        | {"seconds": max(0.0, now.at - q.since) if q.since is not None else 0.0, "rate": rates.get(("queue", q.name), 0.0)}
        for q in sorted(now.queues, key=lambda q: -q.ready)
    ]
    running = [
        {"process": p.name, "pid": p.pid, "app": p.app, "state": processes.state(p, session), "rss": p.rss, "trouble": p.trouble}
        | {"done": p.done, "rate": rates["process", p.name], "work": len(p.work)}
        for p in now.processes
    ]
    work = sorted((each for p in now.processes for each in p.work), key=lambda each: -each.seconds)
    paces: dict[str, list[processes.Pace]] = {}
    for name, pace in ((name, pace) for p in now.processes for name, pace in p.handlers.items()):
        paces.setdefault(name, []).append(pace)
    handlers = [
        {"handler": name, "done": sum(p.done for p in of), "rate": rates["handler", name], "pace": _mean(of)}
        for name, of in sorted(paces.items(), key=lambda each: -(_mean(each[1]) or 0.0))
    ]
    return {"groups": groups, "queues": queues, "processes": running, "work": list(map(asdict, work)), "handlers": handlers}


def _mean(paces: list[processes.Pace]) -> float | None:
    known = [p.pace for p in paces if p.pace is not None]
    return sum(known) / len(known) if known else None


def frames(app: App) -> Iterator[Frame]:
    """Frames without end, as often as they are asked for."""
    looks: deque[Look] = deque(maxlen=SPAN + 1)
    while True:
        looks.append(Look(app.clock.now(), lag.groups(app), app.jobs.queue_states(), processes.processes(app)))
        yield frame(looks[-1], looks[0], app.settings.session_timeout)


def tables(found: Frame, room: int | None) -> Iterator[Any]:
    """The frame as tables, each of at most `room` rows."""
    columns: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
        "groups": ("group open# behind# rate# processes# state", lambda g: (
            g["group"], g["open"], draw.age(g["seconds"]), _rate(g["rate"]), g["processes"], g["state"])),
        "queues": ("queue ready# behind# rate# in_work# scheduled# retry# dead#", lambda q: (
            q["queue"] or "(all)", q["ready"], draw.age(q["seconds"]), _rate(q["rate"]), *map(q.get, _KINDS))),
        "processes": ("process app memory# done# rate# in_work# state", lambda p: (
            p["process"], p["app"], draw.size(p["rss"]), p["done"], _rate(p["rate"]), p["work"],
            draw.joined(p["state"], p["trouble"]))),
        "work": ("in_work at for# process", lambda w: (
            f"{w['handler']} {w['progress']}".rstrip(), _at(w), draw.age(w["seconds"]), w["process"])),
        "handlers": ("handler done# rate# a_message_takes#", lambda h: (
            h["handler"], h["done"], _rate(h["rate"]), "" if h["pace"] is None else f"{1000 * h['pace']:,.3f} ms")),
    }
    for name, (words, row) in columns.items():
        titles = [word.replace("_", " ") for word in words.split()]
        if found[name]:
            shown = found[name] if room is None else found[name][:room]
            rows = [row(each) for each in shown]
            left = len(found[name]) - len(shown)
            yield draw.grid(titles, rows + [(f"… and {left:,} more", *[""] * (len(titles) - 1))] * (left > 0))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 or not rate else f"{rate:.1f}/s"


def _at(work: dict[str, Any]) -> str:
    where = work["topic"] if work["partition"] < 0 else f"{work['topic']}[{work['partition']}]"
    return f"{where}@{work['offset']}"


@command()
@click.option("--once", is_flag=True, help="Print one frame and end; so it does where the output is not a terminal.")
def top(app: App, once: bool, as_json: bool) -> None:
    """Show groups, queues, processes and the slowest handlers, live; q or Ctrl-C ends it. JSON is a line a second."""
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        if not (once or as_json) and sys.stdout.isatty() and sys.stdin.isatty():
            _live(app)
            return
        for number, found in enumerate(frames(app)):
            if number >= 2 or (number and not once and as_json):  # two ticks, so that rates are known
                if as_json:
                    draw.json_line({"time": app.clock.now()} | found)
                    sys.stdout.flush()
                else:
                    for drawn in tables(found, None):
                        draw.show(drawn)
                if once or not as_json:
                    return
            time.sleep(TICK)


def _live(app: App) -> None:
    """Draw over the whole screen until somebody wants no more."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`, so that the terminal is as it was
    source = frames(app)
    with _keys() as pressed, Live(screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            size = shutil.get_terminal_size()
            title = f"{app.name}  {time.strftime('%H:%M:%S')}  (q ends)  {app.settings.shown('events')}"
            try:
                parts = [part for each in tables(next(source), max(3, (size.lines - 16) // 5)) for part in ("", each)]
            except BackendError as error:  # away for a while
                source, parts = frames(app), [str(error)]
            live.update(Group(Text(title, "reverse", no_wrap=True), *parts), refresh=True)
            if pressed(TICK) in ("q", "Q", "\x04"):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Single keys, as they are pressed: gives a function that waits so many seconds for one ("": none)."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda timeout: sys.stdin.read(1) if select.select([fd], [], [], timeout)[0] else ""
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
