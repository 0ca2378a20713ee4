"""From `--app MODULE:NAME` to the App, and the options that every command has."""

import contextlib
import difflib
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from barnabas.app import App
from barnabas.errors import BarnabasError
from barnabas.inspect import meant
from barnabas.settings import Settings

T = TypeVar("T")


class Wrong(BarnabasError):
    """What a command was to work on is not there, and the command to try then. misuse: it was called wrongly (status 2)."""

    def __init__(self, message: str, next_command: str = "", misuse: bool = False) -> None:
        super().__init__(message)
        self.next_command, self.misuse = next_command, misuse


@contextlib.contextmanager
def hinted(command: str) -> Iterator[None]:
    """An error in it names this command to try next."""
    try:
        yield
    except BarnabasError as error:
        raise Wrong(str(error), command) from error


def declared(app: App, kind: str, name: str, there: Mapping[str, T]) -> T:
    """What the app declares by this name. Raises Wrong."""
    if name not in there:
        raise Wrong(f"app {app.name!r} declares no {kind} {name!r}; {meant(name, there, f'{kind}s')}", "barnabas check")
    return there[name]


def load(spec: str | None) -> App:
    """Import an app by its MODULE:NAME; None: the one that the setting `app` names. Raises Wrong, which says what is there."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    spec = spec or Settings().app
    if spec is None:
        there = 'give --app MODULE:NAME (such as --app shop:app), put app = "MODULE:NAME" into barnabas.toml, or set BARNABAS_APP'
        raise Wrong(f"no app is named: {there}", misuse=True)
    module_name, _, name = spec.partition(":")
    if not name or not re.fullmatch(r"\w+(\.\w+)*", module_name):
        guess = f"{module_name.removesuffix('.py').replace('/', '.').strip('.') or 'shop'}:{name or 'app'}"
        raise Wrong(f"{spec!r} is not MODULE:NAME; did you mean {guess}?", misuse=True)
    module = _module(module_name, name)
    found: Any = getattr(module, name, None)
    if not isinstance(found, App):
        apps = [f"{module_name}:{key}" for key, value in vars(module).items() if isinstance(value, App)]
        what = f"{name} is {type(found).__name__}, not an App" if found is not None else f"it has no {name!r}"
        there = f"did you mean {' or '.join(apps)}?" if apps else "it has no App at all"
        raise Wrong(f"{spec}: {module_name} was imported from {module.__file__}, but {what}; {there}", misuse=True)
    return found


def _module(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            close = difflib.get_close_matches(module_name, [path.stem for path in Path.cwd().glob("*.py")], 1)
            hint = f"did you mean {close[0]}:{name}?" if close else "go to the folder that has it, or check PYTHONPATH"
            raise Wrong(f"no module {error.name!r} in {os.getcwd()} or on sys.path; {hint}", misuse=True) from None
        # The app's own code fails: its author needs the traceback, from their first line on.
        ours = os.path.dirname(os.path.dirname(__file__))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(ours) and "importlib" not in frame.filename]
        if isinstance(error, SystemExit) and own:
            why = f"ends itself when it is imported (sys.exit at {own[-1].filename}:{own[-1].lineno})"
            raise Wrong(f'{module_name} {why}: put that under if __name__ == "__main__"') from None
        if isinstance(error, BarnabasError):
            if own:
                error.add_note(f"(declared at {own[-1].filename}:{own[-1].lineno})")
            raise
        shown = "".join(traceback.format_list(own) + traceback.format_exception_only(error))
        raise Wrong(f"{module_name} cannot be imported:\n{shown.rstrip()}") from error


def override(app: App, **flags: Any) -> App:
    """The app with settings of the command line on top (None: not given)."""
    if any(value is not None for value in flags.values()):
        app.close()  # where importing it has opened a backend already
        app.settings = app.settings.override(**flags)
    return app


_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON, for programs.")
_OPTIONS = [
    click.Option(["--app", "spec"], metavar="MODULE:NAME", help="The app. [default: the setting `app`]"),
    click.Option(["--events"], metavar="URL", help="Where topics live, in place of the setting."),
    click.Option(["--jobs"], metavar="URL", help="Where queues live, in place of the setting."),
]


class AppCommand(click.Command):
    """A command with --json (unless json=False), --app, --events and --jobs. Its function gets the App that they name as
    `app`, closed afterwards; with loads=False these options themselves."""

    def __init__(self, *args: Any, json: bool = True, loads: bool = True, **given: Any) -> None:
        super().__init__(*args, **given)
        self.params += [_JSON] * json + _OPTIONS
        self.loads = loads

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        if not self.loads:
            return super().invoke(ctx)
        spec, events, jobs = (ctx.params.pop(name) for name in ("spec", "events", "jobs"))
        with contextlib.closing(override(load(spec), events=events, jobs=jobs)) as ctx.params["app"]:
            return super().invoke(ctx)


class AppGroup(click.Group):
    """A group of such commands."""

    command_class = AppCommand

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of `--help`: the first sentence of each command, whole."""
        lines = [(name, (self.commands[name].help or "").partition(". ")[0].split("\n\n")[0]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(line.split()).rstrip(".") + ".") for name, line in lines])


def command(**given: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """As click.command, for an AppCommand."""
    return click.command(cls=AppCommand, **given)


def options(*added: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add these options, in this order."""
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(added), function)


def _processes(app: App) -> list[str]:
    from barnabas.processes import processes

    found = processes(app)
    return [*(process.name for process in found), *(str(process.pid) for process in found), "all"]


_NAMES: dict[str, Callable[[App], Iterable[str]]] = {
    "topics": lambda app: app.topics,
    "consumers": lambda app: app.consumers,
    "jobs": lambda app: app.job_handlers,
    "crons": lambda app: app.crons,
    "tables": lambda app: app.tables,
    "groups": lambda app: sorted({at.group for at in app.events.positions()}),
    "queues": lambda app: [f"queue:{state.name}" for state in app.jobs.queue_states() if state.name],
    "bare queues": lambda app: [*(job.queue for job in app.job_handlers.values()), *(q.name for q in app.jobs.queue_states())],
    "processes": _processes,
}


def known(*kinds: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What the shell completes a parameter with: the app's names of these kinds."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        names: list[str] = []
        # Nobody who presses Tab wants to read an error, and what the app prints is no name.
        with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
            app = override(load(ctx.params.get("spec")), events=ctx.params.get("events"), jobs=ctx.params.get("jobs"))
            with contextlib.closing(app):
                names = [name for kind in kinds for name in _NAMES[kind](app)]
        return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]

    return complete
