"""The future of a send: one object that a thread waits for with `.result()` and a coroutine with `await`.

Lean on purpose: a send makes one, and most are never waited for. `concurrent.futures.Future` makes a lock and a
condition each (four times the price of everything else in a send); here they are made when somebody waits.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from barnabas.errors import DeclarationError, NotYetDurable, patience

T = TypeVar("T")
_PENDING: Any = object()
_LOCK = threading.Lock()  # guards the registration of waiters, of all futures: a rare and short act
unseen = 0  # sends of this process that failed, and nobody looked at their futures


class _Failure:
    """A failed outcome. Dropped without anybody having looked, it says so: nothing is lost in silence."""

    __slots__ = ("error", "log", "seen")

    def __init__(self, error: BaseException, seen: bool) -> None:
        import logging  # 3 ms that a process without failures need not pay

        self.error, self.seen = error, seen
        self.log = logging.getLogger("barnabas.send")

    def __del__(self) -> None:
        if not self.seen:
            global unseen
            unseen += 1
            self.log.error("a send failed and nobody looked at its future: %s: %s", type(self.error).__name__, self.error)


class Future(msgspec.Struct, Generic[T], eq=False, gc=False):
    """The outcome of a send or enqueue, resolved when it is durable. Safe in any thread and any event loop."""

    _id: Any = None  # text, or a function and its arguments: most ids are never asked for
    _hand: Any = None
    _value: Any = _PENDING
    _waiters: Any = None

    @property
    def id(self) -> str | None:
        """The job id, or the id derived from the cause of a send inside a handler; None for other messages."""
        value = self._id
        return value[0](*value[1:]) if type(value) is tuple else value  # type: ignore[no-any-return]

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._value is not _PENDING

    def result(self, timeout: float | None = None) -> T:
        """Wait for the outcome, at most `timeout` seconds (TimeoutError), and return it or raise its error."""
        self._wait(timeout)
        return self._outcome()

    def _wait(self, timeout: float | None) -> None:
        if self._value is _PENDING:
            self._ask_hand(True)
        if self._value is _PENDING:
            gate = threading.Lock()  # a bare one: an Event costs three times as much
            gate.acquire()
            if self._watch(gate.release) and not gate.acquire(timeout=patience("future", timeout)):
                raise NotYetDurable(f"not durable after {timeout} s; it may still become so: see barnabas check")

    def outcome(self, timeout: float | None = None) -> Any:
        """Of a job with `result_ttl`: wait for what it returns, as Job.outcome does."""
        raise DeclarationError("no outcome is kept: declare the job with result_ttl=SECONDS, and ask outside of handlers")

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as `result` does; return the error, or None if there was none."""
        self._wait(timeout)
        value = self._value
        if type(value) is not _Failure:
            return None
        value.seen = True
        return value.error  # never raised: a traceback would keep whatever looks at it

    def add_done_callback(self, callback: Callable[["Future[T]"], Any]) -> None:
        """Call `callback(future)` once the outcome is known: at once if it is, else in the thread that resolves it."""
        if not self._watch(lambda: callback(self)):
            callback(self)

    def __await__(self) -> Generator[Any, None, T]:
        if self._value is _PENDING:
            self._ask_hand(False)
            import asyncio

            loop = asyncio.get_running_loop()
            waiter = loop.create_future()

            def wake() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            def resolved() -> None:
                with suppress(RuntimeError):  # that loop has ended, and with it whoever waited
                    loop.call_soon_threadsafe(wake)

            if self._watch(resolved):
                yield from waiter
        return self._outcome()

    # What follows is for sinks.

    def resolve(self, value: Any) -> None:
        """Set the outcome. A tuple is a stored row whose first item, a Topic, makes the Message when asked for."""
        self._value = value
        self._hand = None
        # The waiter registers before it looks at the value again, the resolver sets the value before it looks at the
        # waiters: under the interpreter lock at least one of them sees the other.
        if self._waiters is not None:
            self._wake()

    def fail(self, error: BaseException, told: bool = False) -> None:
        """Set the error as the outcome. `told`: a log line has said so, for all that failed with it."""
        self.resolve(_Failure(error, told))

    def settle(self, value: Any) -> None:
        """Set the outcome, or the error that it is."""
        self.fail(value) if isinstance(value, Exception) else self.resolve(value)

    def hand_on(self, other: "Future[Any]") -> None:
        """Give another this one's outcome as it was set: nobody has asked for a Message yet."""
        value = self._value
        other.fail(value.error) if type(value) is _Failure else other.resolve(value)

    def _wake(self) -> None:
        with _LOCK:
            waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            try:
                waiter()
            except (Exception, SystemExit):  # what has its outcome is settled, whatever somebody's callback makes of that
                import logging

                logging.getLogger("barnabas.send").exception("a callback of a future failed")

    def _watch(self, waiter: Callable[[], None]) -> bool:
        with _LOCK:
            if self._value is not _PENDING:
                return False
            self._waiters = [*(self._waiters or ()), waiter]
        if self._value is not _PENDING:
            self._wake()
        return True

    def _ask_hand(self, blocking: bool) -> None:
        """Somebody is about to wait: the handler that sent this refuses it, a sink may do its work at once."""
        hand = self._hand
        if hand is not None:
            hand.awaited(self, blocking)

    def _outcome(self) -> T:
        value = self._value
        if type(value) is _Failure:
            value.seen = True
            raise value.error
        if type(value) is tuple:
            self._value = value = value[0].stored(value)
        return value  # type: ignore[no-any-return]


def gathered(futures: "list[Future[Any]]", many: "Future[Any] | None" = None, value: Any = None) -> "Future[Any]":
    """One future (`many`) for all of these: `value` (None where a handler failed, and they did not leave), or their values,
    without those that are None; or, once all are known, the first error."""
    if many is None:
        hand = next((future._hand for future in reversed(futures) if future._hand is not None), None)  # whom a wait concerns
        many = Future(None, hand)
    left = [len(futures)]

    def known(_: Any) -> None:
        with _LOCK:
            left[0] -= 1
            if left[0]:
                return
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            many.fail(errors[0])
        elif value is not None:
            many.resolve(None if any(future._value is None for future in futures) else value)
        else:
            many.resolve([one for future in futures if (one := future.result()) is not None])

    for future in futures:
        future.add_done_callback(known)
    if not futures:
        many.resolve([] if value is None else value)
    return many


def resolved(value: Any) -> Future[Any]:
    """A future whose outcome is known already."""
    return Future(None, None, value)
