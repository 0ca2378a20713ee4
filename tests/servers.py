"""Real servers for tests, on free ports of 127.0.0.1, started when a test first asks and ended with the test run.

Where a program is missing its tests skip, and fail in CI.
"""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest


def need(*programs: str) -> None:
    """Skip the test, or fail it in CI, for want of a program."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not found: {', '.join(missing)}; .ci/run installs them")


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:  # a cluster's nodes listen 10,000 above as well
            return port


class RedisServer:
    """A redis-server that can be killed and started again. `durable`: it has on disk what it has answered."""

    def __init__(self, folder: Path | str, *, durable: bool = False, options: tuple[str, ...] = ()) -> None:
        need("redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        sync = ("--appendonly", "yes", "--appendfsync", "always") if durable else ("--appendonly", "no")
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._command += [*sync, *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        import redis

        end = time.monotonic() + 60
        while True:
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
                return
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert self.process.poll() is None and time.monotonic() < end, "redis-server did not start"
                time.sleep(0.02)

    def end(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


@cache
def shared_redis() -> RedisServer:
    """One server for all tests that bring a prefix or a database of their own."""
    folder = tempfile.TemporaryDirectory()
    server = RedisServer(folder.name)

    def end() -> None:
        server.end(signal.SIGKILL)
        folder.cleanup()

    atexit.register(end)
    return server


@cache
def shared_kafka() -> str:
    """The bootstrap servers of one broker for all tests that bring a prefix of their own: a running one, if
    BARNABAS_TEST_KAFKA names it, else one from `dev/kafka`."""
    if "BARNABAS_TEST_KAFKA" in os.environ:
        return os.environ["BARNABAS_TEST_KAFKA"]
    need("java", "mvn")
    folder = tempfile.TemporaryDirectory()
    command, where = [sys.executable, str(Path(__file__).parents[1] / "dev" / "kafka")], ["--dir", f"{folder.name}/kafka"]

    def end() -> None:
        subprocess.run([*command, "stop", *where], check=True)
        folder.cleanup()

    atexit.register(end)
    started = subprocess.run([*command, "start", "--session", "3", *where], stdout=subprocess.PIPE, check=True, text=True)
    return started.stdout.strip()


def murmur2(data: bytes) -> int:
    """The hash by which Kafka's clients choose partitions, from its definition."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if data[whole:]:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15
