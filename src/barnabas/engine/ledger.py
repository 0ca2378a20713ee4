"""The account of one partition: what was handed out, what is finished, and the position that follows from it.

Completions come in any order; the position is the lowest unfinished offset (the watermark), plus the intervals that are
finished beyond it. Offsets may have gaps (compaction, transactions): what counts is the order in which they were
delivered, so the watermark is the first key of a dict of what is in flight, and no gap needs code.
"""

from collections.abc import Iterable, Sequence

from barnabas.message import Row

Intervals = list[tuple[int, int]]  # [from, to)


class Ledger:
    """What is in flight of one partition. Touched by the fetch thread only."""

    __slots__ = ("_done", "_open", "done_before", "next")

    def __init__(self, position: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self._open: dict[int, int] = {}
        self._done = set[int]()  # finished but beyond the watermark
        self.next = position
        self.done_before = _beyond(position, done)  # finished by an earlier owner: never handed out

    def __len__(self) -> int:
        """How far the account reaches beyond the watermark: in flight, or finished out of order."""
        return len(self._open) + len(self._done)

    def __bool__(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._open)

    def add(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Take rows into account, in offset order; returns those that are still to be done."""
        if not rows:
            return rows
        if self.done_before:
            rows = self._skip(rows)
        self._open.update([(row[0], 0) for row in rows])
        return rows

    def _skip(self, rows: Sequence[Row]) -> Sequence[Row]:
        kept = []
        intervals = self.done_before
        for row in rows:
            if any(a <= row[0] < b for a, b in intervals):
                self._done.add(row[0])
            else:
                kept.append(row)
        self.done_before = _beyond(rows[-1][0] + 1, intervals)
        if not kept and not self._open:  # nothing is to be settled that would move the watermark over them
            self._done.clear()
        return kept

    def finish(self, rows: Sequence[Row]) -> None:
        """These rows have their outcome."""
        opened, done = self._open, self._done
        for row in rows:
            offset = row[0]
            if opened.pop(offset, None) is not None:  # a settlement that failed is tried again: count once
                done.add(offset)

    def position(self) -> tuple[int, Intervals]:
        """The watermark, and the intervals finished beyond it. Shrinks the account to what is beyond."""
        opened, done = self._open, self._done
        if not opened:
            watermark = max(self.next, max(done, default=-1) + 1)
            done.clear()
            return watermark, list(self.done_before)
        watermark = next(iter(opened))
        done = self._done = {offset for offset in done if offset > watermark}
        return watermark, _intervals(sorted(done)) + self.done_before


class Straight:
    """The account of a partition whose rows are finished in the order they came: one number, no dict."""

    __slots__ = ("_count", "_watermark", "done_before", "next")

    def __init__(self, position: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self._count = 0
        self._watermark = position
        self.next = position
        self.done_before = _beyond(position, done)

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Take rows into account; returns those that are still to be done."""
        if self.done_before:
            intervals = self.done_before
            rows = [row for row in rows if not any(a <= row[0] < b for a, b in intervals)]
        self._count += len(rows)
        return rows

    def finish(self, rows: Sequence[Row]) -> None:
        """These rows, the oldest in flight, have their outcome."""
        if rows[0][0] < self._watermark:  # a settlement that failed is tried again: count once
            rows = [row for row in rows if row[0] >= self._watermark]
        if rows:
            self._count -= len(rows)
            self._watermark = rows[-1][0] + 1

    def position(self) -> tuple[int, Intervals]:
        """The watermark; intervals of an earlier owner that lie beyond it."""
        if not self._count:
            self._watermark = max(self.next, self._watermark)
        watermark = self._watermark
        if self.done_before:
            self.done_before = _beyond(watermark, self.done_before)
        return watermark, list(self.done_before)


def _beyond(offset: int, intervals: Iterable[tuple[int, int]]) -> Intervals:
    """What of these lies there: accounts overlap nowhere."""
    return [(max(a, offset), b) for a, b in intervals if b > offset]


def _intervals(offsets: list[int]) -> Intervals:
    found: Intervals = []
    for offset in offsets:
        if found and found[-1][1] == offset:
            found[-1] = (found[-1][0], offset + 1)
        else:
            found.append((offset, offset + 1))
    return found
