"""Log lines of `barnabas run`: text or JSON, with what the handler that logs has in hand."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from barnabas.app import App
from barnabas.cli.draw import CONTROLS
from barnabas.engine.hand import CURRENT
from barnabas.errors import own_part
from barnabas.jobs.work import name_of
from barnabas.message import offset_of

_ONE_LINE = CONTROLS | {10: "\\n"}  # what others have named is not to look like a line of the log
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "context", "taskName"}


class Context(logging.Filter):
    """Adds to a record of a handler what it has in hand: app, consumer, topic, partition, offset; of a job its name,
    queue and id. Costs a message nothing: it looks when a handler logs."""

    def __init__(self, app: App, process: int | None = None) -> None:
        super().__init__()
        self._always: dict[str, Any] = {"app": app.name} if process is None else {"app": app.name, "process": process}
        self._consumers = {consumer.group: name for name, consumer in app.consumers.items()}

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        record.context = self._always | self._in_hand()
        return True

    def _in_hand(self) -> dict[str, Any]:
        hand = CURRENT.get()
        if hand is None or not hand.open:
            return {}
        part, row = hand.run.part, hand.row
        if part.partition < 0:
            return {"job": name_of(row) or "?", "queue": part.topic, "jid": row[1]}
        consumer = self._consumers.get(part.group, part.group)
        return {"consumer": consumer, "topic": part.topic, "partition": part.partition, "offset": offset_of(row)}


class _Own(logging.Formatter):
    """Of a traceback, the user's part."""

    def formatException(self, ei: Any) -> str:
        return super().formatException((ei[0], ei[1], (ei[1] and own_part(ei[1])) or ei[2]))


class Text(_Own):
    """A line for people; on a terminal it first clears the status line."""

    def __init__(self, terminal: bool) -> None:
        clear = "\r\x1b[K" if terminal else ""
        super().__init__(f"{clear}%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s%(where)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        # Our own lines name what they are about.
        of: dict[str, Any] = {} if record.name == "barnabas" else getattr(record, "context", {})
        record.where = ""
        if record.name == "barnabas":
            record.message = record.message.translate(CONTROLS if "\n" in str(record.msg) else _ONE_LINE)
        if "topic" in of:
            record.where = f" ({of['consumer']} {of['topic']}[{of['partition']}]@{of['offset']})"
        elif "job" in of:
            record.where = f" (job {of['job']} {of['jid']})".translate(_ONE_LINE)
        return super().formatMessage(record)


class Json(_Own):
    """One JSON object a line; what a logging call gives as `extra` is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        fields |= getattr(record, "context", {})
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=repr).decode()


def set_up(app: App, process: int | None = None) -> None:
    """Log to stderr as the settings log_format and log_level say. An app that has set up logging itself keeps it."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if app.settings.log_format == "json" else Text(sys.stderr.isatty()))
    handler.addFilter(Context(app, process))
    root.addHandler(handler)
    root.setLevel(app.settings.log_level)
