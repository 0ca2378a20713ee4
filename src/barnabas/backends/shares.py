"""What every log backend does alike: fair shares of a group's partitions, and the account of a partition in hand."""

import json
import socket
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from barnabas.engine.ledger import Intervals, Ledger, Straight
from barnabas.ports import Part, Result

HOST = socket.gethostname()
CONTROL = "barnabas.control"  # the table that keeps what operators have asked for
STATES = ("ready", "work", "scheduled", "retry", "dead")
M = TypeVar("M", bound=Hashable)
P = TypeVar("P", bound=Hashable)


def numbers(counts: Mapping[str, int]) -> dict[int, int]:
    """Counts by offset, as JSON keeps them."""
    return {int(offset): n for offset, n in counts.items()}


def fair(members: Sequence[M], partitions: Sequence[P], owners: Mapping[P, M]) -> dict[P, M]:
    """Who is to own which partition: shares differ by one at most, and as few as possible change hands."""
    if not members:
        return {}
    least, extra = divmod(len(partitions), len(members))
    owned: dict[M, list[P]] = {m: [] for m in members}
    for p in partitions:
        if owners.get(p) in owned:
            owned[owners[p]].append(p)
    # Those who own most keep the shares that are one larger.
    ranked = sorted(members, key=lambda m: -len(owned[m]))
    share = {m: least + (1 if i < extra else 0) for i, m in enumerate(ranked)}
    target: dict[P, M] = {}
    for m in members:
        for p in owned[m][: share[m]]:
            target[p] = m
    free = [p for p in partitions if p not in target]
    for m in members:
        missing = share[m] - min(len(owned[m]), share[m])
        for p in free[:missing]:
            target[p] = m
        free = free[missing:]
    return target


def spread(group: str, members: Sequence[M], topics: Mapping[P, str], owners: Mapping[P, M]) -> dict[P, M]:
    """Fair shares of a group's partitions (of which topic each), those of its retry topics apart: nobody is to get only
    what is idle most of the time."""
    kinds: tuple[list[P], list[P]] = ([], [])
    for p, topic in topics.items():
        kinds[topic.endswith(f".retry.{group}")].append(p)
    return fair(members, kinds[0], owners) | fair(members, kinds[1], owners)


def open_account(part: Part, ordered: bool, position: int, done: Intervals, attempts: Mapping[int, int]) -> None:
    """Begin the account of a partition that was assigned, where its last owner left off."""
    part.held = Straight(position, done) if ordered and not part.retries else Ledger(position, done)
    part.attempts.update(attempts)


def close_books(results: Iterable[Result]) -> set[Part]:
    """Enter results into the accounts of their partitions; returns the partitions touched."""
    touched = set()
    for result in results:
        part = result.part
        touched.add(part)
        if not result.rows:  # a failed attempt, to be kept
            continue
        part.held.finish(result.rows)
        if part.attempts or part.crashes:
            for row in result.rows:
                part.attempts.pop(row[0], None)
                part.crashes.pop(row[0], None)
    return touched


def finished(offset: int, done: Intervals, more: Iterable[int]) -> tuple[list[int], int, Intervals]:
    """A group's position when these offsets are finished, too: which of them were not, the new offset and intervals."""
    known = sorted(done)
    lows = [low for low, _ in known]
    fresh = []
    for each in dict.fromkeys(more):
        at = bisect_right(lows, each) - 1
        if each >= offset and (at < 0 or each >= known[at][1]):
            fresh.append(each)
    spans = [(offset, offset)]
    for low, high in sorted([*known, *((each, each + 1) for each in fresh)]):
        if low <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(high, spans[-1][1]))
        else:
            spans.append((low, high))
    return fresh, spans[0][1], spans[1:]


def by_partition(letters: Iterable[tuple[str, int, int, Any]]) -> dict[tuple[str, int], dict[int, Any]]:
    """What comes with which offset, by topic and partition."""
    found: dict[tuple[str, int], dict[int, Any]] = {}
    for topic, number, offset, what in letters:
        found.setdefault((topic, number), {})[offset] = what
    return found


def by_target(outputs: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Messages and jobs apart."""
    messages: list[Any] = []
    jobs: list[Any] = []
    for output in outputs:
        (messages if len(output) == 7 else jobs).append(output)
    return messages, jobs


def state_of(part: Part, done: list[tuple[int, int]]) -> str | None:
    """What a position carries beside its offset; None for nothing."""
    state: dict[str, Any] = {}
    if done:
        state["done"] = done
    if part.attempts:
        state["attempts"] = dict(part.attempts)
    if part.crashes:
        state["crashes"] = dict(part.crashes)
    return json.dumps(state) if state else None
