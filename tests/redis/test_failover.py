"""Sentinel and TLS: the master dies, and both sides go on with the replica; a line that nobody reads along."""

import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import redis
from servers import RedisServer, free_port, need

from barnabas import App
from barnabas.errors import BackendError
from barnabas.worker import Worker

pytestmark = pytest.mark.slow


def until(condition, seconds=40.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def start_sentinel(folder: Path, port: int, master: int) -> "subprocess.Popen[bytes]":
    (folder / "sentinel.conf").write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor jobs 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds jobs 500\nsentinel failover-timeout jobs 2000\n"
    )
    command = ["redis-server", str(folder / "sentinel.conf"), "--sentinel"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_both_sides_follow_sentinel_to_the_new_master(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    master = RedisServer(tmp_path / "a", durable=True)
    replica = RedisServer(tmp_path / "b", durable=True, options=("--replicaof", "127.0.0.1", str(master.port)))
    port = free_port()
    sentinel = start_sentinel(tmp_path, port, master.port)
    app = App("shop", events="memory:", jobs=f"redis://127.0.0.1:{port}/0?sentinel=jobs", send_timeout=40.0)
    ran, lock = [], threading.Lock()

    @app.job
    def mail(n: int):
        with lock:
            ran.append(n)

    try:
        client = redis.Redis(port=replica.port)
        until(lambda: client.info("replication")["master_link_status"] == "up")
        with redis.Redis(port=port) as watch:
            until(lambda: watch.sentinel_master("jobs")["num-slaves"] == 1)
        worker = Worker(app)
        worker.start()
        mail.enqueue_many((n,) for n in range(100)).result(20)
        until(lambda: len(ran) == 100)
        until(lambda: client.get("stat:processed") == b"100")  # the replica has it all
        master.end(signal.SIGKILL)
        futures = [mail.enqueue(n) for n in range(100, 200)]
        assert {future.result(40) is not None for future in futures} == {True}
        until(lambda: set(ran) == set(range(200)))
        assert client.info("replication")["role"] == "master"
        assert not worker.stop(10.0)
        client.close()
    finally:
        app.close()
        for process in (sentinel, master.process, replica.process):
            process.kill()
            process.wait()


def test_a_line_with_tls(tmp_path):
    need("openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    port, cert = free_port(), str(tmp_path / "cert.pem")
    tls = ("--tls-port", str(port), "--tls-cert-file", cert, "--tls-key-file", str(tmp_path / "key.pem"))
    server = RedisServer(tmp_path, options=(*tls, "--tls-ca-cert-file", cert, "--tls-auth-clients", "no"))
    seen: list[int] = []
    app = App("shop", events="memory:", jobs=f"rediss://127.0.0.1:{port}/0", redis={"ssl_ca_certs": cert})
    try:
        mail = app.job(seen.append, name="mail")
        mail.enqueue_many((n,) for n in range(50)).result(10)
        worker = Worker(app)
        worker.start()
        until(lambda: len(seen) == 50)
        mail.enqueue(50).result(10)
        until(lambda: len(seen) == 51)
        assert not worker.stop(10.0)
        with pytest.raises(BackendError, match="certificate"):
            App("other", events="memory:", jobs=f"rediss://127.0.0.1:{port}/0").jobs  # noqa: B018
    finally:
        app.close()
        server.end(signal.SIGKILL)
