"""What is refused when a SQLite file is opened, how schemas move on, and what is beneath `barnabas db`."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import apsw
import pytest

from barnabas import App
from barnabas.backends import sqlite_read
from barnabas.backends.host import Life, look
from barnabas.backends.sqlite_care import backup, check, compact, expire
from barnabas.backends.sqlite_file import SCHEMA, SOUND, check_library, check_place, migrate, mounted
from barnabas.backends.sqlite_file import STEPS as OURS
from barnabas.errors import BackendError, Refused
from barnabas.worker import Worker

MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
tmpfs /home/local tmpfs rw 0 0
//server/share /mnt/with\\040blank cifs rw 0 0
me@host:/ /mnt/ssh fuse.sshfs rw,user_id=0 0 0
drvfs /mnt/c 9p rw,aname=drvfs;path=C:\\134,trans=fd 0 0
systemd-1 /auto autofs rw 0 0
server:/auto /auto nfs rw 0 0
/dev/sdb1 /mnt/usb fuseblk rw 0 0
"""


def open_app(path: Path) -> App:
    app = App("care", events=f"sqlite:///{path}", jobs=f"sqlite:///{path}")
    things = app.topic("things", partitions=2)

    @app.consumer(things, name="look")
    def look(thing: dict) -> None: ...

    @app.job(queue="slow")
    def later(number: int) -> None: ...

    return app


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with messages, positions and jobs."""
    app = open_app(tmp_path / "care.db")
    app.topics["things"].send_many({"n": n, "fill": "x" * 500} for n in range(2000)).result(30)
    app.job_handlers["later"].enqueue_many((n,) for n in range(10)).result(30)
    worker = Worker(app, only=["look"])
    worker.start()
    while not worker.drained():
        time.sleep(0.01)
    worker.stop()
    app.close()
    return tmp_path / "care.db"


def run(path: Path, sql: str) -> list[tuple]:
    with closing(apsw.Connection(str(path))) as db:
        return db.execute(sql).fetchall()


PAD = "CREATE TABLE pad AS WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT randomblob(1000) FROM n"


# Refusals.


@pytest.mark.parametrize("version", ["3.40.1", "3.51.2", "3.9.3"])
def test_an_old_library_is_refused(version):
    with pytest.raises(BackendError, match=f"SQLite {version} of this apsw has the WAL-reset bug.*pip install --upgrade 'apsw>="):
        check_library(version)


@pytest.mark.parametrize("version", ["3.51.3", "3.52.0", "4.0", apsw.sqlitelibversion()])
def test_a_sound_library_is_not(version):
    check_library(version)
    assert SOUND == (3, 51, 3)


@pytest.mark.parametrize(
    ("folder", "kind", "at"),
    [
        ("/srv", "ext4", "/"),
        ("/", "ext4", "/"),
        ("/home/me", "nfs4", "/home"),
        ("/homes", "ext4", "/"),
        ("/home/local/me", "tmpfs", "/home/local"),
        ("/mnt/with blank/x", "cifs", "/mnt/with blank"),
        ("/auto", "nfs", "/auto"),
        ("/mnt/c/x", "9p", "/mnt/c"),
    ],
)
def test_where_a_folder_is_mounted(folder, kind, at):
    assert mounted(folder, MOUNTS) == (kind, at)


@pytest.mark.parametrize("path", ["/home/me/a.db", "/mnt/with blank/a.db", "/mnt/ssh/a.db", "/mnt/c/a.db", "/auto/a.db"])
def test_a_network_file_system_is_refused(path):
    with pytest.raises(BackendError, match=r"lies on a network file system \(.*, mounted at /.*Put it on a local disk"):
        check_place(path, MOUNTS)


@pytest.mark.parametrize("table", [MOUNTS, "", "none / 9p rw 0 0\n", "overlay / overlay rw 0 0\n"])
def test_a_local_one_is_not(table):
    for path in ("/srv/a.db", "/home/local/a.db", "/mnt/usb/a.db") if table == MOUNTS else ("/srv/a.db",):
        check_place(path, table)


def test_opening_asks_all_of_it(tmp_path, monkeypatch):
    app = open_app(tmp_path / "a.db")
    monkeypatch.setattr(apsw, "sqlitelibversion", lambda: "3.51.2")
    with pytest.raises(BackendError, match="WAL-reset"):
        app.events.topics()
    monkeypatch.undo()
    monkeypatch.setattr("barnabas.backends.sqlite_file.mounted", lambda folder, table: ("nfs4", folder))
    with pytest.raises(BackendError, match=f"nfs4, mounted at {tmp_path}"):
        app.events.topics()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []  # and before anything is made
    began = time.perf_counter()
    for _ in range(100):
        check_place("/tmp/a.db")
    assert time.perf_counter() - began < 1.0


def test_a_file_system_without_shared_memory_is_refused(tmp_path, monkeypatch):
    """SQLite itself says so there: it stays with another journal. Its VFS without locks has no shared memory either."""
    monkeypatch.setattr(sqlite_read.apsw, "Connection", partial(apsw.Connection, vfs="unix-none"))
    with pytest.raises(BackendError, match="no shared memory"):
        sqlite_read.connect(str(tmp_path / "a.db"))


def test_a_file_has_the_same_locks_under_every_name(path, tmp_path):
    (tmp_path / "link.db").symlink_to(path)
    app = open_app(tmp_path / "link.db")
    assert app.events.path == str(path)
    app.close()
    assert not (tmp_path / "link.db-turn").exists()


def test_a_number_that_is_given_out_again_inherits_nothing(tmp_path):
    """A restored backup does so."""
    old = Life(str(tmp_path / "a.db"), 1)
    base = old.places(1)
    old.box[base] = 7
    old.abandon()  # as a kill does
    new = Life(str(tmp_path / "a.db"), 1)
    assert new.box[base] == 0
    new.close()


FORK = """
import os, sys, time
from barnabas import App
app = App("fork", events=f"sqlite:///{sys.argv[1]}", jobs=f"sqlite:///{sys.argv[1]}")
app.events.box(1)
turn = app.events.file.turn.take()
turn.__enter__()
if os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(30)
else:
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_holds_no_lock_though_a_child_that_it_forked_lives(tmp_path):
    command = [sys.executable, "-c", FORK, str(tmp_path / "a.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert not look(str(tmp_path / "a.db"), 1)[0]
        process.stdin.close()
        process.wait(30)
        dead = look(str(tmp_path / "a.db"), 1)[0]
        with open(tmp_path / "a.db-turn") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.kill(child, signal.SIGKILL)
    assert dead


CHILDREN = """
import multiprocessing, sys
from barnabas import App
app = App("children")
numbers, sent = app.topic("numbers", int), app.topic("sent", int)

def send(n):
    sent.send(n)  # nobody waits for it

def ask(n):
    child = multiprocessing.get_context("fork").Process(target=send, args=(n,))
    child.start(), child.join()

app.consumer(numbers, name="ask")(ask)
if __name__ == "__main__":
    numbers.send(2).result(5)
    ask(1)
    from barnabas.cli import main
    sys.argv[1:] = ["run", "--app", "children:app", "--drain"]
    main()
"""


def test_what_a_child_sends_is_stored_also_that_of_a_handler(tmp_path):
    (tmp_path / "children.py").write_text(CHILDREN)
    done = subprocess.run([sys.executable, "children.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with closing(open_app(tmp_path / "barnabas.db")) as app:
        assert [sum(end for _, end, _ in t.partitions) for t in app.events.topics() if t.name == "sent"] == [2], done.stderr


# Schemas.

FIRST = """
DROP INDEX jobs_lock; DROP INDEX jobs_run; DROP INDEX jobs_ready; CREATE INDEX jobs_ready ON jobs (queue, id) WHERE state = 0;
ALTER TABLE jobs DROP COLUMN lock; ALTER TABLE jobs DROP COLUMN run; ALTER TABLE jobs DROP COLUMN rank; DROP TABLE locks;
DROP TABLE slots; PRAGMA user_version = 1"""  # back to schema 1
STEPS = [*OURS, "CREATE TABLE more (a); INSERT INTO more SELECT count(*) FROM jobs", "ALTER TABLE more ADD COLUMN b"]
NEWEST = 1 + len(STEPS)


def test_a_new_file_has_the_newest_schema(path):
    assert run(path, "PRAGMA user_version") == [(SCHEMA,)]


def test_jobs_of_the_first_schema_are_as_they_were(path):
    now = run(path, "SELECT name FROM sqlite_schema ORDER BY name"), run(path, "SELECT * FROM jobs")
    run(path, FIRST)
    open_app(path).jobs.queue_states()
    assert (run(path, "SELECT name FROM sqlite_schema ORDER BY name"), run(path, "SELECT * FROM jobs")) == now


@pytest.mark.parametrize("have", range(1, NEWEST + 1))
def test_an_older_schema_is_brought_up_step_by_step(path, caplog, have):
    run(path, FIRST)
    with closing(apsw.Connection(str(path))) as db:
        migrate(db, str(path), STEPS[: have - 1])
        migrate(db, str(path), STEPS)
        migrate(db, str(path), STEPS)
        assert db.pragma("user_version") == NEWEST
        assert db.execute("SELECT a, b FROM more").fetchall() == [(10, None)]
    assert len(caplog.records) == (1 if have in (1, NEWEST) else 2)
    with pytest.raises(BackendError, match=f"has schema {NEWEST}, this Barnabas knows {SCHEMA}: upgrade Barnabas"):
        open_app(path).events.topics()


def test_a_step_that_fails_leaves_the_file_as_it_was(path):
    before = run(path, "SELECT name, sql FROM sqlite_schema")
    with closing(apsw.Connection(str(path))) as db, pytest.raises(apsw.SQLError):
        migrate(db, str(path), [*STEPS[:-1], "nonsense"])
    assert run(path, "PRAGMA user_version") == [(SCHEMA,)]
    assert run(path, "SELECT name, sql FROM sqlite_schema") == before


def test_a_schema_that_living_processes_use_is_not_changed(path):
    app = open_app(path)
    worker = Worker(app)
    worker.start()
    with closing(apsw.Connection(str(path))) as db:
        with pytest.raises(BackendError, match=rf":{os.getpid()}:\d of an older Barnabas still use it"):
            migrate(db, str(path), STEPS)
        worker.stop()
        app.close()
        migrate(db, str(path), STEPS)


def test_another_program_s_tables_are_an_error_of_ours(tmp_path):
    run(tmp_path / "a.db", "CREATE TABLE jobs (a)")
    with pytest.raises(BackendError, match="not one of Barnabas"):
        open_app(tmp_path / "a.db").events.topics()


# check.


def test_a_sound_file(path):
    found = check(str(path))
    assert found.ok, found.problems
    assert (found.schema, found.messages, found.jobs, found.processes, found.notes) == (SCHEMA, 2000, 10, 0, [])
    assert found.size == path.stat().st_size


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("UPDATE positions SET offset = offset + 9000 WHERE id = 1", r"1 positions beyond the end of .*: care-look at things\["),
        ("UPDATE positions SET grp = 99", "positions of partitions or groups that do not exist: position 1, "),
        ("UPDATE positions SET member = 99", "partitions owned by nobody"),
        ("INSERT INTO members (grp, process, topics) VALUES (1, 99, '')", "1 members of processes that do not exist: member"),
        ("UPDATE jobs SET state = 1, owner = 99", r"10 jobs owned by nobody: \w+, \w+, \w+, \.\.\.$"),
        ("UPDATE jobs SET state = 1", "10 jobs owned by nobody"),
        ("UPDATE jobs SET queue = 99", "10 jobs of queues that do not exist"),
        ("UPDATE jobs SET state = 3 WHERE id = 1", "1 jobs in a state that is none"),
        ("UPDATE records SET id = id + (99 << 40)", "records of partitions that do not exist"),
        ("DELETE FROM records WHERE id = (SELECT min(id) FROM records)", r"things\[0\] has .* messages in its records, but 1,"),
        ("UPDATE records SET id = id + 1", r"things\[0\] has .* messages in its records"),
        ("UPDATE heads SET first = 5 WHERE topic = 'things.dead'", r"things.dead\[0\]"),
        ("UPDATE heads SET bytes = bytes + 1 WHERE gid = 1", r"things\[0\] has .* bytes, but counts"),
        ("PRAGMA user_version = 9", f"has schema 9, this Barnabas knows {SCHEMA}"),
        ("PRAGMA user_version = 0", "Barnabas has not made it"),
    ],
)
def test_what_must_not_be_is_found(path, sql, says):
    run(path, sql)
    found = check(str(path))
    assert not found.ok
    assert any(re.search(says, problem) for problem in found.problems), found.problems


def test_a_damaged_file(path):
    data = bytearray(path.read_bytes())
    for page in range(5, len(data) // 4096, 3):
        data[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(data)
    found = check(str(path))
    assert not found.ok
    assert found.problems[0].startswith("integrity: ") or "it is damaged" in found.problems[0], found.problems


def test_a_reader_of_a_damaged_file_says_so_in_our_words(path):
    app = open_app(path)
    app.events.topics()
    test_a_damaged_file(path)
    with pytest.raises(BackendError, match="damaged"):
        app.events.open_work({"care-look": ["things"]}, ["slow"])
    app.close()


@pytest.mark.parametrize(("data", "says"), [(None, "there is no such file"), (b"nonsense" * 1000, "it is not a SQLite file")])
def test_no_file_of_ours(tmp_path, data, says):
    if data is not None:
        (tmp_path / "a.db").write_bytes(data)
    found = check(str(tmp_path / "a.db"))
    assert not found.ok
    assert says in found.problems[0]
    assert os.listdir(tmp_path) == (["a.db"] if data else [])


def test_the_dead_are_named_and_what_they_had(path):
    run(path, "INSERT INTO processes (id, pid, started) VALUES (77, 1, 0); UPDATE jobs SET state = 1, owner = 77 WHERE id < 4")
    found = check(str(path))
    assert found.ok
    assert found.notes == ["1 processes have died; the next worker takes over what they had (3 jobs)"]


# backup.


def test_a_backup_is_one_state_of_the_file_while_others_write(path, tmp_path):
    app = open_app(path)
    run(path, PAD)
    told: list[tuple[int, int]] = []
    sent = [2000]

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        sent[0] += 100
        app.topics["things"].send_many({"n": n} for n in range(100)).result(30)

    size = backup(str(path), str(tmp_path / "copy.db"), tell)
    assert len(told) > 2
    assert told[-1] == (size, size)
    copied = check(str(tmp_path / "copy.db"))
    assert (copied.problems, copied.messages) == ([], 2000)
    assert check(str(path)).messages == sent[0]
    app.close()
    ok = subprocess.run(["sqlite3", "-readonly", tmp_path / "copy.db", "PRAGMA integrity_check"], check=True, capture_output=True)
    assert ok.stdout == b"ok\n"
    assert not [name for name in os.listdir(tmp_path) if name.startswith("copy.db-") or name.endswith(".part")]
    again = open_app(tmp_path / "copy.db")  # it works
    assert again.events.open_work({"care-look": ["things"]}, []) == 0
    again.close()


@pytest.mark.parametrize("name", ["copy.db", "copy.db.part"])
def test_a_backup_overwrites_nothing(path, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(Refused, match=f"{name} exists"):
        backup(str(path), str(tmp_path / "copy.db"))
    assert (tmp_path / name).read_text() == "precious"


def test_a_backup_that_is_broken_off_leaves_nothing(path, tmp_path):
    def tell(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        backup(str(path), str(tmp_path / "copy.db"), tell)
    with pytest.raises(BackendError, match="cannot be made: No such file or directory"):
        backup(str(path), str(tmp_path / "none" / "copy.db"))
    assert set(os.listdir(tmp_path)) - before <= {"care.db-shm", "care.db-wal"}


def test_a_backup_of_a_damaged_file_is_none(path, tmp_path):
    test_a_damaged_file(path)
    with pytest.raises(BackendError, match="damaged"):
        backup(str(path), str(tmp_path / "copy.db"))
    assert not (tmp_path / "copy.db").exists()


# expire.


def test_what_expires_goes_in_small_steps(tmp_path, monkeypatch):
    app = open_app(tmp_path / "care.db")
    blobs, events = app.topic("blobs", codec="raw", partitions=1), app.events
    for _ in range(12):
        blobs.send_many([bytes(900_000)] * 2).result(30)
    left, write = [events.topics()[0].partitions[0][2]], events.write

    def watched(act):
        count = write(act)
        left.append(events.topics()[0].partitions[0][2])
        return count

    monkeypatch.setattr(events, "write", watched)
    expire(events, time.time() + 8 * 86400)
    assert left[0] > 20_000_000 and left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) < 7_000_000
    app.close()


# compact.


def test_compact_gives_space_back_and_senders_wait(path):
    run(path, f"{PAD}; DROP TABLE pad")
    assert "barnabas db compact gives them back" in check(str(path)).notes[0]
    app = open_app(path)
    app.topics["things"].send({"n": -1}).result(30)  # it has the file open, and goes on afterwards
    stop = threading.Event()
    count = [1]

    def send() -> None:
        while not stop.is_set():
            app.topics["things"].send({"n": count[0]}).result(30)
            count[0] += 1

    thread = threading.Thread(target=send)
    thread.start()
    before, after = compact(str(path))
    stop.set()
    thread.join()
    app.close()
    assert after < before // 4
    assert check(str(path)).messages == 2000 + count[0]
    assert check(str(path)).ok


def test_compact_is_refused_while_a_worker_lives(path):
    app = open_app(path)
    worker = Worker(app)
    worker.start()
    with pytest.raises(Refused, match=rf"in use by \S+:{os.getpid()}:\d; stop them first: barnabas stop NAME"):
        compact(str(path))
    worker.stop()
    app.close()
    compact(str(path))


def test_compact_makes_no_file(tmp_path):
    with pytest.raises(BackendError, match="there is no such file"):
        compact(str(tmp_path / "a.db"))
    assert os.listdir(tmp_path) == []
