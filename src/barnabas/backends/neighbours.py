"""Processes that share a SQLite file: signs of life, and what is done when one is dead or silent."""

import json
import logging
import os
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import apsw

from barnabas.backends.host import Life, forget, holder, look
from barnabas.backends.shares import HOST
from barnabas.backends.sqlite_care import EVERY, expire
from barnabas.backends.sqlite_limits import bury
from barnabas.backends.sqlite_read import one
from barnabas.errors import BackendError

if TYPE_CHECKING:
    from barnabas.backends.sqlite import SqliteBackend

log = logging.getLogger("barnabas")


class Neighbours:
    """This process among those that own partitions and jobs of a file: a row, a locked file, a thread that looks around."""

    def __init__(self, home: "SqliteBackend", session: float) -> None:
        self.home, self.session, self.number = home, session, 0
        self.life: Life | None = None
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def join(self) -> None:
        """Be a process that owns things: a row, a file with a lock, a thread that gives signs of life, one that looks around."""
        if self.life is None:
            self.number, self.life = self.home.write(self._register)
            for act in (partial(self._keep, self.life), self._care):
                self._threads.append(threading.Thread(target=act, name="barnabas-keeper", daemon=True))
                self._threads[-1].start()

    def _register(self, db: apsw.Connection) -> tuple[int, Life]:
        row = (os.getpid(), self.home.clock.now(), json.dumps({"host": HOST}))
        while True:
            db.execute("INSERT INTO processes (pid, started, info) VALUES (?, ?, ?)", row)
            number = db.last_insert_rowid()
            try:
                return number, Life(self.home.path, number)
            except BlockingIOError:  # somebody lives under this number in the file that stood here before
                db.execute("DELETE FROM processes WHERE id = ?", (number,))

    def abandon(self) -> None:
        """The file is gone, and with it all that was owned."""
        self._end.set()
        life, self.life = self.life, None
        if life is not None:
            life.close()

    def leave(self) -> None:
        """End in order: nothing is owned any more."""
        if self.life is not None:
            try:
                self.home.write(lambda db: self._let_go(db, self.number))  # a stop that overran has left things owned
            except (BackendError, OSError) as error:
                log.debug("leaving %s failed: %s", self.home.path, error)
        self._end.set()  # only now: they see to it that the write does not wait for ever
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        self.abandon()

    def _keep(self, life: Life) -> None:
        """Signs of life, twice a second: this waits for nobody, or a process that cannot write would count as silent."""
        last = time.monotonic()
        while not self._end.wait(0.5):
            now = time.monotonic()
            if now - last > self.session / 2:  # we were frozen: nothing is ours until the group confirms it
                log.warning("this process did not run for %.1f s; its partitions are claimed anew", now - last)
                for source in list(self.home.sources):
                    source.lapse()
            last = now
            life.beat()
            for source in list(self.home.sources):
                source.extend(now + self.session * 0.7)
            try:
                self._unblock(now)
            except (BackendError, OSError) as error:
                log.debug("looking for the process that has the turn failed: %s", error)

    def _unblock(self, now: float) -> None:
        """A process that is stopped while it has the turn lets nobody write: after a session without a sign of life it is
        killed. Only its end gives back the turn and SQLite's own lock."""
        since = self.home.file.turn.since
        if not since or now - since < 1.0:
            return
        pid = holder(self.home.path)
        for (number,) in self.home._query("SELECT id FROM processes WHERE pid = ? AND info ->> 'host' = ?", (pid, HOST)):
            dead, silent, _ = look(self.home.path, number)
            if not dead and silent > self.session:
                log.error("process %d (pid %d) lets nobody write, silent for %.1f s: it is killed", number, pid, silent)
                os.kill(pid, signal.SIGKILL)
                return

    def _care(self) -> None:
        """A look whether the others still give signs of life, twice a second; retention."""
        swept = 0.0
        while not self._end.wait(0.5):
            try:
                self.look_around()
                if time.monotonic() - swept > EVERY:
                    swept = time.monotonic()
                    expire(self.home, self.home.clock.now())
            except (BackendError, OSError) as error:
                log.debug("looking at other processes failed: %s", error)

    def look_around(self) -> None:
        """Bury who is dead, take the partitions of who is silent."""
        for (number,) in self.home.query("SELECT id FROM processes WHERE id <> ?", (self.number,)):
            dead, silent, work = look(self.home.path, number)
            if dead:
                if self.home.write(partial(self._bury, number=number, work=work)):
                    what = "process %d died with %d deliveries in work; they are given to others"
                    log.warning(what, number, len(work))
                if self.home.neighbours is self:
                    forget(self.home.path, number)
            elif silent > self.session and self.home.query("SELECT 1 FROM members WHERE process = ? LIMIT 1", (number,)):
                self.home.write(partial(self._expel, number=number))

    def _bury(self, db: apsw.Connection, number: int, work: list[tuple[int, int, int]]) -> bool:
        """A process died: count its crash against what it had in work, free its partitions and jobs."""
        if self.home.neighbours is not self or not one(db, "SELECT 1 FROM processes WHERE id = ?", (number,)):
            return False  # somebody else did, or the file was replaced meanwhile
        suspects: dict[int, list[int]] = {}
        for owner, first, count in work:
            if owner < 0:
                db.execute("UPDATE jobs SET crashes = crashes + 1 WHERE id = ? AND owner = ?", (first, number))
            else:
                suspects.setdefault(owner - 1, []).extend(range(first, first + max(1, count)))
        for position, offsets in suspects.items():
            at = "positions p JOIN members m ON m.id = p.member WHERE p.id = ? AND m.process = ?"
            row = one(db, f"SELECT p.offset, p.open FROM {at}", (position, number))
            if row is not None:
                state = json.loads(row[1] or "{}")
                crashes = state.setdefault("crashes", {})
                done = state.get("done", [])
                for offset in offsets:
                    if offset >= row[0] and not any(a <= offset < b for a, b in done):
                        crashes[str(offset)] = crashes.get(str(offset), 0) + 1
                db.execute("UPDATE positions SET open = ? WHERE id = ?", (json.dumps(state), position))
        self._let_go(db, number)
        return True

    def _let_go(self, db: apsw.Connection, number: int) -> None:
        """A process owns nothing any more."""
        db.execute("UPDATE jobs SET state = 0, owner = NULL WHERE owner = ?", (number,))
        if db.changes():
            self.home.stir(db, "partition = -1")
        bury(self.home, db, number)
        self._expel(db, number)
        db.execute("DELETE FROM processes WHERE id = ?", (number,))
        self.home.forget_control(db, number)

    def _expel(self, db: apsw.Connection, number: int) -> None:
        """Take a process's partitions: it is dead, or was silent for a session."""
        if self.home.neighbours is not self:
            return
        db.execute("UPDATE positions SET member = NULL WHERE member IN (SELECT id FROM members WHERE process = ?)", (number,))
        groups = "SELECT n.name FROM members m JOIN names n ON n.id = m.grp WHERE m.process = ?"
        self.home.stir(db, f"partition = -2 AND topic IN ({groups})", (number,))
        db.execute("DELETE FROM members WHERE process = ?", (number,))
