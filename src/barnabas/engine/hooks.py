"""Hooks: generator functions around a handler. What stands before `yield` runs before it, what follows after it.

Written once, driven by sync and async handlers alike; `enter`, `leave` and `fail` are shared, the two wrappers differ by
one `await`. Async generators serve async handlers only.
"""

import contextlib
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

from barnabas.engine.hand import CURRENT
from barnabas.errors import DeclarationError, must
from barnabas.verdict import Done

Hook = Callable[[Any], Generator[None, Any, Any] | AsyncGenerator[None, Any]]


ARGUMENTS = {"around": ["delivery"], "after": ["delivery", "outcome"], "before": ["delivery"], "before_enqueue": ["job"],
             "on_start": [], "on_stop": [], "observe": ["record"]}  # fmt: skip


def check_takes(owner: str, function: Any, *arguments: str) -> None:
    """Refuse a function that cannot be called as it will be: every delivery would fail at it."""
    try:
        with contextlib.suppress(ValueError):  # some builtins do not say what they take
            inspect.signature(function).bind(*arguments)
    except TypeError as error:
        got = f"with ({', '.join(arguments)})" if arguments else "without arguments"
        raise DeclarationError(f"{owner}: {function!r} is called {got}, and cannot be: {error}") from None


def check_hook(hook: Any, kind: str) -> None:
    """Refuse what is no generator function (around) or no plain function (all others; on_start and on_stop may be async)."""
    generator = inspect.isgeneratorfunction(hook) or inspect.isasyncgenfunction(hook)
    if kind == "around" and not generator:
        how = "a hook is a generator function with one `yield`; for a plain function use @app.before or @app.after"
        raise DeclarationError(f"@app.around on {hook!r}: {how}")
    plain = kind not in ("on_start", "on_stop")
    if kind != "around" and (generator or not callable(hook) or (plain and inspect.iscoroutinefunction(hook))):
        may = "plain function; a generator belongs under @app.around" if plain else "function, plain or async"
        raise DeclarationError(f"@app.{kind} on {hook!r}: give a {may}")
    check_takes(f"@app.{kind}", hook, *ARGUMENTS[kind])


def refuse_async(owner: str, awaited: bool, hooks: Sequence[Any]) -> None:
    """Refuse async generators around a handler that is not async."""
    for hook in hooks:
        if inspect.isasyncgenfunction(hook) and not awaited:
            how = "make the hook a plain generator (it then serves both kinds) or the handler `async def`"
            what = f"{hook.__name__} is an async generator and the handler is not async"
            raise DeclarationError(f"{owner}: hooks: {what}; {how}")


def check_hooks(owner: str, hooks: Any) -> list[Any]:
    """The value of `hooks=[...]`. Refuses what is no list of generator functions."""
    must(isinstance(hooks, list | tuple), owner, "hooks", hooks, "give a list: hooks=[...]")
    for hook in hooks:
        generator = inspect.isgeneratorfunction(hook) or inspect.isasyncgenfunction(hook)
        must(generator, owner, "hooks", [hook], "a hook is a generator function with one `yield`")
        check_takes(f"{owner}: hooks=[...]", hook, "delivery")
    return list(hooks)


def before(function: Callable[[Any], Any]) -> Hook:
    """A hook that calls `function(delivery)` before the handler."""

    def hook(delivery: Any) -> Generator[None, Any, None]:
        function(delivery)
        yield

    return hook


def after(function: Callable[[Any, Any], Any]) -> Hook:
    """A hook that calls `function(delivery, outcome)` after a handler that succeeded."""

    def hook(delivery: Any) -> Generator[None, Any, None]:
        outcome = yield
        function(delivery, outcome)

    return hook


def wrap(function: Callable[..., Any], hooks: Sequence[Any], awaited: bool, owner: str) -> Callable[..., Any]:
    """`function` with `hooks` around it, outermost first. The wrapper takes the delivery as an extra first argument."""
    refuse_async(owner, awaited, hooks)
    if any(inspect.isasyncgenfunction(hook) for hook in hooks):
        return lambda delivery, /, *args: _onion(delivery, function, args, list(hooks))

    if len(hooks) == 1 and not awaited:
        return _wrap_once(function, hooks[0])

    def enter(entered: list[Any], delivery: Any) -> None:
        for hook in hooks:
            generator = hook(delivery)
            try:
                next(generator)
            except StopIteration:
                raise _no_yield(hook) from None
            entered.append(generator)

    if awaited:

        async def hooked(delivery: Any, /, *args: Any) -> Any:
            entered: list[Any] = []
            try:
                enter(entered, delivery)
                out = await function(*args)
            except BaseException as error:
                return _fail(entered, error)
            return _leave(entered, out)

        return hooked

    def hooked_sync(delivery: Any, /, *args: Any) -> Any:
        entered: list[Any] = []
        try:
            enter(entered, delivery)
            out = function(*args)
        except BaseException as error:
            return _fail(entered, error)
        return _leave(entered, out)

    return hooked_sync


def _no_yield(hook: Any) -> RuntimeError:
    return RuntimeError(f"the hook {hook.__name__} ended before its `yield`; to refuse a delivery, raise Reject")


def _yielded_twice(generator: Any) -> RuntimeError:
    generator.close()
    return RuntimeError(f"the hook {generator.__name__} yielded twice; a hook has exactly one `yield`")


def _wrap_once(function: Callable[..., Any], hook: Any) -> Callable[..., Any]:
    """The commonest case, a sync handler and one hook, without the list."""

    def hooked_once(delivery: Any, /, *args: Any) -> Any:
        generator = hook(delivery)
        try:
            next(generator)
        except StopIteration:
            raise _no_yield(hook) from None
        try:
            out = function(*args)
        except BaseException as error:
            return _fail([generator], error)
        try:
            generator.send(out)
        except StopIteration:
            return out
        raise _yielded_twice(generator)

    return hooked_once


def _leave(entered: list[Any], out: Any) -> Any:
    """After a success: each hook gets the outcome; an error of one is seen by those outside of it."""
    while entered:
        generator = entered.pop()
        try:
            generator.send(out)
        except StopIteration:
            continue
        except BaseException as error:
            return _fail(entered, error)
        return _fail(entered, _yielded_twice(generator))
    return out


def _fail(entered: list[Any], error: BaseException) -> Any:
    """After an error: each hook sees it, inside out. If one says `return Done`, that is the outcome for those outside
    of it; else it is raised: merely swallowing an error does not make a delivery done."""
    _forget()
    while entered:
        try:
            entered.pop().throw(error)
        except StopIteration as stop:
            if _forgives(stop.value, error):
                return _leave(entered, Done)
        except BaseException as other:
            error = other
    raise error


def _forgives(said: Any, error: BaseException) -> bool:
    """Whether a hook made an error good. A cancellation is nobody's to forgive."""
    return (said is Done or isinstance(said, Done)) and isinstance(error, Exception)


def _forget() -> None:
    """A failing handler sends nothing, also if a hook forgives it; what the hooks send from now on counts."""
    hand = CURRENT.get()
    if hand is not None and hand.open:
        hand.forget()


async def _onion(delivery: Any, function: Callable[..., Any], args: tuple[Any, ...], hooks: list[Any]) -> Any:
    """An async handler of which at least one hook is an async generator."""
    if not hooks:
        try:
            return await function(*args)
        except BaseException:
            _forget()
            raise
    generator = hooks[0](delivery)
    awaited = hasattr(generator, "asend")
    send, throw = (generator.asend, generator.athrow) if awaited else (generator.send, generator.throw)
    if (await _resume(send, None, awaited))[0]:
        raise _no_yield(hooks[0])
    try:
        out = await _onion(delivery, function, args, hooks[1:])
    except BaseException as error:
        ended, said = await _resume(throw, error, awaited)
        if ended and _forgives(said, error):
            return Done
        raise
    try:
        if not (await _resume(send, out, awaited))[0]:
            raise RuntimeError(f"the hook {hooks[0].__name__} yielded twice; a hook has exactly one `yield`")
    except BaseException:
        _forget()
        raise
    return out


async def _resume(go_on: Callable[[Any], Any], value: Any, awaited: bool) -> tuple[bool, Any]:
    """Let a hook go on; whether that was its end, and what it returned."""
    try:
        step = go_on(value)
        if awaited:
            await step
    except StopIteration as stop:
        return True, stop.value
    except StopAsyncIteration:
        return True, None
    return False, None
