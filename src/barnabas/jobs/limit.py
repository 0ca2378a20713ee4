"""Limits of jobs: how many of a kind run at once (`Concurrent`), or begin in a time (`Rate`). Pure: which slots a job needs.

A run lock of unique jobs is such a limit, of one; backends know needs only. Who finds no free slot waits, first enqueued
first: for a slot of a `Concurrent` until who ends wakes him, for one of a `Rate` until the time that is his. The rule of a
rate is a log of starts: one begins only if fewer than `count` did in the last `per` seconds. What is logged is when a slot was
taken; the function begins within `slack` of that, or gives the slot back. So the log looks back over `per + slack`.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from time import monotonic, sleep
from typing import Any, NamedTuple

import msgspec

from barnabas.engine.hooks import check_takes
from barnabas.errors import DeclarationError, NoSlot, is_text, must, patience

By = str | Sequence[str] | Callable[..., Any] | None
WAIT = 60.0  # seconds until a job that waits looks for itself; before that, whoever ends wakes it
APART = 0.01  # seconds between those looks: of a hundred thousand that wait, never all at once
WANT = 1.0  # seconds that the wish of who waits by hand is good for; he asks again sooner
PLAIN = {str, int, bool, type(None)}  # of these, what is equal and of one type has the same JSON
_encode = msgspec.json.Encoder(order="deterministic").encode


class Need(NamedTuple):
    """A slot that a job needs: one of `most` under a key, for as long as it runs (span 0) or for `span` seconds. waits: for its
    turn (else it is refused)."""

    key: str
    most: int
    span: float
    waits: bool = True
    text: str = ""  # all of it, for scripts

    def turn(self, now: float, oldest: float | None, ahead: int, before: float | None) -> float:
        """When somebody may look again who finds no slot. oldest: the start that has to be over first, None if a slot is free;
        ahead: how many wait before him, the last of whom is due at `before`. That one may be late, or have come later than those
        behind him: so their number counts as well, or of many who come in no order all would look again at each window."""
        base, apart = now + WAIT, APART
        if self.span:
            base, apart = max(now + 0.01, now + 0.1 if oldest is None else oldest + self.span), self.span / self.most
            base += ahead // self.most * self.span
        return base if before is None else max(base, before + apart)

    def nominal(self, now: float, oldest: float | None) -> float:
        """The time of a start in the log: that at which its slot became free, if it was just now, so that the small delays of
        many who wait do not add up."""
        free = -math.inf if oldest is None else oldest + self.span
        return free if now - slack(self.span) / 4 < free <= now else now


def slack(span: float) -> float:
    """How long after the time in the log a function may begin; a quarter of it may have passed when its slot is taken."""
    return min(1.0, max(0.25, span / 11))


def slot(key: str, most: int, span: float, waits: bool = True) -> Need:
    """A need."""
    return Need(key, most, span, waits, f"{key},{most},{span!r},{'' if waits else '!'}")


class _Limit(msgspec.Struct, frozen=True, kw_only=True):
    by: Any = None
    name: str | None = None

    def _check(self, count: Any) -> None:
        kind = type(self).__name__
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1_000_000:
            raise DeclarationError(f"{kind}({count!r}): give a whole number, 1 to 1,000,000")
        if self.name is not None and not (is_text(self.name) and self.name):
            raise DeclarationError(f"{kind}(name={self.name!r}): give the name that those have in common who share the limit")


class Rate(_Limit, frozen=True):
    """At most `count` starts in any `per` seconds; a window counts as a tenth longer (0.25 s to 1 s), to be sure of that.

    by: the parameter(s) that make the kind, or a function of the arguments (None from it: no limit); left out, one limit for
    all. name: of a limit that several jobs share, and `app.limiter`. Raises DeclarationError for what cannot be.
    """

    count: int
    per: float

    def __post_init__(self) -> None:
        self._check(self.count)
        if isinstance(self.per, bool) or not isinstance(self.per, int | float) or not 0 < self.per <= 10**7:
            raise DeclarationError(f"Rate(per={self.per!r}): give seconds, above 0 and up to 10,000,000")

    def need(self, scope: Sequence[Any], name: str) -> Need:
        """The slot of this limit: of this kind, of the job of this name where the limit has none of its own."""
        key = digest("barnabas:limit", ["rate", self.per, self.name or ["job", name], scope])
        return slot(key, self.count, self.per + slack(self.per * 1.1))

    def __str__(self) -> str:
        return f"{self.count} in {self.per:g} s"


class Concurrent(_Limit, frozen=True):
    """At most `count` at work at once. by, name, and what raises: as for Rate."""

    count: int

    def __post_init__(self) -> None:
        self._check(self.count)

    def need(self, scope: Sequence[Any], name: str) -> Need:
        """As of Rate."""
        key = digest("barnabas:limit", ["at once", self.name or ["job", name], scope])
        return slot(key, self.count, 0.0)

    def __str__(self) -> str:
        return f"{self.count} at once"


def digest(prefix: str, of: Any) -> str:
    """A key. Raises TypeError for what has no JSON form."""
    from hashlib import md5  # 3 ms to import

    return f"{prefix}:{md5(_encode(of), usedforsecurity=False).hexdigest()}"


class Kind:
    """What `by=` makes of a job's arguments: which kind it is of. Raises DeclarationError for what does not fit them."""

    def __init__(self, owner: str, by: By, signature: inspect.Signature) -> None:
        self.by, self._signature = by, signature
        names: list[Any] = [by] if isinstance(by, str) else [*by] if isinstance(by, list | tuple) else []
        must(not inspect.iscoroutinefunction(by), owner, "by", by, "give a plain function, not an `async def`")
        must(by is None or callable(by) or names, owner, "by", by, "name a parameter, or leave it out")
        for name in names:
            must(name in (*signature.parameters,), owner, "by", name, f"there is no such parameter; it takes {signature}")
        if callable(by) and all(p.kind is not p.VAR_POSITIONAL for p in signature.parameters.values()):
            check_takes(f"{owner}: by", by, *signature.parameters)
        plain = [inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD]
        order = {p.name: (at, p.default) for at, p in enumerate(signature.parameters.values()) if p.kind in plain}
        self._places = [order[name] for name in names] if all(name in order for name in names) else None
        self._names = names

    def scope(self, args: Sequence[Any]) -> list[Any] | None:
        """The values that make the kind, [] for one kind of all; None if it is of none. Raises what `by` raises."""
        if self.by is None:
            return []
        if self._names and self._places is not None:  # four times as fast as `bind`
            scope = [args[at] if at < len(args) else default for at, default in self._places]
            return scope if scope.count(None) < len(scope) else None
        bound = self._signature.bind(*args)
        bound.apply_defaults()
        if not callable(self.by):
            scope = [bound.arguments[name] for name in self._names]
            return scope if any(value is not None for value in scope) else None
        found = self.by(*bound.args)
        return None if found is None else list(found) if isinstance(found, list | tuple) else [found]


class Limit:
    """A job's declared limit, checked against its parameters."""

    def __init__(self, owner: str, name: str, signature: inspect.Signature, limit: "Rate | Concurrent", twins: int) -> None:
        way_out = "give Rate(count, per=SECONDS), Concurrent(count), or a list"
        must(isinstance(limit, Rate | Concurrent), owner, "limit", limit, way_out)
        self.limit, self.shown = limit, limit.name or name
        self._name = f"{name} {twins}" if twins else name  # customer 7 is not account 7
        self._known = lru_cache(1 << 14, typed=True)(lambda *scope: limit.need(scope, self._name))
        self._kind = Kind(f"{owner}: limit={type(limit).__name__}", limit.by, signature)

    def key(self, args: Sequence[Any]) -> str:
        """Which kind a job with these arguments is of, for people."""
        return ", ".join(map(str, self._kind.scope(args) or ()))

    def need(self, args: Sequence[Any]) -> Need | None:
        """The slot that a job with these arguments needs."""
        scope = self._kind.scope(args)
        if scope is None or not PLAIN.issuperset(map(type, scope)):
            return None if scope is None else self.limit.need(scope, self._name)
        return self._known(*scope)


def limits(owner: str, name: str, signature: inspect.Signature, given: Any) -> list[Limit]:
    """The limits of a job, as `limit=` gives them."""
    all_ = given if isinstance(given, list | tuple) else [given]
    kinds = [(getattr(each, "per", None), getattr(each, "name", None)) for each in all_]
    found = [Limit(owner, name, signature, each, kinds[:at].count(kinds[at])) for at, each in enumerate(all_)]
    if len({(*kind, kind[1] or repr(each.by)) for kind, each in zip(kinds, all_, strict=True)}) < len(found):
        raise DeclarationError(f"{owner}: limit={given!r}: two limits of the same; leave one out, or give it another name=")
    return found


_TOKENS: ContextVar[tuple[str, ...]] = ContextVar("barnabas_slots", default=())  # what this thread, or task, has by hand


class Limiter:
    """A limit taken by hand, as `app.limiter` returns it: `with` it, or `async with`, in any process, again and again."""

    def __init__(self, app: Any, name: str, limit: Any, timeout: float | None) -> None:
        self._owner = f"limiter {name!r}"
        must(isinstance(limit, Rate | Concurrent), self._owner, "limit", limit, "give Rate(count, per=SECONDS) or Concurrent")
        way_out = "its name, a text, makes it; put the kind into that: app.limiter(f'mail:{customer}', Rate(...))"
        mine = is_text(name) and name and limit.by is None and limit.name in (None, name)
        must(mine, self._owner, "limit", limit, way_out)
        must(patience(self._owner, timeout) or not timeout, self._owner, "timeout", timeout, "give seconds, 0 or more, or None")
        self._app, self._limit, self._timeout = app, limit, timeout
        self._need = msgspec.structs.replace(limit, name=name).need([], "")

    def _waits(self, token: str) -> Iterator[float]:
        """Ask for a slot again and again; between, wait so many seconds. Raises NoSlot."""
        need, home = self._need, self._app.jobs
        end, pause = math.inf if self._timeout is None else monotonic() + self._timeout, 0.01
        while True:
            began = monotonic()
            wait = home.hold(token, need)
            if not wait and (not need.span or monotonic() < began + 0.75 * slack(need.span)):
                return
            if not wait:  # the answer came late: others count on a start that was then
                home.let_go(token, need, False)
            pause = min(2 * pause, WANT / 4)
            left = end - monotonic()
            if left <= 0:
                why = "others have them, or wait; give it more time, or raise the limit"
                raise NoSlot(f"{self._owner}: no slot of {self._limit!r} within {self._timeout} s: {why}")
            yield min(left, max(0.001, min(wait, WANT / 2 if need.span else pause)))

    def _over(self, token: str, begun: bool) -> None:
        self._app.jobs.let_go(token, self._need, begun)

    def __enter__(self) -> None:
        token = os.urandom(8).hex()
        try:
            for seconds in self._waits(token):
                sleep(seconds)
        except BaseException:
            self._over(token, False)
            raise
        _TOKENS.set((*_TOKENS.get(), token))

    def __exit__(self, *error: Any) -> None:
        *others, token = _TOKENS.get()
        _TOKENS.set(tuple(others))
        if not self._need.span:
            self._over(token, True)

    async def __aenter__(self) -> None:
        import asyncio

        token = os.urandom(8).hex()
        waits = self._waits(token)
        try:
            while (seconds := await asyncio.to_thread(next, waits, None)) is not None:
                await asyncio.sleep(seconds)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._over, token, False))
            raise
        _TOKENS.set((*_TOKENS.get(), token))

    async def __aexit__(self, *error: Any) -> None:
        import asyncio

        *others, token = _TOKENS.get()
        _TOKENS.set(tuple(others))
        if not self._need.span:
            await asyncio.shield(asyncio.to_thread(self._over, token, True))
