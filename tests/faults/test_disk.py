"""The disk is full: a clear error, nothing acknowledged that is not stored, and work goes on by itself when there is room."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shops import SOURCE, Shop, opened, skip_at_home, until

from barnabas.errors import BackendError

shop = pytest.fixture(name="shop")(opened)
pytestmark = pytest.mark.slow
SIZE = 6 << 20
INSIDE = "FAULTS_INSIDE"  # this test runs itself again where it may mount


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of SIZE bytes of the test's own: mounted by root, or by nobody in particular in a namespace of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "barnabas", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    elif INSIDE in os.environ or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        skip_at_home("neither root nor user namespaces may mount a file system here")
    else:
        again = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
        run = subprocess.run(again, env=os.environ | {INSIDE: "1"}, cwd=request.config.rootpath, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout
        pytest.skip("it ran, and passed, in a namespace of its own")


def by_mount(shop: Shop, small: Path) -> Callable[[], None]:
    """The file lies where there is little room; returns what makes more."""
    shop.path, shop.url = small / "shop.db", f"sqlite:///{small}/shop.db"
    return lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True) and None


def by_limit(shop: Shop) -> Callable[[], None]:
    """No file of our processes may be larger (EFBIG in place of ENOSPC: also what a quota's EDQUOT looks like to SQLite)."""

    def limit(size: int) -> None:
        for process in shop.team:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(SIZE)
    return lambda: limit(200 << 20)


@pytest.mark.parametrize("how", ["mount", "limit"])
def test_full_while_workers_and_senders_run(shop: Shop, request: pytest.FixtureRequest, how: str) -> None:
    relieve = by_mount(shop, request.getfixturevalue("small")) if how == "mount" else None
    workers = [shop.worker(log=f"worker{n}") for n in range(2)]
    until(lambda: len(shop.app.events.processes()) == 2, "both workers to begin")
    shop.module.note.enqueue_many([(n, 1.0) for n in range(80)]).result(10)  # some are in work when it happens
    senders = [shop.sender(n, 2, pad=3000, log=f"sender{n}") for n in range(2)]
    until(lambda: len(shop.said("end", "step")) > 20, "work to begin")
    relieve = relieve or by_limit(shop)
    logs = [f"{kind}{n}" for kind in ("worker", "sender") for n in range(2)]
    word = "is full"
    until(lambda: all(word in shop.log(name) for name in logs[2:]), "the senders to say that the disk is full")
    until(lambda: any(word in shop.log(name) for name in logs[:2]), "a worker to say that the disk is full")
    acked = len(shop.ids("acked"))
    until(lambda: shop.said("refused"), "the buffer of a sender to be full")  # nothing is acknowledged meanwhile
    assert len(shop.ids("acked")) - acked < 50  # (a checkpoint may have made room for a few)
    assert all(process.poll() is None for process in [*workers, *senders])
    relieve()
    acked = len(shop.ids("acked"))
    until(lambda: len(shop.ids("acked")) > acked + 100, "sends to be stored again")
    shop.end(*senders)
    shop.check()
    assert not shop.ids("failed") and shop.ids("acked") == set(shop.stored()) and set(shop.stored().values()) == {1}
    shop.end(*workers)
    assert {int(words[-1]) for words in shop.said("end", "note")} == set(range(80))
    for name in logs:
        lines = shop.log(name).splitlines()
        # One line a change and speaker: a worker's three runners and its buffer, a sender's buffer. (It may be full twice.)
        assert sum(word in line for line in lines) <= (8 if "worker" in name else 2), lines
        assert any("again" in line for line in lines) and not any("Traceback" in line for line in lines), lines


@pytest.mark.parametrize("what", ["worker", "send"])
def test_full_from_the_start(shop: Shop, small: Path, what: str) -> None:
    """What begins on a full disk says so; the next try, with room, works."""
    relieve = by_mount(shop, small)
    shop.app.events.declare(shop.app.all_topics())
    shop.app.close()
    ballast = os.open(small / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while os.write(ballast, bytes(1000)):
            pass
    os.close(ballast)
    if what == "worker":
        worker = shop.worker("--drain")
        until(lambda: worker.poll() is not None, "the worker to end")
        assert worker.returncode == 1 and "is full" in shop.log() and "Traceback" not in shop.log(), shop.log()
        relieve()
        worker = shop.worker("--drain")
        until(lambda: worker.poll() is not None, "the worker to drain")
        assert worker.returncode == 0, shop.log()
    else:
        with pytest.raises(BackendError, match="full"):
            shop.module.items.send(shop.module.Item(1, "a"))
        (small / "ballast").unlink()
        assert shop.module.items.send(shop.module.Item(1, "a")).result(10).offset == 0


def test_a_process_starts_on_a_full_disk(small: Path) -> None:
    """Its box is mapped memory: a page that the disk has no room for would kill it (SIGBUS)."""
    (small / "x").write_bytes(bytes(100))
    ballast = os.open(small / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while os.write(ballast, bytes(1000)):
            pass
    os.close(ballast)
    code = f"from barnabas.backends.host import Life; Life({str(small / 'x')!r}, 1)"
    environ = os.environ | {"PYTHONPATH": str(SOURCE)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert ended.returncode == 1 and "No space left on device" in ended.stderr, ended
