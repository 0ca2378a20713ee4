"""Sidekiq's own web page, served by puma, shows our processes and jobs, and its buttons act on them."""

import html
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import RedisServer, free_port, need

from barnabas import App

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


class Page:
    """What a browser does with the page's forms: it sends their hidden fields and the button that was pressed."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"
        self._open = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar())).open

    def get(self, path: str) -> str:
        with self._open(self._root + path, timeout=10) as answer:
            return str(answer.read().decode())

    def press(self, path: str, button: str, *, near: str = "", tick: str | None = None) -> None:
        """Press a button of a form on the page: of the one that has `near` in it, with the box of `tick` ticked."""
        for form in re.findall(r"<form.*?</form>", self.get(path), re.S):
            pressed = re.search(rf'<(?:input|button)[^>]*type="submit"[^>]*name="{button}"', form)
            if pressed and near in html.unescape(form):
                break
        else:
            raise AssertionError(f"no button {button!r} on {path} near {near!r}")
        head = re.match(r'<form(?:[^>]*action="([^"]*)")?', form)
        fields = [(html.unescape(n), html.unescape(v)) for n, v in self._hidden(form)] + [(button, "1")]
        if tick is not None:
            keys = re.findall(r"name='key\[\]' value='([^']*)'", form)
            fields.append(("key[]", next(html.unescape(key) for key in keys if tick in key)))
        target = (head and head[1]) or path
        data = urllib.parse.urlencode(fields).encode()
        with self._open(urllib.request.Request(self._root + target, data, method="POST"), timeout=10) as answer:
            assert answer.status == 200

    @staticmethod
    def _hidden(form: str) -> list[tuple[str, str]]:
        found = []
        for field in re.findall(r"<input[^>]*hidden[^>]*>", form, re.S):
            name, value = re.search(r"""name=['"]([^'"]*)""", field), re.search(r"""value=(?:'([^']*)'|"([^"]*)")""", field)
            if name and value:
                found.append((name[1], value[1] if value[1] is not None else value[2]))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.end()


@pytest.fixture(scope="module")
def page(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    need("puma")
    port = free_port()
    env = {"REDIS_URL": server.url, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    with open(tmp_path_factory.mktemp("puma") / "log", "w") as log:
        command = ["puma", "-b", f"tcp://127.0.0.1:{port}", str(HERE / "config.ru")]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    page = Page(port)
    until(lambda: reached(page))
    yield page
    process.terminate()
    process.wait(20)


def reached(page: Page) -> bool:
    try:
        return "Sidekiq" in page.get("/")
    except (urllib.error.URLError, ConnectionError):
        return False


def until(condition: Any, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture
def app(server: RedisServer) -> Iterator[App]:
    with redis.Redis(port=server.port) as client:
        client.flushall()
    app = App("web", events="memory:", jobs=server.url)
    yield app
    app.close()


def jids(app: App, state: str) -> list[str]:
    return [job.jid for job in app.jobs.find_jobs(state)]


def test_buttons_act_on_our_waiting_and_dead_jobs(page, app):
    mail = app.foreign_job("Mail <ü>", queue="mail", retry=3)
    one, two, three = mail.enqueue_many([("a/b", 1), ("é", 2), ("\u2028", 3)]).result(10)
    shown = html.unescape(page.get("/queues/mail"))
    assert one in shown and "Mail <ü>" in shown and '"a/b", 1' in shown
    page.press("/queues/mail", "delete", near=two)
    assert jids(app, "ready") == [one, three]
    later = mail.enqueue_in(3600, "later").result(10)
    page.press("/scheduled", "add_to_queue", tick=later)
    assert jids(app, "ready") == [one, three, later] and jids(app, "scheduled") == []
    never = mail.enqueue_in(3600, "never").result(10)
    page.press("/scheduled", "delete", tick=never)
    assert jids(app, "scheduled") == []
    client = app.jobs.client
    for n, button in enumerate(("retry", "delete", "kill")):
        failed = json.loads(client.rpop("queue:mail")) | {"retry_count": 2, "error_message": "smtp", "error_class": "E"}
        client.zadd("retry", {json.dumps(failed | {"failed_at": time.time()}, separators=(",", ":")): 2_000_000_000.5 + n})
        assert "smtp" in page.get("/retries")
        page.press("/retries", button, tick=failed["jid"])
        assert jids(app, "retry") == []
    assert jids(app, "ready") == [one] and jids(app, "dead") == [later]
    assert json.loads(next(app.jobs.find_jobs("ready")).payload)["retry_count"] == 1
    page.press("/morgue", "retry", tick=later)
    assert jids(app, "ready") == [one, later] and jids(app, "dead") == []
    stats = json.loads(page.get("/stats"))["sidekiq"]
    assert (stats["enqueued"], stats["scheduled"], stats["retries"], stats["dead"]) == (2, 0, 0, 0)


def test_a_process_is_seen_at_work_and_its_buttons_quiet_and_stop_it(page, app, server, tmp_path):
    (tmp_path / "webroom.py").write_text(
        "import os, time\nfrom barnabas import App\napp = App('webroom', events='memory:')\n"
        "@app.job\ndef slow(n: int, name: str):\n    open('began', 'w').close()\n"
        "    while not os.path.exists('go'):\n        time.sleep(0.05)\n"
    )
    first = app.foreign_job("slow").enqueue(7, "Ümläut").result(10)
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    command = [sys.executable, "-m", "barnabas", "run", "webroom:app", "--jobs", server.url]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=os.environ)
    try:
        until(lambda: (tmp_path / "began").exists())
        (name,) = [found.name for found in app.jobs.processes()]
        until(lambda: first in page.get("/busy") and "webroom" in page.get("/busy"))
        shown = html.unescape(page.get("/busy"))
        assert name.rpartition(":")[0] in shown and "Ümläut" in shown and "python" in shown
        page.press("/busy", "quiet", near=name)
        until(lambda: "quiet" in page.get("/busy").lower().split("<tbody>", 1)[-1] and app.jobs.processes()[0].info["quiet"])
        late = app.foreign_job("slow").enqueue(8, "late").result(10)
        (tmp_path / "go").touch()
        until(lambda: jids(app, "work") == [])
        time.sleep(2.0)
        assert jids(app, "ready") == [late] and process.poll() is None and app.jobs.processes()[0].name == name
        page.press("/busy", "stop", near=name)
        assert process.wait(30) == 0
        assert app.jobs.processes() == [] and name not in page.get("/busy")
    finally:
        process.kill()
        process.wait()
        log.close()
        print((tmp_path / "log").read_text())
