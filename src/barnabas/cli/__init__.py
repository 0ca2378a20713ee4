"""The `barnabas` command. Each command is a thin skin over a function of `inspect`, `worker` or `supervisor`.

A command's file is imported when it is called, so that `barnabas --help` stays quick.
"""

import difflib
from importlib import import_module
from typing import Any

import click

import barnabas
from barnabas.errors import BackendError, BarnabasError, DeclarationError, Refused, UnknownBatch, UnknownTopic

# Name: its file, and its line in `barnabas --help`.
COMMANDS = {
    "run": ("run", "Run the app's consumers and jobs."),
    "send": ("write", "Send messages to a topic."),
    "enqueue": ("write", "Enqueue a job."),
    "read": ("read", "Show the messages of a topic."),
    "topics": ("show", "List the topics; on Kafka, plan and apply changes."),
    "table": ("show", "Show a table, or one key of it."),
    "flow": ("show", "Show which topics are answered on which."),
    "lag": ("groups", "Show how far each consumer group is."),
    "reset": ("groups", "Let a consumer group go on elsewhere."),
    "queues": ("jobs", "Show the queues."),
    "jobs": ("jobs", "List, show, retry, move and drop stored jobs."),
    "limits": ("jobs", "Show the limits of jobs: who has slots, who waits."),
    "batches": ("batches", "List, show, watch and cancel batches of jobs."),
    "cron": ("cron", "List, run and pause what is enqueued by the clock."),
    "dead": ("dead", "List, show, retry, drop and export dead letters."),
    "replay": ("replay", "Run one stored message through a consumer, and keep nothing."),
    "processes": ("processes", "List the worker processes."),
    "quiet": ("processes", "Let processes take nothing new."),
    "stop": ("processes", "Stop processes."),
    "pause": ("processes", "Pause a consumer, a queue or a key; list what is paused."),
    "resume": ("processes", "Resume what was paused."),
    "top": ("top", "Show groups, queues and processes, live."),
    "check": ("show", "Check the settings and what the app declares."),
    "db": ("db", "Check, back up or compact the SQLite file."),
}
EPILOG = """\b
Exit status: 0 it worked, 1 it failed (the reason is on stderr), 2 it was called
wrongly; `run`: 75 the process made way for another (a handler hangs, or max_memory),
130 a second Ctrl-C.

\b
Shell completion: eval "$(_BARNABAS_COMPLETE=bash_source barnabas)"
(or zsh_source; fish: _BARNABAS_COMPLETE=fish_source barnabas | source)
"""


HINTS: dict[Any, str] = {  # what to try next
    DeclarationError | BackendError: "barnabas check", UnknownTopic: "barnabas topics", UnknownBatch: "barnabas batches list",
    Refused: "barnabas processes",
}  # fmt: skip


class Failed(click.ClickException):
    """An error of ours on its way out: a message and the next command to try, no traceback."""

    def __init__(self, error: BarnabasError, command: str) -> None:
        super().__init__("\n".join([str(error), *getattr(error, "__notes__", ())]))
        usual = next((hint for kinds, hint in HINTS.items() if isinstance(error, kinds)), f"barnabas {command} --help")
        self.exit_code = 2 if getattr(error, "misuse", False) else 1  # type: ignore[misc]  # called wrongly, or failed
        hint: str = getattr(error, "next_command", usual)
        self.next_command = "" if hint == f"barnabas {command}" else hint

    def show(self, file: Any = None) -> None:
        """Print it to stderr."""
        super().show(file)
        if self.next_command:
            click.echo(f"Next, try: {self.next_command}", err=True)


class Commands(click.Group):
    """A group that knows its commands' names without importing them, and shows our errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a first hour."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"barnabas.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the command that was probably meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of `--help`, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; its return value is the exit status."""
        try:
            status = super().invoke(ctx)
        except BarnabasError as error:
            raise Failed(error, ctx.invoked_subcommand or "") from error
        ctx.exit(status or 0)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(barnabas.__version__, "--version", prog_name="barnabas")
def commands() -> None:
    """Barnabas carries events (topics and consumers) and jobs (queues and workers).

    Commands work on an app: --app MODULE:NAME, or `app = "MODULE:NAME"` in barnabas.toml, or BARNABAS_APP.
    """


def main() -> None:
    """The entry point; ends the process with its exit status."""
    commands(prog_name="barnabas")
