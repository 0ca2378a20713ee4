"""Real processes on one file, and something done to the file, the disk, or to them. Every wait has a deadline."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
DEADLINE = 30.0  # seconds any wait of a test may take


def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait until `condition()` is true and return what it gave; fail at the deadline."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s for {what}")
        time.sleep(0.02)
    return found


def skip_at_home(why: str) -> None:
    """What a machine cannot do is skipped at home and fails where everything must run."""
    pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)


def same(what: str, one: Any, other: Any) -> None:
    """(Assertions outside of test files do not say what differs.)"""
    if one != other:
        one, other = (dict.fromkeys(each) if not isinstance(each, dict) else each for each in (one, other))
        both = [(key, one.get(key, "-"), other.get(key, "-")) for key in {**one, **other}]
        odd = [each for each in both if each[1] != each[2]]
        pytest.fail(f"{what}: {len(odd)} differ: {odd[:20]}")


class Shop:
    """The app of shop.py on a file of the test's own, with its processes and what they said."""

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        self.folder = folder
        self.path = path or folder / "shop.db"
        self.url = f"sqlite:///{self.path}"
        self.team: list[subprocess.Popen[bytes]] = []
        self.witness = folder / "witness"
        self.witness.touch()
        self.witness.chmod(0o666)
        self._apps: list[Any] = []

    @property
    def app(self) -> Any:
        """The app in this process, on the same file: to send, and to see what is stored."""
        if not self._apps:
            self._apps.append(self.own_app())
        return self._apps[0]

    def own_app(self) -> Any:
        sys.modules.pop("shop", None)
        import shop

        shop.app.settings = shop.app.settings.override(events=self.url, jobs=self.url)
        self.module = shop
        return shop.app

    def start(self, *command: str, log: str = "log", wrap: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """A process of this app: `python COMMAND...`, its output appended to a file of that name."""
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(SOURCE), str(HERE)]),
            "SHOP_WITNESS": str(self.witness),
            "BARNABAS_EVENTS_URL": self.url,
            "BARNABAS_JOBS_URL": self.url,
        }
        with open(self.folder / log, "ab") as out:
            process = subprocess.Popen([*wrap, sys.executable, *command], stdout=out, stderr=out, env=environ, cwd=self.folder)
        self.team.append(process)
        return process

    def worker(self, *flags: str, log: str = "log", wrap: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        return self.start("-m", "barnabas", "run", "shop:app", *flags, log=log, wrap=wrap)

    def sender(self, first: int = 0, step: int = 1, pad: int = 0, **options: Any) -> "subprocess.Popen[bytes]":
        return self.start(str(HERE / "shop.py"), str(first), str(step), str(pad), **options)

    def log(self, name: str = "log") -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self, *words: str) -> list[list[str]]:
        """The witnesses' lines that begin with these words, without them."""
        lines = [line.split(" ") for line in self.witness.read_text().splitlines()]
        return [line[len(words) :] for line in lines if line[: len(words)] == list(words)]

    def ids(self, word: str) -> set[int]:
        """The numbers that a sender said are "acked", "failed" or "refused"."""
        return {int(words[0]) for words in self.said(word)}

    def stored(self, name: str = "items") -> Counter[int]:
        """How often each id is in a topic."""
        events = self.app.events
        events.refresh()
        states = {state.name: state.partitions for state in events.topics()}
        rows = [r for n, (low, high, _) in enumerate(states[name]) for r in events.read(name, n, low, high - low)]
        decode = self.app.topics[name].decode
        return Counter(decode(row[2]).id for row in rows)

    def drained(self) -> bool:
        groups = {c.group: [t.name for t in c.topics] for c in self.app.consumers.values()}
        return self.app.events.open_work(groups, ["notes"]) == 0

    def check(self, within: float = DEADLINE) -> None:
        """Everything was handled; order per key, tables and outputs are exact. The senders have ended."""
        until(self.drained, f"all to be handled; the log says {self.log()[-3000:]}", within)
        stored = self.stored()
        for name in ("step", "many"):
            firsts: dict[int, None] = {}
            last: dict[str, int] = {}
            for _, partition, offset, key, id_ in self.said("end", name):
                if int(id_) not in firsts:
                    firsts[int(id_)] = None
                    assert last.get(key, -1) < int(offset), f"{name}: {key}: {partition}@{offset} came first after {last[key]}"
                    last[key] = int(offset)
            same(f"stored, and handled by {name}", stored.keys(), firsts.keys())
        module = self.module
        by_key: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        for id_, n in stored.items():
            by_key[f"k{id_ % module.KEYS}"] += n
            sums[f"k{id_ % module.KEYS}"] += id_ * n
        with module.counts.open() as view:
            same("counts", Counter(dict(view.items())), by_key)
        with module.sums.open() as view:
            same("sums", Counter(dict(view.items())), sums)
        same("copies", self.stored("copies"), stored)

    def end(self, *processes: "subprocess.Popen[bytes]") -> None:
        """Stop these (all) processes in order."""
        chosen = list(processes or self.team)
        for process in chosen:
            process.terminate()
        for process in chosen:
            process.wait(DEADLINE)

    def close(self) -> None:
        for process in self.team:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(DEADLINE)
        self.close_apps()

    def close_apps(self) -> None:
        """Let this process use the file no more; the next use opens it again."""
        while self._apps:
            self._apps.pop().close()

    def integrity(self) -> str:
        """What the outside witness says: the sqlite3 shell, read-only, after all have ended."""
        self.close_apps()
        command = ["sqlite3", "-readonly", str(self.path), "PRAGMA integrity_check"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A shop on a file in the test's folder. A fixture is made of it in each test file: two conftest.py hide each other."""
    monkeypatch.syspath_prepend(str(HERE))
    shop = Shop(tmp_path)
    yield shop
    shop.close()
