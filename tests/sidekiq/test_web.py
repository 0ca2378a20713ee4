"""Sidekiq's own web page, served by puma and used in a headless Chromium: it shows our processes and jobs, and its buttons act
on them. What it looked like is kept in build/screenshots."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import RedisServer, free_port, need

from barnabas import App

HERE = Path(__file__).parent
SCREENSHOTS = HERE.parents[1] / "build" / "screenshots"
pytestmark = pytest.mark.slow

ROOM = """
import os, time
from barnabas import App, RetryAfter

app = App("webroom", events="memory:", threads=3)

@app.job
def slow(n: int, name: str) -> None:
    while not os.path.exists("go"):
        time.sleep(0.05)

@app.job(retry=3)
def mail(n: int, to: str) -> None:
    with open("ran", "a") as file:
        file.write(f"{n}\\n")
    if not os.path.exists("mended"):
        raise RetryAfter(3600)
"""


class Browser:
    """A person in front of the page. `port`: where it is served."""

    def __init__(self, port: int) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        looks = ("headless=new", "lang=en", "window-size=1300,900")
        for switch in ("no-sandbox", "disable-dev-shm-usage", "disable-background-networking", *looks):
            options.add_argument(f"--{switch}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        self.driver.set_page_load_timeout(30)
        self._root, self._shots = f"http://127.0.0.1:{port}", 0

    def open(self, path: str) -> str:
        """Go there; what can be read."""
        self.driver.get(self._root + path)
        return self.text

    @property
    def text(self) -> str:
        return str(self.driver.find_element("tag name", "body").text)

    def keep(self, name: str) -> None:
        """Keep a picture of what is to be seen."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

    def press(self, path: str, button: str, *, row: str = "", tick: str = "") -> None:
        """Press the button of this label: the one in the table row that says `row`, or below the list in which the box of
        `tick` is ticked first. A page that asks whether one is sure hears yes (Debian's has lost its scripts, and does not)."""
        from selenium.common.exceptions import NoAlertPresentException

        driver = self.driver
        driver.get(self._root + path)
        if tick:
            driver.find_element("css selector", f"input[type=checkbox][value*='{tick}']").click()
        here = f"//tr[contains(., '{row}')]" if row else ""
        old = driver.find_element("tag name", "html")
        driver.find_element("xpath", f"{here}//*[@type='submit' and (@value='{button}' or normalize-space()='{button}')]").click()
        with suppress(NoAlertPresentException):
            driver.switch_to.alert.accept()
        until(lambda: gone(old))  # another page is there


def gone(element: Any) -> bool:
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException

    try:
        element.is_enabled()
    except StaleElementReferenceException:
        return True
    except WebDriverException:  # the driver's, while the page is changing: ask again
        return False
    return False


def until(condition: Callable[[], Any], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.end()


@pytest.fixture(scope="module")
def browser(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need("puma", "chromium", "chromedriver")
    port = free_port()
    env = {"REDIS_URL": server.url, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    with open(tmp_path_factory.mktemp("puma") / "log", "w") as log:
        command = ["puma", "-b", f"tcp://127.0.0.1:{port}", str(HERE.parents[1] / "examples" / "flights" / "web.ru")]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    browser = None
    try:
        until(lambda: served(port))
        browser = Browser(port)
        yield browser
    finally:
        if browser is not None:
            browser.driver.quit()
        process.terminate()
        process.wait(20)


def served(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=5) as answer:
            return "sidekiq" in json.load(answer)
    except OSError:
        return False


@pytest.fixture
def app(server: RedisServer) -> Iterator[App]:
    with redis.Redis(port=server.port) as client:
        client.flushall()
    app = App("web", events="memory:", jobs=server.url)
    yield app
    app.close()


def jids(app: App, state: str, queue: str | None = None) -> list[str]:
    return [job.jid for job in app.jobs.find_jobs(state, queue)]


def test_buttons_of_a_queue_act_on_our_waiting_jobs(browser, app):
    letter = app.foreign_job("Mail <ü>", queue="post", retry=3)
    strange = [("a/b", 1), ("é\n'\"&", 2), ("\u2028<script>alert(1)</script>", 3), ("x" * 300, {"k": [None, 1.5]})]
    one, two, three, four = letter.enqueue_many(strange).result(10)
    shown = browser.open("/queues/post")
    browser.keep("queue")
    assert "Mail <ü>" in shown and '"a/b", 1' in shown and "<script>alert(1)</script>" in shown
    for gone_now, said, left in ((two, '"&', [one, three, four]), (three, "<script>", [one, four]), (one, "a/b", [four])):
        browser.press("/queues/post", "Delete", row=said.replace("'", ""))
        assert jids(app, "ready") == left and gone_now not in left
    assert "post" in browser.open("/queues")
    browser.press("/queues", "Delete", row="post")
    assert jids(app, "ready") == [] and "post" not in [state.name for state in app.jobs.queue_states()]


def test_a_process_is_seen_at_work_and_every_button_acts_on_it_and_its_jobs(browser, app, server, tmp_path):
    (tmp_path / "webroom.py").write_text(ROOM)
    ran = lambda: (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []  # noqa: E731
    mail, slow = app.foreign_job("mail", retry=3), app.foreign_job("slow")
    first = slow.enqueue(7, "Ümläut").result(10)
    failing = mail.enqueue_many((n, f"<{n}@ü>") for n in range(5)).result(10)
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    command = [sys.executable, "-m", "barnabas", "run", "webroom:app", "--jobs", server.url]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=os.environ)
    try:
        until(lambda: sorted(jids(app, "retry")) == sorted(failing) and sorted(ran()) == list("01234"))
        (name,) = [found.name for found in app.jobs.processes()]
        until(lambda: first in browser.open("/busy") and "webroom" in browser.text)
        browser.keep("busy")
        for text in (name.rpartition(":")[0], name, "python", "Ümläut", "slow", "Queues: default"):
            assert text in browser.text
        check_retries(browser, app, failing, tmp_path / "mended", ran)
        check_schedule(browser, app, mail, ran)
        stats = json.loads(browser.open("/stats"))["sidekiq"]
        counted = [stats[key] for key in ("enqueued", "scheduled", "retries", "dead", "busy", "processes")]
        assert counted == [0, 0, 0, 0, 1, 1]
        browser.open("/")
        browser.keep("dashboard")

        browser.press("/busy", "Quiet", row=name.rpartition(":")[0])
        until(lambda: "quiet" in browser.open("/busy") and app.jobs.processes()[0].info["quiet"])
        browser.keep("busy-quiet")
        late = slow.enqueue(8, "late").result(10)
        (tmp_path / "go").touch()
        until(lambda: jids(app, "work") == [])
        time.sleep(2.0)
        assert jids(app, "ready") == [late] and process.poll() is None and app.jobs.processes()[0].name == name
        browser.press("/busy", "Stop", row=name.rpartition(":")[0])
        assert process.wait(30) == 0
        assert app.jobs.processes() == [] and name not in browser.open("/busy")
    finally:
        process.kill()
        process.wait()
        log.close()
        print((tmp_path / "log").read_text())


def check_retries(browser: Browser, app: App, failing: list[str], mended: Path, ran: Callable[[], list[str]]) -> None:
    """Five jobs wait for a retry: each button makes of one what it says, in the eyes of the worker that goes on."""
    assert "RetryAfter: retry after 3600 s" in browser.open("/retries")
    browser.keep("retries")
    browser.press("/retries", "Delete", tick=failing[0])
    browser.press("/retries", "Kill", tick=failing[1])
    browser.press("/retries", "Kill", tick=failing[2])
    assert sorted(jids(app, "retry")) == sorted(failing[3:]) and sorted(jids(app, "dead")) == sorted(failing[1:3])
    browser.press("/retries", "Retry Now", tick=failing[3])
    until(lambda: ran().count("3") == 2 and failing[3] in jids(app, "retry"))
    (entry,) = [json.loads(job.payload) for job in app.jobs.find_jobs("retry") if job.jid == failing[3]]
    assert entry["retry_count"] == 0  # one taken off by the page, one added by the second failure
    mended.touch()
    browser.press("/retries", "Retry All")
    until(lambda: jids(app, "retry") == [] and ran().count("3") == 3 and ran().count("4") == 2)
    assert failing[1] in browser.open("/morgue") or "<1@ü>" in browser.text
    browser.keep("dead")
    browser.press("/morgue", "Retry Now", tick=failing[1])
    until(lambda: jids(app, "dead") == [failing[2]] and ran().count("1") == 2)
    browser.press("/morgue", "Delete", tick=failing[2])
    assert jids(app, "dead") == [] and ran().count("0") == ran().count("2") == 1


def check_schedule(browser: Browser, app: App, mail: Any, ran: Callable[[], list[str]]) -> None:
    """Of two jobs that are due in an hour one is run now, the other never."""
    soon, never = mail.enqueue_in(3600, 10, "soon").result(10), mail.enqueue_in(3600, 11, "never").result(10)
    assert '"soon"' in browser.open("/scheduled")
    browser.keep("scheduled")
    browser.press("/scheduled", "Add to queue", tick=soon)
    until(lambda: ran().count("10") == 1 and jids(app, "scheduled") == [never])
    browser.press("/scheduled", "Delete", tick=never)
    assert jids(app, "scheduled") == [] and "11" not in ran()
