"""From `--app MODULE:NAME` to the App, and the options that every command has."""

import difflib
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from barnabas.app import App
from barnabas.errors import BarnabasError
from barnabas.settings import Settings


class Wrong(BarnabasError):
    """What a command was to work on is not there. `next_command` is what to try then."""

    misuse = False  # whether the command was called wrongly: its exit status is 2, not 1

    def __init__(self, message: str, next_command: str = "") -> None:
        super().__init__(message)
        self.next_command = next_command


class NoApp(Wrong):
    """The app that a command was to work on is not there."""

    misuse = True


def load(spec: str | None) -> App:
    """Import an app by its MODULE:NAME; None: the one that the setting `app` names. Raises NoApp, which says what is
    there, and Wrong if the app's own code fails."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if spec is None:
        spec = Settings().app
    if spec is None:
        raise NoApp(
            'no app is named: give --app MODULE:NAME (such as --app shop:app), put app = "MODULE:NAME" into '
            "barnabas.toml, or set BARNABAS_APP"
        )
    module_name, colon, name = spec.partition(":")
    if not module_name or not colon or not name:
        guess = f"{module_name.removesuffix('.py').replace('/', '.') or 'shop'}:{name or 'app'}"
        raise NoApp(f"{spec!r} is not MODULE:NAME; did you mean {guess}?")
    module = _module(module_name, name)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, App):
        apps = [key for key, value in vars(module).items() if isinstance(value, App)]
        what = f"{name} is {type(found).__name__}, not an App" if found is not None else f"it has no {name!r}"
        meant = " or ".join(f"{module_name}:{key}" for key in apps)
        there = f"did you mean {meant}?" if apps else "it has no App at all"
        raise NoApp(f"{spec}: {module_name} was imported from {module.__file__}, but {what}; {there}")
    return found


def _module(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(module_name, error) from error
        here = [path.stem for path in Path.cwd().glob("*.py")]
        close = difflib.get_close_matches(module_name, here, 1)
        hint = f"did you mean {close[0]}:{name}?" if close else "go to the folder that has it, or check PYTHONPATH"
        raise NoApp(f"no module {error.name!r} in {os.getcwd()} or on sys.path; {hint}") from None
    except BarnabasError as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if not _ours(f.filename)]
        if own:
            error.add_note(f"(declared at {own[-1].filename}:{own[-1].lineno})")
        raise
    except Exception as error:
        raise _broken(module_name, error) from error


def _ours(filename: str) -> bool:
    return filename.startswith(os.path.dirname(os.path.dirname(__file__))) or "importlib" in filename


def _broken(module_name: str, error: Exception) -> Wrong:
    """An app whose own code fails: its author needs the traceback, from their first line on."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
    shown = traceback.format_list(own) + traceback.format_exception_only(error)
    return Wrong(f"{module_name} cannot be imported:\n{''.join(shown).rstrip()}")


def override(app: App, **flags: Any) -> App:
    """The app with settings of the command line on top (None: not given)."""
    if any(value is not None for value in flags.values()):
        app.close()  # where importing it has opened a backend already
        app.settings = app.settings.override(**flags)
    return app


_OPTIONS = [
    click.option("--app", "spec", metavar="MODULE:NAME", help="The app. [default: the setting `app`]"),
    click.option("--events", metavar="URL", help="Where topics live, in place of the setting."),
    click.option("--jobs", metavar="URL", help="Where queues live, in place of the setting."),
]
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def app_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --app, --events and --jobs."""
    return functools.reduce(lambda inner, option: option(inner), reversed(_OPTIONS), function)


def with_app(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add those options; the function gets the App as its first argument, and it is closed afterwards."""

    @functools.wraps(function)
    def wrapped(spec: str | None, events: str | None, jobs: str | None, **options: Any) -> Any:
        app = override(load(spec), events=events, jobs=jobs)
        try:
            return function(app, **options)
        finally:
            app.close()

    return app_options(wrapped)
