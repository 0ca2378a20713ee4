"""Suspects: what was in work at three crashes of its process runs with nothing beside it; if that run crashes too, it is
dead. So a message that kills its process ends in the dead letters, and a random kill buries nothing innocent."""

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from barnabas.engine.lanes import Run
from barnabas.message import Row
from barnabas.ports import Part

if TYPE_CHECKING:
    from barnabas.engine.runner import Runner

log = logging.getLogger("barnabas")
CRASHES = 3
NOTHING = -1  # what is in work once a suspect has had its run


class Gate:
    """One a process. Whoever closes it waits until nothing is in work anywhere in the process."""

    def __init__(self) -> None:
        self.runners: list[Runner] = []
        self._owner: object = None
        self._lock = threading.Lock()

    def close(self, owner: object) -> bool:
        """Let nobody take a new run; True once nothing is in work."""
        with self._lock:
            if self._owner not in (None, owner):
                return False
            self._owner = owner
            crews = [crew for runner in self.runners for crew in runner.crews]
            for crew in crews:
                with crew.lanes.lock:  # who is taking a run just now has it in hand afterwards
                    crew.held = True
        return not any(crew.busy() for crew in crews)

    def open(self, owner: object) -> None:
        """Go on, if it was this owner that closed it."""
        with self._lock:
            if self._owner is not owner:
                return
            self._owner = None
            for crew in [crew for runner in self.runners for crew in runner.crews]:  # before another closes it
                crew.held = False
                crew.nudge()


class Alone:
    """A runner's suspects, and what waits behind them so that order holds."""

    def __init__(self, runner: "Runner", gate: Gate) -> None:
        self._runner = runner
        self._gate = gate
        self._behind: dict[Part, list[Row]] = {}
        self._running: tuple[Part, Row] | None = None

    def __bool__(self) -> bool:
        return bool(self._behind) or self._running is not None

    def sift(self, part: Part, rows: Sequence[Row]) -> Sequence[Row]:
        """What may be handed over now; the first suspect and all behind it are held back."""
        if part in self._behind:
            self._behind[part] += rows
            return ()
        for index, row in enumerate(rows):
            if part.crashes.get(row[0], 0) >= CRASHES:
                self._behind[part] = list(rows[index:])
                return rows[:index]
        return rows

    def forget(self, part: Part) -> None:
        """The partition is no longer ours."""
        self._behind.pop(part, None)
        for crew in self._runner.crews:
            with crew.lanes.lock:  # a worker may be taking it
                if crew.solo is not None and crew.solo.part is part:
                    crew.solo = None
        if self._running is None:  # else it opens when that run is over, whoever owns its partition by then
            self._gate.open(self)

    def step(self) -> list[tuple[Part, Sequence[Row]]]:
        """Move on; returns what may be handed over after a suspect had its run."""
        if self._running is not None:
            part, row = self._running
            if any(crew.solo is not None or crew.busy() for crew in self._runner.crews):
                return []
            if part.alone is not None and part in self._runner.parts:  # before anybody else can crash
                self._runner.settle()
                if not part.alone(NOTHING):
                    return []
            self._running = None
            part.crashes.pop(row[0], None)
            self._gate.open(self)
            return self._next(part) if part in self._behind else []
        for part, rows in self._behind.items():
            crashes = part.crashes[rows[0][0]]
            if part.lanes:  # older messages of the partition are still waiting or in work
                continue
            if crashes > CRASHES:
                return self._next(part) if self._bury(part, rows[0], crashes) else []
            if self._gate.close(self) and (part.alone is None or part.alone(rows[0][0])):
                crew = self._runner.crew_of(rows[0])
                where = f"{part.topic}[{part.partition}]@{rows[0][0]}"
                log.warning("%s: %s was in work at %d crashes of its process: it runs alone", self._runner.name, where, crashes)
                self._running = (part, rows[0])
                crew.put_alone(part, rows[0])
            return []
        return []

    def _bury(self, part: Part, row: Row, crashes: int) -> bool:
        crew = self._runner.crew_of(row)
        run = Run(part, None, [row])
        reason = f"was in work at {crashes} crashes of its process, the last time alone"
        try:
            crew.handler.bury(run, row, reason, None, part.attempts.get(row[0], 0) + 1, crew.clock.now())
        except Exception as problem:  # on_dead="stop"
            crew.error = problem
            crew.stopping = True
            return False
        part.crashes.pop(row[0], None)
        crew.hand_in(run)
        return True

    def _next(self, part: Part) -> list[tuple[Part, Sequence[Row]]]:
        rows = self._behind.pop(part)[1:]
        return [(part, rows)] if rows else []  # whoever hands them over sifts them
