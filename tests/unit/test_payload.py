"""Sidekiq's JSON: golden bytes, both dialects of time, and what becomes of a job that failed."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest

from barnabas.errors import BarnabasError
from barnabas.jobs.payload import (
    Failed,
    PayloadError,
    build,
    build_many,
    derived_jid,
    enqueued,
    failed,
    new_jid,
    parse,
    recalled,
    seconds,
)
from barnabas.ports import StoredJob
from barnabas.queues import entry

JID = "0123456789abcdef01234567"
NOW = 1_700_000_000.25


def job(*args: Any, **more: Any) -> bytes:
    return build("Mail", list(args), **{"queue": "mail", "retry": True, "jid": JID, "now": NOW} | more)


def raw(**fields: Any) -> bytes:
    return json.dumps({"class": "Mail", "args": [1], "jid": JID, "queue": "mail", "retry": True} | fields).encode()


# -- golden bytes ------------------------------------------------------------------------------------------------------


def test_golden_bytes_of_a_job() -> None:
    assert job(1, "a", None, True, [2.5], {"k": "v"}) == (
        b'{"retry":true,"queue":"mail","class":"Mail","args":[1,"a",null,true,[2.5],{"k":"v"}],'
        b'"jid":"0123456789abcdef01234567","created_at":1700000000.25,"enqueued_at":1700000000.25}'
    )


def test_golden_bytes_of_a_scheduled_job_have_neither_at_nor_enqueued_at() -> None:
    assert job(at=True, retry=0) == (
        b'{"retry":0,"queue":"mail","class":"Mail","args":[],"jid":"0123456789abcdef01234567","created_at":1700000000.25}'
    )


@pytest.mark.parametrize("at", [False, True])
def test_golden_bytes_of_further_options(at: bool) -> None:
    entered = b"" if at else b',"enqueued_at":1700000000.25'
    assert job(7, extra={"dead": False, "tags": ["é"], "retry_for": 60}, retry=False, at=at) == (
        b'{"retry":false,"queue":"mail","dead":false,"tags":["\xc3\xa9"],"retry_for":60,"class":"Mail","args":[7],'
        b'"jid":"0123456789abcdef01234567","created_at":1700000000.25' + entered + b"}"
    )


@pytest.mark.parametrize("now", [1_700_000_000, 1_700_000_000.0, True])
@pytest.mark.parametrize("extra", [None, {"dead": True}])
def test_whole_seconds_keep_their_point(now: float, extra: dict[str, Any] | None) -> None:
    data = job(now=now, extra=extra)
    assert f'"created_at":{float(now)},"enqueued_at":{float(now)}}}'.encode() in data


# Checked by hand against Ruby 3.1 with json 2.6.1: JSON.generate(JSON.parse(line)) gives the same bytes.
@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("é ☃ 😀", '"é ☃ 😀"'),
        ("a/b </script>", '"a/b </script>"'),
        ("\u2028\u2029\x7f", '"\u2028\u2029\x7f"'),
        ('"\\', r'"\"\\"'),
        ("\b\f\n\r\t", r'"\b\f\n\r\t"'),
        ("\x00\x01\x0b\x1b\x1f", r'"\u0000\u0001\u000b\u001b\u001f"'),
        (2**80, "1208925819614629174706176"),
        (-(2**70), "-1180591620717411303424"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
        (0.0001, "0.0001"),
        (999_999_999_999_999.0, "999999999999999.0"),
        (1e14, "100000000000000.0"),
        ([[], {}], "[[],{}]"),
    ],
)
def test_values_are_written_as_ruby_writes_them(value: object, written: str) -> None:
    assert f'"args":[{written}],"jid"'.encode() in job(value)
    assert f'"args":[[{written}]],"jid"'.encode() in job([value])


class Point(msgspec.Struct):
    x: float
    name: str | None = None


@dataclasses.dataclass
class Pair:
    a: int
    b: datetime


def test_what_msgspec_encodes_is_an_argument() -> None:
    when = datetime(2026, 11, 21, 7, 30, tzinfo=UTC)
    data = job(
        Point(1.5), Pair(1, when), when, timedelta(seconds=3), Decimal("1.10"), UUID(int=7), b"ab", (1, None), {3}
    )
    assert json.loads(data)["args"] == [
        {"x": 1.5, "name": None},
        {"a": 1, "b": "2026-11-21T07:30:00Z"},
        "2026-11-21T07:30:00Z",
        "PT3S",
        "1.10",
        "00000000-0000-0000-0000-000000000007",
        "YWI=",
        [1, None],
        [3],
    ]
    assert json.loads(job(msgspec.Raw(b'{"a":null}'), [msgspec.Raw(b"null")]))["args"] == [{"a": None}, [None]]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind < 7:
        text = "".join(rng.choice('aß☃😀"\\/\n\t\x00\x1f\x7f\u2028 {}[]null,:') for _ in range(rng.randrange(12)))
        number = rng.uniform(-1e9, 1e9)
        return [None, True, False, rng.randrange(-(2**70), 2**70), rng.randrange(100), number, text][kind]
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {str(rng.random()): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_random_jobs_survive_the_round_trip() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        args = [random_value(rng) for _ in range(rng.randrange(5))]
        retry = rng.choice([True, False, 0, 1, 25])
        extra = rng.choice([None, {}, {"tags": ["x"], "dead": False}])
        name = "".join(rng.choice("aB:é_") for _ in range(6))
        data = build(name, args, queue="q", retry=retry, now=NOW, at=rng.random() < 0.5, extra=extra)
        assert b"\n" not in data
        plain = json.dumps(json.loads(data), ensure_ascii=False, separators=(",", ":"))
        assert data == plain.encode()  # the standard encoder agrees to the byte
        payload = parse(data)
        assert (payload.name, json.loads(bytes(payload.args)), payload.retry) == (name, args, retry)
        assert type(payload.retry) is type(retry)
        again = failed(enqueued(data, NOW + 1), KeyError("x"), NOW + 2).payload
        assert json.loads(again).items() >= (json.loads(data) | {"enqueued_at": NOW + 1}).items()
        assert bytes(parse(again).args) == bytes(payload.args)


# -- what is refused ---------------------------------------------------------------------------------------------------


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NAN, INF = float("nan"), float("inf")
DEEP = "it is nested deeper than 100 levels, which Ruby refuses to read; send it flatter, or its id"
NUMBER = "NaN and infinity do not exist in JSON; send None or a string"
HALF = "it holds half a surrogate pair, which is no text; repair it, or send the bytes as base64"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (NAN, f"(float): {NUMBER}"),
        (INF, f"(float): {NUMBER}"),
        ([1, {"a": (None, -INF)}], f"(list): {NUMBER}"),
        (Point(NAN), f"(Point): {NUMBER}"),
        ({1.5, NAN}, f"(set): {NUMBER}"),
        ("\ud83d", f"(str): {HALF}"),
        ({"\udc00": 1}, f"(dict): {HALF}"),
        (nested(99), f"(list): {DEEP}"),
        (nested(500), f"(list): {DEEP}"),
        (CYCLE, "(list): it is nested deeper than 100 levels or contains itself; send it flatter, or its id"),
        (object(), "(object): it has no JSON form ("),
        ([1j], "(list): it has no JSON form ("),
        ({(1, 2): 3}, "(dict): it has no JSON form ("),
    ],
)
def test_an_argument_that_ruby_could_not_read_is_refused_by_name(value: object, reason: str) -> None:
    with pytest.raises(PayloadError, match=re.escape(f"job 'Mail', argument 2 {reason}")) as caught:
        job("fine", value, None)
    assert "send" in str(caught.value), "the way out"
    assert isinstance(caught.value, BarnabasError)


def test_a_job_of_ten_megabytes_is_refused_alone_and_among_many() -> None:
    with pytest.raises(PayloadError, match=r"has 1000\d{4} bytes as JSON, 8388608 are its limit; store the data where"):
        job("x" * 10_000_000)
    with pytest.raises(PayloadError, match="8388608 are its limit"):
        build_many("Mail", [("x",), ("x" * 10_000_000,)], ["a", "b"], queue="q", retry=True, now=1.0, extra=None)
    assert len(job("x" * 8_000_000)) > 8_000_000


def test_depth_counts_brackets_outside_of_strings_only() -> None:
    for value in (nested(98), "[" * 500, ["[{" * 500, '"[' * 300, "\\"], [[]] * 500, [{"a": {}}] * 500):
        assert json.loads(job(value))["args"] == [value]


def test_nulls_that_were_meant_pass() -> None:
    args: list[Any] = [None, [None, 1.5], {"null": None}, Point(1.0), "null", ("null", 2.0)]
    assert json.loads(job(*args))["args"][:3] == args[:3]


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"cannot be written as JSON: .*surrogates not allowed"):
        build("\ud83d", [1], queue="q", retry=1, now=NOW)


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_new_jids_are_24_lower_hex_and_distinct_over_threads() -> None:
    found: list[list[str]] = [[] for _ in range(8)]

    def take(mine: list[str]) -> None:
        mine.extend(new_jid() for _ in range(5000))

    threads = [threading.Thread(target=take, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jids = [jid for mine in found for jid in mine]
    assert len(set(jids)) == 40_000
    assert all(re.fullmatch("[0-9a-f]{24}", jid) for jid in jids)
    assert re.search(rb'"jid":"[0-9a-f]{24}"', job(jid=None))


def test_a_forked_child_does_not_repeat_its_parents_jids() -> None:
    program = """
import os
from barnabas.jobs.payload import new_jid
new_jid()
out, back = os.pipe()
if os.fork() == 0:
    os.write(back, "\\n".join(new_jid() for _ in range(100)).encode())
    os._exit(0)
os.wait()
print(len(set(os.read(out, 9999).decode().split()) | {new_jid() for _ in range(300)}))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("400\n", "")


def test_derived_jids_are_stable_and_distinct() -> None:
    assert derived_jid("orders:3:17", 0) == "696c9d0502581e24519b6b6a"
    causes = ("orders:3:17", "orders:3:1", "orders", "\udcff")
    jids = [derived_jid(cause, index) for cause in causes for index in range(50)]
    assert len(set(jids)) == 200
    assert all(re.fullmatch("[0-9a-f]{24}", jid) for jid in jids)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_is_read_of_a_job_of_ours() -> None:
    payload = parse(job(1, "a", retry=3))
    assert (payload.name, payload.jid, payload.queue, payload.retry) == ("Mail", JID, "mail", 3)
    assert bytes(payload.args) == b'[1,"a"]'
    assert (payload.created_at, payload.failed_at) == (NOW, None)
    assert (payload.retry_count, payload.attempt) == (None, 1)


def test_a_retry_of_sidekiq_6_and_one_of_sidekiq_8() -> None:
    six = raw(created_at=1700000000.5, enqueued_at=1700000001.0, failed_at=1700000002.25, retry_count=0)
    eight = raw(created_at=1700000000500, enqueued_at=1700000001000, failed_at=1700000002250, retry_count=0)
    for payload in (parse(six), parse(eight)):
        assert payload.created_at == 1700000000.5
        assert payload.failed_at == 1700000002.25
        assert payload.attempt == 2


@pytest.mark.parametrize(
    ("stamp", "read"),
    [(1.7e9, 1.7e9), (1700000000000, 1.7e9), (0, 0.0), (None, None), ("2026", None), (True, None), ([], None)],
)
def test_timestamps(stamp: object, read: float | None) -> None:
    assert seconds(stamp) == read
    assert parse(raw(created_at=stamp)).created_at == read


@pytest.mark.parametrize(("count", "attempt"), [(None, 1), (-1, 1), (0, 2), (24, 26)])
def test_the_attempt_follows_from_the_count(count: int | None, attempt: int) -> None:
    assert parse(raw(retry_count=count)).attempt == attempt


def test_a_bare_push_and_unknown_keys() -> None:
    bare = parse(b' {"bid": {"a": [1]}, "args": [ 1 ], "class": "A::B", "class": "C", "retry": null} ')
    assert (bare.name, bytes(bare.args), bare.jid, bare.queue, bare.retry) == ("C", b"[ 1 ]", "", "default", None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Input data was truncated"),
        (b"hello", "JSON is malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"class":"A","args":[1]', "Input data was truncated"),
        (b'{"class":"A","args":[1]}x', "trailing characters"),
        (b'{"args":[]}', "missing required field `class`"),
        (b'{"class":"A"}', "missing required field `args`"),
        (b'{"class":3,"args":[]}', "Expected `str`, got `int` - at `$.class`"),
        (b'{"class":"A","args":{"a":1}}', "`args` must be a list, not b'{\"a\":1}'"),
        (b'{"class":"A","args":null}', "`args` must be a list, not b'null'"),
        (b'{"class":"A","args":[NaN]}', "JSON is malformed"),
        (b'{"class":"A","args":[],"retry":"yes"}', "at `$.retry`"),
        (b'{"class":"A","args":[],"retry_count":1e99}', "at `$.retry_count`"),
        (b'{"class":"A","args":[],"retry_count":99999999999}', "at `$.retry_count`"),
        (b'{"class":"\xff","args":[]}', "can't decode byte 0xff"),
        (b'{"class":"A","args":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    ],
)
def test_rubbish_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    for read in (parse, lambda data: failed(data, ValueError(), NOW)):
        with pytest.raises(PayloadError, match=re.escape(reason)) as caught:
            read(data)
        assert str(caught.value).startswith("not a Sidekiq job: ")


# -- entering a queue --------------------------------------------------------------------------------------------------


def test_a_due_job_enters_with_one_enqueued_at_and_its_other_bytes_untouched() -> None:
    foreign = (
        b'{"class":"A" , "args":[ 1.0e+16,"\\u00e9\\/" ],"enqueued_at":1700000000500,"enqueued_at":5,"x":{"y" : 1}}'
    )
    once = b'{"class":"A","args":[ 1.0e+16,"\\u00e9\\/" ],"enqueued_at":1700000009.0,"x":{"y" : 1}}'
    assert enqueued(foreign, 1700000009) == once
    assert enqueued(once, 1700000009.0) == once
    assert enqueued(job(1, at=True), NOW) == job(1)
    assert enqueued(job("é", at=True), NOW) == job("é")
    for empty in (b"{}", b"{ }", b"{} "):
        assert enqueued(empty, 5.0) == b'{"enqueued_at":5.0}'
    for last in (b'{"a":{}}', b'{"a":{} } ', b'{"a":{"enqueued_at":1}}'):
        assert enqueued(last, 5.0).replace(b" ", b"") == last.strip().replace(b" ", b"")[:-1] + b',"enqueued_at":5.0}'


@pytest.mark.parametrize(
    ("count", "after"),
    [(b"25", b"24"), (b"0", b"-1"), (b"null", b"null"), (b'"x"', b'"x"'), (b"true", b"true")],
)
def test_a_job_that_an_operator_calls_back_has_one_failure_less(count: bytes, after: bytes) -> None:
    dead = b'{"class":"A","args":[ 1.0e+16 ],"retry_count":%b,"enqueued_at":5}'
    assert recalled(dead % count, 1700000009) == dead.replace(b":5}", b":1700000009.0}") % after
    assert recalled(job(1, at=True), NOW) == job(1)


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b'{"a":\xff}', b'{"\xff":1}'])
def test_rubbish_is_called_back_as_it_is(data: bytes) -> None:
    assert recalled(data, NOW) is data


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b'{"a":\xff}', b'{"\xff":1}'])
def test_only_an_object_enters(data: bytes) -> None:
    with pytest.raises(PayloadError, match="not a Sidekiq job: "):
        enqueued(data, NOW)


# -- failing -----------------------------------------------------------------------------------------------------------


class Declined(Exception):
    pass


def fail(data: bytes, error: BaseException | None = None, now: float = NOW, **more: Any) -> Failed:
    return failed(data, error or Declined("no"), now, **{"rand": lambda: 0.0} | more)


def test_golden_bytes_of_the_first_and_the_second_failure() -> None:
    first = fail(job(1.5))
    head = job(1.5)[:-1]
    name = f"{__name__}.Declined".encode()
    assert first[:4] == ("again", first.payload, NOW + 15, "")
    assert first.payload == (
        head + b',"error_message":"no","error_class":"' + name + b'","failed_at":1700000000.25,"retry_count":0}'
    )
    second = fail(first.payload, ValueError("ünd/\n"), 1_700_000_100)
    assert second[:4] == ("again", second.payload, 1_700_000_100 + 1 + 15, "")
    assert second.payload == (
        head + ',"error_message":"ünd/\\n","error_class":"ValueError"'.encode() + b',"failed_at":1700000000.25,'
        b'"retry_count":1,"retried_at":1700000100.0}'
    )
    assert parse(second.payload).attempt == 3


def test_the_waits_and_their_jitter() -> None:
    data = job(1)
    for count in range(25):
        low, high = fail(data), fail(data, rand=lambda: 0.999)
        assert low.at == NOW + count**4 + 15
        assert high.at == low.at + 9 * (count + 1)
        assert (low.kind, json.loads(low.payload)["retry_count"]) == ("again", count)
        data = low.payload
    dead = fail(data)
    assert (dead.kind, dead.at, dead.reason) == (
        "dead",
        NOW,
        f"failed 26 times, and retry is 25: {__name__}.Declined: no",
    )
    assert json.loads(dead.payload)["retry_count"] == 25


def runs(data: bytes, **more: Any) -> tuple[int, str]:
    """How often a job that always fails runs, and what becomes of it."""
    for run in range(1, 40):
        verdict = fail(data, **more)
        if verdict.kind != "again":
            return run, verdict.kind
        data = verdict.payload
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("fields", "more", "expected"),
    [
        ({"retry": True}, {}, (26, "dead")),
        ({"retry": 3}, {}, (4, "dead")),
        ({"retry": 0}, {}, (1, "dead")),
        ({"retry": False}, {}, (1, "drop")),
        ({"retry": True}, {"default_retry": 2}, (3, "dead")),
        ({"retry": True}, {"default_retry": True}, (26, "dead")),
        ({"retry": None}, {"default_retry": 2}, (3, "dead")),
        ({"retry": None}, {"default_retry": False}, (1, "drop")),
        ({"retry": 1}, {"default_retry": 7}, (2, "dead")),
        ({"retry": 1, "dead": False}, {}, (2, "drop")),
        ({"retry": 1, "dead": True}, {}, (2, "dead")),
        ({"retry": 1, "dead": None}, {}, (2, "dead")),
        ({"retry": 3}, {"final": True}, (1, "dead")),
        ({"retry": False}, {"final": True}, (1, "dead")),
        ({"retry": 3, "dead": False}, {"final": True}, (1, "drop")),
    ],
)
def test_how_often_a_job_runs(fields: dict[str, Any], more: dict[str, Any], expected: tuple[int, str]) -> None:
    assert runs(raw(**fields), **more) == expected


def test_reasons_say_why_there_is_no_further_run() -> None:
    error = ValueError("x" * 300)
    assert fail(raw(retry=0), error).reason == "failed 1 times, and retry is 0: ValueError: " + "x" * 200
    assert fail(raw(retry=False), error).reason == "failed, and retry is false: ValueError: " + "x" * 200
    assert fail(raw(), error, final=True).reason == "not retried: ValueError: " + "x" * 200


@pytest.mark.parametrize("dialect", [1, 1000])
def test_retry_for_replaces_the_count(dialect: int) -> None:
    stamp = 1_700_000_000 * dialect if dialect > 1 else 1_700_000_000.0
    late = raw(retry=0, retry_for=3600, retry_count=30, failed_at=stamp)
    assert fail(late, now=1_700_003_599.0).kind == "again"
    over = fail(late, now=1_700_003_601.0)
    assert (over.kind, over.reason) == ("dead", f"failed for longer than retry_for, 3600 s: {__name__}.Declined: no")
    assert fail(raw(retry=0, retry_for=60)).kind == "again", "the first failure opens the window"
    for unset in (None, 0, False, True, "soon"):
        assert fail(raw(retry=0, retry_for=unset)).kind == "dead"


def test_a_delay_of_ones_own() -> None:
    asked: list[tuple[int, BaseException]] = []

    def delay(count: int, error: BaseException, fields: dict[str, Any]) -> float:
        asked.append((count, error))
        return 100.5

    error = Declined("x")
    first = fail(raw(), error, delay=delay)
    assert first.at == NOW + 100.5
    assert fail(first.payload, error, delay=delay, rand=lambda: 0.5).at == NOW + 100.5 + 5 * 2
    assert asked == [(0, error), (1, error)]
    assert fail(raw(retry=0), delay=delay).kind == "dead"
    assert len(asked) == 2, "not asked without a retry to come"


@pytest.mark.parametrize("wait", [None, 0, -1, NAN, INF, -INF])
def test_a_delay_that_is_no_wait_leaves_the_usual_one(wait: float | None) -> None:
    assert fail(raw(), delay=lambda count, error, fields: wait).at == NOW + 15


def test_the_queue_it_goes_back_to() -> None:
    assert parse(fail(raw()).payload).queue == "mail"
    assert parse(fail(raw(), queue="popped").payload).queue == "popped"
    assert parse(fail(raw(retry_queue="slow"), queue="popped").payload).queue == "slow"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x" * 20_000), "x" * 10_000),
        (ValueError("a\ud83db\udc00"), "a\ufffdb\ufffd"),
        (KeyError("k"), "'k'"),
        (ValueError(), ""),
        (KeyboardInterrupt("stop"), "stop"),
        (Mute(), "(RuntimeError while reading the message of Mute)"),
    ],
)
def test_the_message_is_cut_and_scrubbed(error: BaseException, message: str) -> None:
    assert json.loads(fail(raw(), error).payload)["error_message"] == message


def test_other_values_keep_their_bytes() -> None:
    foreign = (
        b'{"wrapped":"\\u00c4","args":[1.0e+16, 1e-05 ,"\\/"],"class":"A","retry":1,"retry_count":null,'
        b'"error_message":"old","big":123456789012345678901234567890,"created_at":1700000000500}'
    )
    assert fail(foreign, ValueError("new")).payload == (
        b'{"wrapped":"\\u00c4","args":[1.0e+16, 1e-05 ,"\\/"],"class":"A","retry":1,"retry_count":0,'
        b'"error_message":"new","big":123456789012345678901234567890,"created_at":1700000000500,'
        b'"error_class":"ValueError","failed_at":1700000000.25}'
    )


def test_an_error_in_delay_passes_through() -> None:
    def delay(count: int, error: BaseException, fields: dict[str, Any]) -> float:
        raise LookupError("delay")

    with pytest.raises(LookupError, match="delay"):
        fail(raw(), delay=delay)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b'{"class":"mail"}', "missing required field `args`"),
        (b'{"class":"mail","args":5}', "`args` must be a list"),
        (b'{"class":"mail","args":[],"retry":"many"}', "got `str` - at `$.retry`"),
        (b"zzz", "JSON is malformed"),
        (b'{"class":"mail","args":[]}', ""),
    ],
)
def test_a_dead_job_that_is_none_says_why(payload, said):
    shown = entry(StoredJob(None, "", "q", "dead", 1.0, 0, None, payload)).error
    assert said in shown and bool(said) == bool(shown)
