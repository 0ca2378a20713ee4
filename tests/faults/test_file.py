"""The file is deleted, moved away, replaced, damaged, or may not be written: a clear error, nothing acknowledged that is not in
the file that everybody finds, and work goes on by itself when the cause is gone."""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import apsw
import pytest
from shops import Shop, opened, skip_at_home, until

from barnabas.errors import BackendError

shop = pytest.fixture(name="shop")(opened)


def at_work(shop: Shop, workers: int = 2, senders: int = 2) -> tuple[list, list]:
    """Workers and senders that have begun."""
    team = [shop.worker(log=f"worker{n}") for n in range(workers)]
    until(lambda: len(shop.app.events.processes()) == workers, "the workers to begin")
    sending = [shop.sender(n, senders, log=f"sender{n}") for n in range(senders)]
    until(lambda: len({n % senders for n in shop.ids("acked")}) == senders, "the senders to begin")
    until(lambda: len(shop.said("end", "step")) > 50, "work to begin")
    return team, sending


def rests(path: Path) -> bool:
    size = path.stat().st_size
    time.sleep(1.0)
    return path.stat().st_size == size


def everywhere(shop: Shop, word: str, kinds: str = "worker sender") -> bool:
    return all(word in shop.log(f"{kind}{n}") for kind in kinds.split() for n in range(2))


@pytest.mark.slow
def test_moved_away_and_back(shop: Shop) -> None:
    """The same file: whoever had it open goes on where it was, and everything is exact."""
    workers, senders = at_work(shop)
    os.rename(shop.path, shop.folder / "away")
    until(lambda: everywhere(shop, "deleted or moved away"), "everybody to notice")
    acked = shop.ids("acked")
    time.sleep(0.5)
    assert shop.ids("acked") == acked
    with pytest.raises(BackendError, match="deleted or moved away"):
        shop.app.events.topics()
    os.rename(shop.folder / "away", shop.path)
    until(lambda: len(shop.ids("acked")) > len(acked) + 200, "sends to be stored again")
    shop.end(*senders)
    shop.check()
    assert shop.ids("acked") == set(shop.stored())
    shop.end(*workers)
    for name in ("worker0", "worker1", "sender0", "sender1"):
        lines = shop.log(name).splitlines()
        assert sum("moved away" in line for line in lines) <= 4 and not any("Traceback" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "all", "folder"])
def test_deleted(shop: Shop, what: str) -> None:
    """Nobody goes on with what is gone: what was not acknowledged by then goes into the file that is made next."""
    shop.path = shop.folder / "home" / "shop.db"
    shop.url = f"sqlite:///{shop.path}"
    shop.path.parent.mkdir()
    workers, senders = at_work(shop)
    shop.close_apps()
    before = len(shop.witness.read_text().splitlines())
    if what == "folder":
        shutil.rmtree(shop.path.parent)
    else:
        for path in sorted(shop.path.parent.glob("shop.db*" if what == "all" else "shop.db"), reverse=True):
            path.unlink()
    until(lambda: everywhere(shop, "deleted or moved away"), "everybody to notice")
    assert not shop.path.exists() and all(process.poll() is None for process in shop.team)
    until(lambda: rests(shop.witness), "handlers to end that had work of it")  # they say so, and their offsets are of that file
    lost = shop.ids("acked")  # with the file
    if what == "folder":
        shop.path.parent.mkdir()
    shop.witness.write_text("")
    workers.append(shop.worker(log="worker2"))  # makes a new one
    until(lambda: len({words[0] for words in shop.said("begin", "step")}) == 3, "all workers to share the new file's work")
    until(lambda: len(shop.ids("acked")) > 200, "sends to be stored again")
    shop.end(*senders)
    assert before and lost
    stored = shop.stored()
    sent = shop.ids("acked")
    assert sent <= set(stored)
    for n in range(2):  # each was acknowledged, before or after
        own = {id_ for id_ in sent if id_ % 2 == n}
        assert set(range(n, max(own), 2)) <= sent | lost
    shop.check()
    shop.end(*workers)
    assert shop.integrity() == "ok"


@pytest.mark.slow
def test_replaced_by_a_backup(shop: Shop) -> None:
    """Another file of the same app in its place, nobody stopped: all go on with that one, and it stays whole."""
    workers, senders = at_work(shop)
    backup = shop.folder / "backup.db"
    copy, db = apsw.Connection(str(backup)), apsw.Connection(str(shop.path))
    with copy.backup("main", db, "main") as all_of_it:
        all_of_it.step()
    copy.close(), db.close()
    until(lambda: len(shop.ids("acked")) > 300, "more to be sent than the backup has")
    shop.close_apps()
    os.rename(backup, shop.path)
    until(lambda: everywhere(shop, "that one"), "everybody to use the other file")
    shop.witness.write_text("")
    until(lambda: len(shop.ids("acked")) > 300, "sends to be stored again")
    shop.end(*senders)
    until(shop.drained, "all to be handled")
    assert shop.ids("acked") <= set(shop.stored())
    assert {int(words[-1]) for words in shop.said("end", "step")} >= shop.ids("acked")
    shop.end(*workers)
    assert shop.integrity() == "ok"


@pytest.mark.parametrize("what", ["rubbish", "text", "empty folder", "sqlite", "partial", "newer"])
def test_what_is_no_file_of_ours_is_refused_and_left_as_it_is(shop: Shop, what: str) -> None:
    path = shop.path
    if what == "empty folder":
        path.mkdir()
    elif what == "sqlite":
        with apsw.Connection(str(path)) as db:
            db.execute("CREATE TABLE jobs (mine)")
        db.close()
    elif what == "partial":
        shop.app.events.declare([shop.module.items])
        shop.close_apps()
        path.write_bytes(path.read_bytes()[:8192])
    elif what == "newer":
        shop.app.events.declare([shop.module.items])
        shop.close_apps()
        with apsw.Connection(str(path)) as db:
            db.pragma("user_version", 99)
        db.close()
    else:
        path.write_bytes(random.Random(1).randbytes(20_000) if what == "rubbish" else b"a text\n" * 2000)
    before = None if path.is_dir() else path.read_bytes()
    for _ in range(20):
        with pytest.raises(BackendError, match=str(path)):
            shop.app.topics["items"].send(shop.module.Item(1, "a")).result(5)
    worker = shop.worker("--drain")
    assert worker.wait(30) == 1 and "Traceback" not in shop.log() and f"Error: {path}" in shop.log(), shop.log()
    assert before is None or path.read_bytes() == before
    assert not [name for name in os.listdir("/proc/self/fd") if _open_at(name, path)]


def _open_at(fd: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(path))
    except OSError:
        return False


@pytest.mark.slow
def test_damaged_while_it_is_used(shop: Shop) -> None:
    """Pages full of rubbish: everybody says so and nobody crashes; with a backup in its place work goes on."""
    workers, senders = at_work(shop)
    shop.end(*senders)
    shop.check()
    db = apsw.Connection(str(shop.path))
    db.set_busy_timeout(5000)
    db.pragma("user_version")  # (it does not know of the log before it has read)
    assert db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE) == (0, 0)  # or nobody looks at the pages
    db.close()
    shop.close_apps()
    shutil.copy(shop.path, shop.folder / "backup.db")
    with open(shop.path, "r+b") as file:
        size = file.seek(0, 2)
        for at in range(4096, size, 4096):
            file.seek(at)
            file.write(random.Random(at).randbytes(4096))
    sender = shop.sender(10_001, 1, log="sender2")
    until(lambda: any("damaged;" in words for words in shop.said("refused")), "the sender to say so")
    until(lambda: everywhere(shop, "it is damaged", "worker"), "the workers to say so")
    assert all(process.poll() is None for process in [*workers, sender])
    os.rename(shop.folder / "backup.db", shop.path)
    until(lambda: len({n for n in shop.ids("acked") if n > 10_000}) > 200, "sends to be stored again")
    shop.end(sender)
    shop.check()
    shop.end(*workers)
    assert shop.integrity() == "ok"


# Root ignores modes unless it gives that right up.
BOUND = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")


@pytest.fixture
def bound() -> tuple[str, ...]:
    """What makes a process mind modes."""
    if os.geteuid() != 0:
        return ()
    if subprocess.run([*BOUND, "true"], capture_output=True).returncode != 0:
        skip_at_home("root cannot give up its right to ignore modes here")
    return BOUND


@pytest.mark.parametrize("what", ["file", "folder", "new", "missing", "in a file"])
def test_what_may_not_be_written(shop: Shop, bound: tuple[str, ...], what: str) -> None:
    """Refused at the start, in a sentence; a sender that lives on needs no restart once it may."""
    home = shop.folder / "home"
    shop.path = home / "shop.db"
    shop.url = f"sqlite:///{shop.path}"
    home.write_text("") if what == "in a file" else home.mkdir()
    if what in ("file", "folder"):
        shop.app.events.declare(shop.app.all_topics())
        shop.close_apps()
    if what == "folder":
        for path in home.glob("shop.db-*"):
            path.unlink()
    target, mode = (shop.path, 0o444) if what == "file" else (home, 0o555)
    target.chmod(mode) if what != "missing" else home.rmdir()
    worker = shop.worker("--drain", wrap=bound)
    sender = shop.sender(log="sender0", wrap=bound)
    assert worker.wait(30) == 1, shop.log()
    assert "Traceback" not in shop.log() and "Error: " + str(home) in shop.log(), shop.log()
    said = {"missing": "does not exist", "in a file": "does not exist"}.get(what, "this user may not write")
    assert said in shop.log(), shop.log()
    until(lambda: shop.said("refused"), "the sender to be refused")
    assert sender.poll() is None and not shop.ids("acked")
    if what == "in a file":
        home.unlink()
    home.mkdir() if what in ("missing", "in a file") else target.chmod(0o755)
    until(lambda: len(shop.ids("acked")) > 20, "sends to be stored")
    shop.end(sender)
    worker = shop.worker("--drain", wrap=bound)
    assert worker.wait(30) == 0, shop.log()
    shop.check()
