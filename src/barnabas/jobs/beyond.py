"""What a job's field "barnabas" asks for: a deadline, the last of several calls, a chain, a result, the end of a run by the
clock. A job without that field meets none of this."""

from collections.abc import Iterator
from typing import Any

import msgspec

from barnabas.engine.hand import CURRENT
from barnabas.errors import BarnabasError
from barnabas.jobs.payload import More, Payload, PayloadError, build, derived_jid, dumps, hooked
from barnabas.message import OutgoingJob, note
from barnabas.verdict import Done

KEPT = 30 * 86400.0  # seconds that notes are kept which only tell late-comers something


class Unneeded(BarnabasError):
    """A job that is not to run any more; `outcome` says why: "expired" or "superseded"."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class BadResult(BarnabasError):
    """What a job returned cannot be kept or handed on."""


class Outcome(msgspec.Struct, omit_defaults=True):
    """What came of a job: the value it returned, or why it will not return one."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


def end_of(jid: str, more: More) -> tuple[str, float | None]:
    """The id of the last job of a chain (of the job itself where there is none), and how long its result is kept."""
    ttl = more.result_ttl
    for _ in more.then:
        jid = derived_jid(jid, 0)
    if more.then:
        ttl = msgspec.json.decode(more.then[-1]).get("barnabas", {}).get("result_ttl")
    return jid, ttl


class End:
    """A job in hand that asks for more: whether it is to run, and what follows its end."""

    __slots__ = ("_entry", "_more", "_payload", "function")

    def __init__(self, entry: Any, payload: Payload) -> None:
        self._entry, self._payload = entry, payload
        self._more: More = payload.more  # type: ignore[assignment]
        self.function = entry and entry.function

    def admit(self) -> None:
        """Raise Unneeded if it is too late, or if the same was asked for again since."""
        more, app = self._more, self._entry.job.app
        if more.expires_at is not None and app.clock.now() > more.expires_at:
            raise Unneeded("expired", f"it was to begin {app.clock.now() - more.expires_at:.1f} s ago (expires_in)")
        if more.debounce is not None:
            newest = app.jobs.note(more.debounce)
            if newest is not None and newest != self._payload.jid.encode():
                raise Unneeded("superseded", f"it was asked for again, by job {newest.decode(errors='replace')}")

    def done(self, out: Any) -> None:
        """It returned: what follows leaves as it is settled. Raises BadResult."""
        app, more = self._entry.job.app, self._more
        out, now, hand = None if out is Done or isinstance(out, Done) else out, app.clock.now(), CURRENT.get()
        assert hand is not None
        try:
            if more.then:
                made = self._next(app, out, now)
                if made is not None:
                    hand.add(made)
            if more.result_ttl is not None:
                value = dumps(self._payload.name, out)
                if len(value) > app.settings.value_limit:
                    raise PayloadError(f"it is {len(value)} bytes, and value_limit is {app.settings.value_limit}")
                hand.add(_result(self._payload.jid, Outcome(msgspec.Raw(value)), now + more.result_ttl))
        except PayloadError as error:
            raise BadResult(f"what it returned cannot be kept or handed on: {error}") from error
        for ended in self._ended(now):
            hand.add(ended)

    def lost(self, now: float, reason: str) -> Iterator[OutgoingJob]:
        """It will not return: tell who waits for it, or for the end of its chain."""
        jid, ttl = end_of(self._payload.jid, self._more)
        where = f"job {self._payload.name!r} ({self._payload.jid}) ended the chain: " if self._more.then else ""
        if ttl is not None:
            yield _result(jid, Outcome(error=where + reason), now + ttl)
        if self._more.then and self._more.result_ttl is not None:
            yield _result(self._payload.jid, Outcome(error=reason), now + self._more.result_ttl)
        yield from self._ended(now)

    def _ended(self, now: float) -> Iterator[OutgoingJob]:
        if self._more.cron is not None:
            yield note(f"ended:{self._more.cron}", self._payload.jid.encode(), now + KEPT)

    def _next(self, app: Any, out: Any, now: float) -> OutgoingJob | None:
        """The next job of the chain; None if a before_enqueue hook refuses it."""
        first, *rest = self._more.then
        said: dict[str, Any] = msgspec.json.decode(first)
        own = said.pop("barnabas", {})
        if "expires_in" in own:
            own["expires_at"] = now + own.pop("expires_in")
        own |= {"step": self._more.step + 1} | ({"then": rest} if rest else {})
        name, queue, retry, jid = said.pop("class"), said.pop("queue"), said.pop("retry"), derived_jid(self._payload.jid, 0)
        data = build(name, [out], queue=queue, retry=retry, jid=jid, now=now, extra=said | {"barnabas": own})
        made = hooked(app.enqueue_hooks, data, queue)
        return None if made is None else OutgoingJob(made[1], made[0], None, jid, None)


def _result(jid: str, outcome: Outcome, until: float) -> OutgoingJob:
    return note(f"result:{jid}", msgspec.json.encode(outcome), until)
