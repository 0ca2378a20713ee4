"""Settings: code < `barnabas.toml` < `BARNABAS_*` environment < command line; the later one wins.

The body of `Settings` is the table of all of them. Code is checked at once, so that a declaration fails where it
stands; file and environment are not looked at before the first value is asked for.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from barnabas.errors import SettingError

FILE = "barnabas.toml"
URL = "sqlite:///barnabas.db"
SCHEMES = ("sqlite", "memory", "kafka", "redis", "rediss")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
QUEUE_NAME = re.compile(r"[A-Za-z0-9_:.-]{1,200}")  # Sidekiq's web page answers 404 for any other (facts/sidekiq.md 1.0)
_SECRET = re.compile(r"passw|passphrase|secret|token|jaas|\.pem$", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^:@/\s]*:)\S+(?=@)|([?&][^=&\s]*password=)[^&\s]+")


class Row(NamedTuple):
    """One line of `barnabas check`; `value` has its passwords masked."""

    name: str
    value: Any
    unit: str
    origin: str
    doc: str


Kind = Callable[["Option", Any], Any]  # turns what was said into the value; ValueError completes "it must be ..."
Place = tuple[tuple[str, ...], Row]  # where in the values, and what


def _number(option: "Option", value: Any) -> Any:
    real = option.unit == "seconds"  # all else is counted
    fits = type(value) is int or (real and type(value) is float and value < math.inf)
    if not fits or not option.low <= value <= option.high:
        kind = "a number of seconds" if real else f"a whole number{option.unit and f' of {option.unit}'}"
        raise ValueError(f"{kind} from {option.low:,} " + (f"to {option.high:,}" if option.high < math.inf else "up"))
    return float(value) if real else value


def _yes(option: "Option", value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(option: "Option", value: Any) -> Any:
    for choice in option.choices:
        if str(value).lower() == choice.lower():
            return choice
    raise ValueError(f"one of {', '.join(option.choices)}{_meant(value, option.choices)}")


def _app(option: "Option", value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise ValueError('MODULE:NAME, such as "shop:app"')
    return value


def _url(option: "Option", value: Any) -> Any:
    scheme, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or scheme not in SCHEMES:
        raise ValueError(f"a URL such as {URL}; the schemes are {', '.join(SCHEMES)}{_meant(scheme, SCHEMES)}")
    if scheme == "sqlite" and not re.fullmatch(r"///(?!:memory:)[^?]+", rest):
        raise ValueError("sqlite:///FILE.db (relative), sqlite:////FOLDER/FILE.db (absolute) or memory: (no file)")
    if scheme in ("kafka", "redis", "rediss") and not re.match(r"//[^/]", rest):
        raise ValueError(f"{scheme}://HOST:PORT")
    return value


def _queues(option: "Option", value: Any) -> Any:
    names = list(value) if isinstance(value, list | tuple | dict) else []
    if not names or not all(isinstance(name, str) and QUEUE_NAME.fullmatch(name) for name in names):
        raise ValueError('a list of queues (strict order), or queues with weights; names use letters, digits and "_:.-"')
    if isinstance(value, dict) and not all(type(weight) is int and 1 <= weight <= 1000 for weight in value.values()):
        raise ValueError("queues with whole weights from 1 to 1000, such as {mail = 5, low = 1}")
    if len(set(names)) < len(names):
        raise ValueError("a list that names each queue once; to favour one give weights: {mail = 5, low = 1}")
    return dict(value) if isinstance(value, dict) else names


def _table(option: "Option", value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"a table: {option.doc}")
    return value


class Option:
    """One setting: its kind, default, a line about it, unit and bounds. As an attribute it gives the value."""

    name = env = key = ""  # in code; the variable; the place in the file
    low: float = 0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    entries: "Mapping[str, Option]" = MappingProxyType({})  # of a table, by name; "*" is any name

    def __init__(self, read: Kind, default: Any, doc: str, unit: str = "", **more: Any) -> None:
        self.read, self.default, self.doc, self.unit = read, default, doc, unit
        self.__dict__.update(more)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.env, self.key = name, self.env or f"BARNABAS_{name.upper()}", self.key or name

    def __get__(self, settings: "Settings | None", owner: type | None = None) -> Any:
        if settings is None:
            return self
        settings._read()  # fills the instance's __dict__, which answers without us from then on
        return settings.__dict__[self.name]

    def parse(self, text: str) -> Any:
        """What a text from the environment or the command line stands for."""
        if self.read is _queues and not text.startswith(("[", "{")):
            return [name.strip() for name in text.split(",")]
        try:
            return text if self.read in (_url, _app, _choice) else msgspec.json.decode(text)
        except ValueError:  # not JSON
            return text


TOPIC = {
    "partitions": Option(_number, None, "partitions of the topic, instead of the code's", low=1, high=10_000),
    "replication": Option(_number, None, "on kafka: copies of each partition, instead of the broker's default", low=1),
    "compact": Option(_yes, None, "on kafka: keep the last message of each key instead of all for a time"),
    "retention_age": Option(_number, None, "messages are kept this long", "seconds"),
    "retention_size": Option(_number, None, "and while the topic is not larger than this", "bytes"),
}
DRIVER = {"*": Option(lambda option, value: value, None, "handed to the driver, which checks it")}
_option: Any = Option  # so that an attribute has the type of its value, as annotated


class Settings:
    """The settings of one app; `settings.stop_timeout` gives a value, `settings.origin(name)` where it came from.

    code: what the app was declared with. flags: the command line; None means not given, in both. environ: instead of
    `os.environ`. SettingError is raised for unknown names and refused values, at once for code and flags, else at the
    first use.
    """

    events: str = _option(_url, URL, "where topics live", env="BARNABAS_EVENTS_URL", key="events.url")
    jobs: str = _option(_url, URL, "where queues live", env="BARNABAS_JOBS_URL", key="jobs.url")
    app: str | None = _option(_app, None, "the app that commands work on, as MODULE:NAME")
    processes: int = _option(_number, 1, "worker processes of one `barnabas run`", low=1, high=1024)
    threads: int = _option(_number, 10, "sync jobs at a time in a process", key="jobs.threads", low=1, high=10_000)
    coroutines: int = _option(_number, 100, "async jobs at a time", key="jobs.coroutines", low=1, high=1_000_000)
    queues: list[str] | dict[str, int] | None = _option(
        _queues, None, "a list (strict order) or weights; unset: those of the declared jobs", key="jobs.queues"
    )
    concurrency: dict[str, int] = _option(
        _table, {}, "of these queues, jobs at a time in a process", key="jobs.concurrency",
        entries={"*": Option(_number, None, "jobs of this queue at a time in a process", low=1, high=10_000)},
    )  # fmt: skip
    unknown: str = _option(
        _choice, "retry", "a job that the app does not declare: it fails, or is left to workers that know it", key="jobs.unknown",
        choices=("retry", "wait"),
    )  # fmt: skip
    unknown_timeout: float = _option(_number, 3600.0, "and fails after that all the same", "seconds", key="jobs.unknown_timeout")
    stop_timeout: float = _option(_number, 25.0, "a stop waits this long for work in hand", "seconds")
    send_timeout: float = _option(_number, 30.0, "a send waits this long for room in the buffer", "seconds")
    buffer_messages: int = _option(_number, 10_000, "sends that may wait for the backend", "messages", low=1)
    buffer_bytes: int = _option(_number, 64 * 1024 * 1024, "their size altogether", "bytes", low=1)
    value_limit: int = _option(_number, 1024 * 1024, "the largest encoded value of a message", "bytes", low=1)
    max_memory: int = _option(_number, 0, "a worker process that uses more makes way for another; 0: never", "bytes")
    session_timeout: float = _option(_number, 10.0, "a silent process loses its partitions", "seconds", low=0.1)
    checkpoint_interval: float = _option(_number, 0.1, "the longest time between checkpoints", "seconds", high=60)
    log_format: str = _option(_choice, "text", "shape of log lines", choices=("text", "json"))
    log_level: str = _option(_choice, "INFO", "least severity that is logged", choices=LEVELS)
    topics: dict[str, dict[str, Any]] = _option(
        _table, {}, "per topic, over the code", entries={"*": Option(_table, {}, ", ".join(TOPIC), entries=TOPIC)}
    )
    create_topics: bool = _option(_yes, False, "on kafka: create missing topics without asking, in development")
    kafka: dict[str, Any] = _option(_table, {}, "options of librdkafka, as it spells them", entries=DRIVER)
    redis: dict[str, Any] = _option(_table, {}, "options of redis-py, as it spells them", entries=DRIVER)

    def __init__(
        self, code: Mapping[str, Any] | None = None, *, flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None, ignore_file: bool = False, ignore_env: bool = False,
    ) -> None:
        self.code = {name: value for name, value in (code or {}).items() if value is not None}
        self._flags = {name: value for name, value in (flags or {}).items() if value is not None}
        self._ignore_file = ignore_file
        self._environ = {} if ignore_env else os.environ if environ is None else environ
        self._known: dict[str, Row] = {}
        list(self._layers(None, {}))  # check code and flags now

    def override(self, **flags: Any) -> "Settings":
        """The same settings with these values of the command line on top (None: not given)."""
        given = {name: value for name, value in flags.items() if value is not None}
        return Settings(self.code, flags=self._flags | given, environ=self._environ, ignore_file=self._ignore_file)

    def origin(self, name: str) -> str:
        """Where a value came from: "default", "code", "barnabas.toml:/its/path", a variable or an option's name.

        Entries of tables have origins of their own: `origin("topics.orders.partitions")`, `origin("kafka.linger.ms")`.
        """
        return self._read()[name].origin

    def shown(self, name: str) -> Any:
        """A value as it may be shown: its passwords are masked."""
        return _masked(name, getattr(self, name))

    def rows(self) -> list[Row]:
        """Every setting in the order of declaration, tables entry by entry; passwords are masked."""
        rows = self._read()
        names = [name for top in OPTIONS for name in [n for n in rows if n.startswith(f"{top}.")] or [top]]
        return [rows[name]._replace(value=_masked(name, rows[name].value)) for name in names]

    @property
    def warnings(self) -> list[str]:
        """Variables that are named like settings and are none."""
        known = {option.env for option in OPTIONS.values()}
        strange = [name for name in self._environ if name.startswith("BARNABAS_") and name not in known]
        return [f"{name} is set, is not a setting, and is ignored{_meant(name, known)}" for name in strange]

    @property
    def file(self) -> str | None:
        """The settings file, absolute, or None if there is none or it is ignored."""
        path = os.path.abspath(FILE)  # pathlib alone would take a tenth of the import
        return None if self._ignore_file or not os.path.exists(path) else path

    def _read(self) -> dict[str, Row]:
        """Lay the sources over each other, once: the values become attributes, their rows are returned."""
        if self._known:
            return self._known
        file = self.file
        values: dict[str, Any] = {name: dict(o.default) if o.entries else o.default for name, o in OPTIONS.items()}
        rows = {name: Row(name, values[name], o.unit, "default", o.doc) for name, o in OPTIONS.items()}
        for path, row in self._layers(file, self._environ):
            table = values
            for key in path[:-1]:
                table = table.setdefault(key, {})
            table[path[-1]] = row.value
            rows[path[0]] = rows[path[0]]._replace(origin=row.origin)
            rows[row.name] = row
        for name in ("events", "jobs"):
            values[name] = _absolute(values[name], os.path.dirname(file) if file else os.getcwd())
            rows[name] = rows[name]._replace(value=values[name])
        self.__dict__.update(values, _known=rows)
        return rows

    def _layers(self, file: str | None, environ: Mapping[str, str]) -> Iterator[Place]:
        for name, value in self.code.items():
            yield from _rows(name, OPTIONS, value, "code")
        places = {option.key: option for option in OPTIONS.values()}
        for place, value in (_toml(file) if file else {}).items():
            yield from _rows(place, places, value, f"{FILE}:{file}")
        for name, option in OPTIONS.items():
            if option.env in environ:
                yield from _rows(name, OPTIONS, option.parse(environ[option.env]), option.env)
        for name, value in self._flags.items():
            parsed = OPTIONS[name].parse(value) if name in OPTIONS and isinstance(value, str) else value
            yield from _rows(name, OPTIONS, parsed, f"--{name.replace('_', '-')}")


OPTIONS: dict[str, Option] = {name: option for name, option in vars(Settings).items() if isinstance(option, Option)}


def _rows(name: str, known: Mapping[str, Option], value: Any, origin: str, *path: str) -> Iterator[Place]:
    """Check a value; give its place and row, or those of a table's entries. Raises SettingError."""
    option, what = known.get(name), f"{name} = {_masked(name, value)!r} (from {origin})"
    if option is None:
        raise SettingError(f"{what} is not a setting" + (_meant(name, known) or f"; it knows {', '.join(known)}"))
    try:
        value = option.read(option, value)
    except ValueError as wrong:
        default = f" (the default is {option.default!r})" if option.default else ""
        raise SettingError(f"{what} must be {wrong}. Change it there, or remove it{default}.") from None
    path = path or (option.name,)
    if not option.entries:
        yield path, Row(".".join(path), value, option.unit, origin, option.doc)
        return
    for key, inner in value.items():
        names = {f"{name}.{key if entry == '*' else entry}": o for entry, o in option.entries.items()}
        yield from _rows(f"{name}.{key}", names, inner, origin, *path, key)


def _meant(word: object, known: Iterable[str]) -> str:
    import difflib  # only a mistake pays for it

    lower, names = str(word).lower(), {name.lower(): name for name in known}
    # what all have in common, "barnabas_" say, would make everything look alike
    skip = len(os.path.commonprefix([lower, *names]))  # noqa: RUF071
    close = difflib.get_close_matches(lower[skip:], rest := {name[skip:]: names[name] for name in names}, 1)
    return f" (did you mean {rest[close[0]]}?)" if close else ""


def _masked(name: str, value: Any) -> Any:
    """The value as it may be shown: no passwords."""
    if isinstance(value, str):
        return "***" if _SECRET.search(name) else _PASSWORD.sub(r"\1\2***", value)
    return {key: _masked(key, inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _absolute(url: str, folder: str) -> str:
    """A sqlite URL with its path made absolute; any other as it is."""
    if not url.startswith("sqlite:///"):
        return url
    path, mark, query = url[10:].partition("?")
    return f"sqlite:///{os.path.normpath(os.path.join(folder, path))}{mark}{query}"


def _toml(path: str) -> dict[str, Any]:
    """What the file says, by place; [events] and [jobs] are opened up: "jobs.threads"."""
    import tomllib  # only who has a file pays for its reader

    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({error.strerror}); mend or remove it") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise SettingError(f"{path} is not a TOML file: {error}; mend it there") from error
    for section in ("events", "jobs"):
        if isinstance(found.get(section), dict):
            found.update({f"{section}.{name}": value for name, value in found.pop(section).items()})
    options = kafka if isinstance(kafka := found.get("kafka"), dict) else {}
    while names := [name for name, value in options.items() if isinstance(value, dict)]:  # linger.ms, without quotes
        for name in names:
            options.update({f"{name}.{inner}": value for inner, value in options.pop(name).items()})
    return found
