"""Settings: which source wins, what each value looks like, and what a refusal says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from barnabas.errors import DeclarationError, SettingError
from barnabas.settings import OPTIONS, TOPIC, Settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and an environment without variables of ours."""
    for name in [name for name in os.environ if name.startswith("BARNABAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, path: str = "barnabas.toml") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path).absolute()


def refusal(**sources: Any) -> str:
    with pytest.raises(SettingError) as caught:
        _ = Settings(**sources).threads
    return str(caught.value)


# -- values ------------------------------------------------------------------------------------------------------------


def test_defaults(folder: Path) -> None:
    settings = Settings()
    assert {name: getattr(settings, name) for name in OPTIONS} == {
        "events": f"sqlite:///{folder}/barnabas.db",
        "jobs": f"sqlite:///{folder}/barnabas.db",
        "app": None,
        "processes": 1,
        "threads": 10,
        "coroutines": 100,
        "queues": None,
        "concurrency": {},
        "unknown": "retry",
        "unknown_timeout": 3600.0,
        "stop_timeout": 25.0,
        "send_timeout": 30.0,
        "buffer_messages": 10_000,
        "buffer_bytes": 67_108_864,
        "value_limit": 1_048_576,
        "create_topics": False,
        "max_memory": 0,
        "session_timeout": 10.0,
        "checkpoint_interval": 0.1,
        "log_format": "text",
        "log_level": "INFO",
        "topics": {},
        "kafka": {},
        "redis": {},
    }
    assert {settings.origin(name) for name in OPTIONS} == {"default"}
    assert (settings.file, settings.warnings) == (None, [])


def test_every_default_is_a_value_that_its_option_takes() -> None:
    for option in OPTIONS.values():
        assert option.doc
        if option.default is not None:
            assert option.read(option, option.default) == option.default


def test_code_yields_to_file_to_environment_to_command_line() -> None:
    file = write("[jobs]\nthreads = 2")
    code, environ = {"threads": 1}, {"BARNABAS_THREADS": "3"}
    for settings, value, origin in [
        (Settings(code, environ={}, ignore_file=True), 1, "code"),
        (Settings(code, environ={}), 2, f"barnabas.toml:{file}"),
        (Settings(code, environ=environ), 3, "BARNABAS_THREADS"),
        (Settings(code, environ=environ, flags={"threads": 4}), 4, "--threads"),
        (Settings(code, environ=environ).override(threads="5"), 5, "--threads"),
        (Settings(code, environ=environ, flags={"threads": 4}).override(processes=2), 4, "--threads"),
        (Settings(code, environ=environ, ignore_env=True), 2, f"barnabas.toml:{file}"),
        (Settings(code, environ=environ, ignore_env=True, ignore_file=True), 1, "code"),
        (Settings(code, environ=environ, ignore_env=True, ignore_file=True).override(app="a:b"), 1, "code"),
    ]:
        assert (settings.threads, settings.origin("threads")) == (value, origin)


def test_none_is_not_given() -> None:
    settings = Settings({"events": None, "threads": 7}, flags={"threads": None}, environ={}).override(threads=None)
    assert (settings.threads, settings.origin("threads"), settings.origin("events")) == (7, "code", "default")


def test_the_file_in_full(folder: Path) -> None:
    file = write(
        """
        app = "shop:app"
        stop_timeout = 5
        log_level = "debug"
        [events]
        url = "kafka://one:9092,two:9092"
        [jobs]
        url = "redis://localhost:6379/0"
        queues = {mail = 5, low = 1}
        threads = 20
        coroutines = 200
        [topics.orders]
        partitions = 24
        retention_age = 3600
        [topics."a.b"]
        retention_size = 1000
        [kafka]
        "linger.ms" = 20
        [redis]
        socket_timeout = 3
        """
    )
    settings = Settings(environ={})
    assert (settings.app, settings.stop_timeout, settings.log_level) == ("shop:app", 5.0, "DEBUG")
    assert (settings.events, settings.jobs) == ("kafka://one:9092,two:9092", "redis://localhost:6379/0")
    assert (settings.queues, settings.threads, settings.coroutines) == ({"mail": 5, "low": 1}, 20, 200)
    assert settings.topics == {"orders": {"partitions": 24, "retention_age": 3600.0}, "a.b": {"retention_size": 1000}}
    assert (settings.kafka, settings.redis) == ({"linger.ms": 20}, {"socket_timeout": 3})
    assert settings.file == str(file)
    assert type(settings.stop_timeout) is float
    assert settings.origin("topics.a.b.retention_size") == settings.origin("jobs") == f"barnabas.toml:{file}"


def test_the_environment_is_parsed_to_the_type() -> None:
    settings = Settings(
        environ={
            "BARNABAS_EVENTS_URL": "memory:",
            "BARNABAS_JOBS_URL": "rediss://h/1",
            "BARNABAS_APP": "shop.main:app",
            "BARNABAS_THREADS": "3",
            "BARNABAS_STOP_TIMEOUT": "2.5",
            "BARNABAS_SEND_TIMEOUT": "2",
            "BARNABAS_LOG_FORMAT": "JSON",
            "BARNABAS_KAFKA": '{"linger.ms": 5}',
            "BARNABAS_TOPICS": '{"orders": {"partitions": 3}}',
            "OTHER": "x",
        }
    )
    assert (settings.events, settings.jobs, settings.app) == ("memory:", "rediss://h/1", "shop.main:app")
    assert (settings.threads, settings.stop_timeout, settings.send_timeout) == (3, 2.5, 2.0)
    assert (settings.log_format, settings.kafka, settings.topics) == (
        "json",
        {"linger.ms": 5},
        {"orders": {"partitions": 3}},
    )
    assert settings.origin("events") == "BARNABAS_EVENTS_URL"
    assert settings.origin("log_format") == "BARNABAS_LOG_FORMAT"
    assert settings.warnings == []


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARNABAS_THREADS", "3")
    assert Settings().threads == 3
    assert Settings(environ={}).threads == 10


@pytest.mark.parametrize(
    ("text", "queues"),
    [
        ("mail", ["mail"]),
        ("mail, low,a:b.c_d-1", ["mail", "low", "a:b.c_d-1"]),
        ("5", ["5"]),
        ('["mail", "low"]', ["mail", "low"]),
        ('{"mail": 5, "low": 1}', {"mail": 5, "low": 1}),
    ],
)
def test_queues_as_text(text: str, queues: object) -> None:
    assert Settings(environ={"BARNABAS_QUEUES": text}).queues == queues
    assert Settings(flags={"queues": text}, environ={}).queues == queues


def test_queues_in_code() -> None:
    assert Settings({"queues": ("b", "a")}, environ={}).queues == ["b", "a"]
    assert list(Settings({"queues": {"b": 1, "a": 2}}, environ={}).queues or ()) == ["b", "a"]


def test_options_of_the_driver_need_no_quotes() -> None:
    write('[kafka]\nlinger.ms = 5\nretry.backoff.ms = 50\nretry.backoff.max.ms = 500\nacks = "all"\nssl.key.pem = "hush"')
    options = {"linger.ms": 5, "retry.backoff.ms": 50, "retry.backoff.max.ms": 500, "acks": "all", "ssl.key.pem": "hush"}
    assert (settings := Settings({}, environ={})).kafka == options and "hush" not in str(settings.rows())


def test_tables_are_laid_over_each_other_entry_by_entry() -> None:
    code = {"kafka": {"linger.ms": 20, "acks": "all"}, "topics": {"orders": {"partitions": 6, "retention_age": 5}}}
    file = write('[topics.orders]\npartitions = 24\n[topics.new]\npartitions = 1\n[kafka]\n"linger.ms" = 5')
    settings = Settings(code, environ={"BARNABAS_KAFKA": '{"client.id": "x"}'})
    assert settings.topics == {"orders": {"partitions": 24, "retention_age": 5.0}, "new": {"partitions": 1}}
    assert settings.kafka == {"linger.ms": 5, "acks": "all", "client.id": "x"}
    toml = f"barnabas.toml:{file}"
    origins = {name: settings.origin(name) for name in ("topics.orders.retention_age", "topics.orders.partitions")}
    assert origins == {"topics.orders.retention_age": "code", "topics.orders.partitions": toml}
    assert [settings.origin(f"kafka.{name}") for name in settings.kafka] == [toml, "code", "BARNABAS_KAFKA"]
    assert (settings.origin("kafka"), settings.origin("topics")) == ("BARNABAS_KAFKA", toml)
    assert code["topics"] == {"orders": {"partitions": 6, "retention_age": 5}}, "the caller's own is left alone"
    assert Settings(environ={}, ignore_file=True).kafka == {}, "and so are the defaults"


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///x.db", "{}/x.db"),
        ("sqlite:///sub/../deep/x.db", "{}/deep/x.db"),
        ("sqlite:////abs/x.db", "/abs/x.db"),
    ],
)
def test_sqlite_paths_become_absolute(url: str, path: str, folder: Path) -> None:
    for sources in ({"code": {"events": url}}, {"environ": {"BARNABAS_EVENTS_URL": url}}, {"flags": {"events": url}}):
        assert Settings(**sources).events == "sqlite:///" + path.format(folder)


def test_paths_are_relative_to_the_settings_file_if_there_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write('[events]\nurl = "sqlite:///e.db"', "etc/barnabas.toml")
    monkeypatch.chdir("etc")
    settings = Settings(environ={"BARNABAS_JOBS_URL": "sqlite:///j.db"})
    assert (settings.events, settings.jobs) == (f"sqlite:///{folder}/etc/e.db", f"sqlite:///{folder}/etc/j.db")
    assert settings.origin("events") == f"barnabas.toml:{file}"
    assert Settings().events == f"sqlite:///{folder}/etc/e.db"
    assert Settings(ignore_file=True).jobs == f"sqlite:///{folder}/etc/barnabas.db"


def test_values_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(environ={})
    assert settings.threads == 10
    write("[jobs]\nthreads = 2")
    monkeypatch.chdir("/")
    assert (settings.threads, settings.events) == (10, f"sqlite:///{folder}/barnabas.db")
    assert settings.topics is settings.topics


def test_nothing_is_read_before_the_first_value() -> None:
    settings = Settings({"threads": 3})
    write("[jobs]\nthreads = 2")
    assert settings.threads == 2


def test_without_a_file_no_reader_of_files_is_loaded() -> None:
    program = "import sys; from barnabas.settings import Settings; Settings().threads; print('tomllib' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_rows_name_every_setting_with_value_unit_origin_and_a_line() -> None:
    rows = Settings(
        {"stop_timeout": 3, "topics": {"o": {"retention_age": 60}}, "kafka": {"acks": 1}}, environ={}
    ).rows()
    names = [row.name for row in rows]
    tables = {"topics": "topics.o.retention_age", "kafka": "kafka.acks"}
    assert names == [tables.get(name, name) for name in OPTIONS]
    assert all(row.doc for row in rows)
    shown = {row.name: row[1:4] for row in rows}
    assert shown["stop_timeout"] == (3.0, "seconds", "code")
    assert shown["buffer_bytes"] == (67_108_864, "bytes", "default")
    assert shown["topics.o.retention_age"] == (60.0, "seconds", "code")
    assert shown["kafka.acks"] == (1, "", "code")
    assert shown["redis"] == ({}, "", "default")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pa@ss:w/rd@host:6379/0", "redis://user:***@host:6379/0"),
        ("rediss://:secret@host/0", "rediss://:***@host/0"),
        ("redis://host/0?password=secret&x=1", "redis://host/0?password=***&x=1"),
        ("kafka://a:secret@one:9092,two:9092", "kafka://a:***@one:9092,two:9092"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    settings = Settings({"jobs": url}, environ={})
    assert settings.jobs == url
    assert {row.name: row.value for row in settings.rows()}["jobs"] == shown
    for said in (refusal(code={"evnts": url}), refusal(code={"shop": {"url": url}}), refusal(code={"log_level": url})):
        assert "secret" not in said
        assert "pa@ss" not in said


def test_secrets_of_drivers_are_masked() -> None:
    driver = {"sasl.password": "hidden", "ssl.key.pem": "hidden", "sasl.jaas.config": "hidden", "acks": "all"}
    rows = {row.name: row.value for row in Settings({"kafka": driver}, environ={}).rows()}
    assert [rows[f"kafka.{name}"] for name in driver] == ["***", "***", "***", "all"]
    assert "hidden" not in refusal(code={"kafkaa": driver})


def test_unknown_variables_warn() -> None:
    settings = Settings(environ={"BARNABAS_TREADS": "hidden", "BARNABAS_QQQQ": "1", "BARN": "1"})
    assert settings.warnings == [
        "BARNABAS_TREADS is set, is not a setting, and is ignored (did you mean BARNABAS_THREADS?)",
        "BARNABAS_QQQQ is set, is not a setting, and is ignored",
    ]
    assert settings.threads == 10
    assert Settings(environ={"BARNABAS_TREADS": "1"}, ignore_env=True).warnings == []


# -- refusals ----------------------------------------------------------------------------------------------------------

WHOLE, NUMBER = "must be a whole number", "must be a number of seconds"
SHAPE = "must be sqlite:///FILE.db (relative), sqlite:////FOLDER/FILE.db (absolute) or memory: (no file)"
A_URL = "must be a URL such as sqlite:///barnabas.db; the schemes are sqlite, memory, kafka, redis, rediss"
NAMES = 'must be a list of queues (strict order), or queues with weights; names use letters, digits and "_:.-"'
WEIGHTS = "must be queues with whole weights from 1 to 1000, such as {mail = 5, low = 1}"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("threads", "10", f"{WHOLE} from 1 to 10,000"),
        ("threads", True, f"{WHOLE} from 1 to 10,000"),
        ("threads", 2.0, f"{WHOLE} from 1 to 10,000"),
        ("threads", 0, f"{WHOLE} from 1 to 10,000"),
        ("threads", 10_001, f"{WHOLE} from 1 to 10,000"),
        ("coroutines", 0, f"{WHOLE} from 1 to 1,000,000"),
        ("processes", -1, f"{WHOLE} from 1 to 1,024"),
        ("buffer_messages", 0, f"{WHOLE} of messages from 1 up"),
        ("buffer_bytes", "64 MiB", f"{WHOLE} of bytes from 1 up"),
        ("value_limit", 0, f"{WHOLE} of bytes from 1 up"),
        ("max_memory", "1G", f"{WHOLE} of bytes from 0 up"),
        ("stop_timeout", -0.1, f"{NUMBER} from 0 up"),
        ("stop_timeout", float("inf"), f"{NUMBER} from 0 up"),
        ("send_timeout", float("nan"), f"{NUMBER} from 0 up"),
        ("send_timeout", "30", f"{NUMBER} from 0 up"),
        ("session_timeout", 0.05, f"{NUMBER} from 0.1 up"),
        ("checkpoint_interval", 61, f"{NUMBER} from 0 to 60"),
        ("log_format", "jsn", "must be one of text, json (did you mean json?)"),
        ("log_level", 20, "must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("app", "shop", 'must be MODULE:NAME, such as "shop:app"'),
        ("app", 3, 'must be MODULE:NAME, such as "shop:app"'),
        ("events", "barnabas.db", A_URL),
        ("events", "", A_URL),
        ("events", 5, A_URL),
        ("jobs", "postgres://x/y", A_URL),
        ("jobs", "sqllite:///x.db", f"{A_URL} (did you mean sqlite?)"),
        ("jobs", "REDIS://x", f"{A_URL} (did you mean redis?)"),
        ("events", "sqlite:x.db", SHAPE),
        ("events", "sqlite://x.db", SHAPE),
        ("events", "sqlite:///", SHAPE),
        ("events", "sqlite:///:memory:", SHAPE),
        ("events", "sqlite:///x.db?mode=ro", SHAPE),
        ("events", "kafka:", "must be kafka://HOST:PORT"),
        ("jobs", "redis:///0", "must be redis://HOST:PORT"),
        ("queues", [], NAMES),
        ("queues", "mail", NAMES),
        ("queues", ["a b"], NAMES),
        ("queues", [1], NAMES),
        ("queues", {"": 1}, NAMES),
        ("queues", {"a": 0}, WEIGHTS),
        ("queues", {"a": True}, WEIGHTS),
        (
            "queues",
            ["a", "a"],
            "must be a list that names each queue once; to favour one give weights: {mail = 5, low = 1}",
        ),
        ("kafka", 3, "must be a table: options of librdkafka, as it spells them"),
        ("redis", {1: 2}, "must be a table: options of redis-py, as it spells them"),
        ("topics", [], "must be a table: per topic, over the code"),
    ],
)
def test_a_wrong_value_is_refused_at_declaration(name: str, value: object, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings({name: value})  # not even read
    assert isinstance(caught.value, DeclarationError)
    default = OPTIONS[name].default
    way_out = "Change it there, or remove it" + (f" (the default is {default!r})." if default else ".")
    assert str(caught.value) == f"{name} = {value!r} (from code) {reason}. {way_out}"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (3, "topics.o = 3 (from code) must be a table: partitions, replication, compact, retention_age, retention_size."),
        ({"partitions": 0}, "topics.o.partitions = 0 (from code) must be a whole number from 1 to 10,000."),
        ({"retention_age": "7d"}, "topics.o.retention_age = '7d' (from code) must be a number of seconds from 0 up."),
        (
            {"retention_size": 1.5},
            "topics.o.retention_size = 1.5 (from code) must be a whole number of bytes from 0 up.",
        ),
    ],
)
def test_a_wrong_entry_of_a_topic_is_refused(entries: object, message: str) -> None:
    assert refusal(code={"topics": {"o": entries}}) == f"{message} Change it there, or remove it."


def test_unknown_names_are_refused_with_what_was_meant() -> None:
    file = write("")
    unknown = "is not a setting (did you mean"
    assert refusal(code={"stop_timout": 3}) == f"stop_timout = 3 (from code) {unknown} stop_timeout?)"
    assert refusal(flags={"thread": 3}) == f"thread = 3 (from --thread) {unknown} threads?)"
    assert refusal(code={"zzz": 3}) == f"zzz = 3 (from code) is not a setting; it knows {', '.join(OPTIONS)}"
    assert refusal(code={"topics": {"o": {"partition": 3}}}) == (
        f"topics.o.partition = 3 (from code) {unknown} topics.o.partitions?)"
    )
    for text, name, value, meant in [
        ("stop_timout = 3", "stop_timout", 3, "stop_timeout"),
        ("threads = 3", "threads", 3, "jobs.threads"),
        ("[jobs]\nthread = 3", "jobs.thread", 3, "jobs.threads"),
        ("[events]\nulr = 'x'", "events.ulr", "x", "events.url"),
        ("events = 'memory:'", "events", "memory:", "events.url"),
        ("[topic.orders]\npartitions = 3", "topic", {"orders": {"partitions": 3}}, "topics"),
        ("[topics.o]\nretention = 3", "topics.o.retention", 3, "topics.o.retention_age"),
    ]:
        write(text)
        assert refusal() == f"{name} = {value!r} (from barnabas.toml:{file}) {unknown} {meant}?)"


@pytest.mark.parametrize(
    ("variable", "text", "start"),
    [
        ("BARNABAS_THREADS", "many", "threads = 'many'"),
        ("BARNABAS_THREADS", "", "threads = ''"),
        ("BARNABAS_THREADS", "1_0", "threads = '1_0'"),
        ("BARNABAS_THREADS", "1.0", "threads = 1.0"),
        ("BARNABAS_THREADS", "true", "threads = True"),
        ("BARNABAS_STOP_TIMEOUT", "Infinity", "stop_timeout = 'Infinity'"),
        ("BARNABAS_STOP_TIMEOUT", "1e999", "stop_timeout = '1e999'"),
        ("BARNABAS_STOP_TIMEOUT", "\udcff", "stop_timeout = '\\udcff'"),
        ("BARNABAS_JOBS_URL", "", "jobs = ''"),
        ("BARNABAS_QUEUES", "", "queues = ['']"),
        ("BARNABAS_QUEUES", "a,,b", "queues = ['a', '', 'b']"),
        ("BARNABAS_QUEUES", "[a]", "queues = '[a]'"),
        ("BARNABAS_KAFKA", "linger.ms=5", "kafka = 'linger.ms=5'"),
        ("BARNABAS_TOPICS", '{"o":{"partitions":0}}', "topics.o.partitions = 0"),
    ],
)
def test_a_wrong_variable_is_refused_at_the_first_use(variable: str, text: str, start: str) -> None:
    settings = Settings(environ={variable: text})
    for _ in range(2):
        with pytest.raises(SettingError, match=f"^{re.escape(start)} \\(from {variable}\\) must be .*Change it there"):
            settings.origin("events")


@pytest.mark.parametrize("ending", ["", "x = \n", "é = 1", '[jobs]\nthreads = "3"'])
def test_a_file_that_cannot_be_used_is_named(ending: str) -> None:
    file = write("")
    if not ending:
        file.write_bytes(b"\xff\xfe")
    else:
        write(ending)
    said = refusal()
    assert str(file) in said
    assert "mend it there" in said or "Change it there" in said
    assert Settings(environ={}, ignore_file=True).threads == 10


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "barnabas.toml").mkdir()
    assert refusal() == f"{folder}/barnabas.toml cannot be read (Is a directory); mend or remove it"


def test_topic_options_have_lines() -> None:
    assert all(option.doc for option in TOPIC.values())
