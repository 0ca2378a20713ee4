"""A job on the wire: Sidekiq's JSON, byte for byte (`facts/sidekiq.md` 1.0, 1.1, 2.4). Pure: no I/O, no threads.

The bytes matter: Sidekiq moves entries by their exact text, so what we write must be what Ruby's generator would write.
msgspec's output is that (compact, UTF-8 and "/" raw, lower-case \\u00xx) with one exception: Ruby writes a float below
1e-4 or a whole one from 1e15 up with an exponent (`1.0e-05`, `1.0e+15`), and its versions differ. Timestamps never come
near; avoid such floats in arguments, or accept that rescheduling the job in Sidekiq's web page leaves a second copy.

Two dialects of time: Sidekiq 6 and 7 write float seconds, Sidekiq 8 integer milliseconds. Both are read; float seconds
are written, because every version understands those.
"""

import binascii
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from barnabas.errors import BarnabasError, own_part, text
from barnabas.settings import QUEUE_NAME

MAX_DEPTH = 100  # Ruby's parser refuses deeper nesting; the job's own braces and the list of arguments are two of them
MAX_BYTES = 8 << 20  # of a job: each process that handles it, and each that lists it, holds it whole
MAX_MESSAGE = 10_000  # characters of `error_message` that Sidekiq keeps
DEFAULT_RETRY = 25  # what `retry: true` means
CHAIN = 1000  # jobs in a chain: each carries those behind it

_encode = msgspec.json.Encoder().encode
_raws = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_surrogates = re.compile("[\ud800-\udfff]")
# What decoding raises for bytes that are no job; TypeError for what is not even bytes: SQL can put anything there.
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError)


def with_more(data: bytes, **more: Any) -> bytes:
    """The job with these values in its field "barnabas"; all else keeps its bytes."""
    fields = _raws(data)
    own: dict[str, Any] = _raws(fields.get("barnabas", b"{}"))
    return _encode(fields | {"barnabas": own | more})


class PayloadError(BarnabasError):
    """A job that cannot be written as Sidekiq's JSON, or bytes that are not such a job; the text says why."""


_jids: list[str] = []
os.register_at_fork(after_in_child=_jids.clear)  # or parent and child would hand out the same ids


def new_jid() -> str:
    """A fresh job id: 96 random bits as 24 lower-case hex digits, cut from blocks: one system call for 256 of them."""
    try:
        return _jids.pop()  # as atomic as `extend`: any thread may call
    except IndexError:
        jid, *more = new_jids(256)
        _jids.extend(more)
        return jid


def new_jids(count: int) -> list[str]:
    """So many of them."""
    block = os.urandom(12 * count).hex()
    return [block[at : at + 24] for at in range(0, 24 * count, 24)]


def derived_jid(cause: str, index: int) -> str:
    """The id of the `index`-th job sent by a handler while it worked on `cause`: a repeat of it carries the same id."""
    from hashlib import blake2b  # 3 ms to import, and most processes never need it

    return blake2b(f"{cause}:{index}".encode(errors="surrogatepass"), digest_size=12).hexdigest()


# Writing.


class _Job(msgspec.Struct, gc=False):
    """Twice as fast to make and to encode as a dict."""

    retry: bool | int
    queue: str
    name: str = msgspec.field(name="class")
    args: Sequence[Any]
    jid: str
    created_at: float
    enqueued_at: float | msgspec.UnsetType = msgspec.UNSET


def build(
    name: str, args: Sequence[Any], *, queue: str, retry: bool | int, jid: str | None = None, now: float, at: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The JSON of a new job. `now`: epoch seconds. `at`: it is scheduled, so `enqueued_at` is left out.

    `extra`: further Sidekiq options (`dead`, `tags`, ...), written between queue and class. Arguments are anything msgspec
    encodes. Raises PayloadError, naming the argument, for NaN and infinity, halves of surrogate pairs, nesting deeper than
    100 in all, and types without a JSON form: what Ruby could not read must not be stored; and for more than 8 MiB.
    """
    now = float(now)  # an integer would be read as milliseconds by Sidekiq 8
    jid = jid or new_jid()
    job: _Job | dict[str, Any] = _Job(retry, queue, name, args, jid, now, msgspec.UNSET if at else now)
    if extra:
        job = {"retry": retry, "queue": queue, **extra, "class": name, "args": args, "jid": jid, "created_at": now}
        if not at:
            job["enqueued_at"] = now
    try:
        data = _encode(job)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        _check(name, args)
        raise PayloadError(f"job {name!r} cannot be written as JSON: {error}") from error
    if len(data) > MAX_BYTES:
        what = f"job {name!r} has {len(data)} bytes as JSON, {MAX_BYTES} are its limit"
        raise PayloadError(f"{what}; store the data where its worker finds it, and enqueue its id")
    # msgspec writes NaN as null, and depth needs brackets: most jobs pay for no closer look. (`in` is slower than find)
    if data.find(b"null") >= 0 or (len(data) > 2 * MAX_DEPTH and data.count(b"[") + data.count(b"{") > MAX_DEPTH):
        _check(name, args)
    return data


def build_many(name: str, calls: Sequence[Sequence[Any]], jids: Sequence[str], **fields: Any) -> list[bytes]:
    """The same for many calls of a job at once, in a third of the time. They are a microsecond apart: who waits for a lock
    gets it in the order of these times."""
    queue, retry, now, extra = fields["queue"], fields["retry"], float(fields["now"]), fields["extra"]
    each = [(args, jid, now + n * 1e-6) for n, (args, jid) in enumerate(zip(calls, jids, strict=True))]
    with suppress(TypeError, ValueError, OverflowError, RecursionError):  # else `build` says which it is
        made = [_encode(_Job(retry, queue, name, args, jid, at, at)) for args, jid, at in each]
        if b"".join(made).find(b"null") < 0 and len(max(made, key=len, default=b"")) <= 2 * MAX_DEPTH:
            head = _encode({"retry": retry, "queue": queue})[:-1] + b","
            more = head + _encode(extra)[1:-1] + b","
            return [more + data[len(head) :] for data in made] if extra else made
    return [build(name, args, queue=queue, retry=retry, jid=jid, now=at, extra=extra) for args, jid, at in each]


def dumps(value: Any) -> bytes:
    """The JSON of a value that a job returned. Raises PayloadError as `build` does."""
    try:
        data = _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        _check("", [value])
        raise PayloadError(str(error)) from error
    if data.find(b"null") >= 0:
        _check("", [value])
    return data


def hooked(hooks: Sequence[Callable[[dict[str, Any]], Any]], payload: bytes, queue: str) -> tuple[bytes, str] | None:
    """A job and its queue after before_enqueue hooks, which may change its fields; None if one returned False. Raises
    PayloadError where they have left no job."""
    if not hooks:
        return payload, queue
    fields = msgspec.json.decode(payload)
    for hook in hooks:
        if hook(fields) is False:
            return None
    data = dumps(fields)
    parse(data)  # or it would be dead on arrival
    queue = fields.get("queue", queue)
    if not QUEUE_NAME.fullmatch(queue):
        raise PayloadError(f"a before_enqueue hook has put it into the queue {queue!r}, which is no name of one")
    return data, queue


def _check(name: str, args: Sequence[Any]) -> None:
    """Raise PayloadError for the first argument of this job (of "": what it returned) that Ruby could not read back."""
    for index, value in enumerate(args, 1):
        fault = None
        try:
            _encode(value)
            fault = _fault(msgspec.to_builtins(value, str_keys=True, enc_hook=msgspec.json.decode), 3)  # the hook: for Raw
        except UnicodeEncodeError:
            fault = "it holds half a surrogate pair, which is no text; repair it, or send the bytes as base64"
        except RecursionError:
            fault = f"it is nested deeper than {MAX_DEPTH} levels or contains itself; send it flatter, or its id"
        except (TypeError, ValueError, OverflowError) as error:
            fault = f"it has no JSON form ({error}); send its id, or a str, number, list or dict"
        if fault:
            raise PayloadError(f"{f'job {name!r}, argument {index} ' if name else ''}({type(value).__name__}): {fault}")


def _fault(value: Any, depth: int) -> str | None:
    if type(value) is float:
        return None if math.isfinite(value) else "NaN and infinity do not exist in JSON; send None or a string"
    if not isinstance(value, list | tuple | dict):
        return None
    if depth > MAX_DEPTH:
        return f"it is nested deeper than {MAX_DEPTH} levels, which Ruby refuses to read; send it flatter, or its id"
    inner = value.values() if isinstance(value, dict) else value
    return next((fault for each in inner if (fault := _fault(each, depth + 1))), None)


# Reading.


Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None


class More(msgspec.Struct, frozen=True, gc=False):
    """What a job asks for that Sidekiq has no word for, in its field "barnabas", which others keep and show as it is.

    cron: the schedule whose run it is, and which is to know when it has ended. debounce: the note that names the only one of
    several to run. expires_at: epoch seconds after which it does not begin. then: what follows it in its chain, of which it is
    number `step`. result_ttl: seconds that what it returns is kept. unknown_since: when somebody met it who did not know it.
    batch: the id of the batch that it is of. priority: see `job.Job`.
    """

    cron: str | None = None
    debounce: str | None = None
    expires_at: float | None = None
    expires_in: Seconds = None  # of a link
    then: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=CHAIN)] = []
    step: int = 1
    result_ttl: Seconds = None
    unknown_since: float | None = None
    batch: str | None = None
    priority: Annotated[int, msgspec.Meta(ge=-10, le=10)] = 0


class _Link(msgspec.Struct, gc=False):
    """What has to be right of a link of a chain, so that it can become a job."""

    name: str = msgspec.field(name="class")
    queue: Annotated[str, msgspec.Meta(min_length=1)]
    retry: bool | int
    barnabas: More = More()


_link = msgspec.json.Decoder(_Link).decode


class Payload(
    msgspec.Struct, frozen=True, gc=False, kw_only=True,
    rename={"name": "class", "raw_created_at": "created_at", "raw_failed_at": "failed_at", "more": "barnabas"},
):
    """What a worker needs to know of a job. Unknown keys are skipped here and kept by `failed` and `enqueued`.

    `args` is the list's JSON, undecoded, and keeps the job's bytes alive. `retry`: True (25 times), False (no retry, no
    dead entry), a number, or None where the sender left it out: then the job's own declaration decides.
    """

    # in the order of the wire, which msgspec reads fastest; Any, since a job must not die of a foreign timestamp
    retry: bool | int | None = None
    queue: str = "default"
    name: str
    args: msgspec.Raw
    jid: str = ""
    raw_created_at: Any = None
    raw_failed_at: Any = None
    retry_count: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    retry_for: Any = None
    dead: Any = None
    more: More | None = None

    @property
    def attempt(self) -> int:
        """Which run this is, from 1. (The first failure stores a retry_count of 0; "Retry now" takes one off.)"""
        return 1 if self.retry_count is None else max(1, self.retry_count + 2)

    @property
    def created_at(self) -> float | None:
        """When the job was made: epoch seconds."""
        return seconds(self.raw_created_at)

    @property
    def failed_at(self) -> float | None:
        """When it failed first: epoch seconds."""
        return seconds(self.raw_failed_at)


class _Stamp(msgspec.Struct):
    enqueued_at: Any = msgspec.UNSET


class _Due(Payload, frozen=True, gc=False, kw_only=True):
    enqueued_at: Any = msgspec.UNSET


_payload = msgspec.json.Decoder(Payload).decode
_stamp, _due = msgspec.json.Decoder(_Stamp).decode, msgspec.json.Decoder(_Due).decode


def seconds(stamp: object) -> float | None:
    """Epoch seconds of a timestamp in a job: a JSON float is seconds, an integer milliseconds; else None."""
    if type(stamp) is float:
        return stamp
    return stamp / 1000 if type(stamp) is int else None


def parse(data: bytes) -> Payload:
    """Read a job's JSON. Raises PayloadError, with the reason, for bytes that are not a job."""
    try:
        payload = _payload(data)
        for link in payload.more.then if payload.more is not None else ():
            _link(link)
    except _BROKEN as error:
        raise PayloadError(f"not a Sidekiq job: {error}") from error
    if memoryview(payload.args)[0] != 91:  # "["
        raise PayloadError(f"not a Sidekiq job: `args` must be a list, not {bytes(payload.args)[:40]!r}")
    return payload


def enqueued_at(data: bytes) -> float | None:
    """Since when a job is in its queue (epoch seconds); None where it does not say."""
    try:
        return seconds(_stamp(data).enqueued_at)
    except _BROKEN:
        return None


def enqueued(data: bytes, now: float) -> bytes:
    """The job as it enters its queue at `now` (epoch seconds), due by schedule or for a retry.

    Every other value keeps its bytes. Raises PayloadError for what is not a JSON object.
    """
    try:
        if data.isascii() and _stamp(data).enqueued_at is msgspec.UNSET and data[-1:] == b"}" and data[:-1].rstrip()[-1:] != b"{":
            return data[:-1] + tail(now)  # in a fourth of the time
        return _encode(_raws(data) | {"enqueued_at": float(now)})
    except _BROKEN as error:
        raise PayloadError(f"not a Sidekiq job: {error}") from error


def tail(now: float) -> bytes:
    """What a job ends in that enters its queue at `now` (epoch seconds), in place of its last brace."""
    return b',"enqueued_at":%b}' % _encode(float(now))


def due(data: bytes, now: float) -> tuple[str, bytes | None]:
    """The queue of a scheduled job, and the job as it enters that at `now`: None where only its `tail` is new.

    Raises PayloadError for bytes that are not a job.
    """
    if data[-1:] == b"}" and data.isascii():
        with suppress(*_BROKEN):
            job = _due(data)
            if job.enqueued_at is msgspec.UNSET and memoryview(job.args)[0] == 91:
                return job.queue or "default", None
    return parse(data).queue or "default", enqueued(data, now)


def recalled(data: bytes, now: float) -> bytes:
    """The job as it enters its queue at `now` (epoch seconds) because an operator says so, as Sidekiq's "Retry now" writes
    it: with one failure off its count, so that there is a run left. Bytes that are no job stay as they are."""
    try:
        fields: dict[str, Any] = _raws(data)
        count = msgspec.json.decode(fields.get("retry_count", b"null"))
    except _BROKEN:
        return data
    return _encode(fields | ({"retry_count": count - 1} if type(count) is int else {}) | {"enqueued_at": float(now)})


def requeued(data: bytes, queue: str) -> bytes:
    """The job as it stands in another queue, where an operator has put it. Bytes that are no job stay as they are."""
    try:
        return _encode(_raws(data) | {"queue": queue})
    except _BROKEN:
        return data


# Failing.


class Failed(NamedTuple):
    """What becomes of a failed job.

    kind: "again" (run it at `at`, epoch seconds), "dead" (to the dead set, entered at `at`) or "drop" (it asked for no
    dead entry: count it, run the death callbacks, let it go). payload: its new JSON. reason: a sentence, "" for again.
    spent: it had retries and has none left. queue: where it says that it runs next.
    """

    kind: Literal["again", "dead", "drop"]
    payload: bytes
    at: float
    reason: str
    spent: bool = False
    queue: str | None = None


Wait = float | Literal["discard", "kill"] | None  # seconds; let it go; no further retry; Sidekiq's own delay


def failed(
    data: bytes, error: BaseException, now: float, *, default_retry: bool | int = DEFAULT_RETRY,
    rand: Callable[[], float] | None = None, delay: Callable[[int, BaseException, dict[str, Any]], Wait] | None = None,
    queue: str | None = None, final: bool = False,
) -> Failed:
    """Write a failure at `now` (epoch seconds) into the job and decide what becomes of it, as Sidekiq does.

    The next run is after count**4 + 15 seconds, or after `delay(count, error, fields)` where that is a positive number,
    plus a jitter of 0 to 9 seconds times count + 1; count is 0 for the first retry. default_retry: for jobs that leave
    `retry` out or say true. queue: where a retry goes back to unless the job names a `retry_queue`. final: no retry
    whatever the job says. `retry_for` (seconds since the first failure) replaces the count, as in Sidekiq 8.1. Every value
    not set here keeps its bytes. Raises PayloadError for what is not a job; an error of `delay` passes through.
    """
    if rand is None:
        import random  # takes 3 ms

        rand = random.random
    job, now = parse(data), float(now)
    fields: dict[str, Any] = _raws(data)
    if "retry_queue" in fields or queue is not None:
        fields["queue"] = fields.get("retry_queue", queue)
    message, kind = _message(error), _class(error)
    count, stamp = (0, "failed_at") if job.retry_count is None else (job.retry_count + 1, "retried_at")
    fields |= {"error_message": message, "error_class": kind, stamp: now, "retry_count": count}
    if "backtrace" in fields:
        _trace(fields, error)
    payload = _encode(fields)
    retry = default_retry if job.retry is None or job.retry is True else job.retry
    last = f"{kind}: {message[:200]}"
    if retry is False and not final:
        return Failed("drop", payload, now, f"failed, and retry is false: {last}")
    spent = "not retried" if final else _spent(job, count, DEFAULT_RETRY if retry is True else retry, now)
    wait = delay(count, error, msgspec.json.decode(payload)) if delay is not None and not spent else None
    if wait == "discard":
        return Failed("drop", payload, now, f"discarded by retry_delay: {last}")
    if spent or wait == "kill":
        return Failed("drop" if job.dead is False else "dead", payload, now, f"{spent or 'killed by retry_delay'}: {last}", True)
    if wait is None or not 0 < wait < math.inf:
        wait = count**4 + 15
    at = now + wait + int(rand() * 10) * (count + 1)
    return Failed("again", payload, at, "", queue=parse(payload).queue if "retry_queue" in fields else None)


def _spent(job: Payload, count: int, limit: int, now: float) -> str:
    """Why there is no further retry, or ""."""
    window = job.retry_for
    if type(window) in (int, float) and window:
        over = (job.failed_at or now) + window < now
        return f"failed for longer than retry_for, {window} s" if over else ""
    return f"failed {count + 1} times, and retry is {limit}" if count >= limit else ""


def _trace(fields: dict[str, Any], error: BaseException) -> None:
    """Store where the error came from, as much of it as the job's `backtrace` asks for (all, or so many lines)."""
    fields.pop("error_backtrace", None)
    wanted, frame, lines = msgspec.json.decode(fields["backtrace"]), own_part(error), list[str]()
    while frame is not None:
        code, line, frame = frame.tb_frame.f_code, frame.tb_lineno, frame.tb_next
        lines.insert(0, _surrogates.sub("\ufffd", f"{code.co_filename}:{line}:in `{code.co_name}'"))  # innermost first
    if lines := lines[: None if wanted is True else wanted] if isinstance(wanted, int) else []:
        fields["error_backtrace"] = binascii.b2a_base64(zlib.compress(_encode(lines)), newline=False).decode()


def backtrace(stored: object) -> list[str]:
    """The lines of an `error_backtrace`, innermost first; none for what is not one."""
    with suppress(*_BROKEN, ValueError, zlib.error):
        return msgspec.json.decode(zlib.decompress(binascii.a2b_base64(stored)), type=list[str])  # type: ignore[arg-type]
    return []


def _message(error: BaseException) -> str:
    return _surrogates.sub("\ufffd", text(error)[:MAX_MESSAGE])


def _class(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
