"""`make bench`: raw loops and Barnabas in turn; prints a table of ratios and writes RESULTS.md and results.json.

A row is the median of the rounds, each round of a bench a process of its own. `--only` and `--quick` write nothing.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
SRC = HERE.parent / "src"
THEMES = ("topics", "jobs", "engine", "start")  # a file each
sys.path.insert(0, str(SRC))


def disk(folder: Path) -> float:
    """Milliseconds of an fdatasync: what durability costs here."""
    path = folder / "disk"
    times = []
    with open(path, "wb") as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            file.flush()
            began = perf_counter()
            os.fdatasync(file.fileno())
            times.append(1000 * (perf_counter() - began))
    path.unlink()
    return statistics.median(times)


def machine(folder: Path) -> dict[str, str]:
    """What the figures were taken on."""
    import apsw

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "system": f"{platform.system()} {platform.release()}, fdatasync {disk(folder):.2f} ms",
        "Python": platform.python_version(),
        "SQLite": apsw.sqlite_lib_version(),
        "apsw": apsw.apsw_version(),
        "msgspec": version("msgspec"),
    }


def one_round(name: str, n: int, turn: int, folder: Path) -> list[Any]:
    """A bench's figures of one round, from a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BARNABAS_")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "run.py"), "--round", name, str(n), str(turn)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def show(value: float | None, unit: str) -> str:
    """A figure with its unit."""
    if value is None:
        return ""
    if unit == "x":
        return f"{value:.2f}x"
    if unit == "/s":
        return f"{value:,.0f}/s" if value < 100_000 else f"{value / 1000:,.0f} k/s"
    return f"{value:.2f} us" if unit == "us" else f"{value:.0f} {unit}"


def summary(bench: Any, index: int, rounds: list[Any]) -> dict[str, Any]:
    """The line of one row: medians of all rounds."""
    row = bench.rows[index]
    found: dict[str, Any] = {"bench": bench.name, "n": bench.n, **row._asdict()}
    values = [figures[index][0] for figures in rounds]
    found["figure"] = figure = statistics.median(values)
    found["rounds"] = values
    for at, side in ((1, "raw"), (2, "ours")):
        sides = [figures[index][at] for figures in rounds]
        found[side] = None if None in sides else statistics.median(sides)
    found["ok"] = None if row.target is None else figure <= row.target if row.at_most else figure >= row.target
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, as text."""
    target = "" if row["target"] is None else f"{'≤' if row['at_most'] else '≥'} {show(row['target'], row['unit'])}"
    ok = {True: "ok", False: "**no**", None: ""}[row["ok"]]
    what = row["what"] + (f" ({row['note']})" if row["note"] else "")
    shown = show(row["figure"], row["unit"])
    return [what, target, shown, ok, show(row["raw"], row["each"]), show(row["ours"], row["each"])]


HEAD = ["what", "target", "reached", "", "raw", "Barnabas"]


def markdown(about: dict[str, str], rounds: int, rows: list[dict[str, Any]]) -> str:
    """RESULTS.md."""
    lines = ["# Figures", "", "Written by `make bench`; do not edit. Each figure is the median of "]
    lines[-1] += f"{rounds} rounds, the raw loop and Barnabas in turn in each; ratios hold, absolutes move."
    lines += ["", *(f"- {name}: {text}" for name, text in about.items()), ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows), ""])


def measure(names: list[str], rounds: int, quick: bool) -> int:
    """Run the benches and show what came out; returns the exit status."""
    from kit import BENCHES
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows: list[dict[str, Any]] = []
    failures = 0
    build = HERE.parent / "build"  # not /tmp, which may be memory: durability would cost nothing there
    build.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=build) as folder, console.status("") as status:
        about = machine(Path(folder))
        for bench in [BENCHES[name] for name in names]:
            figures = []
            try:
                for turn in range(rounds):
                    status.update(f"{bench.name}, round {turn + 1} of {rounds}")
                    figures.append(one_round(bench.name, bench.tiny if quick else bench.n, turn, Path(folder)))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failures += 1
                console.print(f"{bench.name} failed:", style="red")
                console.print(str(error), markup=False, highlight=False)
                continue
            rows += [summary(bench, index, figures) for index in range(len(bench.rows))]
    table = Table(*HEAD, title=f"{about['date']}, {about['machine']}")
    for row in rows:
        table.add_row(*(text.replace("**", "").replace("`", "") for text in cells(row)))
    console.print(table)
    if quick or len(names) < len(BENCHES):
        console.print("nothing was written: that takes a run of everything")
    elif not failures:
        (HERE / "RESULTS.md").write_text(markdown(about, rounds, rows))
        data = {"about": about, "rounds": rounds, "rows": rows}
        (HERE / "results.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written to {HERE / 'RESULTS.md'}")
    return 1 if failures else 0


def main() -> int:
    for theme in THEMES:
        import_module(theme)
    from kit import BENCHES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(BENCHES), help="this bench alone (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="a few messages, one round: does it work?")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each bench (5)")
    parser.add_argument("--round", nargs=3, metavar=("NAME", "N", "TURN"), help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, metavar=("MODULE:FUNCTION", "ARGS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        module, function = given.part[0].split(":")
        getattr(import_module(module), function)(*json.loads(given.part[1]))
        return 0
    if given.round:
        name, n, turn = given.round
        print(json.dumps(BENCHES[name].run(int(n), int(turn))))
        return 0
    return measure(given.only or list(BENCHES), 1 if given.quick else given.rounds, given.quick)


if __name__ == "__main__":
    sys.exit(main())
