"""Programs that nobody here wrote look at what we send, and send what we read; a crash is told by what it repeats."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import need
from test_broker import drain

from barnabas import App, Delivery
from barnabas.errors import Reject
from barnabas.retry import Retry


def kcat(app: App, *options: str, given: str = "") -> str:
    need("kcat")
    done = subprocess.run(["kcat", "-b", app.events.servers, *options], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kcat_reads_what_we_send_and_we_read_what_it_sends(make) -> None:
    app, seen = make(), []
    topic = app.topic("orders", dict, partitions=2)

    @app.consumer(topic, name="read")
    def read(value: dict | None, delivery: Delivery) -> None:
        seen.append((delivery.key, value, list(delivery.headers), delivery.timestamp))

    topic.send({"n": 1}, key="ü", headers={"a": "1", "b": "zwei"}, timestamp=1_700_000_000.25).result(10)
    topic.send({"n": 2}, partition=0).result(10)
    topic.send(None, key="gone").result(10)
    name = f"{app.events.prefix}orders"
    lines = kcat(app, "-C", "-t", name, "-e", "-q", "-f", "%k|%s|%S|%h|%T\n").splitlines()
    assert sorted(line.rpartition("|")[0] for line in lines) == ["gone||-1|", '|{"n":2}|7|', 'ü|{"n":1}|7|a=1,b=zwei']
    assert [line.rpartition("|")[2] for line in lines if line.startswith("ü")] == ["1700000000250"]
    kcat(app, "-P", "-t", name, "-k", "theirs", "-H", "x=1", "-H", "y=", given='{"n":3}\n')
    kcat(app, "-P", "-t", name, "-K", ":", "-Z", given="empty:\n")  # -Z: an empty value is none
    drain(app)
    found = {(key, str(value), tuple(headers)) for key, value, headers, _ in seen}
    assert found >= {("theirs", "{'n': 3}", (("x", b"1"), ("y", b""))), ("empty", "None", ()), ("gone", "None", ())}
    assert ("ü", "{'n': 1}", (("a", b"1"), ("b", b"zwei"))) in found and len(seen) == 5
    assert [stamp for key, _, _, stamp in seen if key == "ü"] == [1_700_000_000.25]


def test_kcat_shows_why_a_letter_is_dead(make) -> None:
    app = make()
    topic = app.topic("orders", int, partitions=1)

    @app.consumer(topic, name="read", retry=Retry(1, backoff=0))
    def read(n: int) -> None:
        raise Reject("no such order") if n else ValueError("nought")

    topic.send(0, key="k", headers={"own": "1"}).result(10)
    topic.send(7).result(10)
    drain(app)
    letters = kcat(app, "-C", "-t", f"{app.events.prefix}orders.dead", "-e", "-q", "-f", "%k|%s|%h\x01").split("\x01")
    first, second = sorted(letters[:2])  # "k" comes before "|"
    assert first.startswith("k|0|own=1,barnabas-reason=") and "barnabas-exception=ValueError" in first and "nought" in first
    for said in ("attempts=2", "group=shop-read", "topic=orders", "partition=0", "offset=0", "time=", "traceback=Traceback"):
        assert f"barnabas-{said}" in first
    for said in ("reason=rejected: no such order", "attempts=1", "offset=1"):
        assert f"barnabas-{said}" in second


@pytest.mark.slow
def test_what_a_crash_repeats_carries_the_same_id(make, tmp_path) -> None:
    """A worker is killed after its outputs are stored and before its position is."""
    app = make()
    source = app.topic("source", int, partitions=1)
    source.send_many(range(5)).result(10)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "CRASH_URL": app.events.url}
    command = [sys.executable, "-m", "barnabas", "run", "crash:app", "--drain"]
    for crash, code in (("1", -signal.SIGKILL), ("", 0)):
        ran = subprocess.run(command, cwd=tmp_path, env={**env, "CRASH": crash}, capture_output=True, text=True, timeout=60)
        assert ran.returncode == code, ran.stderr
    stored = {name: [] for name in ("answers", "out", "source.dead")}
    for state in app.events.topics():
        for n, (first, end, _) in enumerate(state.partitions if state.name in stored else ()):
            rows = app.events.read(state.name, n, first, end)
            whose = "id" if state.name != "source.dead" else "offset"
            stored[state.name] += [(row[2], dict(row[3])[f"barnabas-{whose}"]) for row in rows]
    for name, count in (("answers", 4), ("out", 12), ("source.dead", 1)):
        rows = stored[name]
        assert len(set(rows)) == len({id for _, id in rows}) == count, (name, rows)  # an id is one message's
        assert all(rows.count(row) == 2 for row in rows), (name, rows)  # each of them twice
