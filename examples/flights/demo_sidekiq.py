"""The notices of the late departures as jobs on Redis, half of them done by a real Sidekiq (if it is installed), and Sidekiq's
web page to look at it. Starts and ends a redis-server of its own."""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo import HERE, barnabas, console, read, send


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--limit", type=int, help="only so many departures")
    options.add_argument("--build", type=Path, default=HERE.parents[1] / "build", help="where files go")
    given = options.parse_args()
    build = given.build.resolve()
    build.mkdir(parents=True, exist_ok=True)
    for old in build.glob("flights.db*"):
        old.unlink()
    if not shutil.which("redis-server"):
        sys.exit("redis-server is not installed; Debian's package has that name")
    ports = free_ports(2)
    url, page = f"redis://127.0.0.1:{ports[0]}/0", f"http://127.0.0.1:{ports[1]}"
    os.environ |= {"BARNABAS_EVENTS_URL": f"sqlite:///{build / 'flights.db'}", "BARNABAS_JOBS_URL": url, "REDIS_URL": url}
    with contextlib.ExitStack() as stack:
        start = lambda *command: stack.enter_context(running(build, *command))  # noqa: E731
        start("redis-server", "--port", str(ports[0]), "--bind", "127.0.0.1", "--save", "", "--dir", str(build))
        wait_until(lambda: listens(ports[0]))
        if shutil.which("puma") and shutil.which("sidekiq"):
            start("puma", "-b", page.replace("http", "tcp"), str(HERE / "web.ru"))
            wait_until(lambda: listens(ports[1]))
            console.print(f"Sidekiq's web page: {page}")
        else:
            page = ""
            console.print("puma or Sidekiq is not installed: there is no web page (Debian: ruby-sidekiq puma)")
        figures = work(given.limit, start)
        (build / "sidekiq.json").write_text(json.dumps(figures | {"page": page}, indent=2) + "\n")
        by_ruby = f", {figures['ruby']:,} of them by Ruby's Sidekiq" if figures["ruby"] else " (Sidekiq is not installed)"
        said = f"{figures['delays']:,} departures were late; {figures['told']:,} notices were given{by_ruby}"
        console.print(said, soft_wrap=True)
        if page and sys.stdin.isatty():
            console.input(f"Look at {page}, then press Enter: ")


def work(limit: int | None, start: Callable[..., Any]) -> dict[str, int]:
    """Find the late departures, let Sidekiq do half of the notices, and Python what is left."""
    import flights

    send(limit)
    barnabas("run", "flights:app", "--drain", "--only", "late", "--only", "tell")
    client = flights.app.jobs.client
    delays = client.llen("queue:notices")
    if shutil.which("sidekiq"):
        # Alone it would need four seconds; Python begins in time to find half of them.
        start("sidekiq", "-r", str(HERE / "notify.rb"), "-q", "notices", "-c", str(max(2, delays // 400)))
        wait_until(lambda: client.hlen("told by ruby") >= 0.3 * delays, 120)
    barnabas("run", "flights:app", "--drain", "--only", "queue:notices")
    by_ruby = {jid.decode() for jid in client.hkeys("told by ruby")}
    by_python = {notice["id"] for notice in read("notified")}
    return {"delays": delays, "told": len(by_ruby | by_python), "ruby": len(by_ruby), "python": len(by_python)}


@contextlib.contextmanager
def running(build: Path, *command: str) -> Iterator[None]:
    """A program, until the end; what it says goes into the build folder."""
    with open(build / f"{command[0]}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(40)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit("a program does not get on: see the .log files in the build folder")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
