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
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
SRC = HERE.parent / "src"
YARD = 0.26  # us of the yardstick where the targets were set (0.21 to 0.26)
THEMES = ("topics", "processes", "jobs", "failover", "engine", "start", "kafka", "redis_jobs", "batches", "limits")  # a file each
HEAD = ["what", "target", "reached", "", "raw", "Barnabas"]
sys.path.insert(0, str(SRC))


def disk(folder: str) -> float:
    """Milliseconds of an fdatasync: what durability costs here."""
    times = []
    with TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            began = perf_counter()
            os.fdatasync(file.fileno())
            times.append(1000 * (perf_counter() - began))
    return statistics.median(times)


def yardstick() -> float:
    """Microseconds to decode a small order and call a function with it: how fast this machine is just now."""
    import msgspec
    from kit import Order

    decode, data, call = msgspec.json.Decoder(Order).decode, msgspec.json.encode(Order(1, "c1", 1.5)), lambda order: None
    times = []
    for _ in range(9):
        began = perf_counter()
        for _ in range(20_000):
            call(decode(data))
        times.append((perf_counter() - began) / 20_000 * 1e6)
    return statistics.median(times)


def machine(folder: str) -> dict[str, str]:
    """What the figures were taken on."""
    import apsw

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "system": f"{platform.system()} {platform.release()}, fdatasync {disk(folder):.2f} ms",
        "versions": f"Python {platform.python_version()}, SQLite {apsw.sqlite_lib_version()}, "
        f"apsw {apsw.apsw_version()}, msgspec {version('msgspec')}",
    }


def one_round(name: str, n: int, turn: int, folder: str) -> list[Any]:
    """A bench's figures of one round, from a process of its own."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("BARNABAS_") and k != "PYTHONDONTWRITEBYTECODE"}
    keep["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "run.py"), "--round", name, str(n), str(turn)]
    done = subprocess.run(command, cwd=folder, env=keep, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit status {done.returncode}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if isinstance(figures, str):
        raise import_module("kit").Missing(figures)
    return figures


def show(value: float | None, unit: str) -> str:
    """A figure with its unit."""
    if value is None:
        return ""
    if unit == "/s":
        return f"{value:,.0f}/s" if value < 100_000 else f"{value / 1000:,.0f} k/s"
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:.{2 if value < 1 or unit == 'us' else 1 if value < 10 else 0}f} {unit}"


def summary(bench: Any, index: int, rounds: list[Any]) -> dict[str, Any]:
    """The line of one row: medians of all rounds."""
    row = bench.rows[index]
    values, *sides = zip(*(figures[index] for figures in rounds), strict=True)
    raw, ours = (None if None in side else statistics.median(side) for side in sides)
    if row.percent is None:
        figure = statistics.median(values)
    else:
        every = [each for value in values for each in value]
        figure = ours = statistics.quantiles(every, n=100, method="inclusive")[row.percent - 1]
    ok = None if row.target is None else figure <= row.target if row.at_most else figure >= row.target
    each = [statistics.median(value) if isinstance(value, list) else value for value in values]
    found = {"figure": figure, "ok": ok, "raw": raw, "ours": ours, "rounds": each}
    return {"bench": bench.name, "n": bench.n, **row._asdict(), **found}


def cells(row: dict[str, Any], yard: float) -> list[str]:
    """A row of the table, as text; `yard`: what the yardstick took, by which a missed target in microseconds is judged, too."""
    target = "" if row["target"] is None else f"{'≤' if row['at_most'] else '≥'} {show(row['target'], row['unit'])}"
    ok = {True: "ok", False: "**no**", None: ""}[row["ok"]]
    if row["ok"] is False and row["unit"] == "us":
        ok = f"{ok} ({show(row['figure'] * min(1.0, YARD / yard), 'us')} at the yardstick's {YARD} us)"
    what = row["what"] + (f" ({row['note']})" if row["note"] else "")
    shown = [show(row["figure"], row["unit"]), ok, show(row["raw"], row["each"]), show(row["ours"], row["each"])]
    return [what, target, *shown]


def write(
    about: dict[str, str], rounds: int, rows: list[dict[str, Any]], table: list[list[str]], missing: dict[str, None]
) -> None:
    """RESULTS.md and results.json."""
    about |= {"left out": "; ".join(missing)} if missing else {}
    lines = [" | ".join(line) for line in (HEAD, ["---"] * len(HEAD), *table)]
    text = f"""# Figures

Written by `make bench`; do not edit. Each figure is the median of {rounds} rounds, the raw loop and Barnabas in turn in
each. Ratios hold, absolutes move.

{chr(10).join(f"- {name}: {value}" for name, value in about.items())}

{chr(10).join(f"| {line} |" for line in lines)}
"""
    (HERE / "RESULTS.md").write_text(text)
    data = {"about": about, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def measure(benches: list[Any], rounds: int, quick: bool, all_of_them: bool) -> int:
    """Run the benches and show what came out; returns the exit status."""
    from kit import Missing
    from rich.console import Console
    from rich.table import Table

    console, rows, failures, missing, yards = Console(), [], 0, {}, []
    build = HERE.parent / "build"  # not /tmp, which may be memory: durability would cost nothing there
    build.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=build) as folder, ExitStack() as servers, console.status("") as status:
        about = machine(folder)
        for bench in benches:
            figures = []
            yards.append(yardstick())
            try:
                if bench.server is not None and bench.server.__name__.upper() not in os.environ:
                    status.update(f"{bench.name}: {bench.server.__name__}")
                    os.environ[bench.server.__name__.upper()] = servers.enter_context(bench.server(folder))
                for turn in range(rounds):
                    status.update(f"{bench.name}, round {turn + 1} of {rounds}")
                    figures.append(one_round(bench.name, bench.tiny if quick else bench.n, turn, folder))
                rows += [summary(bench, index, figures) for index in range(len(bench.rows))]
            except Missing as why:
                missing[str(why)] = None
            except (RuntimeError, subprocess.SubprocessError) as error:
                failures += 1
                missing[f"{bench.name}, which failed"] = None
                console.print(f"{bench.name} failed:\n{error}", markup=False, highlight=False)
    yard = statistics.median(yards)
    about["yardstick"] = (
        f"decoding a small order and calling takes {yard:.2f} us ({min(yards):.2f} to {max(yards):.2f} during the run); "
        f"the targets in microseconds were set where it took 0.21 to {YARD}"
    )
    lines = [cells(row, yard) for row in rows]
    table = Table(*HEAD, title=f"{about['date']}, {about['machine']}, yardstick {yard:.2f} us")
    for line in lines:
        table.add_row(*(text.replace("*", "").replace("`", "") for text in line))
    console.print(table)
    for why in missing:
        console.print(f"left out: {why}", markup=False, highlight=False)
    if quick or not all_of_them:
        console.print("nothing was written: that takes a run of everything")
    else:
        write(about, rounds, rows, lines, missing)
        console.print(f"written to {HERE / 'RESULTS.md'}")
    return 1 if failures else 0


def main() -> int:
    for theme in THEMES:
        import_module(theme)
    kit = import_module("kit")
    benches = kit.BENCHES
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=[*THEMES, *benches], help="these benches, or this one")
    parser.add_argument("--quick", action="store_true", help="a few messages, one round: does it work?")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each bench (5)")
    parser.add_argument("--round", nargs=3, help=argparse.SUPPRESS)  # NAME N TURN: in a process of its own
    given = parser.parse_args()
    if given.round:
        name, n, turn = given.round
        try:
            print(json.dumps(benches[name].run(int(n), int(turn))))
        except kit.Missing as why:
            print(json.dumps(str(why)))
        return 0
    only = given.only or benches
    chosen = [bench for name, bench in benches.items() if name in only or bench.run.__module__ in only]
    return measure(chosen, 1 if given.quick else given.rounds, given.quick, not given.only)


if __name__ == "__main__":
    sys.exit(main())
