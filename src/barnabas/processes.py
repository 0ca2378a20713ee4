"""The worker processes as they report themselves, and what operators ask of them: quiet, stop, pause, resume."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from barnabas.app import App
from barnabas.ports import Backend, Process


class Work(msgspec.Struct, frozen=True):
    """What a process has in work: a handler and its delivery, for so many seconds now. A queue's partition is -1.
    progress: what a job said of how far it is."""

    process: str
    handler: str
    topic: str
    partition: int
    offset: int
    seconds: float
    progress: str = ""


class Pace(msgspec.Struct, frozen=True):
    """What a handler has done in a process, and the seconds a message takes it (None: not known)."""

    done: int = 0
    pace: float | None = None


class ProcessInfo(msgspec.Struct, frozen=True):
    """A worker process, as it last said itself. silent: seconds since its last sign of life; rss: bytes; asked: "quiet" or
    "stop", if an operator has; groups: it is in; queues: how many jobs it has done of each; done: altogether; trouble: what a
    backend cannot do for it just now."""

    name: str
    pid: int
    host: str
    app: str
    started: float
    silent: float
    rss: int
    done: int
    quiet: bool
    asked: str | None
    groups: list[str]
    queues: dict[str, int]
    work: list[Work]
    handlers: dict[str, Pace]
    trouble: str = ""


def homes(app: App) -> list[Backend]:
    """The app's backends, each once."""
    return [app.events] if app.jobs is app.events else [app.events, app.jobs]


def processes(app: App) -> list[ProcessInfo]:
    """All worker processes on the app's backends, also those of other apps (but on Kafka); one that is on both is there once."""
    found: dict[Any, ProcessInfo] = {}
    for home in homes(app):
        asked = home.control()
        for process in home.processes():
            try:
                info = _info(process, asked.get(f"process:{process.name}"))
            except (msgspec.MsgspecError, AttributeError, TypeError, ValueError):
                continue  # on Redis anybody may say of himself what he likes
            twin = next((key for key in found if key[:2] == (info.host, info.pid) and key[2] is not home), None)
            if twin is None:
                found[info.host, info.pid, home, info.name] = info
            elif not found[twin].app:  # it has said nothing there
                found[twin] = msgspec.structs.replace(info, name=found[twin].name)
    return list(found.values())


def _info(process: Process, asked: str | None) -> ProcessInfo:
    said = process.info
    info = ProcessInfo(
        process.name, process.pid, process.host, said.get("app", ""), process.started, max(0.0, process.silent),
        said.get("rss", 0), said.get("counts", {}).get("done", 0), said.get("quiet", False), asked, list(said.get("groups", ())),
        dict(said.get("queues", {})), [Work(process.name, *each) for each in said.get("work", ())],
        {name: Pace(each.get("done", 0), each.get("pace")) for name, each in said.get("handlers", {}).items()},
        said.get("trouble", ""),
    )
    return msgspec.convert(msgspec.to_builtins(info), ProcessInfo)


def state(process: ProcessInfo, session: float) -> str:
    """ "ok", "troubled", "quiet", "stopping", or "silent" (no sign of life for half a session of so many seconds)."""
    if process.silent > session / 2:
        return "silent"
    if process.asked == "stop":
        return "stopping"
    return "quiet" if process.quiet or process.asked == "quiet" else "troubled" if process.trouble else "ok"


def ask(app: App, process: ProcessInfo, what: str) -> None:
    """Ask a process to be "quiet" (finish what is in work, take nothing new) or to "stop"; it obeys within a second or two."""
    for home in homes(app):
        for one in home.processes():
            if (one.host, one.pid) == (process.host, process.pid):
                home.set_control(f"process:{one.name}", what)


class Pause(msgspec.Struct, frozen=True):
    """What is paused: kind "group", "queue", or "key" (`key` of the group `name`)."""

    kind: str
    name: str
    key: str | None = None


def pauses(app: App) -> list[Pause]:
    """All that is paused."""
    found = list(_pauses(app.events.control(), ("group", "key")))
    return found + list(_pauses(app.jobs.control(), ("queue",)))


def _pauses(control: dict[str, str], kinds: tuple[str, ...]) -> Iterator[Pause]:
    for asked in sorted(control):
        what, _, name = asked.partition(":")
        kind = what.removeprefix("pause ")
        if what.startswith("pause ") and kind in kinds:
            yield Pause(kind, *json.loads(name)) if kind == "key" else Pause(kind, name)


def set_pause(app: App, pause: Pause, on: bool) -> bool:
    """Pause, or resume; False where it was so before."""
    if (pause in pauses(app)) == on:
        return False
    name = pause.name if pause.key is None else json.dumps([pause.name, pause.key])  # its own: two may be paused at once
    home = app.jobs if pause.kind == "queue" else app.events
    home.set_control(f"pause {pause.kind}:{name}", "" if on else None)
    return True
