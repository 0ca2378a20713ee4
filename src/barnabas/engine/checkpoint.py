"""The one commit order: flush outputs, commit state, settle the source. One transaction where all three live together."""

from collections.abc import Callable, Sequence
from typing import Any

from barnabas.errors import Conflict, MessageRefused, SendError
from barnabas.future import Future
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Result, Source

Bury = Callable[[Sequence[Result], Sequence[Result], list[tuple[Any, Exception]]], Sequence[Result]]
FLUSH = 60.0  # seconds that outputs may take to become durable elsewhere before the checkpoint fails (and is repeated)


def checkpoint(source: Source, sinks: Callable[[Any], Any] | None, results: Sequence[Result], bury: Bury) -> int:
    """Settle `results`. Outputs for the source's own home ride in its transaction, others are durable before it.

    sinks: where an output leaves; None if all leave where the source lives. bury: makes of results, of what is left of them to
    settle, and of outputs that are refused for good, what is to be settled instead.
    Returns the number of outputs. Raises what the sink or the source raises; nothing is settled then.
    """
    if sinks is None:
        source.settle(results)
        return sum([len(result.outputs) for result in results])
    away: dict[Any, list[Outgoing | OutgoingJob]] = {}
    settled: list[Result] = []
    refused: list[tuple[Any, Exception]] = []
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
        refused += flush(sink, outputs)
    if refused:
        checkpoint(source, sinks, bury(results, settled, refused), bury)
    else:
        source.settle(settled)
    return count


def flush(sink: Any, outputs: list[Outgoing | OutgoingJob]) -> list[tuple[Any, Exception]]:
    """Make these durable. Each gets a future of its own for this try: the caller's resolves with the last one. What is
    refused for what it is goes alone, and a dead letter then without its value: it says where that is. Returns what is refused
    even so, and why."""
    tries, stored, failed, refused = [], [], None, []
    for output in outputs:
        future: Future[Any] = Future()
        own = output._replace(future=future) if isinstance(output, OutgoingJob) else (*output[:-1], future)
        tries.append((own, output, future))
    sink.send([own for own, _, _ in tries])
    for own, output, future in tries:
        try:
            error = future.exception(FLUSH)
        except Exception as problem:
            error = problem
        if isinstance(error, MessageRefused):
            if less := output if len(tries) > 1 else without_value(output):
                refused += flush(sink, [less])  # (Kafka measures what goes in one batch together)
            else:
                refused.append((output, error))
        elif error is not None and not isinstance(error, Conflict):  # that is an answer: another job holds its lock
            failed = failed or (own, error)
        elif output[-1] is not None:
            stored.append((future, output[-1]))
    if failed is not None:
        name = getattr(failed[0][0], "name", failed[0][0])
        raise SendError(f"an output to {name!r} could not be stored: {failed[1]}") from failed[1]
    for future, asked in stored:
        future.hand_on(asked)
    return refused


def without_value(output: Any) -> Outgoing | None:
    """A dead letter, without its value; None for whatever else."""
    topic, partition, key, value, headers, *rest = output
    if value is None or topic.parent is None or topic.name != topic.parent.dead_topic.name:
        return None
    return (topic, partition, key, None, [*headers, ("barnabas-value-left-out", str(len(value)).encode())], *rest)
