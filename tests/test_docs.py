"""The README and the pages in docs/ are true: their files are written, their commands followed literally, in order, in an
empty folder.

A page says what a file is called in the line before its block: `` `shop.py`: ``. In a `console` block the lines after a
command are what it prints: `...` alone stands for any lines, within a line for any text. A command that ends in `&` runs
until the page ends it (`kill %1`) or ends itself.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^`(?P<file>[\w./-]+)`[^\n]*:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)

LOOKS = ("barnabas lag", "barnabas queues", "barnabas processes", "barnabas dead list")


class Folder:
    """An empty folder and a shell in it, with what was started in the background."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("BARNABAS_")}
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"
        self.env["COLUMNS"] = "120"
        self.started: list[subprocess.Popen[str]] = []

    def run(self, command: str) -> str:
        """What a command prints; it must succeed (unless it ends in `|| true`)."""
        options = {"shell": True, "cwd": self.path, "env": self.env, "text": True}
        if command.endswith(" &"):
            log = (self.path / f"log.{len(self.started) + 1}").open("w")
            with log:
                self.started.append(
                    subprocess.Popen(f"exec {command[:-2]}", stdout=log, stderr=log, start_new_session=True, **options)
                )
            time.sleep(1.5)  # as a reader would take
            return ""
        if found := re.fullmatch(r"kill( -\w+)? %(\d)", command):
            process = self.started[int(found[2]) - 1]
            process.send_signal(getattr(signal, f"SIG{found[1].strip(' -')}") if found[1] else signal.SIGTERM)
            process.wait(40)
            return ""
        done = subprocess.run(command, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path)
    yield made
    made.end()


def steps(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines it is to print."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, *lines = part.replace("\\\n", "").rstrip("\n").split("\n")
        yield command, lines


def matches(shown: list[str], printed: str) -> bool:
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(re.escape(" ".join(p.split())) for p in line.split("...")) + r"\n"
        for line in shown
    )
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines if line)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_followed_literally(page: Path, folder: Folder) -> None:
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            (folder.path / block["file"]).write_text(block["text"])
        elif block["kind"] == "console":
            for command, lines in steps(block["text"]):
                end = time.monotonic() + (20 if command.startswith(LOOKS) and folder.started else 0)
                printed = folder.run(command)
                while lines and not matches(lines, printed) and time.monotonic() < end:
                    printed = folder.run(command)  # what runs in the background is not there yet: look again
                assert not lines or matches(lines, printed), f"{command}\nprinted\n{printed}\nnot\n" + "\n".join(lines)
        else:
            assert block["kind"] != "python", f"{page.name}: a python block without a file name:\n{block['text']}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
