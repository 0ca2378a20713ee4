"""The shape of the package: floors, weight, lengths, public surface (DESIGN.md, "Layout and floors")."""

import ast
import math
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest

import barnabas

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "barnabas"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; a file imports from its own floor and from those beneath it. `__init__` is the public face.
FLOORS = {
    "words": "message verdict errors retry codec clock future",
    "doors": "ports settings",
    "engine": "engine jobs state",
    "backends": "backends",
    "processes": "app topic consumer job worker supervisor systemd",
    "face": "__init__",
    "windows": "inspect queues dead replay lag processes observers web proxy cli testing killing __main__",
}
FLOOR = {name: level for level, names in enumerate(FLOORS.values()) for name in names.split()}
STRANGERS = {("jobs", "state"), ("state", "jobs"), ("engine", "jobs"), ("engine", "state")}

# The public surface, in sorted order. A name is added here, to `__all__` and to the README (or its
# docstring) in one change; one that leaves is named in CHANGELOG.md.
PUBLIC = [
    "Again",
    "App",
    "Batch",
    "Concurrent",
    "Dead",
    "Delivery",
    "Done",
    "Message",
    "Rate",
    "Reject",
    "Release",
    "Respond",
    "Retention",
    "Retry",
    "RetryAfter",
    "progress",
    "respond_to",
    "steps",
    "until_and_while_executing",
    "until_executed",
    "until_executing",
    "until_expired",
    "while_executing",
]

HEAVY = {"apsw", "sqlite3", "confluent_kafka", "redis", "click", "rich", "pydantic", "watchfiles", "starlette"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name (`engine`, `app`, ... or `__init__`) of each import from the package itself."""
    folder = ("barnabas", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = [*start, *(node.module.split(".") if node.module else [])]
            targets = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "barnabas":
                name = target[1] if len(target) > 1 else "__init__"
                yield node.lineno, name if exists(name) else "__init__"


def exists(module: str) -> bool:
    return (PACKAGE / module).is_dir() or (PACKAGE / f"{module}.py").exists()


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_has_a_floor():
    homeless = {home(path) for path in FILES} - FLOOR.keys()
    assert not homeless, f"{homeless} stand on no floor: add them to FLOORS, or merge them into a file that does"


def test_floors():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} ({home(path)}) imports {target}"
        for path in FILES
        for line, target in imports(path)
        if FLOOR[target] > FLOOR[home(path)] or (home(path), target) in STRANGERS
    ]
    assert not wrong, "\n".join(wrong)


def test_lengths():
    code = {path: path.read_text().count("\n") for path in PACKAGE.rglob("*") if path.suffix in {".py", ".sql", ".lua"}}
    long = [f"{path.relative_to(ROOT)}: {lines} lines (500)" for path, lines in code.items() if lines > 500]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines (60)")
    assert not long, "\n".join(long)
    assert sum(map(lines_of_code, FILES)) < 15_800  # to come down to 10,000 again: what is told twice is told once


LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring (every public thing is to have one)."""
    text = path.read_text()
    code: set[int] = set()
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def test_public_surface():
    assert sorted(PUBLIC) == PUBLIC == list(barnabas.__all__), "see PUBLIC in this file for how a name comes and goes"
    assert not [name for name in PUBLIC if not hasattr(barnabas, name)]


def test_changelog_and_version_agree():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == barnabas.__version__


def python(*arguments: str) -> str:
    """Runs a fresh interpreter that sees the package; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_import_loads_no_driver():
    loaded = set(python("-c", "import sys, barnabas; print(*sys.modules)").split())
    assert not loaded & HEAVY
    windows = {f"barnabas.{name}" for name in FLOORS["windows"].split()}
    assert not loaded & windows


BARE, MSGSPEC = ["-c", "pass"], ["-c", "import msgspec"]


@pytest.mark.parametrize(
    ("code", "beyond", "limit"),  # beyond: what an interpreter takes that does nothing
    [
        (["-c", "import barnabas"], True, 0.060),
        (["-c", "import sys; from barnabas.cli import main; sys.exit(main())", "--help"], False, 0.150),
    ],
    ids=["import", "help"],
)
def test_start_is_quick(code: list[str], beyond: bool, limit: float, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # an installed package is compiled once
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    # The minimum is what the code costs; what is above it belongs to the machine's other work.
    def seconds(arguments: list[str]) -> float:
        began = perf_counter()
        python(*arguments)
        return perf_counter() - began

    # The limits are for a machine that imports msgspec in 30 ms; a slower one may take longer, in proportion.
    whole = bare = known = math.inf
    for _ in range(40):
        whole, bare, known = (min(pair) for pair in ((whole, seconds(code)), (bare, seconds(BARE)), (known, seconds(MSGSPEC))))
        took, most = whole - bare if beyond else whole, limit * max(1.0, (known - bare) / 0.030)
        if took <= most:
            break
    assert took <= most, f"{took * 1000:.0f} ms of {most * 1000:.0f}; `python -X importtime` shows where they go"
