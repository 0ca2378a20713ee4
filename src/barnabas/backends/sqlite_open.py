"""Whether a SQLite file may be opened at all: the library, the file system, the schema it was left with."""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

import apsw

from barnabas.backends.host import look
from barnabas.backends.sqlite_admin import name_of
from barnabas.errors import BackendError

log = logging.getLogger("barnabas")
STEPS: tuple[str, ...] = ()  # SQL that brings schema 1 to 2, 2 to 3, ...; sqlite.sql makes the newest at once
SCHEMA = 1 + len(STEPS)
SOUND = (3, 51, 3)  # the first SQLite without the WAL-reset bug (sqlite.org/wal.html)
# Where other machines may write too, locks and shared memory do not reach them. 9p is Windows' side of WSL, or a host's of
# its guest: files of SQLite get damaged there.
REMOTE = re.compile(
    r"nfs4?|cifs|smb\d?(fs)?|ncpfs|afs|coda|9p|davfs|(fuse\.)?(ceph(-fuse)?|lustre|gpfs|beegfs|orangefs|pvfs2|glusterfs)|"
    r"fuse\.(sshfs|s3fs|goofys|mount-s3|rclone|gcsfuse|blobfuse2?|juicefs|curlftpfs|smbnetfs|davfs2?|seaweedfs|mfs)"
)


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
        with suppress(OSError), open("/proc/self/mounts", errors="surrogateescape") as mounts:  # Linux only
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
            raise BackendError(
                f"{path} has schema {version} and is to be brought to {newest}, but {', '.join(users)} of an older Barnabas "
                "still use it; stop them, then start again"
            )
        with db:
            for number in range(version, newest):
                db.execute(f"{steps[number - 1]}; PRAGMA user_version = {number + 1}")
        log.warning("%s: schema %d was brought to %d; an older Barnabas cannot open it any more", path, version, newest)
    elif version == 0:
        with db:
            db.execute(files("barnabas.backends").joinpath("sqlite.sql").read_text())
