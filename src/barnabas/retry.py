"""When a failed message runs again, and when it is given up: pure functions of policy, attempt, error and time."""

from collections.abc import Callable, Sequence
from typing import Never

from barnabas.errors import Reject, ResponderError, RetryAfter, TableError, must, refuse_unknown, told, whole
from barnabas.verdict import Again, Dead

Errors = type[BaseException] | tuple[type[BaseException], ...]


def exponential(retry: int) -> float:
    """1, 2, 4, ... seconds, at most 60: the default wait before the n-th retry."""
    return min(60.0, 2.0 ** min(retry - 1, 6))


class Retry:
    """How a consumer retries. `times` counts retries after the first run.

    backoff: seconds before a retry: one number for all, a sequence (its last repeats), or a function of the retry's
    number (from 1). jitter: this share of the wait is added at random (0.1 = up to a tenth). on: errors that are
    retried; give_up_on: errors that are not. ordered: True retries in place, so that the key's lane waits and order
    holds; False sends the message through a retry topic and **gives up order** for it.
    """

    __slots__ = ("backoff", "give_up_on", "jitter", "on", "ordered", "times")

    def __init__(
        self, times: int = 5, *, backoff: float | Sequence[float] | Callable[[int], float] = exponential, jitter: float = 0.1,
        on: Errors = Exception, give_up_on: Errors = (), ordered: bool = True, **unknown: Never,
    ) -> None:
        refuse_unknown("Retry", unknown, self.__slots__)
        must(whole(times) and times >= 0, "Retry", "times", times, "give the number of retries after the first run, 0 or more")
        way_out = "give seconds, a list of seconds or a function of the retry's number"
        must(callable(backoff) or _seconds(backoff), "Retry", "backoff", backoff, way_out)
        share = not isinstance(jitter, bool) and isinstance(jitter, int | float) and 0 <= jitter <= 1
        must(share, "Retry", "jitter", jitter, "give a share of the wait between 0 and 1")
        for name, errors in (("on", on), ("give_up_on", give_up_on)):
            each = errors if isinstance(errors, tuple) else (errors,)
            fit = all(isinstance(error, type) and issubclass(error, BaseException) for error in each)
            must(fit, "Retry", name, errors, "give an exception class or a tuple of them")
        must(isinstance(ordered, bool), "Retry", "ordered", ordered, "give True (in place, order holds) or False (retry topic)")
        self.times, self.backoff, self.jitter, self.ordered = times, backoff, jitter, ordered
        self.on, self.give_up_on = on, give_up_on

    def __repr__(self) -> str:
        return f"Retry({self.times}, ordered={self.ordered})"

    def wait(self, retry: int, rand: Callable[[], float] | None = None) -> float:
        """Seconds to wait before the retry of this number (from 1)."""
        if rand is None:
            from random import random

            rand = random
        backoff = self.backoff
        if callable(backoff):
            try:
                seconds = float(backoff(retry))
                if not seconds <= 10**9:
                    raise ValueError(f"it gave {seconds}")
            except Exception:  # must not cost the message
                import logging

                logging.getLogger("barnabas").exception("Retry(backoff=%r) failed; the default is taken", backoff)
                seconds = exponential(retry)
        elif isinstance(backoff, Sequence):
            seconds = float(backoff[min(retry, len(backoff)) - 1])
        else:
            seconds = float(backoff)
        return max(0.0, seconds) * (1 + self.jitter * rand())


def _seconds(backoff: object) -> bool:
    values = backoff if isinstance(backoff, Sequence) and not isinstance(backoff, str) else [backoff]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf") for v in values)


def decide(
    policy: Retry, attempt: int, error: BaseException, now: float, rand: Callable[[], float] | None = None
) -> Again | Dead:
    """What becomes of a delivery whose run number `attempt` (from 1) ended in `error` at `now` (epoch seconds)."""
    if isinstance(error, Reject):
        return Dead(f"rejected: {error.reason}")
    if isinstance(error, ResponderError | TableError):  # a retry cannot mend a broken declaration
        return Dead(f"{'responder' if isinstance(error, ResponderError) else 'table'}: {error}")
    if isinstance(error, policy.give_up_on):
        return Dead(f"gave up on {told(error)}")
    on = (policy.on, RetryAfter) if isinstance(policy.on, type) else (*policy.on, RetryAfter)
    # No Exception: a CancelledError that the handler raised itself (ours is no failure), a failure as any other.
    if not isinstance(error, on) and (isinstance(error, Exception) or Exception not in on):
        return Dead(f"not retried: {told(error)}")
    if attempt > policy.times:
        return Dead(f"failed {attempt} times, last with {told(error)}")
    if isinstance(error, RetryAfter):
        return Again(now + error.seconds)
    return Again(now + policy.wait(attempt, rand))
