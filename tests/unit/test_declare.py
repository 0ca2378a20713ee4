"""Declarations: whatever cannot work is refused where it stands, by a message that names the option, the value and the
way out."""

import functools
import re
import sys
from contextlib import nullcontext
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import msgspec
import pytest

from barnabas import App, Batch, Delivery, Message, Respond, Retention, Retry, respond_to, testing
from barnabas.errors import BarnabasError, DeclarationError, Refused, SendError, SettingError
from barnabas.inspect import check


class Order(msgspec.Struct):
    id: int
    customer: str = ""


class Nothing:
    """Something that no option takes."""

    def __repr__(self) -> str:
        return "<nothing>"


NOTHING = Nothing()


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = App("shop", events="memory:", jobs="memory:")
    app.orders = app.topic("orders", Order, key="customer")
    app.totals = app.table("totals", int)
    return app


def handler(order: Order): ...


async def async_handler(order: Order): ...


def batch_handler(orders: list[Order]): ...


async def async_hook(delivery):
    yield


def plain(delivery): ...


def generator(delivery):
    yield


def nothing_around():
    yield


def two(self, order): ...


def by_keyword(order: Order, *, delivery: Delivery): ...


def wrapper(function, *args, **kwargs): ...


class Callable:
    def __call__(self, order: Order): ...


class Model:
    __pydantic_validator__ = model_validate_json = None


def of_a_model(model: Model): ...


def consume(function: Any = handler, **options: Any) -> Any:
    return lambda app: app.consumer(app.orders, **options)(function)


def topic(*args: Any, **options: Any) -> Any:
    return lambda app: app.topic(*(args or ("new",)), **options)


def job(function: Any = plain, **options: Any) -> Any:
    return lambda app: app.job(**options)(function)


def call(function: Any, *args: Any, **options: Any) -> Any:
    return lambda app: function(*args, **options)


LONG = "x" * 201

# What is declared, the option, the value as the message shows it, and a piece of the way out.
REFUSED = {
    # App
    "app name": (call(App, ""), "name", "''", "printable"),
    "app name with a slash": (call(App, "a/b"), "name", "'a/b'", "without slashes"),
    "app name of another kind": (call(App, NOTHING), "name", "<nothing>", "printable"),
    "events": (call(App, "a", events="ftp:x"), "events", "'ftp:x'", "sqlite:///"),
    "jobs": (call(App, "a", jobs="sqlite://x.db"), "jobs", "'sqlite://x.db'", "sqlite:///FILE.db"),
    "setting": (call(App, "a", threads=0), "threads", "0", "whole number from 1"),
    "stop_timeout": (call(App, "a", stop_timeout="long"), "stop_timeout", "'long'", "a number of seconds"),
    # topics
    "topic name": (topic(""), "name", "''", "letters, digits"),
    "topic name with a space": (topic("a b"), "name", "'a b'", "letters, digits"),
    "topic name too long": (topic(LONG), "name", repr(LONG), "up to 200"),
    "topic name of another kind": (topic(NOTHING), "name", "<nothing>", "letters, digits"),
    "topic type": (topic("new", complex), "type", "complex", "msgspec Struct"),
    "partitions 0": (topic(partitions=0), "partitions", "0", "from 1 to 10000"),
    "partitions True": (topic(partitions=True), "partitions", "True", "from 1 to 10000"),
    "partitions text": (topic(partitions="6"), "partitions", "'6'", "whole number"),
    "key of another kind": (topic(key=NOTHING), "key", "<nothing>", "a field's name"),
    "key unknown": (topic("new", Order, key="custmer"), "key", "'custmer'", "its fields are id, customer"),
    "codec": (topic(codec="xml"), "codec", "'xml'", '"json" or "raw"'),
    "codec raw with a type": (topic("new", Order, codec="raw"), "codec", "Order", 'codec="json"'),
    "retention": (topic(retention=7), "retention", "7", "Retention(age="),
    "limit": (topic(limit=0), "limit", "0", "most bytes"),
    "limit True": (topic(limit=True), "limit", "True", "most bytes"),
    "rekeyed": (topic(rekeyed="yes"), "rekeyed", "'yes'", "True or False"),
    "age": (call(Retention, age=0), "age", "0", "seconds above 0"),
    "age of another kind": (call(Retention, age="7d"), "age", "'7d'", "seconds above 0"),
    "age nan": (call(Retention, age=float("nan")), "age", "nan", "seconds above 0"),
    "key of two": (topic(key=two), "key", "two", "is called with (value), and cannot be"),
    "key of bytes": (topic(codec="raw", key="id"), "key", "'id'", "give a function"),
    "size": (call(Retention, size=-1), "size", "-1", "bytes above 0"),
    "force": (call(Retention, force=1), "force", "1", "True"),
    # consumers
    "consumer topics": (lambda app: app.consumer([])(handler), "topics", "[]", "app.topic(...)"),
    "consumer topics by name": (lambda app: app.consumer("orders")(handler), "topics", "'orders'", "app.topic(...)"),
    "one topic twice": (lambda app: app.consumer([app.orders] * 2)(handler), "topics", "<topic orders>", "each topic once"),
    "consumer of nothing": (lambda app: app.consumer(handler), "consumer", "handler", "@app.consumer(TOPIC)"),
    "cron of nothing": (lambda app: app.cron(handler), "cron", "handler", "every=timedelta"),
    "consumer without a name": (consume(lambda order: None), "name", "''", "printable"),
    "handler by keyword": (consume(by_keyword), "Delivery", "'delivery'", "asks by annotation"),
    "handler of an object": (consume(Callable(), name="x"), "annotations", "Callable", "a function or a method"),
    "wrapper": (consume(functools.partial(wrapper, plain), name="x"), "parameter", "takes no", "functools.wraps"),
    "consumer name": (consume(name=""), "name", "''", "give a text"),
    "consumer name without end": (consume(name="a" * 201), "name", "aaa", "up to 200"),
    "queue without end": (job(queue="a" * 201), "queue", "aaa", "up to 200"),
    "job name of two lines": (job(name="a\nb"), "name", "'a\\nb'", "printable"),
    "consumer name with a slash": (consume(name="a/b"), "name", "'a/b'", "without slashes"),
    "consumer name of another kind": (consume(name=NOTHING), "name", "<nothing>", "give a text"),
    "group": (consume(group="a\nb"), "group", "'a\\nb'", "printable"),
    "group empty": (consume(group=""), "group", "''", "give a text"),
    "start": (consume(start="middle"), "start", "'middle'", '"earliest" or "latest"'),
    "concurrency 0": (consume(concurrency=0), "concurrency", "0", "from 1 to 10000"),
    "concurrency True": (consume(concurrency=True), "concurrency", "True", "from 1 to 10000"),
    "concurrency text": (consume(concurrency="5"), "concurrency", "'5'", "whole number"),
    "order": (consume(order="fifo"), "order", "'fifo'", '"key", "partition" or "none"'),
    "order empty": (consume(order=""), "order", "''", '"key", "partition" or "none"'),
    "retry": (consume(retry=3), "retry", "3", "Retry(times"),
    "retry None": (consume(retry=None), "retry", "None", "Retry(0) for none"),
    "on_dead": (consume(on_dead="drop"), "on_dead", "'drop'", '"skip"'),
    "timeout 0": (consume(timeout=0), "timeout", "0", "above 0"),
    "timeout nan": (consume(timeout=float("nan")), "timeout", "nan", "above 0"),
    "timeout inf": (consume(timeout=float("inf")), "timeout", "inf", "or None"),
    "timeout True": (consume(timeout=True), "timeout", "True", "seconds"),
    "timeout text": (consume(timeout="5s"), "timeout", "'5s'", "seconds"),
    "responds": (lambda app: consume(responds=app.orders)(app), "responds", "<topic orders>", "responds=[...]"),
    "responds by name": (consume(responds=["orders"]), "responds", "'orders'", "app.topic(...)"),
    "responds twice": (
        lambda app: consume(responds=[app.orders, respond_to(app.orders)])(app),
        "responds", "<topic orders>", "multiple=True",
    ),
    "tables": (lambda app: consume(tables=app.totals)(app), "tables", "Table", "tables=[...]"),
    "tables by name": (consume(tables=["totals"]), "tables", "'totals'", "app.table(...)"),
    "tables without order": (
        lambda app: consume(tables=[app.totals], order="none")(app), "order", "'none'", '"key" or "partition"',
    ),
    "tables with retries out of order": (
        lambda app: consume(tables=[app.totals], retry=Retry(ordered=False))(app),
        "retry", "ordered=False", "ordered=True",
    ),
    "tables of a rekeyed topic by key": (
        lambda app: app.consumer(app.topic("r", rekeyed=True), tables=[app.totals], concurrency=2)(handler),
        "order", "'key'", '"partition"',
    ),
    "hooks": (consume(hooks=generator), "hooks", "generator", "hooks=[...]"),
    "hooks that are none": (consume(hooks=[plain]), "hooks", "plain", "generator function"),
    "hooks of another kind": (consume(hooks=[NOTHING]), "hooks", "<nothing>", "generator function"),
    "async hook for a sync handler": (consume(hooks=[async_hook]), "hooks", "async_hook", "`async def`"),
    "batch": (consume(batch_handler, batch=100), "batch", "100", "Batch(max="),
    "batch 0": (consume(batch_handler, batch=0), "batch", "0", "Batch(max="),
    "batch of a plain handler": (consume(batch=Batch()), "batch", "Batch", "list[T]"),
    "handler": (lambda app: app.consumer(app.orders, name="x")(NOTHING), "handler", "<nothing>", "give a function"),
    "max": (call(Batch, max=0), "max", "0", "1 or more"),
    "max True": (call(Batch, max=True), "max", "True", "1 or more"),
    "wait": (call(Batch, wait=-1), "wait", "-1", "0 or more"),
    "wait inf": (call(Batch, wait=float("inf")), "wait", "inf", "seconds"),
    # retries
    "times": (call(Retry, -1), "times", "-1", "0 or more"),
    "times True": (call(Retry, True), "times", "True", "0 or more"),
    "times text": (call(Retry, "5"), "times", "'5'", "number of retries"),
    "backoff": (call(Retry, backoff=-1), "backoff", "-1", "a list of seconds"),
    "backoff empty": (call(Retry, backoff=[]), "backoff", "[]", "function of the retry's number"),
    "backoff text": (call(Retry, backoff="1s"), "backoff", "'1s'", "give seconds"),
    "jitter": (call(Retry, jitter=1.5), "jitter", "1.5", "between 0 and 1"),
    "on": (call(Retry, on="ValueError"), "on", "'ValueError'", "exception class"),
    "give_up_on": (call(Retry, give_up_on=[KeyError]), "give_up_on", "KeyError", "tuple"),
    "ordered": (call(Retry, ordered="no"), "ordered", "'no'", "retry topic"),
    # answers
    "respond_to": (call(respond_to, "orders"), "respond_to", "'orders'", "app.topic(...)"),
    "required": (lambda app: respond_to(app.orders, required=1), "required", "1", "True or False"),
    "multiple": (lambda app: respond_to(app.orders, multiple="no"), "multiple", "'no'", "True or False"),
    # tables
    "table name": (lambda app: app.table(""), "name", "''", "printable"),
    "table name of another kind": (lambda app: app.table(NOTHING), "name", "<nothing>", "printable"),
    "table type": (lambda app: app.table("new", type=complex), "type", "complex", "msgspec Struct"),
    # jobs
    "queue": (job(queue="a b"), "queue", "'a b'", "letters, digits"),
    "queue empty": (job(queue=""), "queue", "''", "letters, digits"),
    "queue of another kind": (job(queue=NOTHING), "queue", "<nothing>", "letters, digits"),
    "job retry": (job(retry=-1), "retry", "-1", "number of retries"),
    "job retry of another kind": (job(retry=Retry(5)), "retry", "Retry", "number of retries"),
    "job name": (job(name=""), "name", "''", "printable"),
    "job name of another kind": (job(name=NOTHING), "name", "<nothing>", "printable"),
    "job without a name": (job(lambda: None), "name", "''", "printable"),
    "job timeout": (job(timeout=-1), "timeout", "-1", "above 0"),
    "job timeout nan": (job(timeout=float("nan")), "timeout", "nan", "above 0"),
    "dead": (job(dead="no"), "dead", "'no'", "False if"),
    "retry_for": (job(retry_for=0), "retry_for", "0", "whole seconds"),
    "retry_for too long": (job(retry_for=10**9 + 1), "retry_for", "1000000001", "whole seconds"),
    "retry_for of another kind": (job(retry_for=1.5), "retry_for", "1.5", "whole seconds"),
    "retry_for without retries": (job(retry_for=60, retry=False), "retry_for", "60", "retry=False"),
    "retry_queue": (job(retry_queue="a b"), "retry_queue", "'a b'", "letters, digits"),
    "retry_delay": (job(retry_delay=60), "retry_delay", "60", "function(count, error, job)"),
    "retry_delay async": (job(retry_delay=async_handler), "retry_delay", "async_handler", "not an `async def`"),
    "on_exhausted": (job(on_exhausted="mail"), "on_exhausted", "'mail'", "function(job, error)"),
    "on_death": (job(on_death=NOTHING), "on_death", "<nothing>", "function(job, error)"),
    "backtrace": (job(backtrace=-1), "backtrace", "-1", "number of lines"),
    "backtrace of another kind": (job(backtrace="all"), "backtrace", "'all'", "number of lines"),
    "job hooks": (job(hooks=generator), "hooks", "generator", "hooks=[...]"),
    "job hooks that are none": (job(hooks=[plain]), "hooks", "plain", "generator function"),
    "async hook for a sync job": (job(hooks=[async_hook]), "hooks", "async_hook", "`async def`"),
    "job of a wrapper": (job(wrapper), "parameter", "'kwargs'", "functools.wraps"),
    "job of a pydantic model": (job(of_a_model), "annotations", "Model", "msgspec Structs"),
    "chain of a function": (lambda app: job()(app).then(plain), "then", "plain", "give jobs"),
    "job of a class": (job(Order), "function", "Order", "decorate a function"),
    "job of another kind": (lambda app: app.job(NOTHING), "function", "<nothing>", "decorate a function"),
    "options queue": (lambda app: job()(app).options(queue="?"), "queue", "'?'", "letters, digits"),
    "options retry": (lambda app: job()(app).options(retry="many"), "retry", "'many'", "number of retries"),
    # hooks
    "around": (lambda app: app.around(plain), "around", "plain", "@app.before or @app.after"),
    "around nothing": (lambda app: app.around(NOTHING), "around", "<nothing>", "generator function"),
    "before": (lambda app: app.before(generator), "before", "generator", "@app.around"),
    "after": (lambda app: app.after(async_handler), "after", "async_handler", "plain function"),
    "before_enqueue": (lambda app: app.before_enqueue(NOTHING), "before_enqueue", "<nothing>", "function"),
    "before_enqueue async": (lambda app: app.before_enqueue(async_handler), "before_enqueue", "async_handler", "plain"),
    "on_start": (lambda app: app.on_start(NOTHING), "on_start", "<nothing>", "function"),
    "on_stop": (lambda app: app.on_stop(generator), "on_stop", "generator", "function"),
    "observe": (lambda app: app.observe(NOTHING), "observe", "<nothing>", "function"),
    "hooks that take nothing": (consume(hooks=[nothing_around]), "hooks", "nothing_around", "(delivery)"),
    "around that takes nothing": (lambda app: app.around(nothing_around), "around", "nothing_around", "(delivery)"),
    "before of two": (lambda app: app.before(two), "before", "two", "(delivery)"),
    "after of one": (lambda app: app.after(plain), "after", "plain", "(delivery, outcome)"),
    "before_enqueue of two": (lambda app: app.before_enqueue(two), "before_enqueue", "two", "(job)"),
    "on_start of one": (lambda app: app.on_start(plain), "on_start", "plain", "without arguments"),
    "observe of two": (lambda app: app.observe(two), "observe", "two", "(record)"),
    "on_death of one": (job(on_death=plain), "on_death", "plain", "(job, error)"),
    "class with an argument": (consume(type("K", (), {"__init__": two, "process": two})), "K", "K", "without arguments"),
    "set_up with an argument": (consume(type("K", (), {"set_up": two, "process": two})), "K", "two", "(self)"),
    "revoked without one": (consume(type("K", (), {"revoked": plain, "process": two})), "K", "plain", "(self, partitions)"),
    "observe async": (lambda app: app.observe(async_handler), "observe", "async_handler", "plain function"),
}  # fmt: skip


@pytest.mark.parametrize(("declare", "option", "value", "way_out"), REFUSED.values(), ids=list(REFUSED))
def test_a_bad_declaration_names_the_option_the_value_and_the_way_out(app, declare, option, value, way_out):
    with pytest.raises(BarnabasError) as caught:
        declare(app)
    message = str(caught.value)
    assert isinstance(caught.value, DeclarationError), type(caught.value)
    assert re.search(rf"\b{option}\b", message), f"no {option!r} in: {message}"
    assert value in message, f"no {value!r} in: {message}"
    assert way_out in message, f"no {way_out!r} in: {message}"
    assert len(message) < 500


class Bill(msgspec.Struct):
    order_id: int
    sum: float = 0.0


@pytest.mark.parametrize(
    ("carried", "read"), [(int, str), (Bill, int), (dict, list[list]), (int | None, bool), (str, Bill)], ids=str
)
def test_a_value_that_its_handler_can_never_read_is_refused(app, carried, read):
    def handle(value): ...

    handle.__annotations__["value"] = read
    with pytest.raises(DeclarationError, match=r"is read as .*; annotate it as what the topic carries"):
        app.consumer(app.topic("carried", carried))(handle)


@pytest.mark.parametrize(
    ("carried", "read"), [(int, float), (Bill, dict), (dict, Bill), (None, str), (int | str, str), (Bill, list[Bill])], ids=str
)
def test_a_value_that_its_handler_may_be_able_to_read_is_not(app, carried, read):
    def handle(value): ...

    handle.__annotations__["value"] = read
    app.consumer(app.topic("carried", carried))(handle)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("returns", "responds", "said"),
    [
        (int, "orders", "it returns <class 'int'>, and topic 'orders' carries"),
        (str | None, "orders", "it returns <class 'str'>, and topic 'orders' carries"),
        (Bill, "orders", "which needs id as well"),
        (Message[Bill], "orders", "which needs id as well"),
        (None, "orders", "answer on orders, and returns None; give it a parameter `respond: Respond`"),
        (Order, "orders anything", "answer on orders, anything, and what it returns does not say on which; give it a parameter"),
        (Order | None, "orders", ""),
        (dict, "orders", ""), (Message, "orders", ""), (Any, "orders", ""), (NoReturn, "orders", ""),
        (int | Order, "orders", ""), (Bill, "anything", ""), (str, "raw", ""), (None, "perhaps", ""),
    ],
    ids=str,
)  # fmt: skip
def test_an_annotation_by_which_each_answer_would_be_dead_is_refused(app, batch, returns, responds, said):
    topics = {"orders": app.orders, "anything": app.topic("anything"), "raw": app.topic("raw", codec="raw")}
    topics["perhaps"] = respond_to(app.orders, required=False)

    def handle(value): ...

    many = batch and returns in (int, Order, Bill)
    handle.__annotations__.update({"value": list[Order] if batch else Order, "return": list[returns] if many else returns})
    declare = call(app.consumer(app.orders, responds=[topics[name] for name in responds.split()]), handle)
    with pytest.raises(DeclarationError, match=re.escape(said)) if said else nullcontext():
        declare(app)


def test_check_warns_of_fields_that_a_handler_needs_and_its_topic_does_not_have():
    app = App("shop", events="memory:", jobs="memory:")

    def handle(bill: Bill): ...

    app.consumer(app.topic("orders", Order))(handle)
    app.consumer(app.topic("bills", Bill), name="bills")(handle)
    [warning] = check(app)[1]
    assert "'handle'" in warning and "needs order_id; topic 'orders'" in warning


@pytest.mark.parametrize(
    ("declare", "option", "near"),
    [
        (call(App, "a", thread=5), "thread", "threads"),
        (call(App, "a", stop_timout=5), "stop_timout", "stop_timeout"),
        (topic("new", partition=3), "partition", "partitions"),
        (topic("new", retension=3), "retension", "retention"),
        (consume(concurency=5), "concurency", "concurrency"),
        (consume(responds_to=[]), "responds_to", "responds"),
        (consume(retries=5), "retries", "retry"),
        (consume(time_out=5), "time_out", "timeout"),
        (job(que="mail"), "que", "queue"),
        (job(retries=5), "retries", "retry"),
        (call(Retry, time=5), "time", "times"),
        (call(Retention, ages=5), "ages", "age"),
        (call(Batch, maxi=5), "maxi", "max"),
        (lambda app: respond_to(app.orders, require=True), "require", "required"),
        (lambda app: app.job(plain).options(que="mail"), "que", "queue"),
    ],
)
def test_an_unknown_option_is_refused_with_the_near_one(app, declare, option, near):
    with pytest.raises(DeclarationError, match=rf"\b{option}\b.*did you mean {near}\b"):
        declare(app)


@pytest.mark.parametrize("declare", [topic("new", zzz=1), consume(zzz=1), job(zzz=1), call(App, "a", zzz=1)])
def test_an_unknown_option_like_no_other_is_refused_with_where_to_look(app, declare):
    with pytest.raises(DeclarationError, match=r"zzz.*it knows"):
        declare(app)


def test_settings_are_refused_as_declarations():
    assert issubclass(SettingError, DeclarationError)


# Names that clash.


def test_two_consumers_of_one_name_are_refused(app):
    consume()(app)
    with pytest.raises(DeclarationError, match=r"'handler'.*taken.*name="):
        consume()(app)


def test_a_consumer_and_a_job_of_one_name_are_refused(app):
    consume(name="plain")(app)
    with pytest.raises(DeclarationError, match=r"'plain'.*taken.*name="):
        job()(app)
    job(name="mail")(app)
    with pytest.raises(DeclarationError, match=r"'mail'.*taken.*name="):
        consume(name="mail")(app)


def test_two_consumers_of_one_group_are_refused(app):
    consume(name="one", group="g")(app)
    with pytest.raises(DeclarationError, match=r"group='g' belongs to consumer 'one'.*another name= or group="):
        consume(name="two", group="g")(app)
    assert "two" not in app.consumers


def test_a_refused_declaration_leaves_nothing_behind(app):
    consume(name="one", group="g")(app)
    with pytest.raises(DeclarationError):
        consume(name="two", group="g")(app)
    with pytest.raises(DeclarationError):
        job(name="mail", retry=-1)(app)
    consume(name="two")(app)
    job(name="mail")(app)


@pytest.mark.parametrize("of", ["topic", "responds", "tables"])
def test_what_belongs_to_another_app_is_refused(app, of):
    other = App("other", events="memory:", jobs="memory:")
    theirs = other.table("sums", int) if of == "tables" else other.topic("theirs", Order)
    with pytest.raises(DeclarationError, match=r"belongs to <app other>; declare it in <app shop> as well"):
        app.consumer(theirs)(handler) if of == "topic" else consume(**{of: [theirs]})(app)


@pytest.mark.parametrize("wrong", [1, "a", {"x": 1}])
def test_a_call_of_enqueue_many_that_is_no_tuple_is_refused(app, wrong):
    found = job()(app)
    with pytest.raises(SendError, match=rf"job 'plain': enqueue_many\(\[{re.escape(repr(wrong))}\]\): give a tuple"):
        found.enqueue_many([(1,), wrong])
    assert len(found.enqueue_many([(1,), [2]]).result(5)) == 2


def test_two_tables_of_one_name_are_refused(app):
    with pytest.raises(DeclarationError, match="'totals' is declared twice"):
        app.table("totals")


def test_one_table_belongs_to_one_consumer(app):
    consume(tables=[app.totals], name="one")(app)
    with pytest.raises(DeclarationError, match=r"tables=.*'totals' belongs to consumer 'one'.*a table of its own"):
        consume(tables=[app.totals], name="two")(app)


def test_a_topic_declared_twice_alike_is_the_same_and_otherwise_refused(app):
    assert app.topic("orders", Order, key="customer") is app.orders
    with pytest.raises(DeclarationError, match="'orders' is declared twice, differently"):
        app.topic("orders", Order, key="id")
    with pytest.raises(DeclarationError, match="'orders' is declared twice, differently"):
        app.topic("orders", dict, key="customer")


@pytest.mark.parametrize(("url", "driver", "extra"), [
    ("kafka://x", "confluent_kafka", "kafka"), ("redis://x", "redis", "redis"), ("redis://x", "hiredis", "redis"),
])  # fmt: skip
def test_a_driver_that_is_not_installed_is_named(monkeypatch, url, driver, extra):
    kind = "events" if extra == "kafka" else "jobs"
    for name in [name for name in sys.modules if name.startswith("barnabas.backends.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(SettingError, match=re.escape(f"{driver} is not installed; pip install 'barnabas[{extra}]'")):
        getattr(App("a", **{kind: url}), kind)


# Handlers.


T = TypeVar("T")
Big = Annotated[int, msgspec.Meta(gt=10)]


def test_what_an_annotation_asks_of_a_value_is_asked(app):
    """Of the type that a Struct's field would have; notes of others say nothing."""
    numbers, seen = app.topic("numbers", int), []

    def read(first, n: Annotated[Big | None, "noted"], delivery: Delivery | None = None):
        seen.append((first, n, delivery is not None))

    def count(n: Annotated[int, msgspec.Meta(gt=10)]):
        seen.append(n)

    app.consumer(numbers, name="read")(functools.partial(read, "given"))
    count.retry = "an attribute of the function, not an option"
    job = app.job(functools.wraps(count)(functools.partial(count)))
    with testing.run(app, raises=False) as t:
        numbers.send_many([5, 50])
        numbers.send(None, key="k")
        job.enqueue(5), job.enqueue(50)
        t.drain()
        assert sorted(seen, key=str) == [("given", 50, True), ("given", None, True), 50]
        assert [letter.value for letter in t.dead(numbers)] == [5] and [each["args"] for each in t.dead(job)] == [[5]]


def test_a_value_that_is_none_of_its_topic_is_told_of_where_it_is_stored(app):
    lacks = r"stored at orders\[\d\]@0, and no .*Order.* missing required field"
    with testing.run(app), pytest.raises(BarnabasError, match=lacks):
        app.orders.send({"customer": "ann"}, key="k").result(5)


def test_a_static_method_handles_and_one_of_any_type(app):
    seen = []

    @app.consumer(app.orders)
    class Desk:
        @staticmethod
        def process(order: Order):
            seen.append(order.id)

    class Shared(Generic[T]):
        def process(self, value: T):
            seen.append(value.id)

    app.consumer(app.orders, name="own")(type("Own", (Shared,), {}))
    with testing.run(app) as t:
        app.orders.send(Order(7))
        t.drain()
    assert seen == [7, 7]


def test_a_handler_cannot_close_its_app(app):
    app.consumer(app.orders, name="x")(lambda order: app.close())
    with testing.run(app) as t, pytest.raises(Refused, match="leave it out"):
        app.orders.send(Order(1))
        t.drain()


def test_a_handler_without_a_parameter_is_refused(app):
    with pytest.raises(DeclarationError, match="takes no parameter; its first one is the value"):
        app.consumer(app.orders, name="x")(lambda: None)


def test_a_parameter_that_nothing_binds_to_is_refused(app):
    def two(order: Order, other: int): ...

    def keyword(order: Order, *, other): ...

    for function in (two, keyword):
        with pytest.raises(DeclarationError, match=r"parameter 'other'.*Delivery and a Respond"):
            app.consumer(app.orders)(function)


def test_parameters_with_defaults_are_left_alone(app):
    @app.consumer(app.orders)
    def handle(order: Order, *, limit=5, **rest): ...


def test_annotations_that_cannot_be_read_are_refused(app):
    def lost(order: "Nowhere"): ...  # noqa: F821

    with pytest.raises(DeclarationError, match=r"annotations cannot be read.*Nowhere.*import the names"):
        app.consumer(app.orders)(lost)
    with pytest.raises(DeclarationError, match=r"annotations cannot be read.*Nowhere.*import the names"):
        app.job(lost)


def test_generators_are_refused_because_nobody_would_run_them(app):
    async def async_generator(order: Order):
        yield

    for function in (generator, async_generator):
        with pytest.raises(DeclarationError, match=r"is a generator, which nobody runs.*Respond"):
            app.consumer(app.orders)(function)
        with pytest.raises(DeclarationError, match=r"is a generator, which nobody runs"):
            app.job(function)


def test_a_type_for_a_topic_of_bytes_is_refused(app):
    raw = app.topic("raw", codec="raw")

    def handle(value: Order): ...

    for topic in (raw, app.orders.dead_topic):
        with pytest.raises(DeclarationError, match=r"Order.*carries bytes as they are; annotate it as bytes"):
            app.consumer(topic)(handle)


def test_a_value_that_cannot_be_decoded_as_annotated_is_refused(app):
    def handle(order: complex): ...

    with pytest.raises(DeclarationError, match=r"complex.*cannot be decoded"):
        app.consumer(app.orders)(handle)


def test_one_delivery_in_a_batch_handler_and_many_in_a_plain_one_are_refused(app):
    def one(orders: list[Order], delivery: Delivery): ...

    def many(order: Order, deliveries: list[Delivery]): ...

    with pytest.raises(DeclarationError, match=r"a batch handler gets its deliveries as list\[Delivery\]"):
        app.consumer(app.orders)(one)
    with pytest.raises(DeclarationError, match=r"list\[Delivery\] belongs to a batch handler"):
        app.consumer(app.orders)(many)


def test_a_respond_parameter_without_responds_is_refused(app):
    def handle(order: Order, respond: Respond): ...

    with pytest.raises(DeclarationError, match=r"'handle'.*Respond.*responds=\[\.\.\.\]"):
        app.consumer(app.orders)(handle)


def test_a_class_without_a_handler_is_refused(app):
    class Reader:
        def proces(self, order): ...

    with pytest.raises(DeclarationError, match=r"neither a method 'orders'.*nor `process`"):
        app.consumer(app.orders)(Reader)


def test_a_class_that_is_half_async_is_refused(app):
    other = app.topic("other", int)

    class Reader:
        async def orders(self, order: Order): ...

        def other(self, n: int): ...

    with pytest.raises(DeclarationError, match=r"partly async; make all of them `async def`, or none"):
        app.consumer([app.orders, other])(Reader)


def test_a_class_that_takes_batches_in_part_is_refused(app):
    other = app.topic("other", int)

    class Reader:
        def orders(self, orders: list[Order]): ...

        def other(self, n: int): ...

    with pytest.raises(DeclarationError, match=r"partly batches; make all take list\[T\], or none"):
        app.consumer([app.orders, other])(Reader)


@pytest.mark.parametrize("name", ["set_up", "tear_down", "assigned", "revoked"])
def test_an_async_method_beside_a_sync_handler_is_refused(app, name):
    async def method(self, *args): ...

    class Reader:
        def process(self, order: Order): ...

    setattr(Reader, name, method)
    with pytest.raises(DeclarationError, match=rf"`{name}` is async and the handler is not"):
        app.consumer(app.orders)(Reader)


def test_async_hooks_of_the_app_are_refused_beside_sync_handlers_whatever_comes_first(app):
    consume()(app)
    with pytest.raises(DeclarationError, match=r"'handler'.*async_hook is an async generator"):
        app.around(async_hook)
    assert app.hooks == []
    fresh = App("fresh", events="memory:", jobs="memory:")
    fresh.orders = fresh.topic("orders", Order)
    fresh.around(async_hook)
    consume(async_handler)(fresh)
    with pytest.raises(DeclarationError, match=r"'handler'.*async_hook is an async generator"):
        consume()(fresh)
    with pytest.raises(DeclarationError, match=r"'plain'.*async_hook is an async generator"):
        job()(fresh)


# Jobs.


def test_a_keyword_only_argument_of_a_job_is_refused(app):
    def mail(a, *, b): ...

    def more(a, **rest): ...

    with pytest.raises(DeclarationError, match=r"parameter='b'.*stored in order"):
        app.job(mail)
    with pytest.raises(DeclarationError, match=r"parameter='rest'.*stored in order"):
        app.job(more)


def test_a_job_whose_arguments_cannot_be_decoded_is_refused(app):
    def mail(a: complex): ...

    with pytest.raises(DeclarationError, match=r"'mail'.*cannot be decoded by their annotations.*complex"):
        app.job(mail)


# What works.


def test_what_is_right_is_taken(app):
    out = app.topic("out", int)
    app.consumer(
        app.orders,
        name="all",
        group="group",
        start="latest",
        concurrency=10_000,
        order="partition",
        retry=Retry(0, backoff=[1, 2.5], jitter=0, on=(ValueError, OSError), give_up_on=KeyError),
        on_dead="skip",
        timeout=0.5,
        responds=[out],
        tables=[app.totals],
        hooks=[generator],
        batch=Batch(max=1, wait=0),
    )(batch_handler)
    app.job(queue="a.b-c:d_1", retry=True, name="n", timeout=1, dead=False, hooks=[generator])(plain)
    app.topic("t.x-y_z", key=lambda v: v["a"], partitions=1, codec="json", retention=Retention(None, 5, True), limit=1)
    app.topic("raw", bytes, codec="raw", rekeyed=True)
    app.consumer([app.orders, out], name="two", concurrency=2)(lambda value: None)
    assert app.consumers["two"].order == "key" and app.consumers["all"].order == "partition"
