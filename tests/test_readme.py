"""The README is true: its code is run, its commands are followed literally, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.M | re.S)


def run(command: str, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("BARNABAS_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, shell=True, cwd=folder, env=env, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_is_followed_literally(tmp_path: Path) -> None:
    app, tests = blocks("python")
    (tmp_path / "shop.py").write_text(app)
    out = {}
    for line in blocks("console")[0].splitlines():
        command = line.removeprefix("$ ")
        out[command] = run(command, tmp_path)
    send, drain, table, read, flow = out.values()
    assert send == "stored at offset 0\n"
    assert drain.count("mail for order") == 11
    assert "10" in table
    assert "for order" in read
    assert "orders =>" in flow and "receipts" in flow
    (tmp_path / "kit.py").write_text(tests)
    run("python kit.py", tmp_path)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200
