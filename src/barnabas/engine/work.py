"""The hot path: one coroutine a worker takes a run, calls the handler for each row, gives the run back.

A thread drives it with one `send(None)` (it never suspends there), an event loop runs it as a task; `if awaited` is the
only difference. What a message pays here is paid by every message, so: locals, no objects, and one look at the clock
that serves the claim's end, a stop, a revocation and the settling of long runs at once.
"""

import asyncio
from collections.abc import Sequence
from operator import length_hint
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from barnabas.engine.hand import CURRENT, maker
from barnabas.engine.handler import not_run
from barnabas.message import Unread

if TYPE_CHECKING:
    from barnabas.engine.crew import Crew

SLOT = 3  # numbers a worker keeps in the box: partition id, offset in work, how many from there


async def work(crew: "Crew", slot: int) -> None:
    """Run deliveries one at a time until the crew says stop (`take` gives None and there is nothing to wait for)."""
    handler = crew.handler
    function, decode, bind, answer = handler.function, handler.decode, handler.bind, handler.answer
    awaited, app, new_hand = handler.awaited, handler.app, maker(handler)
    past: Any = crew.cancelled if awaited else crew.late
    take, monotonic, box, at_box = crew.take, crew.monotonic, crew.box, slot * SLOT + crew.base + 1
    hand = crew.hands[slot] = new_hand(app)
    CURRENT.set(hand)
    while True:
        run = take(slot)
        if run is None:
            if await crew.idle(slot):
                continue
            return
        hand.run, hand.open = run, not awaited  # (what a task still has of the last message stays closed)
        until, done, parked = crew.begin(slot, run), 0, None
        rows = run.rows
        if type(rows) is Unread:
            (done, parked), rows = _work_unread(crew, slot, run, until), ()
        for row in rows:
            box[at_box] = row[0]  # before the look at the clock: see `rescue`
            if monotonic() > until:
                if awaited:
                    box[at_box] = -1  # nothing in hand: nothing to cancel
                    await asyncio.sleep(0)
                    box[at_box] = row[0]
                until = crew.breathe(slot, run, done)
                if until < 0:
                    break
            if awaited:  # a hand a message: tasks that outlive the handler must not send into the next one's
                hand = new_hand(app, run, row, True)
                CURRENT.set(hand)
            else:
                hand.row = row
            try:
                out: Any = function(decode(row[2])) if decode is not None else function(*bind(run, row))
                if awaited:
                    out = await out
                elif out is not None and type(out) is CoroutineType:
                    raise not_run(out)
                if past:
                    crew.overdue(slot, run, row)
                if answer is not None:
                    answer(hand, out)
            except BaseException as error:  # no Exception: sys.exit, a panic of Rust, a Timeout of gevent
                hand.drop()
                hand.open = not awaited
                parked = crew.failed(slot, run, row, error)
                if parked is not None:
                    break
            else:
                if hand.used:
                    hand.keep()
                if awaited:
                    hand.open = False
            done += 1
        hand.open = False
        crew.end(slot, run, done, parked)


def _work_unread(crew: "Crew", slot: int, run: Any, until: float) -> tuple[int, float | None]:
    """The same for messages that nobody has looked at, with nothing to await, answer or overrun: how many are done, and until
    when the rest is parked. Where it is among them is asked for rarely."""
    handler, monotonic, hand = crew.handler, crew.monotonic, crew.hands[slot]
    function, decode = handler.function, handler.decode
    messages = left = run.rows.messages
    while left:
        ahead, deliveries = iter(left), iter(() if decode is not None else handler.deliveries(run.part, left))
        try:
            for message in ahead:
                if monotonic() > until:
                    at = len(messages) - length_hint(ahead) - 1
                    until = crew.breathe(slot, run, at)
                    if until < 0:
                        return at, None
                hand.row = message
                out = function(decode(message.value())) if decode is not None else function((d := next(deliveries)).value, d)
                if out is not None and type(out) is CoroutineType:
                    raise not_run(out)
                if hand.used:
                    hand.keep()
            break
        except BaseException as error:
            hand.drop()
            hand.open = True
            at = len(messages) - length_hint(ahead) - 1
            parked = crew.failed(slot, run, run.rows[at], error)
            if parked is not None:
                return at, parked
            left = messages[at + 1 :]
    return len(messages), None


async def work_batches(crew: "Crew", slot: int) -> None:
    """The same for batch handlers: one call a run. A failing batch is retried whole; when its attempts are spent its
    messages run as batches of one, so that only culprits die."""
    monotonic, box, at_box = crew.monotonic, crew.box, slot * SLOT + crew.base + 1
    times = crew.handler.consumer.retry.times
    while True:
        run = crew.take(slot)
        if run is None:
            if await crew.idle(slot):
                continue
            return
        if monotonic() > crew.begin(slot, run) and crew.breathe(slot, run, 0) < 0:
            crew.end(slot, run, 0, None)
            continue
        rows = run.rows
        done, parked, attempts = 0, None, run.part.attempts
        if not attempts or not any(attempts.get(row[0], 0) > times for row in rows):  # else it hung as a whole (`abandon`)
            box[at_box], box[at_box + 1] = rows[0][0], rows[-1][0] - rows[0][0] + 1  # the span: a lane's rows have gaps
            error = await _call(crew, slot, run, rows)
            if error is None:
                done = len(rows)
            else:
                parked = _failed(crew, slot, run, rows[0], error, True)
        while parked is None and done < len(rows) and crew.breathe(slot, run, done) >= 0:
            box[at_box], box[at_box + 1] = rows[done][0], 1
            error = await _call(crew, slot, run, [rows[done]])
            if error is not None:
                parked = _failed(crew, slot, run, rows[done], error)
            done += parked is None
        crew.end(slot, run, done, parked)


def _failed(crew: "Crew", slot: int, run: Any, row: Any, error: BaseException, whole: bool = False) -> float | None:
    return -1.0 if error is crew.error else crew.failed(slot, run, row, error, whole)


async def _call(crew: "Crew", slot: int, run: Any, rows: Sequence[Any]) -> BaseException | None:
    """Call the batch handler for these rows, without those that cannot be decoded. Those are dead on their own, once
    the others are done: a batch that is retried meets them again."""
    handler = crew.handler
    hand = maker(handler)(handler.app, run, rows[0], True)
    hand.keys = None
    CURRENT.set(hand)
    decode = handler.decoder(run.part.topic)
    bad: list[Any] = []
    try:
        values = list(map(decode, rows.values())) if type(rows) is Unread else [decode(row[2]) for row in rows]
    except Exception:
        values, rows, bad = crew.decode_each(run, rows)
    try:
        if values:
            out = handler.call_batch(run, rows, values)
            if handler.awaited:
                out = await out
            elif type(out) is CoroutineType:
                raise not_run(out)
            if crew.cancelled or crew.late:
                crew.overdue(slot, run, hand.row)
            if handler.answer is not None:
                handler.answer(hand, out)
    except BaseException as error:
        hand.drop()
        return error
    finally:
        hand.open = False
    for row, why in bad:
        crew.failed(slot, run, row, why)
    if bad and crew.error is not None:  # on_dead="stop"
        return crew.error
    if hand.used:
        hand.keep()
    return None
