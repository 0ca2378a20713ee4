"""What `@app.consumer(...)` declares: checked here, compiled to a Handler when a worker starts."""

import inspect
from collections.abc import Sequence
from typing import Any, Never

from barnabas.codec import misfit
from barnabas.engine.handler import Handler, Params, Route, make_route
from barnabas.engine.hooks import check_hooks, check_takes, refuse_async
from barnabas.engine.observe import Observers
from barnabas.engine.respond import RespondTo, respond_to
from barnabas.errors import DeclarationError, check_seconds, is_text, must, refuse_unknown, whole
from barnabas.retry import Retry
from barnabas.settings import QUEUE_NAME
from barnabas.state.table import Table
from barnabas.topic import Topic

OPTIONS = (
    "name", "group", "start", "concurrency", "order", "retry", "on_dead", "timeout", "responds", "tables", "hooks", "batch",
)  # fmt: skip


class Batch:
    """How a batch handler is fed: up to `max` messages of one partition, or what came within `wait` seconds."""

    __slots__ = ("max", "wait")

    def __init__(self, max: int = 1000, wait: float = 0.5, **unknown: Never) -> None:
        refuse_unknown("Batch", unknown, self.__slots__)
        must(whole(max) and max >= 1, "Batch", "max", max, "give the most messages of a batch, 1 or more")
        fits = not isinstance(wait, bool) and isinstance(wait, int | float) and 0 <= wait < float("inf")
        must(fits, "Batch", "wait", wait, "give the seconds a batch may wait to fill up, 0 or more")
        self.max, self.wait = max, float(wait)


def check_name(owner: str, option: str, name: Any, slashes: bool = False) -> None:
    """Refuse a name that no line of a table or a log could show."""
    fits = isinstance(name, str) and name.strip() and name.isprintable() and len(name) <= 200 and (slashes or "/" not in name)
    must(fits, owner, option, name, "give a text of up to 200 printable characters" + " without slashes" * (not slashes))


def check_call(owner: str, tags: Any, **seconds: Any) -> None:
    """Refuse tags that are no texts, and what is no number of seconds."""
    fits = isinstance(tags, list | tuple) and all(is_text(tag) and tag for tag in tags)
    must(fits, owner, "tags", tags, "give a list of texts")
    check_seconds(owner, **seconds)


def check_priority(owner: str, priority: Any) -> None:
    """Refuse what is no priority."""
    way_out = "give a whole number, -10 (last) to 10 (first); most have 0"
    must(whole(priority) and -10 <= priority <= 10, owner, "priority", priority, way_out)


def check_queue(owner: str, queue: Any, option: str = "queue") -> None:
    """Refuse a queue's name that Sidekiq's web page could not show."""
    fits = isinstance(queue, str) and QUEUE_NAME.fullmatch(queue)
    must(fits, owner, option, queue, "a queue's name has up to 200 letters, digits and _ : . -")


def _given(options: dict[str, Any], option: str, default: Any) -> Any:
    value = options.get(option)
    return default if value is None else value


class Consumer:
    """A consumer of one or several topics: one subscription, one consumer group."""

    def __init__(self, app: Any, topics: Sequence[Topic[Any]], target: Any, **options: Any) -> None:
        self.name: str = _given(options, "name", getattr(target, "__name__", type(target).__name__))
        self.owner = f"consumer {self.name!r}"
        refuse_unknown(self.owner, options, OPTIONS)
        self.app = app
        self.topics = list(topics)
        self.target = target
        self.is_class = inspect.isclass(target)
        self.group: str = _given(options, "group", f"{app.name}-{self.name}")
        self.start = options.get("start", "earliest")
        self.concurrency: int = options.get("concurrency", 1)
        self.order: str = _given(options, "order", "partition" if self.concurrency == 1 else "key")
        self.retry: Retry = options.get("retry", Retry())
        self.on_dead: str = options.get("on_dead", "topic")
        self.timeout: float | None = options.get("timeout")
        self.tables: list[Table[Any]] = self._list("tables", options)
        self.hooks = check_hooks(self.owner, options.get("hooks", []))
        self.batch: Batch = options.get("batch") or Batch()
        self._check(options)
        if self.is_class:
            check_takes(self.owner, target)
            for method, *arguments in (["set_up"], ["tear_down"], ["assigned", "partitions"], ["revoked", "partitions"]):
                if inspect.isfunction(inspect.getattr_static(target, method, None)):
                    check_takes(self.owner, getattr(target, method), "self", *arguments)
        self.responds = self._responds(options)
        for thing in (*self.topics, *self.tables, *(answer.topic for answer in self.responds)):
            if thing.app is not app:  # its messages are where that app's settings say, which need not be here
                raise DeclarationError(f"{self.owner}: {thing!r} belongs to {thing.app!r}; declare it in {app!r} as well")
        self.instance: Any = None
        routes = self.routes(target)
        self.awaited = inspect.iscoroutinefunction(routes[0].function)
        refuse_async(self.owner, self.awaited, [*app.hooks, *self.hooks])
        if not self.responds and any("respond" in r.params.kinds for r in routes):
            raise DeclarationError(f"{self.owner}: it asks for a Respond; say on which topics: responds=[...]")
        for params in [route.params for route in routes if self.responds]:
            self._check_answers(params)
        alone = options.get("batch") is not None and not routes[0].params.batch
        must(not alone, self.owner, "batch", self.batch, "it belongs to a batch handler, whose first parameter is list[T]")

    def _must(self, fits: Any, option: str, way_out: str) -> None:
        must(fits, self.owner, option, getattr(self, option), way_out)

    def _list(self, option: str, options: dict[str, Any]) -> list[Any]:
        value = options.get(option, ())
        must(isinstance(value, list | tuple), self.owner, option, value, f"give a list: {option}=[...]")
        return list(value)

    def _responds(self, options: dict[str, Any]) -> list[RespondTo]:
        responds: list[RespondTo] = []
        for answer in self._list("responds", options):
            if not isinstance(answer, RespondTo):
                way_out = "give topics, as app.topic(...) returns them, or respond_to(...)"
                must(isinstance(answer, Topic), self.owner, "responds", answer, way_out)
                answer = respond_to(answer)
            twice = any(other.topic is answer.topic for other in responds)
            must(not twice, self.owner, "responds", answer.topic, "it is named twice; for several answers use multiple=True")
            responds.append(answer)
        return responds

    def _check_answers(self, params: Params) -> None:
        """Refuse an annotation by which every answer would be dead."""
        returned, (answer, *more) = params.returned, self.responds
        nothing, asks = returned is type(None), "respond" in params.kinds
        if not asks and (more or nothing) and any(each.required for each in self.responds):
            names = ", ".join(each.topic.name for each in self.responds)
            why = "returns None" if nothing else "what it returns does not say on which"
            raise DeclarationError(f"{self.owner}: it is to answer on {names}, and {why}; give it a parameter `respond: Respond`")
        wrong, lacks = (False, []) if more or nothing or answer.topic.codec == "raw" else misfit(returned, answer.topic.type)
        if wrong or lacks:
            what = f"it returns {returned!r}, and topic {answer.topic.name!r} carries {answer.topic.type!r}"
            way_out = f"which needs {', '.join(lacks)} as well" if lacks else "annotate it as that, or declare the topic anew"
            raise DeclarationError(f"{self.owner}: {what}; {way_out}")

    def _check(self, options: dict[str, Any]) -> None:
        for option in ("name", "group"):
            check_name(self.owner, option, "" if self.name in ("<lambda>", "partial") else getattr(self, option))
        self._must(self.group != f"{self.app.name}-dead", "group", "it is that of `barnabas dead`; give another name= or group=")
        fit = self.topics and all(isinstance(topic, Topic) for topic in self.topics)
        self._must(fit, "topics", "give a topic, as app.topic(...) returns it, or a list of them")
        self._must(len({topic.name for topic in self.topics}) == len(self.topics), "topics", "name each topic once")
        check_call(self.owner, (), timeout=self.timeout)
        batch, tables, topics, n = _given(options, "batch", self.batch), self.tables, self.topics, self.concurrency
        self._must(self.start in ("earliest", "latest"), "start", 'give "earliest" or "latest"; `barnabas reset` moves a group')
        self._must(whole(n) and 1 <= n <= 10_000, "concurrency", "give a whole number from 1 to 10000: work at once per process")
        self._must(self.order in ("key", "partition", "none"), "order", 'give "key", "partition" or "none"')
        self._must(isinstance(self.retry, Retry), "retry", "give Retry(times, ...), Retry(0) for none")
        self._must(self.on_dead in ("topic", "skip", "stop"), "on_dead", 'give "topic" (dead letters), "skip" (counted), "stop"')
        self._must(all(isinstance(table, Table) for table in tables), "tables", "give tables, as app.table(...) returns them")
        self._must(not tables or self.order != "none", "order", 'tables need an order; use "key" or "partition"')
        self._must(not tables or self.retry.ordered, "retry", "tables need an order; use Retry(..., ordered=True)")
        rekeyed = tables and self.order == "key" and n > 1 and any(t.rekeyed for t in topics)
        self._must(not rekeyed, "order", 'of a rekeyed topic, two keys could write one cell at once; use "partition"')
        must(isinstance(batch, Batch), self.owner, "batch", batch, "give Batch(max=1000, wait=0.5)")

    def _function(self, holder: Any, topic: Topic[Any]) -> Any:
        """The function for one topic: the method named like it, else `process`."""
        if not self.is_class:
            return holder
        method = topic.name.replace(".", "_").replace("-", "_")
        function = getattr(holder, method, None) or getattr(holder, "process", None)
        if function is None:
            lacks = f"the class has neither a method {method!r} for topic {topic.name!r} nor `process`"
            raise DeclarationError(f"{self.owner}: {lacks}")
        return function

    def routes(self, holder: Any) -> list[Route]:
        """One route a topic. `holder` is the function, or the class's instance (the class itself at declaration)."""
        routes = []
        for topic in self.topics:
            function = self._function(holder, topic)
            must(callable(function), self.owner, "handler", function, "give a function, an async function or a class")
            static = inspect.getattr_static(holder, getattr(function, "__name__", ""), None)
            if inspect.isclass(holder) and not isinstance(static, staticmethod):
                function = function.__get__(object())
            routes.append(make_route(self.owner, topic, function))
        if len({inspect.iscoroutinefunction(r.function) for r in routes}) > 1:
            raise DeclarationError(f"{self.owner}: its methods are partly async; make all of them `async def`, or none")
        if len({r.params.batch for r in routes}) > 1:
            raise DeclarationError(f"{self.owner}: its methods take partly batches; make all take list[T], or none")
        awaited = inspect.iscoroutinefunction(routes[0].function)
        for name in ("set_up", "tear_down", "assigned", "revoked") if self.is_class and not awaited else ():
            if inspect.iscoroutinefunction(getattr(holder, name, None)):
                how = "there is no loop for it; make it a plain `def`, or the handler `async def`"
                raise DeclarationError(f"{self.owner}: its `{name}` is async and the handler is not, so {how}")
        return routes

    def compile(self, observers: Observers, hooks: Sequence[Any]) -> Handler:
        """The handler for one worker; a class is instantiated here."""
        self.instance = self.target() if self.is_class else None
        return Handler(self, self.routes(self.instance if self.is_class else self.target), hooks, observers)

    @property
    def subscriptions(self) -> list[Topic[Any]]:
        """The topics it reads: its own, and the retry topics of its group (of `barnabas dead retry`, and of retries that
        give up order). Not with tables: what is out of order must not write them."""
        own = list(self.topics)
        return own if self.tables else own + [t.retry_topic(self.group) for t in own]
