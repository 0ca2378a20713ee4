"""Jobs by the clock: when a schedule ticks, and the one job of each tick, whoever is there to enqueue it.

Nobody leads. How far a schedule has come is a note; who finds a tick due stores the job and the new note in one step, if the
note still is what was read. So a tick is enqueued once, over all processes and restarts.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, takewhile
from typing import Any

import msgspec

from barnabas.errors import BackendError, DeclarationError, must
from barnabas.jobs.beyond import KEPT
from barnabas.jobs.payload import derived_jid
from barnabas.message import OutgoingJob
from barnabas.ports import FOREVER

log = logging.getLogger("barnabas")
POLICIES = ("once", "skip", "all")
LATE = 10.0  # seconds after which a tick that nobody took counts as missed
LOOK = 30.0  # seconds between two looks through all jobs for a run that does not end
STATES = ("work", "retry", "scheduled", "ready")  # where a run may be; a million that are ready come last, or ticks would wait
MISSES = 3  # so many looks in a row have to miss it: a job may move while we look
PAGE = 500  # missed ticks enqueued in one step
YEARS = timedelta(days=50 * 366)
PAUSED = 4e9  # until when a pause holds (epoch seconds): for good


class State(msgspec.Struct):
    """How far a schedule has come: its last tick (epoch seconds), the job of it, and whether an operator has paused it."""

    text: str
    last: float
    jid: str = ""
    paused: bool = False


_state = msgspec.json.Decoder(State).decode


class Schedule:
    """When a job is enqueued: as a cron line says, or `every` so often, counted from the epoch."""

    def __init__(self, job: Any, line: Any, every: Any, tz: Any, on_missed: Any, overlap: Any, name: Any) -> None:
        self.job, self.name = job, job.name if name is None else name
        self.on_missed, self.overlap = on_missed, overlap
        self.note = f"cron:{job.app.name}:{self.name}"
        self.zone: tzinfo = UTC
        self._line, self._every = line, 0
        fits = isinstance(self.name, str) and self.name.isprintable() and 0 < len(self.name) <= 200
        self._must(fits, "name", name, "give up to 200 printable characters, or leave it out for the name of the job")
        self._must(on_missed in POLICIES, "on_missed", on_missed, f"give one of {', '.join(POLICIES)}")
        way_out = "overlap=False keeps the runs of a schedule apart; or declare while_executing"
        self._must(not job.queued, "unique", job.lock and job.lock.kind, way_out)
        way_out = "give True if a run may begin before the last one has ended, else False"
        self._must(isinstance(overlap, bool), "overlap", overlap, way_out)
        self._must((line is None) != (every is None), "every", every, "give either a cron line or every=timedelta(...)")
        self._must(job._least <= 1, "job", job.name, "its function gets no argument, or one, the time of the tick (at: datetime)")
        if every is not None:
            fits = isinstance(every, timedelta) and timedelta(seconds=1) <= every <= YEARS and not every.microseconds
            way_out = "give a timedelta of whole seconds, 1 or more, up to 50 years, and no tz"
            self._must(fits and tz is None, "every", every, way_out)
            self._every = every // timedelta(seconds=1)
            self.text = f"every {every}"
        else:
            self._read("UTC" if tz is None else tz)

    def _must(self, fits: bool, option: str, value: Any, way_out: str) -> None:
        must(fits, f"cron {self.name!r}", option, value, way_out)

    def _read(self, tz: Any) -> None:
        from zoneinfo import ZoneInfo

        try:
            from cronsim import CronSim, CronSimError
        except ModuleNotFoundError:
            raise DeclarationError("cron lines need cronsim: pip install 'barnabas[cron]' (every= needs nothing)") from None
        try:
            self.zone = ZoneInfo(tz)
        except (LookupError, ValueError, TypeError, OSError):
            self._must(False, "tz", tz, 'give a time zone of the IANA database, such as "Europe/Athens"')
        self._sim, self.text = CronSim, f"{self._line} ({tz})"
        try:
            next(self.after(self.job.app.clock.now()))
        except (CronSimError, AttributeError, TypeError) as error:
            self._must(False, "line", self._line, f'it is no cron line ({error}); "*/5 * * * *" is every five minutes')
        except (StopIteration, OverflowError):
            self._must(False, "line", self._line, "no such time comes within 50 years")

    def after(self, at: float) -> Iterator[float]:
        """The ticks after a time (epoch seconds), without end."""
        if self._every:
            at = at // self._every * self._every
            while True:
                at += self._every
                yield at
        for tick in self._sim(self._line, datetime.fromtimestamp(at, self.zone)):
            if tick.timestamp() > at:  # (a local time that comes twice is taken the first time)
                at = tick.timestamp()
                yield at

    def outgoing(self, tick: float, jid: str, tells: bool = False) -> OutgoingJob | None:
        """The job of a tick; None if a before_enqueue hook refuses it. `tells`: its end is to be known."""
        args = (datetime.fromtimestamp(tick, self.zone),) if self.job._least else ()
        return self.job._outgoing(args, None, {"more": {"cron": self.note}} if tells else {}, jid, None)  # type: ignore[no-any-return]

    def state(self) -> State | None:
        """How far it has come; None where it never began."""
        stored = self.job.app.jobs.note(self.note)
        return None if stored is None else _state(stored)

    def pause(self, paused: bool) -> None:
        """Let its ticks pass without a job, in all processes, or no longer. Those that passed are not made up for."""
        home, now = self.job.app.jobs, self.job.app.clock.now()
        while True:
            stored = home.note(self.note)
            state = State(self.text, now) if stored is None else _state(stored)
            state.paused, until = paused, PAUSED
            if not paused:
                state.last, until = now, self._until(now)
            if home.swap(self.note, stored, msgspec.json.encode(state), until, ()):
                return

    def _until(self, last: float) -> float:
        """Until when it is remembered: if nobody takes its next tick for long, it was removed."""
        return min(next(self.after(last), PAUSED) + KEPT, PAUSED)


class Cron:
    """The schedules that one process keeps an eye on."""

    def __init__(self, app: Any, schedules: Iterable[Schedule]) -> None:
        now = app.clock.now()
        self._app = app
        self._next = dict.fromkeys(schedules, now)
        self._base = dict.fromkeys(self._next, now)  # where a schedule begins that is new, or was another
        self._looked: dict[Schedule, float] = {}
        self._troubles: dict[Schedule, str] = {}

    def __bool__(self) -> bool:
        return bool(self._next)

    def step(self) -> float:
        """Enqueue what is due; when there is something to do again (epoch seconds)."""
        now = self._app.clock.now()
        for schedule, at in self._next.items():
            if at > now:
                continue
            try:
                self._next[schedule] = self._tick(schedule, now)
                self._troubles.pop(schedule, None)
            except (Exception, SystemExit) as error:  # of a hook, too
                self._next[schedule] = now + 1.0
                if self._troubles.get(schedule) != repr(error):
                    self._troubles[schedule] = repr(error)
                    shown = None if isinstance(error, BackendError) else error
                    log.error("cron %r: trying again every second: %s", schedule.name, error, exc_info=shown)
        return min(self._next.values(), default=FOREVER)

    def _tick(self, schedule: Schedule, now: float) -> float:
        home = self._app.jobs
        while True:
            stored = home.note(schedule.note)
            known = None if stored is None else _state(stored)
            state = known or State(schedule.text, self._base[schedule])
            if state.text != schedule.text:  # changed: nothing is made up for that the other schedule has not missed
                state = State(schedule.text, max(state.last, self._base[schedule]), state.jid, state.paused)
            ticks = takewhile(lambda tick: tick <= now, schedule.after(state.last))
            most = PAGE if schedule.overlap else 1
            due = list(islice(ticks, most)) if schedule.on_missed == "all" else list(deque(ticks, 1))
            runs = [] if state.paused else self._runs(schedule, due, now)
            if runs and not schedule.overlap and self._busy(schedule, state.jid, now):
                if schedule.on_missed == "all":
                    return now + 1.0
                log.warning("cron %r: its last run (job %s) has not ended, so this one is left out", schedule.name, state.jid)
                runs = []
            if due or known is None or known.text != schedule.text:
                made = [schedule.outgoing(at, derived_jid(schedule.note, int(at)), not schedule.overlap) for at in runs]
                jobs = [job for job in made if job is not None]
                last, jid = due[-1] if due else state.last, jobs[-1].jid if jobs else state.jid
                new = msgspec.json.encode(State(schedule.text, last, jid, state.paused))
                if not home.swap(schedule.note, stored, new, PAUSED if state.paused else schedule._until(last), jobs):
                    continue  # somebody else was quicker
                state.last = last
            self._base[schedule] = now
            return next(schedule.after(state.last), FOREVER)

    def _runs(self, schedule: Schedule, due: list[float], now: float) -> list[float]:
        if schedule.on_missed == "all":
            return due
        return due[-1:] if due and (schedule.on_missed == "once" or now - due[-1] <= LATE) else []

    def _busy(self, schedule: Schedule, jid: str, now: float) -> bool:
        """Whether the last run has not ended. Its worker leaves a note; but others may have run, dropped or lost it."""
        home = self._app.jobs
        if not jid or home.note(f"ended:{schedule.note}") == jid.encode():
            return False
        if now >= self._looked.get(schedule, 0.0) + LOOK:
            looks = (job for _ in range(MISSES) for state in STATES for job in home.find_jobs(state))
            if not any(job.jid == jid for job in looks):
                return False
            self._looked[schedule] = now
        return True
