"""How long a command takes to start."""

import os
import subprocess
import sys
from time import perf_counter

from kit import Figure, Row, bench


def milliseconds(runs: int, *arguments: str) -> float:
    """What a fresh interpreter takes, its own start included: the least of the runs, the rest is the machine's."""
    times, compiled = [], {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as what pip installs is
    for _ in range(runs + 1):
        began = perf_counter()
        subprocess.run([sys.executable, *arguments], env=compiled, stdout=subprocess.DEVNULL, check=True)  # a timeout would poll
        times.append(1000 * (perf_counter() - began))
    return min(times)


@bench(
    7,
    1,
    Row("`barnabas --help`", 150, "ms", "ms", at_most=True, note="raw: an interpreter that does nothing"),
    Row("`import barnabas`", 60, "ms", "ms", at_most=True, note="raw: an interpreter that does nothing"),
    Row("of which: `import msgspec` alone, the interpreter's start included", None, "ms", "ms"),
)
def start(n: int, turn: int) -> list[Figure]:
    bare = milliseconds(n, "-c", "pass")
    help_ = milliseconds(n, "-m", "barnabas", "--help")
    import_ = milliseconds(n, "-c", "import barnabas")
    codec = milliseconds(n, "-c", "import msgspec")
    return [Figure(help_, bare, help_), Figure(import_, bare, import_), Figure(codec, bare, codec)]
