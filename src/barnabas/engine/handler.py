"""A user's function or class, compiled once at start: how its parameters are bound, and what a failure becomes."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from barnabas.codec import make_codec, misfit
from barnabas.engine.hand import CURRENT
from barnabas.engine.hooks import wrap
from barnabas.engine.lanes import Run
from barnabas.engine.observe import Failed, Observers
from barnabas.engine.respond import Respond, make_answer
from barnabas.errors import BarnabasError, DeclarationError, own_part, told
from barnabas.message import Delivery, Headers, Message, Outgoing, Row, Unread
from barnabas.retry import decide
from barnabas.verdict import Again, Dead

RETRIED = "barnabas-retry-"  # headers of a message on its way through a retry topic


class Stop(BarnabasError):
    """A message is dead and its consumer says on_dead="stop": the process stops without settling it."""


class Params(NamedTuple):
    """What a function's parameters ask for, in their order: "value", "delivery", "respond"."""

    kinds: list[str]
    value: Any  # the value's annotation without list[] and None, or Any
    batch: bool
    optional: bool  # the annotation allows None
    returns_none: bool  # the return annotation allows None
    returned: Any  # an answer's type, by that annotation, or Any


def _strip_none(annotation: Any) -> tuple[Any, bool]:
    """An annotation without None, and without notes that no decoder minds; and whether None was in it."""
    if typing.get_origin(annotation) is typing.Annotated:
        bare, none = _strip_none(annotation.__origin__)
        minded = tuple(note for note in annotation.__metadata__ if isinstance(note, msgspec.Meta))
        return (typing.Annotated[(bare, *minded)] if minded else bare), none
    if isinstance(annotation, typing.TypeVar) and not (annotation.__bound__ or annotation.__constraints__):
        return Any, False  # of a class that many handlers share: what the topic carries
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(rest) < len(typing.get_args(annotation)):
            return (_strip_none(rest[0])[0] if len(rest) == 1 else typing.Union[tuple(rest)]), True  # noqa: UP007
    return annotation, annotation is type(None)


def hints_of(owner: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, also in a functools.partial. Refuses those that cannot be read."""
    try:
        return typing.get_type_hints(function.func if isinstance(function, functools.partial) else function, include_extras=True)
    except Exception as error:
        way_out = "import the names they use" if isinstance(error, NameError) else "give a function or a method"
        raise DeclarationError(f"{owner}: its annotations cannot be read ({error}); {way_out}") from None


def refuse_generator(owner: str, function: Callable[..., Any]) -> None:
    """Refuse a generator function: calling it makes a generator, which nobody would run."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DeclarationError(f"{owner}: it is a generator, which nobody runs; to answer more than once use a Respond")


def not_run(out: Any) -> TypeError:
    """A plain function returned a coroutine: its work was not done, and must not count as done."""
    out.close()
    return TypeError(f"it returned a coroutine ({out.__qualname__}) that nobody awaits; make it `async def` itself")


def bind_params(owner: str, function: Callable[..., Any], topic_type: Any = Any) -> Params:
    """Read a handler's signature once. Refuses parameters that nothing can be bound to."""
    refuse_generator(owner, function)
    hints = hints_of(owner, function)
    kinds: list[str] = []
    value: Any = Any
    batch = optional = False
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, Any)
        noted = hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint
        inner = typing.get_args(noted)[0] if typing.get_origin(noted) is list and typing.get_args(noted) else None
        bare = _strip_none(hint)[0]
        if parameter.kind is parameter.KEYWORD_ONLY:  # calls are by position
            bare = inner = None
        if bare is Respond:
            kinds.append("respond")
        elif bare is Delivery or typing.get_origin(bare) is Delivery:
            kinds.append("delivery")
        elif inner is Delivery or typing.get_origin(inner) is Delivery:
            kinds.append("deliveries")
        elif "value" not in kinds and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            batch = inner is not None and not kinds and hint != topic_type
            value, optional = _strip_none(inner if batch else hint)
            kinds.append("value")
        elif parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            what = "a handler takes the value, and if it asks by annotation a Delivery and a Respond"
            raise DeclarationError(f"{owner}: nothing can be bound to its parameter {parameter.name!r} ({hint!r}); {what}")
    if "delivery" in kinds and batch:
        raise DeclarationError(f"{owner}: a batch handler gets its deliveries as list[Delivery]")
    if "deliveries" in kinds and not batch:
        raise DeclarationError(f"{owner}: list[Delivery] belongs to a batch handler, whose first parameter is list[T]")
    returns = hints.get("return", Any)
    returned, nothing = _strip_none(returns)
    may_not_answer = returns not in (Any, type(None)) and nothing  # `-> None` answers by Respond, if at all
    for origin in (list, Message) if batch else (Message,):
        if typing.get_origin(returned) is origin or returned is origin:
            returned = typing.get_args(returned)[0] if typing.get_args(returned) else Any
    return Params(kinds, value, batch, optional, may_not_answer, returned)


class Route(NamedTuple):
    """How the values of one topic are decoded and which function takes them."""

    topic: Any
    function: Callable[..., Any]
    params: Params
    decode: Callable[[bytes], Any]


def make_route(owner: str, topic: Any, function: Callable[..., Any]) -> Route:
    """Bind one topic to one function: the annotation decides how values are decoded, else the topic's type."""
    params = bind_params(f"{owner}: {getattr(function, '__name__', function)}", function, topic.type)
    if "value" not in params.kinds and not params.kinds:
        raise DeclarationError(f"{owner}: it takes no parameter; its first one is the value (a wrapper needs functools.wraps)")
    decode = topic.decode
    if topic.codec == "raw" and params.value not in (Any, bytes):
        what = 'carries bytes as they are; annotate it as bytes, or declare the topic with a type and codec="json"'
        raise DeclarationError(f"{owner}: its value is {params.value!r} and topic {topic.name!r} {what}")
    if params.value is not Any and params.value != topic.type and topic.codec == "json":
        decode = make_codec(owner, params.value, "json")[1]
        if misfit(topic.type, params.value)[0]:
            way_out = "annotate it as what the topic carries, or declare the topic with another type"
            raise DeclarationError(f"{owner}: no {topic.type!r} of topic {topic.name!r} is read as {params.value!r}; {way_out}")
    return Route(topic, function, params, decode)


class Handler:
    """A consumer compiled for one subscription. Its fields are what the worker's loop needs, chosen once."""

    def __init__(self, consumer: Any, routes: Sequence[Route], hooks: Sequence[Any], observers: Observers) -> None:
        first = routes[0]
        self.consumer, self.app = consumer, consumer.app
        self.name: str = consumer.name
        self.group: str = consumer.group
        self.timeout: float | None = consumer.timeout
        self.timed = self.timeout is not None
        self.observers = observers
        self.tables: Any = None  # the worker's Cells, if the consumer has tables
        self.batch = consumer.batch if first.params.batch else None
        self.awaited = inspect.iscoroutinefunction(first.function)
        self.routes = {name: r for r in routes for name in (r.topic.name, r.topic.retry_name(self.group))}
        self.optional = any(r.params.optional for r in routes)
        self._hooked = bool(hooks)
        self._deliveries = "deliveries" in first.params.kinds
        same = len(routes) == 1 or (len({r.function for r in routes}) == 1 and len({id(r.decode) for r in routes}) == 1)
        plain = same and first.params.kinds == ["value"] and not hooks and not self.optional and not self.batch
        self.decode = first.decode if plain else None
        self.whole: Callable[[Any], Row] = as_it_is  # a row with all that belongs to it, where the source left that out
        self.columns: Callable[..., Any] | None = None  # deliveries of unread messages by columns, where the source can
        function: Callable[..., Any] = first.function if same else (_call_async if self.awaited else call)
        self._dispatch = not same
        kinds = first.params.kinds
        self._wants_delivery = self._hooked or any("delivery" in r.params.kinds for r in routes)
        # The two commonest shapes have a way of their own: hooks around f(value), and f(value, delivery).
        self._plain = same and kinds == (["value"] if self._hooked else ["value", "delivery"])
        straight = self._plain and not self.optional and len(routes) == 1
        if straight:
            self._decode = first.decode
            self.bind = self._bind_plain  # type: ignore[method-assign]
        # Of a row, offset and value are enough for it; and not even those, before its turn.
        lists = self.batch is not None and not hooks and not self._deliveries
        calm = not (self.awaited or self.timed or consumer.responds) and (plain or (straight and not hooks))
        self.unread = (lists or calm) and not consumer.tables
        self.bare = (lists or calm or plain) and not consumer.tables
        self.function = wrap(function, hooks, self.awaited, self.name) if hooks else function
        self.answer: Callable[[Any, Any], None] | None = None
        if consumer.responds:
            optional = {name for name, r in self.routes.items() if r.params.returns_none}
            self.answer = make_answer(self.name, consumer.responds, self.batch is not None, optional)

    def limit(self, run: Run) -> float | None:
        """Seconds the delivery in hand may take."""
        return self.timeout

    def decoder(self, topic: str) -> Callable[[Any], Any]:
        """How the values of this topic are decoded for a batch."""
        route = self.routes[topic]
        decode = route.decode
        return (lambda data: None if data is None else decode(data)) if route.params.optional else decode

    def learn(self, whole: Callable[[Any], Row], columns: Callable[..., Any] | None = None) -> None:
        """The source gives bare rows, or unread ones: what makes them whole, and many deliveries of unread ones by columns."""
        self.whole, self.columns = whole, columns
        if self.decode is None and self.batch is None:  # f(value, delivery): of what runs alone, or was held back
            self.bind = lambda run, row: self._bind_plain(run, whole(row))  # type: ignore[method-assign]

    def deliveries(self, part: Any, messages: list[Any]) -> Iterable[Delivery[Any]]:
        """Unread messages as deliveries, each made when it is asked for."""
        if self.columns is not None and not (part.attempts or part.retries):
            return self.columns(part, self.group, self._decode, messages)  # type: ignore[no-any-return]
        return (self.delivery(part, row, self._decode(row[2])) for row in map(self.whole, Unread(messages)))  # type: ignore[arg-type]

    def delivery(self, part: Any, row: Row, value: Any) -> Delivery[Any]:
        """The Delivery of a row, made when somebody asks for it; of a retried message, with its first address."""
        offset, key, _, headers, timestamp = row
        attempt = part.attempts.get(offset, 0) + 1
        if headers and part.retries:
            first, own = origin(headers)
            with suppress(KeyError, ValueError):  # another program's rubbish stands for itself
                return Delivery(
                    first["topic"].decode(), int(first["partition"]), int(first["offset"]), key, value, own, timestamp,
                    int(first["attempts"]) + attempt, self.group,
                )
        return Delivery(part.topic, part.partition, offset, key, value, list(headers or ()), timestamp, attempt, self.group)

    def bind(self, run: Run, row: Row) -> tuple[Any, ...]:
        """The arguments of a call: by annotation, after the delivery for the hooks and the function of its topic."""
        part = run.part
        route = self.routes[part.topic]
        data = row[2]
        value = route.decode(data) if data is not None or not route.params.optional else None  # type: ignore[arg-type]
        delivery: Any = self.delivery(part, row, value) if self._wants_delivery else None
        if self._plain:
            return (delivery, value) if self._hooked else (value, delivery)
        return self._arguments(route, value, delivery)

    def _arguments(self, route: Route, value: Any, delivery: Any) -> tuple[Any, ...]:
        """Of one message, or of a batch: its values and deliveries."""
        args: list[Any] = [delivery] if self._hooked else []
        if self._dispatch:
            args.append(route.function)
        for kind in route.params.kinds:
            args.append(value if kind == "value" else self._respond() if kind == "respond" else delivery)
        return tuple(args)

    def _bind_plain(self, run: Run, row: Row) -> tuple[Any, ...]:
        part = run.part
        offset, key, data, headers, timestamp = row
        if part.attempts or headers:
            return Handler.bind(self, run, row)
        value = self._decode(data)  # type: ignore[arg-type]
        delivery = Delivery(part.topic, part.partition, offset, key, value, [], timestamp, 1, self.group)
        return (delivery, value) if self._hooked else (value, delivery)

    def _respond(self) -> Respond:
        hand = CURRENT.get()
        respond = Respond()
        if hand is not None:
            hand.respond = respond
        return respond

    def call_batch(self, run: Run, rows: Sequence[Row], values: list[Any]) -> Any:
        """Call a batch handler."""
        deliveries = []
        if self._hooked or self._deliveries:
            deliveries = [self.delivery(run.part, row, value) for row, value in zip(rows, values, strict=True)]
        return self.function(*self._arguments(self.routes[run.part.topic], values, deliveries))

    def failed(self, run: Run, row: Row, error: BaseException, now: float, whole: bool) -> float | None:
        """What becomes of a row that failed: None if it has its outcome, else when it runs again (epoch seconds).

        Raises Stop if it is dead and the consumer says on_dead="stop".
        """
        consumer, part, row = self.consumer, run.part, self.whole(row)
        offset, data = row[0], row[2]
        attempt = self.delivery(part, row, None).attempt
        reason = None
        if data is None and not whole and not self.routes[part.topic].params.optional:
            reason = "a null value, and the handler's annotation has no None"
            run.others[offset] = Dead(reason)
            self._say(part, offset, attempt, "skipped", reason, None)
            return None
        if not whole and data is not None:
            reason = self._undecodable(part, data)
        verdict = Dead(f"undecodable: {reason}") if reason else decide(consumer.retry, attempt, error, now)
        if isinstance(verdict, Again):
            if consumer.retry.ordered:
                for failed in run.rows if whole else (row,):
                    part.attempts[failed[0]] = part.attempts.get(failed[0], 0) + 1
                self._say(part, offset, attempt, "again", told(error), error)
                return verdict.at
            if whole:  # each alone, at once: only the culprits go through the retry topic
                return None
            self._retry_apart(run, row, attempt, verdict)
            self._say(part, offset, attempt, "retry topic", told(error), error)
            return None
        if whole:
            for other in run.rows:  # one more run for each alone: only the culprits die
                part.attempts[other[0]] = max(part.attempts.get(other[0], 0), consumer.retry.times)
            return None
        self.bury(run, row, verdict.reason, error, attempt, now)
        return None

    def _retry_apart(self, run: Run, row: Row, attempt: int, verdict: Again) -> None:
        """A row goes through the retry topic."""
        first, topic = self.delivery(run.part, row, None), self.routes[run.part.topic].topic
        at = (first.topic, first.partition, first.offset)
        run.outputs.append(to_retry(topic, self.group, at, attempt, verdict.at, row, first.headers))
        run.others[row[0]] = verdict

    def apart(self, run: Run, now: float) -> None:
        """The rows of a batch are to run again, each alone, and for the last time: in its retry topic, without order."""
        for row in run.rows:
            self._retry_apart(run, row, self.consumer.retry.times, Again(now))

    def bury(self, run: Run, row: Row, reason: str, error: BaseException | None, attempt: int, now: float) -> None:
        """A row is dead: to the dead-letter topic, skipped and counted, or a stop of the process."""
        on_dead = "topic" if reason.startswith("undecodable") and self.consumer.on_dead == "skip" else self.consumer.on_dead
        part, row = run.part, self.whole(row)
        if error is None:  # it was not run: what came through a retry topic has earlier attempts
            attempt = self.delivery(part, row, None).attempt
        if on_dead == "stop":
            self._say(part, row[0], attempt, "stop", reason, error)
            raise Stop(f'{self.name}: {part.topic}[{part.partition}]@{row[0]} is dead and on_dead="stop": {reason}')
        run.others[row[0]] = Dead(reason)
        if on_dead == "topic":
            run.outputs.append(self._dead_letter(part, row, reason, error, attempt, now))
        self._say(part, row[0], attempt, "dead" if on_dead == "topic" else "skipped", reason, error)
        part.attempts.pop(row[0], None)

    def _undecodable(self, part: Any, data: bytes) -> str | None:
        """Why this value cannot be decoded; None if it can, so the handler itself failed."""
        try:
            self.routes[part.topic].decode(data)
        except Exception as error:
            return told(error)
        return None

    def _say(self, part: Any, offset: int, attempt: int, outcome: str, reason: str, error: BaseException | None) -> None:
        self.observers.failed(Failed(self.name, part.topic, part.partition, offset, attempt, outcome, reason, error))

    def _dead_letter(self, part: Any, row: Row, reason: str, error: BaseException | None, attempt: int, now: float) -> Outgoing:
        delivery = self.delivery(part, row, None)
        topic = self.routes[part.topic].topic
        import traceback

        ours = error is None or reason.startswith("undecodable")
        trace = "" if ours else "".join(traceback.format_exception(type(error), error, own_part(error)))  # type: ignore[arg-type]
        said: dict[str, Any] = {
            "reason": reason.encode(errors="replace")[:2048], "exception": type(error).__qualname__ if error is not None else "",
            "traceback": trace.encode(errors="replace")[-2048:], "attempts": attempt, "group": self.group,
            "topic": delivery.topic, "partition": delivery.partition, "offset": delivery.offset, "timestamp": row[4], "time": now,
        }
        value = row[2]
        if value is not None and len(value) > topic.dead_topic.limit:
            said["value-left-out"] = len(value)
            value = None
        told = [(f"barnabas-{name}", each if type(each) is bytes else str(each).encode()) for name, each in said.items()]
        return (topic.dead_topic, None, row[1], value, [*delivery.headers, *told], now, None)


def to_retry(
    topic: Any, group: str, first: tuple[str, int, int], attempts: int, at: float, row: Row, headers: Headers
) -> Outgoing:
    """A row on its way through its group's retry topic, with its first address, its failed runs and when it is due."""
    names = ("topic", "partition", "offset", "attempts", "at")
    values = (*first, attempts, repr(at))
    marks = [(RETRIED + name, str(value).encode()) for name, value in zip(names, values, strict=True)]
    return (topic.retry_topic(group), None, row[1], row[2], [*headers, *marks], row[4], None)


def origin(headers: Headers) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """The first address of a message in a retry topic, and its own headers."""
    cut = len(RETRIED)
    own = [(name, value) for name, value in headers if not name.startswith(RETRIED)]
    return {name[cut:]: value for name, value in headers if name.startswith(RETRIED)}, own


def retry_at(row: Row) -> float:
    """When a message of a retry topic is due (epoch seconds); at once where nothing that makes sense says so."""
    with suppress(ValueError):
        if (at := float(origin(row[3] or ())[0].get("at", b"0"))) < 1e11:
            return at
    return 0.0


def as_it_is(row: Row) -> Row:
    """A row that has all that belongs to it."""
    return row


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call it: a function that is known with its arguments only."""
    return function(*args)


async def _call_async(function: Callable[..., Any], *args: Any) -> Any:
    return await function(*args)
