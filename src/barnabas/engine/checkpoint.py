"""The one commit order: flush outputs, commit state, settle the source. One transaction where all three live together."""

from collections.abc import Callable, Sequence
from typing import Any

from barnabas.errors import Conflict, SendError
from barnabas.future import Future
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Result, Source

FLUSH = 60.0  # seconds that outputs may take to become durable elsewhere before the checkpoint fails (and is repeated)


def checkpoint(source: Source, sinks: Callable[[Any], Any] | None, results: Sequence[Result]) -> int:
    """Settle `results`. Outputs for the source's own home ride in its transaction, others are durable before it.

    sinks: where an output leaves; None if all leave where the source lives.
    Returns the number of outputs. Raises what the sink or the source raises; nothing is settled then.
    """
    if sinks is None:
        source.settle(results)
        return sum([len(result.outputs) for result in results])
    away: dict[Any, list[Outgoing | OutgoingJob]] = {}
    settled = []
    count = 0
    for result in results:
        outputs = result.outputs
        if outputs:
            count += len(outputs)
            own = []
            for output in outputs:
                sink = sinks(output)
                if sink is source.atomic:
                    own.append(output)
                else:
                    away.setdefault(sink, []).append(output)
            if len(own) < len(outputs):
                result = result._replace(outputs=own)
        settled.append(result)
    for sink, outputs in away.items():
        flush(sink, outputs)
    source.settle(settled)
    return count


def flush(sink: Any, outputs: list[Outgoing | OutgoingJob]) -> None:
    """Make these durable. Each gets a future of its own for this try: the caller's resolves with the last one."""
    tries = []
    for output in outputs:
        future: Future[Any] = Future()
        own = output._replace(future=future) if isinstance(output, OutgoingJob) else (*output[:-1], future)
        tries.append((own, output[-1], future))
    sink.send([output for output, _, _ in tries])
    for output, _, future in tries:
        try:
            error = future.exception(FLUSH)
        except Exception as problem:
            error = problem
        if error is not None and not isinstance(error, Conflict):  # that is an answer: another job holds its lock
            raise SendError(f"an output to {getattr(output[0], 'name', output[0])!r} could not be stored: {error}") from error
    for _, asked, future in tries:
        if asked is not None:
            future.hand_on(asked)
