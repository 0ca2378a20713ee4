"""What a process holds open of a SQLite file, and whether that still is the file at its path."""

import contextlib
import os

import apsw

from barnabas.backends.host import Bell, Turn
from barnabas.backends.sqlite_open import check_library, check_place, migrate
from barnabas.backends.sqlite_read import connect, explain, one
from barnabas.errors import BackendError

BESIDE = ("-wal", "-shm")


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
            try:
                self.turn = undo.enter_context(contextlib.closing(Turn(path, patience)))
                self.bell = undo.enter_context(contextlib.closing(Bell(path)))
            except OSError as error:
                raise explain(path, error) from error
            with self.turn.take():  # SQLite lets two that make a new file a WAL file at once meet SQLITE_BUSY without waiting
                self._sweep(before)
                self.writer = undo.enter_context(contextlib.closing(connect(path, lambda db: self._refuse(db, before is None))))
                try:
                    migrate(self.writer, path)
                except apsw.Error as error:
                    raise explain(path, error) from error
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
