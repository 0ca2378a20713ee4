"""A worker process among the others: its signs of life, its place on Sidekiq's web page, what it does for the dead ones,
and the jobs whose time has come."""

import faulthandler
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

from barnabas.backends.redis_admin import KEYS, text
from barnabas.jobs.payload import PayloadError, due, tail
from barnabas.jobs.unique import held
from barnabas.ports import FOREVER

if TYPE_CHECKING:
    from barnabas.backends.redis import RedisBackend
    from barnabas.backends.redis_source import RedisQueues

log = logging.getLogger("barnabas")
LEASE, RENEW, SCAN = 30, 5.0, 10.0  # seconds: a sign of life is good for, its renewal, looking for the dead
BLOCK = 10  # seconds a blocking move may last: it ends before a lease does, or a job could land with a dead process
# Seconds between looks for locks whose jobs were deleted, or so many times what a look takes; so many in a row have to miss one.
SWEEP, REST, MISSES = 15.0, 100, 3
STARTS = b'"lock":"until_'  # in a job whose lock ends as it starts, so not every one of these that waits has it
CALM = 30.0  # after a restart or reconnect nobody is taken for dead: all need the time to give a sign
TICK = 1.0  # seconds between looks at what operators ask for
BEAT = 60  # seconds that Sidekiq believes a heartbeat
PAGE, PAGE_BYTES = 500, 1 << 20  # due jobs moved in one step: others wait for it
AHEAD = 8  # such pages that are read at once
POLL = 5.0  # seconds between two looks for what is due, over all processes about 0.5
SIGNALS = {b"TSTP": "quiet", b"TERM": "stop", b"INT": "stop"}


class Life:
    """Two threads beside the fetch thread: signs of life, and due jobs. Either survives that Redis is away."""

    def __init__(self, home: "RedisBackend", source: "RedisQueues") -> None:
        self.home, self.source = home, source
        self.started = time.time()
        self.until = 0.0  # monotonic seconds: no job starts after that
        self.asked: str | None = None  # what an operator asked of this process: "quiet" or "stop"
        self.info: dict[str, Any] = {}
        self._calm, self._rtt = 0.0, 0
        self._seen: dict[int, int] = {}  # jobs at work: number -> since when, epoch seconds
        self._stop, self._hurry, self._watched = threading.Event(), threading.Event(), False
        self._next = 0.0  # when the next job is known to be due (epoch seconds)
        self._threads = [
            threading.Thread(target=self._live, name="barnabas-life", daemon=True),
            threading.Thread(target=self._move, name="barnabas-due", daemon=True),
            threading.Thread(target=self._sweep, name="barnabas-sweep", daemon=True),
        ]

    # The lease.

    def join(self) -> None:
        """Be among the living; raises BackendError while Redis is away."""
        began = time.monotonic()
        self.home.script("renew", self.source.name, LEASE, " ".join(self.source.weights))
        self.until = began + 0.7 * LEASE

    def extend(self) -> None:
        """The parts in hand may be worked on as long as the lease lasts."""
        for part in list(self.source.parts.values()):
            if not part.closed:
                part.until = self.until

    def lost(self) -> bool:
        """Whether the lease ran out, or somebody took us for dead."""
        return time.monotonic() > self.until

    def watch(self) -> None:
        """While runs hold locks: end the process before these end, if it can give no sign of life. A thread that needs no
        interpreter does it, so neither a handler that holds that nor a command without an answer is in its way."""
        if self.source.runs:
            left = self.until + 0.2 * LEASE - time.monotonic()
            faulthandler.dump_traceback_later(max(0.05, left), exit=True, file=2)
            self._watched = True
        elif self._watched:
            self._watched = False
            faulthandler.cancel_dump_traceback_later()

    def forget(self) -> None:
        """Redis does not know us."""
        self.until = 0.0
        self.source.wake()

    def quiet(self) -> bool:
        """Whether the process takes nothing new, but lives."""
        return self.asked == "quiet" or (self.asked is None and bool(self.info.get("quiet")))

    def start(self) -> None:
        """Begin."""
        with self.home.edge():
            info = self.home.client.info("server")
        self._server = info.get("run_id")
        self._calm = time.monotonic() + max(0.0, CALM - float(info.get("uptime_in_seconds", CALM)))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._hurry.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)

    def _live(self) -> None:
        done, away = dict[Callable[[], None], float](), False
        while True:
            now, beat = time.monotonic(), RENEW if self._seen.keys() == self._working() else 1.0
            try:
                for duty, pause in ((self._renew, RENEW), (self.beat, beat), (self._listen, 0.0), (self._look_around, SCAN)):
                    if now - done.get(duty, 0.0) >= pause:
                        with self.home.edge(*KEYS):  # what fails by those stops no other duty
                            duty()
                        done[duty] = now
                away = False
            except Exception as error:
                self._calm, self._server = time.monotonic() + CALM, None
                if not away:
                    away = True
                    log.warning("%s: no sign of life could be given: %s", self.source.name, error)
            if self._stop.wait(TICK):
                return

    def _renew(self) -> None:
        if (now := time.monotonic()) < self.until:  # else the fetch thread has to begin anew
            if self.home.script("renew", self.source.name, LEASE, ""):
                self.until = now + 0.7 * LEASE
                self.extend()
                self.watch()
            else:
                self.forget()

    def _look_around(self) -> None:
        """Take what dead processes had in hand back to its queues; not after a restart, or with another server after a failover,
        that no command of ours has failed of: signs of life may be lost, and all need the time to give new ones."""
        if time.monotonic() < self._calm:
            return
        before, self._server = self._server, self.home.client.info("server").get("run_id")
        if before not in (None, self._server):
            self._calm = time.monotonic() + CALM
            return
        for name in self.home.script("orphans"):
            count, is_all = self.home.recover(name, crashed=True)
            if count > 0 or (count == 0 and is_all):
                log.warning("process %s died with %d jobs in hand; they are back in their queues", text(name), count)

    def _listen(self) -> None:
        if self.home.look():
            self.source.wake()
        self.source.reopen(self.home.paused() & self.source.parts.keys())
        signal = self.home.client.rpop(self.home.key(f"{self.source.name}-signals"))
        if signal in SIGNALS:
            self.asked = SIGNALS[signal]
            log.info("%s: asked to %s", self.source.name, self.asked)
        elif signal == b"TTIN":
            self.source.listener.dump()

    def _sweep(self) -> None:
        """Free the locks of unique jobs that others have deleted, on Sidekiq's web page or by a command: of such as three
        looks in a row find nowhere. Take those again whose jobs others have called back from the dead: that two find without.
        And let nobody wait for a slot behind jobs that are gone."""
        home, pause, missed, bare, dead = self.home, SWEEP, dict[tuple[str, str], int](), set[tuple[str, str]](), 0
        while not self._stop.wait(pause):
            began, before, missed, once, bare = time.monotonic(), missed, {}, bare, set()
            try:
                leads = (home.key("barnabas:sweep"), self.source.name)
                if home.client.set(*leads, nx=True, ex=int(3 * pause) + 1) or home.client.get(leads[0]) == leads[1].encode():
                    locks = {text(name): text(jid) for name, jid in home.client.hgetall(home.key("barnabas:locks")).items()}
                    fewer, dead = dead, home._sizes("", ())[2]
                    jobs = home.find_jobs() if locks or once or dead < fewer else ()
                    stored = {(lock, job.jid): job for job in jobs if job.state != "dead" and (lock := held(job.payload))}
                    missed = {each: before.get(each, 0) + 1 for each in locks.items() if each not in stored}
                    waits = (each for each, job in stored.items() if job.state != "work" and STARTS not in job.payload)
                    bare = {each for each in waits if each[0] not in locks}
                    waiting = home.client.scan_iter(re.sub(r"([*?[\]\\])", r"\\\1", home.prefix) + "barnabas:waiting:*", 1000)
                    while names := [text(key).partition("barnabas:waiting:")[2] for key in islice(waiting, 100)]:
                        home.script("rouse", len(names), *names)
                for lock, jid in [each for each, times in missed.items() if times >= MISSES]:
                    home.script("free", lock, jid)
                    log.warning("job %s was deleted by somebody else; its lock %s is free", jid, lock)
                for lock, jid in bare & once:
                    home.script("retake", lock, jid, home.clock.now())
                    log.warning("job %s was called back by somebody else; it has its lock %s again", jid, lock)
            except Exception as error:
                log.debug("looking for locks without a job failed: %s", error)
            pause = max(SWEEP, REST * (time.monotonic() - began))

    # Sidekiq's heartbeat.

    def _working(self) -> set[int]:
        return self.home.in_work() & self.source.work.keys()

    def beat(self) -> None:
        """Be seen on Sidekiq's web page: the process, and what it runs."""
        if self.lost():  # else its jobs, which others have by now, would be taken for a Ruby process's
            return
        source, key, now = self.source, self.home.key, time.time()
        self._seen = {number: self._seen.get(number, int(now)) for number in self._working()}
        running = [(number, since, *source.work.get(number, ("", b""))) for number, since in self._seen.items()]
        work = {
            f"{number:x}": json.dumps({"queue": queue, "payload": payload.decode(errors="replace"), "run_at": since})
            for number, since, queue, payload in running if queue
        }  # fmt: skip
        size = sum(len(box) // 3 for box in self.home.boxes)
        host, pid, _ = source.name.rsplit(":", 2)
        info = {
            "hostname": host, "started_at": self.started, "pid": int(pid), "tag": self.info.get("app", "barnabas"),
            "concurrency": size, "queues": list(source.weights), "weights": [source.weights], "labels": ["python"],
            "identity": source.name, "version": "barnabas", "embedded": False,
        }
        quiet = "true" if self.asked or self.info.get("quiet") else "false"
        fields = {
            "info": json.dumps(info), "concurrency": size, "busy": len(work), "beat": now, "rtt_us": self._rtt, "quiet": quiet,
            "rss": self.info.get("rss", 0) // 1024, "barnabas": json.dumps(self.info),
        }
        pipe = self.home.client.pipeline(transaction=True)
        pipe.sadd(key("processes"), source.name)
        pipe.hset(key(source.name), mapping=fields)
        pipe.expire(key(source.name), BEAT)
        for place in (key(f"{source.name}:work"), key(f"{source.name}:workers")):  # since Sidekiq 6.5, and before
            pipe.unlink(place)
            if work:
                pipe.hset(place, mapping=work)
                pipe.expire(place, BEAT)
        began = time.perf_counter()
        pipe.execute()
        self._rtt = int((time.perf_counter() - began) * 1e6)

    # What is due.

    def due(self, at: float) -> None:
        """A job was stored that is due then: look for it in time."""
        if at < self._next:
            self._next = at
            self._hurry.set()

    def _move(self) -> None:
        while not self._stop.is_set():
            self._hurry.clear()
            try:
                self._next = FOREVER
                while self._try_page("retry") + self._try_page("schedule"):
                    if self._stop.is_set():
                        return
                wait = self._pause()
            except Exception as error:
                log.debug("due jobs cannot be moved: %s", error)
                wait = 1.0
            self._hurry.wait(max(0.001, min(wait, self._next - self.home.clock.now())))

    def _try_page(self, name: str) -> int:
        """The same for a set that may be somebody else's key, of another type: that stops no other."""
        with self.home.edge(name):
            return self._move_pages(name) if name not in self.home.strange else 0
        return 0

    def _pause(self) -> float:
        """Seconds until the next look: many processes share the looking, at random."""
        processes: int = self.home.client.hlen(self.home.key("barnabas:workers"))
        return min(POLL, 0.5 * max(1, processes)) * (0.5 + int.from_bytes(os.urandom(1), "big") / 256)

    def _move_pages(self, name: str) -> int:
        """Move what is due in a set to its queues; what is no job, to the dead. Returns how many there were."""
        home, count = self.home, self._page
        key, now = home.key(name), home.clock.now()
        members: list[bytes] = home.client.zrangebyscore(key, "-inf", now, start=0, num=AHEAD * count)
        if not members:
            first: Any = home.client.zrange(key, 0, 0, withscores=True)
            if first:
                self._next = min(self._next, first[0][1])
            return 0
        firsts = takewhile(lambda _: not self._stop.is_set(), range(0, len(members), count))
        pages = ((name, now, *self._page_of(key, members[first : first + count], now)) for first in firsts)
        stay = 0
        for strange, left in home.scripts("move", pages):
            self._moved(strange)
            stay += left
        if stay:
            home.look("dead")
        size = sum(map(len, members)) // len(members)
        self._page = max(1, min(PAGE, PAGE_BYTES // max(1, size)))
        return len(members) - stay

    def _page_of(self, key: str, members: list[bytes], now: float) -> list[Any]:
        """What the script is to know of these."""
        args, at, before = list[Any]([tail(now), 0]), 0, None
        for member in members:
            try:
                queue, payload = due(member, now)
            except PayloadError as error:
                log.error("%s: buried, since %s", key, error)
                queue, payload = "", member
            if (queue, payload is None) != before:  # a stretch of one queue begins
                before, at = (queue, payload is None), len(args) + 2
                args[1] += 1
                args += (queue, int(payload is None), 0)
            args[at] += 1
            args += (member,) if payload is None else (member, payload)
        return args

    def _moved(self, strange: list[bytes]) -> None:
        for queue in strange:
            name = self.home.key(f"queue:{text(queue)}")
            log.error("%s is no list, so it is no queue; what was due there is buried", name)

    _page = 50
