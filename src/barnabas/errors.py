"""Every error Barnabas raises on purpose. Each says what happened, the likely cause and the setting to touch."""

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any


class BarnabasError(Exception):
    """The root of all errors of this package."""


class DeclarationError(BarnabasError):
    """A topic, consumer, job, table or hook was declared in a way that cannot work."""


class SettingError(DeclarationError):
    """A setting has an unknown name, a wrong type or a value out of range."""


class BackendError(BarnabasError):
    """A backend refused or cannot be reached; the driver's own error is the cause."""


class Replaced(BackendError):
    """Another file was put in the place of the one that a worker uses: it is to start anew."""


class PositionLost(BackendError):
    """A group's position is no longer stored, and its policy is to stop."""


class SendError(BarnabasError):
    """A message or job could not be made durable."""


class MessageRefused(SendError):
    """The broker will never store this message as it is: for its missing key, its timestamp or its size."""


class ValueTooLarge(MessageRefused):
    """An encoded value is over the topic's limit (`value_limit`, bytes)."""


class BufferFull(SendError):
    """The send buffer stayed full for `send_timeout` seconds."""


class NotYetDurable(SendError, TimeoutError):
    """A send's outcome is not known after the seconds that somebody wanted to wait for it."""


class UnknownTopic(SendError):
    """A topic or partition that does not exist in the backend."""


class NotAuthorised(SendError, BackendError):
    """The broker does not let this user do what it was asked to."""


class NotAuthenticated(SendError, BackendError):
    """The broker does not take this user's password or certificate, or its own certificate is not trusted here."""


class NoOutcome(BarnabasError, TimeoutError):
    """A job's outcome is not known after the seconds that somebody wanted to wait for it."""


class JobFailed(BarnabasError):
    """The job whose outcome was asked for will not return anything: it is dead, was dropped or came too late."""


class Refused(BarnabasError):
    """An operator's command that must not be done now; the message says what is in its way."""


class UnknownBatch(BarnabasError):
    """There is no batch with that id, or not any more."""


class EndedBatch(UnknownBatch, Refused):
    """A batch has ended, so there is nothing to do about it."""


class NoSlot(BarnabasError, TimeoutError):
    """A limit had no free slot for as long as somebody wanted to wait for one."""


class Conflict(SendError):
    """A unique job's lock is held by another job: `holder`, its id."""

    def __init__(self, text: str, holder: str) -> None:
        super().__init__(text)
        self.holder = holder


class WaitInHandler(BarnabasError):
    """A handler waited for a future of its own send, which leaves only after the handler returned."""


class ResponderError(BarnabasError):
    """A handler broke its declared answers: unregistered topic, second use, or a required one missing."""


class TableError(BarnabasError):
    """A table was used outside of a consumer that names it, or under a key that is not the message's."""


class TimedOut(BarnabasError):
    """A handler ran longer than its `timeout`."""


class Reject(Exception):
    """Raised by a handler: this message or job is dead now, with this reason; no further attempts."""

    def __init__(self, reason: str = "rejected") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryAfter(Exception):
    """Raised by a handler: run this message or job again in `seconds`; it counts as an attempt."""

    def __init__(self, seconds: float, reason: str = "") -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 10**9:
            raise ValueError(f"RetryAfter({seconds!r}): give seconds, from 0 to 1,000,000,000")
        super().__init__(reason or f"retry after {seconds} s")
        self.seconds = seconds


def must(fits: Any, owner: str, option: str, value: Any, way_out: str) -> None:
    """Raise DeclarationError for an option that does not fit."""
    if not fits:
        raise DeclarationError(f"{owner}: {option}={value!r}: {way_out}")


def refuse_unknown(what: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise for the first option that does not exist, with the one that was probably meant."""
    for option, value in options.items():
        if option not in known:
            import difflib

            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}=?" if near else f"it knows {', '.join(known)}"
            raise DeclarationError(f"{what}: unknown option {option}={value!r}; {hint}")


def check_seconds(owner: str, **seconds: Any) -> None:
    """Refuse what is no number of seconds."""
    for name, value in seconds.items():
        fits = value is None or (not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= 10**9)
        must(fits, owner, name, value, "give seconds, above 0 and up to 1,000,000,000, or None")


def is_text(value: Any) -> bool:
    """Whether it is a text that can be stored: half a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value))


def whole(value: Any) -> bool:
    """Whether it is a whole number; yes and no are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def patience(owner: str, timeout: Any) -> float:
    """Seconds to wait: those of a `timeout`, 30 years at most, and for None. Raises DeclarationError for what is no number."""
    fits = timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout == timeout)
    must(fits, owner, "timeout", timeout, "give seconds, or None to wait for ever")
    return 1e9 if timeout is None else max(0.0, min(timeout, 1e9))


def text(error: BaseException) -> str:
    """What an error says. Its own __str__ must not cost the message or job that it failed."""
    try:
        return str(error)
    except Exception as second:
        return f"({type(second).__name__} while reading the message of {type(error).__name__})"


def told(error: BaseException) -> str:
    """The same after its kind: "ValueError: a negative total"."""
    return f"{type(error).__name__}: {text(error)}"


def own_part(error: BaseException) -> TracebackType | None:
    """The traceback from the first frame outside of this package to the last; None if all are inside."""
    ours = os.path.dirname(__file__)
    frames, at = list[TracebackType](), error.__traceback__
    while at is not None:
        frames.append(at)
        at = at.tb_next
    theirs = [n for n, each in enumerate(frames) if not each.tb_frame.f_code.co_filename.startswith(ours)]
    made: TracebackType | None = None
    for each in reversed(frames[theirs[0] : theirs[-1] + 1]) if theirs else ():
        made = TracebackType(made, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return made
