"""Log lines of `barnabas run`: text or JSON, with what the handler that logs has in hand."""

import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from barnabas.app import App
from barnabas.engine.hand import CURRENT
from barnabas.jobs.payload import PayloadError, parse

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
        record.context = self._always | _in_hand(self._consumers)
        return True


def _in_hand(consumers: dict[str, str]) -> dict[str, Any]:
    hand = CURRENT.get()
    if hand is None or not hand.open:
        return {}
    part, row = hand.run.part, hand.row
    if part.partition >= 0:
        consumer = consumers.get(part.group, part.group)
        return {"consumer": consumer, "topic": part.topic, "partition": part.partition, "offset": row[0]}
    try:
        name = parse(row[2]).name
    except PayloadError:
        name = "?"
    return {"job": name, "queue": part.topic, "jid": row[1]}


class Text(logging.Formatter):
    """A line for people; on a terminal it first clears the status line."""

    def __init__(self, terminal: bool) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
        self._clear = "\r\x1b[K" if terminal else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        # Our own lines name what they are about.
        of: dict[str, Any] = {} if record.name == "barnabas" else getattr(record, "context", {})
        where = ""
        if "topic" in of:
            where = f" ({of['consumer']} {of['topic']}[{of['partition']}]@{of['offset']})"
        elif "job" in of:
            where = f" (job {of['job']} {of['jid']})"
        return f"{self._clear}{super().formatMessage(record)}{where}"


class Json(logging.Formatter):
    """One JSON object a line; what a logging call gives as `extra` is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "context", {}),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=repr).decode()


def set_up(app: App, process: int | None = None, stream: TextIO | None = None) -> None:
    """Log to stderr as the settings log_format and log_level say. An app that has set up logging itself keeps it."""
    root = logging.getLogger()
    if root.handlers:
        return
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Json() if app.settings.log_format == "json" else Text(stream.isatty()))
    handler.addFilter(Context(app, process))
    root.addHandler(handler)
    root.setLevel(app.settings.log_level)
    logging.Formatter.converter = time.localtime
