"""One process at work: its runners, its event loop, its watchdog; from start to a stop that loses nothing."""

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any

import msgspec

from barnabas import future
from barnabas.app import App
from barnabas.consumer import Consumer
from barnabas.engine.alone import Gate
from barnabas.engine.crew import Crew
from barnabas.engine.crews import LoopCrew, ThreadCrew, within
from barnabas.engine.runner import CANCELLED, Pauses, Runner
from barnabas.errors import BackendError, DeclarationError
from barnabas.jobs.beyond import SAID
from barnabas.jobs.cron import Cron
from barnabas.jobs.work import Entry, JobHandler, name_of, router
from barnabas.ports import Backend, Part
from barnabas.state.table import Cells

log = logging.getLogger("barnabas")
MOST_WORK = 100  # of what is in work, a report names the longest
RECYCLE = 75  # exit status of a process that makes way for another: a handler hangs, or it uses too much memory
NO_WAIT = 1e-9  # seconds a batch waits to fill up where nobody drives: nothing else is coming, yet it is a batch


def chosen(app: App, only: Iterable[str] = (), skip: Iterable[str] = ()) -> tuple[list[Consumer], list[str] | dict[str, int]]:
    """The consumers and queues to run: all, or those named by --only and --except ("queue:NAME" names a queue).

    A job's name stands for its queue. Raises DeclarationError for a name that nothing has, and where nothing is left.
    """
    declared = list(dict.fromkeys(q for job in app.job_handlers.values() for q in (job.queue, job.retry_queue) if q))
    queues = declared if app.settings.queues is None else app.settings.queues
    if strange := app.settings.concurrency.keys() - {*declared, *queues}:
        there = ", ".join(sorted({*declared, *queues})) or "none"
        raise DeclarationError(f"jobs.concurrency names {', '.join(sorted(strange))}: no job has such a queue; there are {there}")

    def names(wanted: Iterable[str]) -> set[str]:
        found = set()
        for name in wanted:
            if name in app.job_handlers:
                name = f"queue:{app.job_handlers[name].queue}"
            if name not in app.consumers and name.removeprefix("queue:") not in (queues if name.startswith("queue:") else ()):
                known = [*app.consumers, *(f"queue:{q}" for q in queues)]
                raise DeclarationError(f"nothing is named {name!r}; there are {', '.join(known) or 'no consumers and no queues'}")
            found.add(name)
        return found

    wanted, unwanted = names(only), names(skip)

    def runs(name: str) -> bool:
        return (not wanted or name in wanted) and name not in unwanted

    consumers = [c for c in app.consumers.values() if runs(c.name)]
    left = [q for q in queues if runs(f"queue:{q}")]
    if not consumers and not left:
        raise DeclarationError("there is nothing to run: the app has no consumer and no job (or --only and --except left none)")
    return consumers, {q: queues[q] for q in left} if isinstance(queues, dict) else left


def memory() -> int:
    """Bytes of memory this process has (its peak where the system does not tell), in whole MiB: it is to stay the same
    while nothing happens."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return size >> 20 << 20


def _running(runners: Iterable[Runner]) -> Iterator[tuple[Crew, int, Any, int]]:
    """What is in work: the crew, the worker's place in it, the run, and the offset it is at."""
    for crew in [crew for runner in runners for crew in runner.crews]:
        for slot, run in enumerate(crew.current):
            if run is not None:
                yield crew, slot, run, crew.at(slot, run)


def _place(run: Any, offset: int) -> str:
    """Where what is in work stands: a message's address, a job's name and id."""
    row = next((row for row in run.rows if row[0] == offset), None) if run.part.partition < 0 else None
    return repr(f"job {name_of(row)} {row[1]}")[1:-1] if row else f"{run.part.topic}[{run.part.partition}]@{offset}"


class Worker:
    """The runners of one process. `inline=True` makes crews that nobody drives (tests)."""

    def __init__(self, app: App, *, only: Iterable[str] = (), skip: Iterable[str] = (), inline: bool = False) -> None:
        self.app, self._unseen = app, future.unseen
        self.consumers, self.queues = chosen(app, only, skip)
        self.cron = Cron(app, [s for s in app.crons.values() if s.job.queue in self.queues])
        self.batches: Any = None  # jobs.batch.Keeper
        self.inline = inline
        self.drive: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run  # for inline crews
        self.gate = Gate()
        self.runners: list[Runner] = []
        self.recycling: str | None = None
        self.quiet = False
        self.paused: list[str] = []  # as `barnabas resume` takes them
        self._sampled: tuple[float, dict[Any, tuple[Any, int, float]]] = (0.0, {})  # what was in work at the last report
        self.loop: asyncio.AbstractEventLoop | None = None
        self._loop_ends = False
        self._threads: list[threading.Thread] = []
        self._begun: set[Runner] = set()  # those whose set_up ran
        self._fetching: set[Runner] = set()  # those that have their fetch thread
        self._stopping = threading.Event()

    # Building.

    def build(self) -> None:
        """Open the sources and make the runners."""
        try:
            for consumer in self.consumers:
                self._consumer(consumer)
            if self.queues:
                self._jobs()
        except BaseException:
            for runner in self.runners:
                if hasattr(runner, "source"):
                    runner.source.close()
            self.runners = []
            raise

    def _crew(self, handler: Any, order: str, size: int, backend: Backend) -> Crew:
        box, base = backend.box(size)
        kind = Crew if self.inline else LoopCrew if handler.awaited else ThreadCrew
        crew = kind(handler, order, size, self.app.clock, box=box, base=base)
        if isinstance(crew, LoopCrew):
            crew.loop = self._event_loop()
        if self.inline:
            crew.drive = self.drive
            crew.lanes.wait = min(crew.lanes.wait, NO_WAIT)
        return crew

    def _runner(self, name: str, crews: list[Crew], **options: Any) -> Runner:
        app, interval, grace = self.app, self.app.settings.checkpoint_interval, 0.0 if self.inline else 5.0
        apart = app.settings.events != app.settings.jobs
        options["sinks"] = (lambda output: app.events if len(output) == 7 else app.jobs) if apart else None
        options |= {"clock": app.clock, "observers": app.observers, "gate": self.gate, "interval": interval, "grace": grace}
        runner = Runner(name, crews, **options)
        self.runners.append(runner)
        return runner

    def _consumer(self, consumer: Consumer) -> None:
        app, events = self.app, self.app.events
        handler = consumer.compile(app.observers, [*app.hooks, *consumer.hooks])
        if consumer.tables:
            events.cell(consumer.tables[0].name, "")  # a backend without tables says so now
            rekeyed = any(t.rekeyed for t in consumer.topics)
            handler.tables = Cells((t.name for t in consumer.tables), rekeyed, events.cell)
        crew = self._crew(handler, consumer.order, consumer.concurrency, events)
        instance = consumer.instance

        def on_parts(what: str, parts: list[Part]) -> None:
            method = getattr(instance, what, None)
            own = [(p.topic, p.partition) for p in parts if not p.retries]
            if method is not None and own:
                try:
                    crew.call(method, own, timeout=5.0)
                except Exception as error:
                    log.error("%s: its %s() failed: %r", consumer.name, what, error, exc_info=error)

        runner = self._runner(consumer.name, [crew], on_parts=on_parts if instance is not None else None)
        runner.ends = getattr(instance, "tear_down", None)
        runner.begins = getattr(instance, "set_up", None)
        ordered = consumer.order == "partition"
        source = events.log(consumer.group, consumer.subscriptions, start=consumer.start, ordered=ordered, listener=runner)
        if handler.bare and ordered and (bare := getattr(source, "bare", None)) is not None:
            bare(handler)
        runner.attach(source, source.atomic is None)

    def _jobs(self) -> None:
        app, jobs = self.app, self.app.jobs
        from barnabas.jobs.batch import Keeper  # an app without jobs has none

        self.batches = Keeper(app)
        jobs.ripe = self.batches.ripe
        for job in app.job_handlers.values():
            if job.priority:
                app.ranks(job.owner)
        entries = {name: Entry(job, [*app.hooks, *job.hooks]) for name, job in app.job_handlers.items()}
        kinds = {entry.awaited for entry in entries.values()} or {False}
        crews, patience = [], app.settings.unknown_timeout if app.settings.unknown == "wait" else 0.0
        for awaited, size in ((False, app.settings.threads), (True, app.settings.coroutines)):
            if awaited in kinds:
                crews.append(self._crew(JobHandler("jobs", entries, awaited, app.observers, patience), "none", size, jobs))
                crews[-1].handler.hurry = crews[-1].hurry
        route = router(entries) if len(crews) == 2 else None
        ahead, guard = None if self.inline else 0.05, crews[0].handler.guard or None
        limit = 1000 + sum(crew.size for crew in crews)  # what is done and not settled is to keep no coroutine waiting
        runner = self._runner("jobs", crews, route=route, limit=limit, ahead=ahead, widths=app.settings.concurrency)
        runner.dump = self.dump
        runner.attach(jobs.queues(self.queues, runner, guard), app.settings.events != app.settings.jobs)

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self.loop is None:
            try:  # where it is installed: a third more async jobs a second
                import uvloop as loops
            except ImportError:
                loops = asyncio
            self.loop = loop = loops.new_event_loop()
            self._thread("barnabas-loop", self._run_loop, loop)
        return self.loop

    def _thread(self, name: str, target: Callable[..., Any], *args: Any) -> None:
        """A thread that the stop waits for."""
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while not self._loop_ends:
                with contextlib.suppress(SystemExit, KeyboardInterrupt):  # a handler's: its task has ended, the loop
                    loop.run_forever()  # is needed for the stop
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left, timeout=1.0) if left else loop.shutdown_asyncgens())
        finally:
            loop.close()

    # Running.

    def start(self) -> None:
        """Run the on_start hooks and begin. Raises what a hook or a backend raises, after leaving what was begun."""
        _ = self.homes  # a backend that refuses does so before anything is begun
        try:
            for hook in self.app.start_hooks:
                self._hook(hook)
            self.build()
            for crew in [crew for runner in self.runners for crew in runner.crews]:
                crew.start()
            for runner in self.runners:
                if runner.begins is not None:
                    runner.crews[0].call(runner.begins, timeout=60.0)
                self._begun.add(runner)
            self.obey()  # before the first fetch: a pause survives restarts
        except BaseException:
            self.stop(0.0)
            raise
        if self.inline:
            return
        for runner in self.runners:
            self._thread(f"{runner.name}-fetch", runner.run)
            self._fetching.add(runner)
        if self.cron:
            self._thread("barnabas-cron", self._tick)
        if self.batches is not None:
            self._thread("barnabas-batches", self.batches.run, self._stopping)
            self._thread("barnabas-looks", self.batches.tend, self._stopping)
        if any(c.handler.timed for r in self.runners for c in r.crews):
            threading.Thread(target=self._watch, name="barnabas-watchdog", daemon=True).start()

    def _tick(self) -> None:
        """Enqueue what is due by the clock, until this process is to begin nothing new."""
        while not self.quiet and not self._stopping.is_set():
            wait = self.cron.step() - self.app.clock.now()
            self._stopping.wait(max(0.01, min(wait, 1.0)))  # clocks are set, and a process goes quiet

    def _hook(self, hook: Callable[[], Any], timeout: float = 60.0) -> None:
        out = hook()
        if asyncio.iscoroutine(out):
            if self.inline:
                self.drive(out)
            else:
                within(timeout, asyncio.run_coroutine_threadsafe(out, self._event_loop()))

    def failed(self) -> BaseException | None:
        """The error that ended a runner, if any did."""
        return next((r.error for r in self.runners if r.error is not None), None)

    def drained(self) -> bool:
        """Whether nothing is left to do for what this worker runs, in any process."""
        app = self.app
        crews = (crew for runner in self.runners if not runner.finished.is_set() for crew in runner.crews)
        if any(crew.busy() or crew.results or crew.lanes.ready for crew in crews):
            return False
        for _ in range(2 if app.events is not app.jobs or self.queues else 1):  # what ended meanwhile may have led to more
            if any(runner.unsettled() for runner in self.runners) or not (self.batches is None or self.batches.idle()):
                return False
            if app.events.flush(0) or app.jobs.flush(0):
                return False
            groups = {c.group: [t.name for t in c.subscriptions] for c in self.consumers}
            if groups and app.events.open_work(groups, []):
                return False
            if self.queues and app.jobs.open_work({}, list(self.queues)):
                return False
        return True

    # What operators ask for, and what they get to see.

    @property
    def homes(self) -> list[Backend]:
        """The backends this worker lives on, each once."""
        app = self.app
        return list(dict.fromkeys([*([app.events] if self.consumers else []), *([app.jobs] if self.queues else [])]))

    def obey(self) -> str | None:
        """Pause and resume what operators ask for; what they ask of this process: "quiet", "stop" or None."""
        homes = self.homes
        control = {name: value for home in homes for name, value in home.control().items()}
        paused: list[str] = []
        held = sorted(msgspec.json.decode(name[10:], type=tuple[str, str]) for name in control if name.startswith("pause key:"))
        for consumer, runner in zip(self.consumers, self.runners, strict=False):
            keys = [key for group, key in held if group == consumer.group]
            whole = f"pause group:{consumer.group}" in control
            paused += [consumer.name] * whole + [f"{consumer.name} --key {key}" for key in keys]
            self._pause(runner, Pauses(whole, frozenset(k for key in keys for k in (key, key.encode()))))
        if self.queues:
            queues = [queue for queue in self.queues if f"pause queue:{queue}" in control]
            paused += [f"queue:{queue}" for queue in queues]
            self._pause(self.runners[-1], Pauses(queues=frozenset(queues)))
        for name in sorted({*paused} ^ {*self.paused}):
            log.info("%s: %s", "paused by an operator" if name in paused else "resumed", name)
        self.paused = paused
        asked = {control.get(f"process:{home.name}") for home in homes}
        return "stop" if "stop" in asked else "quiet" if "quiet" in asked else None

    def _pause(self, runner: Runner, pauses: Pauses) -> None:
        if runner.pauses != pauses:
            runner.pauses = pauses
            runner.wake()

    def hush(self, why: str) -> None:
        """Begin nothing new: finish what is in hand, settle it, leave the groups and queues to others; live on."""
        if not self.quiet:
            self.quiet = True
            log.info("%s: this process is quiet: it finishes what is in work, and begins nothing until it is stopped", why)
            info = self.report()
            for home in self.homes:
                with contextlib.suppress(BackendError):
                    home.report(info)  # first: what is closed by a quiet process stays to be seen
            for runner in self.runners:
                runner.hush()

    def counts(self) -> dict[str, int]:
        """What it has done since its start: "done", "again", "dead", ...; "overtaken": what it ran
        when others had taken it back, since this process was cut off or frozen; "unseen": sends that failed and nobody looked
        at; "work": what it has in work now."""
        found: dict[str, int] = {}
        for (_, outcome), count in self.app.observers.counts.copy().items():
            name = "again" if outcome == "retry topic" else outcome
            found[name] = found.get(name, 0) + count
        own = {"overtaken": sum(getattr(home, "overtaken", 0) for home in self.homes), "unseen": future.unseen - self._unseen}
        found |= {name: count for name, count in own.items() if count}
        found["work"] = sum(len(run.rows) for _, _, run, _ in _running(self.runners))
        return found

    def report(self) -> dict[str, Any]:
        """What this process is and does, for `Backend.report`: of what is in work [handler, topic, partition, offset, seconds]
        (the longest MOST_WORK), of queues what is done, of handlers that and the seconds a message takes. The same while nothing
        happens."""
        counts = self.counts()
        del counts["work"]
        done = self.app.observers.counts.copy()
        by_queue = {part.topic: part.done for runner in self.runners for part in runner.parts if part.partition < 0}
        paces = {runner.name: max(crew.pace for crew in runner.crews) for runner in self.runners}
        handlers = {name: {"done": done.get((name, "done"), 0), "pace": pace or None} for name, pace in paces.items()}
        queues = {queue: by_queue.get(queue, 0) for queue in self.queues}
        return {
            "app": self.app.name, "groups": [consumer.group for consumer in self.consumers], "queues": queues, "counts": counts,
            "work": self._in_work(), "handlers": handlers, "rss": memory(), "quiet": self.quiet, "paused": self.paused,
            "trouble": next(filter(None, [getattr(each, "away", "") for each in [*self.homes, *self.runners]]), ""),
        }

    def _in_work(self) -> list[list[Any]]:
        (last, seen), now = self._sampled, self.app.clock.monotonic()
        sampled: dict[Any, tuple[Any, int, float]] = {}
        found: list[list[Any]] = []
        for crew, slot, run, offset in _running(self.runners):
            if offset < 0:
                continue
            run_, offset_, since = seen.get((crew, slot), (None, 0, 0.0))
            if run_ is not run or offset_ != offset:
                since = max(last, crew.began[slot])  # it was not in work at the last look
            sampled[crew, slot] = (run, offset, since)
            part, name = run.part, crew.handler.name
            row = next((row for row in run.rows if row[0] == offset), None) if part.partition < 0 else None
            said = [SAID[row[1]]] if row and row[1] in SAID else []
            name = (row and name_of(row)) or name
            found.append([name, part.topic, part.partition, offset, round(now - since, 1), *said])
        self._sampled = (now, sampled)
        return sorted(found, key=lambda each: -each[4])[:MOST_WORK]

    def stop(self, timeout: float | None = None) -> list[str]:
        """Stop fetching, finish what is in hand within `timeout` seconds, settle, leave, run the on_stop hooks.

        Returns the names of handlers that held the stop up (their deliveries are given back), with where they are.
        """
        timeout = self.app.settings.stop_timeout if timeout is None else timeout
        self._stopping.set()
        deadline = time.monotonic() + timeout
        for runner in self.runners:
            runner.stop()
            if runner not in self._fetching:
                runner.overrun.set()
                runner.run()
        for runner in self.runners:
            runner.finished.wait(max(0.0, deadline - time.monotonic()))
        held = [line for runner in self.runners if not runner.finished.is_set() for line in self._release(runner)]
        for runner in self.runners:
            if all(isinstance(crew, LoopCrew) for crew in runner.crews if crew.busy()):
                runner.finished.wait(CANCELLED)  # then what they had is given back now
            runner.overrun.set()
            runner.finished.wait(5.0)
            if runner.ends is not None and runner in self._begun and not held:
                self._end(f"{runner.name}: its tear_down()", runner.crews[0].call, runner.ends)
            for crew in runner.crews:
                crew.leave()
        if self.batches is not None:
            self.batches.end()
        hangs = bool(held) or self.recycling is not None  # maybe on the loop
        for hook in self.app.stop_hooks:
            self._end(f"the on_stop hook {hook!r}", partial(self._hook, timeout=5.0 if hangs else 60.0), hook)
        if self.loop is not None:
            self._loop_ends = True
            self.loop.call_soon_threadsafe(self.loop.stop)
        for thread in self._threads:
            thread.join(0.0 if hangs else 5.0)
        return held

    def _end(self, what: str, call: Callable[..., Any], function: Callable[[], Any]) -> None:
        """Call something that may not stop the stop. A test is to see its error, though."""
        try:
            call(function)
        except Exception:
            if self.inline:
                raise
            log.exception("%s failed", what)

    def _release(self, runner: Runner) -> list[str]:
        """Cancel what can be cancelled, and say what held the stop up."""
        held = []
        for crew, slot, run, offset in _running([runner]):
            held.append(f"{runner.name}, at {_place(run, offset)}:\n{self._where(crew, slot)}")
            crew.cancel(slot, run, "release")
        return held

    def dump(self) -> None:
        """Print to stderr where all threads are, and all coroutines that are in work."""
        faulthandler.dump_traceback(file=sys.stderr)
        for crew, slot, run, offset in _running(self.runners):
            if isinstance(crew, LoopCrew):
                print(f"\nCoroutine of {_place(run, offset)}:\n{self._where(crew, slot)}", end="", file=sys.stderr, flush=True)

    def _where(self, crew: Crew, slot: int) -> str:
        """The stack of a worker from the handler on, innermost last."""
        frames, ident = list[tuple[Any, int]](), crew.threads[slot].ident if isinstance(crew, ThreadCrew) else None
        if isinstance(crew, LoopCrew):
            awaited: Any = crew.tasks[slot].get_coro()
            if getattr(awaited, "cr_running", False):  # it does not wait for anything: it blocks the loop's thread
                ident = next((thread.ident for thread in self._threads if thread.name == "barnabas-loop"), None)
            while ident is None and getattr(awaited, "cr_frame", None) is not None:
                frames.append((awaited.cr_frame, awaited.cr_frame.f_lineno))  # a task's own get_stack knows the outermost only
                awaited = awaited.cr_await
        if (frame := sys._current_frames().get(ident or 0)) is not None:
            frames = [*traceback.walk_stack(frame)][::-1]
        past = max((n for n, (each, _) in enumerate(frames, 1) if each.f_code.co_filename.endswith("engine/work.py")), default=0)
        return "".join(traceback.StackSummary.extract(iter(frames[past:] or frames)).format()) or "ended"

    # Timeouts. A sweep that compares what is in work costs a message nothing.

    def _watch(self) -> None:
        seen: dict[Any, tuple[Any, int, float]] = {}
        while not self._stopping.wait(0.05):
            last, seen, now = seen, {}, time.monotonic()
            for crew, slot, run, offset in _running(self.runners):
                if (limit := crew.handler.limit(run)) is not None:
                    run_, offset_, since = last.get((crew, slot), (None, 0, 0.0))
                    seen[crew, slot] = run, offset, since if run_ is run and offset_ == offset else now
                    if (spent := now - seen[crew, slot][2]) >= limit:
                        self._overdue(crew, slot, run, offset, limit, spent)

    def _overdue(self, crew: Crew, slot: int, run: Any, offset: int, limit: float, spent: float) -> None:
        where = _place(run, offset)
        if not crew.cancel(slot, run, "timeout") and (id(run), offset) not in crew.late:
            crew.late.add((id(run), offset))
            late = f"{crew.handler.name}: {where} runs longer than its timeout of {limit} s"
            log.error("%s:\n%s", late, self._where(crew, slot))
        elif spent >= 2 * limit and self.recycling is None and crew.blocked(slot):
            hangs = f"{crew.handler.name} hangs at {where}, twice its timeout of {limit} s"
            log.error("%s: this process ends and lets another go on:\n%s", hangs, self._where(crew, slot))
            crew.abandon(slot, run)
            self.recycling = hangs
