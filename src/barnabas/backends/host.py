"""What processes that share a file on one machine need of the system: taking turns, a doorbell, a sign of life.

All of it stands in small files beside the database: `-turn` and `-next` (locks), `-bell` (touched after each commit),
and `-p<number>` a process: locked while it lives (the system drops the lock at its death, even by SIGKILL, and keeps it
through SIGSTOP), with a box in it that says since when it was not seen and what it has in work.
"""

import contextlib
import ctypes
import ctypes.util
import errno
import fcntl
import logging
import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from barnabas.errors import BackendError

log = logging.getLogger("barnabas")
BOX_NUMBERS = 64 * 1024  # 64-bit numbers in a process's box: place for 21,000 workers
BEAT = 0  # the first number: monotonic nanoseconds of the last sign of life


class Turn:
    """Writers of all processes take turns: who waits takes the next door, then the main one, then lets the next go on.

    With two doors nobody starves: SQLite's own busy_timeout lets one process wait for seconds (facts: sqlite.md).
    """

    def __init__(self, path: str, patience: float = 10.0) -> None:
        self._path = path
        self._patience = patience  # seconds that the turn may take to come before a log line says who has it
        self._next = os.open(path + "-next", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._main = os.open(path + "-turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.since = 0.0  # when a thread of this process began to wait (monotonic seconds); 0: none waits
        self.trouble = ""  # why the turn does not come, once it is late
        self._watch: threading.Thread | None = None
        self._closed = False  # (no event: a forked child closes, too, and could find its lock taken)

    @contextlib.contextmanager
    def take(self, limit: float | None = None) -> Iterator[None]:
        """Hold the turn. It is waited for as long as it takes: who has it may be in the middle of a transaction, and after a
        while a log line says who that is. Raises BackendError after `limit` seconds."""
        try:
            self._lock(self._next, limit)
            try:
                self._lock(self._main, limit)
            finally:
                fcntl.flock(self._next, fcntl.LOCK_UN)
        finally:
            self.since = 0.0
        try:
            yield
        finally:
            fcntl.flock(self._main, fcntl.LOCK_UN)

    def _lock(self, fd: int, limit: float | None) -> None:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.since = self.since or time.monotonic()
        if self._watch is None:
            self._watch = threading.Thread(target=self._be_late, name="barnabas-turn", daemon=True)
            self._watch.start()
        if limit is None:
            return fcntl.flock(fd, fcntl.LOCK_EX)
        while time.monotonic() < self.since + limit:
            time.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise BackendError(f"{self._path}: no turn to write within {limit} s: {_has_it(holder(self._path))}")

    def _be_late(self) -> None:
        """Say so when the turn does not come, and when it came."""
        late = 0.0
        while not self._closed:
            time.sleep(0.5)
            since = self.since
            if late and since != late:
                log.warning("%s: the turn to write came after %.0f s", self._path, time.monotonic() - late)
                late, self.trouble = 0.0, ""
            elif since and not late and time.monotonic() - since > self._patience:
                late, self.trouble = since, _has_it(holder(self._path))
                log.error("%s: nobody could write for %.0f s; %s", self._path, time.monotonic() - since, self.trouble)

    def close(self) -> None:
        """Let go of the files."""
        self._closed = True
        os.close(self._next)
        os.close(self._main)


def holder(path: str) -> int:
    """The process that has the turn, or is to have it next; 0: nobody has, or the system does not tell (Linux does)."""
    with contextlib.suppress(OSError):
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        for name in ("-turn", "-next"):
            inode = f":{os.stat(path + name).st_ino}"
            for _, kind, _, _, pid, file, *_ in locks:
                if kind == "FLOCK" and file.endswith(inode):
                    return int(pid)
    return 0


def _has_it(pid: int) -> str:
    """That a process has the turn, and what is to be done."""
    if not pid:
        return "another process has the turn"
    stopped = False
    with contextlib.suppress(OSError):
        stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    if not stopped:
        return f"process {pid} has the turn, and may itself wait for a lock of another program: see its log"
    return f"process {pid} has the turn and is stopped: kill -CONT {pid} lets it go on, kill -KILL {pid} ends it, without loss"


class Bell:
    """A file that is touched after each commit; whoever watches it is woken by the system (inotify), else polls."""

    IN_MODIFY = 2
    SAFETY, POLL = 1.0, 0.005  # seconds between two looks with and without inotify, where nobody rings

    def __init__(self, path: str) -> None:
        self._path = path + "-bell"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """Wake the watchers of all processes."""
        with contextlib.suppress(OSError):  # no room for one byte: what was committed is, and they look once a second
            os.pwrite(self._fd, b"!", 0)

    def watch(self, woken: Callable[[], None]) -> None:
        """Call `woken` in a thread of its own after rings, and now and then."""
        self._end = os.pipe()
        given = (woken, self._end[0], self._inotify())
        self._thread = threading.Thread(target=self._listen, args=given, name="barnabas-bell", daemon=True)
        self._thread.start()

    def _inotify(self) -> int | None:
        try:
            libc = ctypes.CDLL(ctypes.util.find_library("c") or None, use_errno=True)
            fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(self._path), self.IN_MODIFY) < 0:
                return None
            return fd
        except (OSError, AttributeError):
            return None

    def _listen(self, woken: Callable[[], None], end: int, inotify: int | None) -> None:
        waiting = select.poll()
        waiting.register(end, select.POLLIN)
        if inotify is not None:
            waiting.register(inotify, select.POLLIN)
        timeout = 1000 * (self.SAFETY if inotify is not None else self.POLL)
        try:
            while True:
                events = waiting.poll(timeout)
                if any(fd == end for fd, _ in events):
                    return
                if inotify is not None and events:
                    with contextlib.suppress(BlockingIOError):
                        os.read(inotify, 65536)
                woken()
                if events:
                    time.sleep(0.0005)  # let rings of a busy time come together
        finally:
            if inotify is not None:
                os.close(inotify)

    def close(self) -> None:
        """End the watching."""
        if self._end is not None:
            os.write(self._end[1], b"!")
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(5.0)
            os.close(self._end[0])
            os.close(self._end[1])
        os.close(self._fd)


class Life:
    """This process's own file: its lock says that it lives, its box when it was last seen and what it has in work."""

    def __init__(self, path: str, number: int) -> None:
        self.path = f"{path}-p{number}"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)  # a number may come again, after its file was deleted: nothing is in work
        os.ftruncate(self._fd, 8 * BOX_NUMBERS)
        self._reserve(3)
        self._map = mmap.mmap(self._fd, 8 * BOX_NUMBERS)
        self.box: Any = memoryview(self._map).cast("q")
        self._used = 3
        self.beat()

    def _reserve(self, count: int, first: int = 0) -> None:
        """Have room on the disk for these numbers: without it, the write to a mapped page kills the process (SIGBUS)."""
        os.pwrite(self._fd, bytes(8 * count), 8 * first)

    def beat(self) -> None:
        """A sign of life."""
        self.box[BEAT] = time.monotonic_ns()

    def places(self, workers: int) -> int:
        """Room in the box for the workers of one crew; where it begins."""
        base = self._used
        self._used += 3 * workers
        if self._used > BOX_NUMBERS:
            raise BackendError(f"more than {BOX_NUMBERS // 3} deliveries at once in one process: lower concurrency=")
        self._reserve(3 * workers, base)
        return base

    def abandon(self) -> None:
        """In a forked child: let go without unlocking what is the parent's. (The map has a descriptor of its own, which would
        keep the lock beyond the parent's death.)"""
        self.box.release()
        self._map.close()
        os.close(self._fd)

    def close(self) -> None:
        """End this life in order: nothing is in work."""
        with contextlib.suppress(OSError):  # of a file that was replaced, the number may be another's by now
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.unlink(self.path)
        os.close(self._fd)


def look(path: str, number: int) -> tuple[bool, float, list[tuple[int, int, int]]]:
    """Another process: (is it dead, seconds since its last sign of life, what it had in work when it died).

    What it had in work: (number of the position or queue, first offset or job, count).
    """
    name = f"{path}-p{number}"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True, 0.0, []
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            beat = int.from_bytes(os.pread(fd, 8, 8 * BEAT), "little", signed=True)
            return False, max(0.0, (time.monotonic_ns() - beat) / 1e9), []
        data = os.pread(fd, 8 * BOX_NUMBERS, 0)
        numbers = memoryview(data[: len(data) // 8 * 8]).cast("q")
        work = [(numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(3, len(numbers) - 2, 3) if numbers[at] != 0]
        return True, 0.0, work
    finally:
        os.close(fd)


def forget(path: str, number: int) -> None:
    """Remove the file of a process that is dead and dealt with."""
    with contextlib.suppress(OSError):
        os.unlink(f"{path}-p{number}")
