"""The registry of what exists: topics, consumers, jobs, tables, hooks. Declares; opens a backend only when one is used."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from barnabas import backends
from barnabas.clock import Clock
from barnabas.consumer import Consumer, check_name
from barnabas.engine.hand import CURRENT
from barnabas.engine.hooks import after, before, check_hook, refuse_async
from barnabas.engine.observe import Observer, Observers
from barnabas.errors import DeclarationError, Refused, SendError, must, refuse_unknown, whole
from barnabas.job import OPTIONS as JOB_OPTIONS
from barnabas.job import STORED, Job
from barnabas.jobs.limit import Concurrent, Limiter, Rate
from barnabas.ports import Backend
from barnabas.settings import Settings
from barnabas.state.table import Table
from barnabas.topic import Retention, Topic

if TYPE_CHECKING:
    from barnabas.jobs.batch import JobBatch, Status
    from barnabas.jobs.cron import Schedule

F = TypeVar("F", bound=Callable[..., Any])
TOPIC_OPTIONS = ("key", "partitions", "codec", "retention", "limit", "rekeyed")


class App:
    """An application. `events` and `jobs` are URLs (sqlite:///FILE, memory:, kafka://, redis://); further settings by name.

    Settings: these arguments < barnabas.toml < BARNABAS_* environment < command line; `barnabas check` shows each
    value and where it came from. Raises SettingError or DeclarationError for what cannot work.
    """

    def __init__(self, name: str, *, events: str | None = None, jobs: str | None = None, **settings: Any) -> None:
        check_name("App", "name", name)
        self.name = name
        self.settings = Settings({"events": events, "jobs": jobs, **settings})
        self.clock: Clock = Clock()
        self.topics: dict[str, Topic[Any]] = {}
        self.consumers: dict[str, Consumer] = {}
        self.job_handlers: dict[str, Job] = {}
        self.crons: dict[str, Schedule] = {}
        self.tables: dict[str, Table[Any]] = {}
        self.hooks: list[Any] = []
        self.enqueue_hooks: list[Callable[[dict[str, Any]], Any]] = []
        self.start_hooks: list[Callable[[], Any]] = []
        self.stop_hooks: list[Callable[[], Any]] = []
        self.observers = Observers()
        self.batches_met: dict[str, tuple[float, str]] = {}  # see jobs.batch.standing
        self._declared: dict[str, dict[str, Any]] = {}  # each topic's options as the code gives them
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<app {self.name}>"

    # Declaring.

    def topic(self, name: str, type: Any = None, **options: Any) -> Topic[Any]:
        """Declare a topic of values of `type` (any type msgspec decodes, a pydantic model, or bytes with codec="raw").

        key: a field's name or a function of the value. partitions: 6 by default. codec: "json" or "raw". retention:
        Retention(age=, size=, force=), seven days by default. limit: bytes of an encoded value, 1 MiB by default.
        rekeyed: all messages that use one table key share a partition, though their keys differ. Declaring the same
        topic again returns the first if nothing differs.
        """
        owner = f"topic {name!r}"
        refuse_unknown(owner, options, TOPIC_OPTIONS)
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.+$)[A-Za-z0-9._-]{1,200}", name):
            raise DeclarationError(f"{owner}: its name may have up to 200 letters, digits, dashes, underscores, and dots between")
        n, limit, kept, rekeyed = (options.get(option) for option in ("partitions", "limit", "retention", "rekeyed"))
        must(n is None or (whole(n) and 1 <= n <= 10_000), owner, "partitions", n, "give a whole number from 1 to 10000")
        must(limit is None or (whole(limit) and limit > 0), owner, "limit", limit, "give the most bytes of a value, 1 or more")
        must(kept is None or isinstance(kept, Retention), owner, "retention", kept, "give Retention(age=SECONDS, size=BYTES)")
        must(rekeyed is None or isinstance(rekeyed, bool), owner, "rekeyed", rekeyed, "give True or False")
        if name in self.topics:
            known = self.topics[name]
            if known.type != type or self._declared[name] != options:
                raise DeclarationError(f"{owner} is declared twice, differently; declare it once and import it")
            return known
        self._declared[name] = dict(options)
        topic: Topic[Any] = Topic(self, name, type, **self._overridden(name, options))
        self.topics[name] = topic
        return topic

    def adopt(self, settings: Settings) -> None:
        """Go by other settings from now on; the topics follow. For whoever starts the app: nothing may be open yet."""
        self.settings = settings
        for name, topic in self.topics.items():
            now = self._overridden(name, self._declared[name])
            topic.adjust(now["partitions"], now["retention"], now["limit"], now["keyed"])

    def _overridden(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Settings files know better than code: `[topics.orders] partitions = 24`."""
        over, given = self.settings.topics.get(name, {}), options.get("retention") or Retention()
        kept = Retention(over.get("retention_age", given.age), over.get("retention_size", given.size), given.force)
        count, limit = over.get("partitions", options.get("partitions")), options.get("limit") or self.settings.value_limit
        return {**options, "partitions": count, "retention": kept, "limit": limit, "keyed": over.get("compact", False)}

    def consumer(self, topics: Topic[Any] | Sequence[Topic[Any]], **options: Any) -> Callable[[F], F]:
        """Declare a consumer: decorates a function (sync or async) or a class, which stays what it is.

        name, group, start ("earliest"|"latest"), concurrency (1), order ("key"|"partition"|"none"), retry (Retry(5)),
        on_dead ("topic"|"skip"|"stop"), timeout (seconds), responds=[...], tables=[...], hooks=[...], batch (Batch()).
        """
        if callable(topics):
            raise DeclarationError(f"@app.consumer on {topics!r}: say what it reads: @app.consumer(TOPIC)")
        own = [topics] if isinstance(topics, Topic) else list(topics) if isinstance(topics, list | tuple) else [topics]

        def declare(target: F) -> F:
            consumer = Consumer(self, own, target, **options)  # type: ignore[arg-type]
            self._claim_name(consumer.name, consumer.owner)
            for other in self.consumers.values():
                if other.group == consumer.group:
                    what = f"{consumer.owner}: group={consumer.group!r} belongs to consumer {other.name!r}"
                    why = "two consumers of one group would take each other's messages: give one of them another name= or group="
                    raise DeclarationError(f"{what}; {why}")
                for table in [table for table in consumer.tables if table in other.tables]:
                    what = f"{consumer.owner}: tables=: the table {table.name!r} belongs to consumer {other.name!r}"
                    how = f"give this one a table of its own, or read the other's: with {table.name}.open() as view"
                    raise DeclarationError(f"{what}; {how}")
            self.consumers[consumer.name] = consumer
            return target

        return declare

    def _claim_name(self, name: str, owner: str) -> None:
        if name in self.consumers or name in self.job_handlers:
            raise DeclarationError(f"{owner}: the name is taken by another consumer or job; give one of them name=")

    def job(self, function: Any = None, **options: Any) -> Any:
        """Declare a job: decorates a function, sync or async, which then has `.enqueue(...)` and stays callable.

        queue ("default"), retry (25; a number, True for 25, False for none), name, timeout (seconds), dead (True: out of
        retries it goes to the dead set), hooks=[...], retry_for (seconds since the first failure, instead of the number),
        retry_queue (where retries wait to run), backtrace (True, or how many lines of it are stored with a failure), tags
        ([...]: labels, also on Sidekiq's page), expires_in (seconds after it was due in which it is to begin; else it is dropped,
        counted as "expired"), result_ttl (seconds that what it returns is kept, for `outcome`), max_runtime (seconds after
        which a job in `steps` lets others go first), priority (-10 to 10, 0 for most: higher ones overtake others of their
        queue, but for one in four, which goes to who waits longest; not on Redis).

        unique: until_executed(...), while_executing(...) and the like: at most one of a kind in the queues, or at work.
        limit: Rate(...), Concurrent(...) or a list of them: the others wait for their turn, first enqueued first.

        retry_delay(count, error, job): seconds before the retry (count: 0 for the first; Sidekiq's jitter comes on top),
        None for Sidekiq's own, "discard" to let the job go, "kill" for no further retry. on_exhausted(job, error): no retry
        is left; "discard" keeps it out of the dead set. on_death(job, error): it will not run again. `job` is a dict of what
        is stored. They run between two jobs, so keep them short; what they send leaves as the job is settled; an error of
        theirs is logged.
        """
        refuse_unknown("job", options, JOB_OPTIONS)

        def declare(function: Callable[..., Any]) -> Job:
            job = Job(self, function, **options)
            self._claim_name(job.name, job.owner)
            self.job_handlers[job.name] = job
            return job

        return declare(function) if function is not None else declare

    def foreign_job(self, name: str, **options: Any) -> Job:
        """A job that another program declares and runs, a Ruby class such as "HardWorker": it can be enqueued here.

        queue ("default"), retry, retry_for, retry_queue, backtrace, dead and tags as for `job`; arguments are what JSON can say.
        """
        refuse_unknown(f"foreign job {name!r}", options, ("queue", "retry", *STORED))

        def elsewhere(*args: Any) -> None:
            raise DeclarationError(f"job {name!r} is run by another program; declare it with app.job to run it here")

        return Job(self, elsewhere, name=name, **options)

    def cron(
        self, line: str | None = None, *, every: timedelta | None = None, tz: str | None = None, on_missed: str = "once",
        overlap: bool = False, name: str | None = None,
    ) -> Callable[[Any], Job]:
        """Enqueue a job by the clock: decorates a job, or a function, which becomes one. `line`: "*/5 * * * *", or with six
        fields the first is seconds; `every=timedelta(...)`: whole seconds, counted from the epoch.

        tz ("UTC"): the time zone of the line. on_missed: what becomes of ticks at which no worker ran: "once" (one run for the
        last of them), "skip", "all". overlap (False): whether a run is enqueued while the last one has not ended; with "all"
        they follow each other. name: where a job has several. A function with a parameter gets the time of the tick:
        `at: datetime` (a text without that annotation). Each tick is enqueued once over all processes, whichever run its queue.
        """
        from barnabas.jobs.cron import Schedule  # most apps have none

        if callable(line):
            raise DeclarationError(f'@app.cron on {line!r}: say when: @app.cron("30 6 * * *"), or every=timedelta(...)')

        def declare(target: Any) -> Job:
            job: Job = target if isinstance(target, Job) else self.job()(target)
            schedule = Schedule(job, line, every, tz, on_missed, overlap, name)
            if schedule.name in self.crons:
                raise DeclarationError(f"cron {schedule.name!r}: the name is taken by another schedule; give one of them name=")
            self.crons[schedule.name] = schedule
            return job

        return declare

    # Batches of jobs.

    def batch(
        self, *, on_success: Any = None, on_complete: Any = None, on_death: Any = None, description: str = ""
    ) -> "JobBatch":
        """Jobs that end in something: `with app.batch(on_success=report) as batch: batch.enqueue(resize, 7)`.

        The callbacks are jobs (or `job.options(...)`) with one parameter, the batch's id, or none. on_complete: all have ended,
        done or dead; on_success: all are done; on_death: the first is dead. A batch made inside another, in its block or in one
        of its jobs, ends before that. In a handler all of it leaves when the handler has returned.
        """
        from barnabas.jobs.batch import new  # most apps have none

        return new(self, description, on_success=on_success, on_complete=on_complete, on_death=on_death)

    def current_batch(self) -> "JobBatch | None":
        """The batch whose block this is, or whose job this is in, to add jobs to; None outside of any."""
        from barnabas.jobs.batch import current

        return current(self)

    def batch_status(self, id: str) -> "Status":
        """How far a batch is, from any process. Raises UnknownBatch."""
        from barnabas.jobs.batch import status

        return status(self, id)

    def cancel_batch(self, id: str) -> None:
        """Skip what has not begun of a batch and those inside it, from a second later on; no callback runs. Raises UnknownBatch,
        and Refused where it has ended."""
        from barnabas.jobs.batch import cancel

        cancel(self, id)

    def limiter(self, name: str, limit: Rate | Concurrent, *, timeout: float | None = None) -> Limiter:
        """A limit to take by hand, in any process: `with app.limiter("stripe", Rate(100, per=60)): ...` (or `async with`). All
        of one name share it, jobs with limit=Rate(..., name="stripe") too.

        timeout: seconds to wait for a slot, None for ever; raises NoSlot (a TimeoutError) when there was none.
        """
        return Limiter(self, name, limit, timeout)

    def table(self, name: str, type: Any = None) -> Table[Any]:
        """Declare a table: keyed values of `type`, settled together with the position of the consumer that owns it."""
        check_name("table", "name", name, slashes=True)
        if name.startswith("barnabas."):
            raise DeclarationError(f"table {name!r}: give it a name that does not begin with 'barnabas.'")
        if name in self.tables:
            raise DeclarationError(f"table {name!r} is declared twice; declare it once and import it")
        table: Table[Any] = Table(self, name, type)
        self.tables[name] = table
        return table

    # Hooks.

    def around(self, hook: F) -> F:
        """A generator function around every handler and job: before its `yield`, after it, `try/except` around it."""
        check_hook(hook, "around")
        declared: list[Any] = [*self.consumers.values(), *self.job_handlers.values()]
        for one in declared:
            refuse_async(one.owner, one.awaited, [hook])
        self.hooks.append(hook)
        return hook

    def _hook(self, kind: str, function: F, among: list[Any], made: Callable[[F], Any] | None = None) -> F:
        check_hook(function, kind)
        among.append(function if made is None else made(function))
        return function

    def before(self, function: F) -> F:
        """`function(delivery)` runs before every handler and job."""
        return self._hook("before", function, self.hooks, before)

    def after(self, function: F) -> F:
        """`function(delivery, outcome)` runs after every handler and job that succeeded."""
        return self._hook("after", function, self.hooks, after)

    def before_enqueue(self, function: F) -> F:
        """`function(job)` sees each job's fields before it is stored; it may change them, or return False to refuse."""
        return self._hook("before_enqueue", function, self.enqueue_hooks)

    def on_start(self, function: F) -> F:
        """Runs once in each worker process before its first delivery: open pools here. May be async: then it runs on
        the event loop of the async handlers."""
        return self._hook("on_start", function, self.start_hooks)

    def on_stop(self, function: F) -> F:
        """Runs once in each worker process after its last delivery. May be async."""
        return self._hook("on_stop", function, self.stop_hooks)

    def observe(self, observer: Observer) -> Observer:
        """Hand every Settled, Failed and Statistics record to `observer`; it may look, never change."""
        return self._hook("observe", observer, self.observers.watchers)

    # Backends, opened at first use.

    @property
    def events(self) -> Backend:
        """The backend of topics."""
        found = self.__dict__.get("_events")  # every send comes by here
        return self._backend("events") if found is None or found.closed else found

    @property
    def jobs(self) -> Backend:
        """The backend of queues."""
        found = self.__dict__.get("_jobs")
        return self._backend("jobs") if found is None or found.closed else found

    def _backend(self, kind: str) -> Backend:
        with self._lock:
            found: Any = self.__dict__.get(f"_{kind}")
            if found is None or found.closed:
                url = getattr(self.settings, kind)
                other = self.__dict__.get("_jobs" if kind == "events" else "_events")
                same = other is not None and not other.closed and other.url == url
                found = other if same else backends.open_url(url, self.settings, kind, self.clock)
                if kind == "events":
                    found.declare(self.all_topics())
                self.__dict__[f"_{kind}"] = found
        return found  # type: ignore[no-any-return]

    def ranks(self, owner: str) -> None:
        """Refuse a priority of this job where queues have none."""
        if not self.jobs.ranks:
            how = "give what is urgent a queue of its own, and the queues weights: [jobs] queues = {urgent = 5, default = 1}"
            raise SendError(f"{owner} has a priority, and queues on Redis are Sidekiq's lists, first in, first out: {how}")

    def all_topics(self) -> list[Topic[Any]]:
        """The declared topics, with their dead-letter topics and the retry topics of groups that need them."""
        found = dict(self.topics)
        for topic in self.topics.values():
            found.setdefault(topic.dead_topic.name, topic.dead_topic)
        for consumer in self.consumers.values():
            for topic in consumer.topics:
                retry = topic.retry_topic(consumer.group)
                found.setdefault(retry.name, retry)
        return list(found.values())

    @contextmanager
    def lent(self, **own: Any) -> Iterator[None]:
        """For a while the app has these attributes, afterwards those it had before (tests, and what keeps nothing)."""
        before = {name: self.__dict__.get(name) for name in own}
        self.__dict__.update(own)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def close(self) -> None:
        """Flush what was sent and let go of the backends; the next use opens them again. Not for a handler: raises Refused."""
        if (hand := CURRENT.get()) is not None and hand.open and hand.app is self:
            raise Refused("app.close() in a handler would take the backends away from the worker that runs it: leave it out")
        with self._lock:
            for kind in ("events", "jobs"):
                backend = self.__dict__.pop(f"_{kind}", None)
                if backend is not None and not backend.closed:
                    backend.close()
