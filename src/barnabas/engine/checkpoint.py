"""The one commit order: flush outputs, commit state, settle the source. One transaction where all three live together."""

from collections.abc import Callable, Sequence
from typing import Any

from barnabas.errors import Conflict, SendError, ValueTooLarge
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
    """Make these durable. Each gets a future of its own for this try: the caller's resolves with the last one. What is
    refused as too large goes alone, and a dead letter then without its value: it says where that is."""
    tries, stored = [], []
    for output in outputs:
        future: Future[Any] = Future()
        own = output._replace(future=future) if isinstance(output, OutgoingJob) else (*output[:-1], future)
        tries.append((own, output[-1], future))
    sink.send([output for output, _, _ in tries])
    for output, asked, future in tries:
        try:
            error = future.exception(FLUSH)
        except Exception as problem:
            error = problem
        if isinstance(error, ValueTooLarge) and (less := (*output[:-1], asked) if len(tries) > 1 else without_value(output)):
            flush(sink, [less])  # (Kafka measures what goes in one batch together)
        elif error is not None and not isinstance(error, Conflict):  # that is an answer: another job holds its lock
            raise SendError(f"an output to {getattr(output[0], 'name', output[0])!r} could not be stored: {error}") from error
        elif asked is not None:
            stored.append((future, asked))
    for future, asked in stored:
        future.hand_on(asked)


def without_value(output: Any) -> Outgoing | None:
    """A dead letter, without its value; None for whatever else."""
    topic, partition, key, value, headers, *rest = output
    if value is None or topic.parent is None or topic.name != topic.parent.dead_topic.name:
        return None
    return (topic, partition, key, None, [*headers, ("barnabas-value-left-out", str(len(value)).encode())], *rest)
