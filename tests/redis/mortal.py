"""A worker that dies by SIGKILL at its n-th command to Redis. Each line on stdin is one life: the URL, a folder, when it dies,
at which command, whether its jobs are unique; each line on stdout is how it ended (0: it had nothing left to do before)."""

import os
import signal
import sys
import threading
import time
from functools import partialmethod
from typing import Any

from redis.connection import AbstractConnection

from barnabas import App, Reject, RetryAfter, until_and_while_executing
from barnabas.backends import redis_life
from barnabas.backends.redis_outbox import Wire
from barnabas.worker import Worker

HASTE = {"LEASE": 2, "RENEW": 0.3, "SCAN": 0.05, "CALM": 0.0, "TICK": 0.05}
JOBS = {*range(10), 100}
LINES: dict[str, list[tuple[type, str]]] = {  # whatever sends, whatever reads an answer
    "send_packed_command": [(AbstractConnection, "send_packed_command"), (Wire, "write")],
    "read_response": [(AbstractConnection, "read_response"), (Wire, "refused")],
}


def shop(url: str, folder: str, unique: bool) -> App:
    """An app whose jobs leave a line each in a file, and fail at times."""
    app = App("steps", events="memory:", jobs=url, threads=2, checkpoint_interval=0.01)
    witness = os.open(f"{folder}/ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @app.job(queue="a", retry=10, unique=until_and_while_executing(by=lambda n: n % 2) if unique else None)
    def work(n: int) -> None:
        os.write(witness, b"%d\n" % n)
        if n == 0:
            work.enqueue(100)
        elif n == 3:
            raise Reject("no")
        elif n == 1 and not os.path.exists(f"{folder}/failed"):
            os.close(os.open(f"{folder}/failed", os.O_CREAT))
            raise RetryAfter(0.01)

    return app


def live(url: str, folder: str, when: str, at: int, unique: bool) -> None:
    """A life up to its end: before the command leaves, with half of it on the way, or when it is answered."""
    count, lock = 0, threading.Lock()

    def counted(connection: Any, real: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        with lock:
            count += 1
            if count == at:
                if when == "half":
                    data = args[0] if isinstance(args[0], bytes) else b"".join(args[0])
                    connection._sock.sendall(data[: len(data) // 2])
                elif when == "answered":
                    real(connection, *args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(connection, *args, **options)

    for place, name in LINES["read_response" if when == "answered" else "send_packed_command"]:
        setattr(place, name, partialmethod(counted, getattr(place, name)))
    app = shop(url, folder, unique)
    worker = Worker(app)
    worker.start()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with open(f"{folder}/ran") as file:
            if {*map(int, file)} == JOBS and os.path.exists(f"{folder}/failed"):
                break
        time.sleep(0.005)
    held = worker.stop(5.0)
    app.close()
    os._exit(len(held))


if __name__ == "__main__":
    for constant, seconds in HASTE.items():
        setattr(redis_life, constant, seconds)
    for line in sys.stdin:
        url, folder, when, at, unique = line.split()
        child = os.fork()
        if child == 0:
            live(url, folder, when, int(at), unique == "True")
        print(os.waitpid(child, 0)[1], flush=True)
