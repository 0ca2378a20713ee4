"""The one commit order: flush outputs, commit state, settle the source. One transaction where all three live together."""

from collections.abc import Callable, Sequence
from typing import Any

from barnabas.errors import Conflict, MessageRefused, SendError
from barnabas.future import Future
from barnabas.message import Outgoing, OutgoingJob
from barnabas.ports import Result, Source

Bury = Callable[[Sequence[Result], list[tuple[Any, Exception]]], Sequence[Result]]
CUT = "barnabas-headers-left-out"  # those of more bytes than it says
FLUSH = 60.0  # seconds that outputs may take to become durable elsewhere before the checkpoint fails (and is repeated)


def checkpoint(source: Source, sinks: Callable[[Any], Any] | None, results: Sequence[Result], bury: Bury) -> int:
    """Settle `results`. Outputs for the source's own home ride in its transaction, others are durable before it.

    sinks: where an output leaves; None if all leave where the source lives. bury: makes of results, and of outputs
    of them that are refused for good, what is to be settled instead.
    Returns the number of outputs. Raises what the sink or the source raises; nothing is settled then.
    """
    count = sum([len(result.outputs) for result in results])
    if sinks is None:
        source.settle(results)
        return count
    away: dict[Any, list[Outgoing | OutgoingJob]] = {}
    stay: list[list[Outgoing | OutgoingJob]] = []
    refused: list[tuple[Any, Exception]] = []
    for result in results:
        own: list[Outgoing | OutgoingJob] = []
        for output in result.outputs:
            sink = sinks(output)
            if sink is source.atomic:
                own.append(output)
            else:
                away.setdefault(sink, []).append(output)
        stay.append(own)
    try:
        for sink, outputs in away.items():
            refused += flush(sink, outputs)
    finally:  # what is stored does not leave again, if this is to be repeated
        left = {id(output) for outputs in away.values() for output in outputs}
        for result, own in zip(results, stay, strict=True):
            if len(own) < len(result.outputs):
                result.outputs[:] = own + [output for output in result.outputs if id(output) in left]
    if refused:
        checkpoint(source, sinks, bury(results, refused), bury)
    else:
        source.settle(results)
    return count


def flush(sink: Any, outputs: list[Outgoing | OutgoingJob]) -> list[tuple[Any, Exception]]:
    """Make these durable, and leave in the list what is not. Each gets a future of its own for this try: the caller's resolves
    with the last one. What is refused for what it is goes alone, and a dead letter then without its value, and without what is
    long of its headers: it says where they are. Returns what is refused even so, and why."""
    tries, alone, failed, refused = [], [], None, list[tuple[Any, Exception]]()
    for output in outputs:
        future: Future[Any] = Future()
        own = output._replace(future=future) if isinstance(output, OutgoingJob) else (*output[:-1], future)
        tries.append((own, output, future))
    sink.send([own for own, _, _ in tries])
    outputs.clear()
    for own, output, future in tries:
        try:
            error = future.exception(FLUSH)
        except Exception as problem:
            error = problem
        if error is None or isinstance(error, Conflict):  # that is an answer: another job holds its lock
            if output[-1] is not None:
                future.hand_on(output[-1])
            continue
        outputs.append(output)
        if not isinstance(error, MessageRefused):
            failed = failed or (own, error)
        elif less := output if len(tries) > 1 else lessened(output):
            alone.append((output, less))  # (Kafka measures what goes in one batch together)
        else:
            refused.append((output, error))
    if failed is not None:
        name = getattr(failed[0][0], "name", failed[0][0])
        raise SendError(f"an output to {name!r} could not be stored: {failed[1]}") from failed[1]
    for output, less in alone:
        refused += [(output, error) for _, error in flush(sink, [less])]
    outputs[:] = [output for output, _ in refused]
    return refused


def lessened(output: Any) -> Outgoing | None:
    """A dead letter with less in it: without its value, then without those of its message's headers (and its traceback) that
    are longer than half of the longest; None where nothing can go, and for whatever else."""
    topic, partition, key, value, headers, *rest = output
    if topic.parent is None or topic.name != topic.parent.dead_topic.name:
        return None
    if value is not None:
        return (topic, partition, key, None, [*headers, ("barnabas-value-left-out", str(len(value)).encode())], *rest)
    known = [name for name, _ in headers if name.startswith("barnabas-") and name != "barnabas-traceback"]
    most = max((len(name) + len(data) for name, data in headers if name not in known), default=0) // 2
    kept = [(name, data) for name, data in headers if name != CUT and (name in known or len(name) + len(data) <= most)]
    return (topic, partition, key, None, [*kept, (CUT, str(most).encode())], *rest) if most else None
