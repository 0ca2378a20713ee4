"""A SQLite file: whether it may be opened at all (the library, the file system, the schema), what a process holds open of it,
and whether that still is the file at its path."""

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import apsw

from barnabas.backends.host import Bell, Turn, look
from barnabas.backends.sqlite_admin import name_of
from barnabas.backends.sqlite_read import connect, explained, one
from barnabas.errors import BackendError

log = logging.getLogger("barnabas")
STEPS = (
    "CREATE TABLE locks (key TEXT PRIMARY KEY, jid TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID; "
    "CREATE INDEX locks_until ON locks (until); ALTER TABLE jobs ADD COLUMN lock TEXT; ALTER TABLE jobs ADD COLUMN run TEXT; "
    "CREATE UNIQUE INDEX jobs_lock ON jobs (lock) WHERE lock IS NOT NULL; "
    "CREATE INDEX jobs_run ON jobs (run, state, id) WHERE run IS NOT NULL",
    "CREATE TABLE slots (id INTEGER PRIMARY KEY, key TEXT NOT NULL, at REAL NOT NULL, until REAL, job NOT NULL, "
    "jid TEXT NOT NULL, owner INTEGER); CREATE INDEX slots_key ON slots (key, at); "
    "CREATE INDEX slots_until ON slots (until) WHERE until IS NOT NULL; "
    "CREATE INDEX slots_owner ON slots (owner) WHERE owner IS NOT NULL",
    "ALTER TABLE jobs ADD COLUMN rank INTEGER NOT NULL DEFAULT 0; DROP INDEX jobs_ready; "
    "CREATE INDEX jobs_ready ON jobs (queue, rank, id) WHERE state = 0",
)  # SQL that brings schema 1 to 2, 2 to 3, ...; sqlite.sql makes the newest at once
SCHEMA = 1 + len(STEPS)
SOUND = (3, 51, 3)  # the first SQLite without the WAL-reset bug (sqlite.org/wal.html)
# Where other machines may write too, locks and shared memory do not reach them. 9p is Windows' side of WSL, or a host's of
# its guest: files of SQLite get damaged there.
REMOTE = re.compile(
    r"nfs4?|cifs|smb\d?(fs)?|ncpfs|afs|coda|9p|davfs|(fuse\.)?(ceph(-fuse)?|lustre|gpfs|beegfs|orangefs|pvfs2|glusterfs)|"
    r"fuse\.(sshfs|s3fs|goofys|mount-s3|rclone|gcsfuse|blobfuse2?|juicefs|curlftpfs|smbnetfs|davfs2?|seaweedfs|mfs)"
)
BESIDE = ("-wal", "-shm")


def check_library(version: str) -> None:
    """Refuse an SQLite that can damage a file which several processes write."""
    if tuple(map(int, version.split("."))) < SOUND:
        raise BackendError(
            f"the SQLite {version} of this apsw has the WAL-reset bug: processes that write and checkpoint at the same instant "
            "can damage the file. Install an apsw that brings a newer one: pip install --upgrade 'apsw>=3.51.3'"
        )


def mounted(folder: str, table: str) -> tuple[str, str]:
    """Type and mount point of the file system that holds a folder, by the text of /proc/self/mounts; ("", "") if none does."""
    found = ("", "")
    for line in table.splitlines():
        _, at, kind, *_ = line.split(" ")
        at = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), at)  # blanks and the like
        if f"{folder}/".startswith(at.rstrip("/") + "/") and len(at) >= len(found[1]):  # a later mount hides an earlier one
            found = (kind, at)
    return found


def check_place(path: str, table: str | None = None) -> None:
    """Refuse a file system on which locks and shared memory do not work. table: instead of the system's own."""
    if table is None:
        with contextlib.suppress(OSError), open("/proc/self/mounts", errors="surrogateescape") as mounts:  # Linux only
            table = mounts.read()
    kind, at = mounted(os.path.dirname(path), table or "")
    if REMOTE.fullmatch(kind) and (kind, at) != ("9p", "/"):  # the sandbox gVisor calls its own root so
        raise BackendError(
            f"{path} lies on a network file system ({kind}, mounted at {at}), where the locks and the shared memory that keep a "
            "SQLite file whole do not work. Put it on a local disk; to share work between machines use kafka:// and redis://"
        )


def living(db: apsw.Connection, path: str) -> list[str]:
    """The names of the worker processes that use the file now."""
    rows: list[Any] = db.execute("SELECT id, pid, info FROM processes ORDER BY id").fetchall()
    return [str(name_of(*row)) for row in rows if not look(path, row[0])[0]]


def migrate(db: apsw.Connection, path: str, steps: Sequence[str] = STEPS) -> None:
    """Create the tables, or bring those of an older Barnabas up to date: all or nothing. For who has the turn."""
    version, newest = db.pragma("user_version"), 1 + len(steps)
    if version > newest:
        raise BackendError(f"{path} has schema {version}, this Barnabas knows {newest}: upgrade Barnabas, or use another file")
    if 0 < version < newest:
        if users := living(db, path):
            what = f"{', '.join(users)} of an older Barnabas still use it; stop them, then start again"
            raise BackendError(f"{path} has schema {version} and is to be brought to {newest}, but {what}")
        with db:
            for number in range(version, newest):
                db.execute(f"{steps[number - 1]}; PRAGMA user_version = {number + 1}")
        log.warning("%s: schema %d was brought to %d; an older Barnabas cannot open it any more", path, version, newest)
    elif version == 0:
        with db:
            db.execute(files("barnabas.backends").joinpath("sqlite.sql").read_text())


def identity(path: str) -> tuple[int, int] | None:
    """Which file stands at a path; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class OpenFile:
    """Two connections, one that writes and one that reads, the turn of the writers and the bell for the readers."""

    def __init__(self, path: str, patience: float, before: "OpenFile | None" = None) -> None:
        """Open the file, creating it if need be; not so after `before`, in whose place another file was put.

        Raises BackendError, and leaves nothing open, if that cannot be done.
        """
        self.name = path
        self.path = path = os.path.realpath(path)  # under another name it would have other locks
        if not os.path.isdir(os.path.dirname(path)):
            raise BackendError(f"{path}: its folder does not exist; create it, or change the URL")
        check_library(apsw.sqlitelibversion())
        check_place(path)
        with contextlib.ExitStack() as undo:
            with explained(path, OSError):
                self.turn = undo.enter_context(contextlib.closing(Turn(path, patience)))
                self.bell = undo.enter_context(contextlib.closing(Bell(path)))
            with self.turn.take():  # SQLite lets two that make a new file a WAL file at once meet SQLITE_BUSY without waiting
                self._sweep(before)
                self.writer = undo.enter_context(contextlib.closing(connect(path, lambda db: self._refuse(db, before is None))))
                with explained(path):
                    migrate(self.writer, path)
            self.reader = undo.enter_context(contextlib.closing(connect(path)))
            self.id = identity(path)
            self.beside = [identity(path + name) for name in BESIDE]
            undo.pop_all()

    def _sweep(self, before: "OpenFile | None") -> None:
        """Remove the log and index of a file that is gone: SQLite would take them for those of the file that is new."""
        fresh = not os.path.exists(self.path) or os.path.getsize(self.path) == 0
        if fresh and before is not None:
            raise BackendError(f"{self.path} was replaced, while it was open, by an empty file; it is used once it is filled")
        for number, name in enumerate(BESIDE):
            if fresh or (before is not None and identity(self.path + name) == before.beside[number]):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + name)

    def _refuse(self, db: apsw.Connection, create: bool) -> None:
        """Raise for a file that is not to be used, before anything in it is changed."""
        version = db.pragma("user_version")
        tables, ours = one(db, "SELECT count(*), sum(name = 'heads') FROM sqlite_master")
        if not ours and (tables or version or not create):
            raise BackendError(f"{self.path} is a SQLite file, but not one of Barnabas; use another URL")

    def moved(self) -> bool:
        """Whether it was deleted, moved away or replaced: who opens the path now does not get what is stored here."""
        return identity(self.name) != self.id

    def close(self) -> None:
        """Let go. What a file that was moved away has in its log goes into it: its log will not be found any more."""
        if self.moved():
            with contextlib.suppress(apsw.Error):
                self.writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        for each in (self.bell, self.reader, self.writer, self.turn):
            each.close()
