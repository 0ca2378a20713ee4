"""Tables: keyed state that a consumer uses as a mapping, settled in the same step as its position."""

import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import msgspec

from barnabas.codec import as_key, known
from barnabas.engine.hand import CURRENT, Hand
from barnabas.errors import BarnabasError, DeclarationError, TableError
from barnabas.message import Key
from barnabas.ports import Part, Result

T = TypeVar("T")
_ABSENT: Any = object()
_encode = msgspec.msgpack.Encoder().encode
KEPT = 100_000  # settled cells kept in memory per partition


class Cells:
    """The tables of one consumer at work. Cells are kept encoded, so what a handler reads is always a copy.

    A cell written is looked for in this order: the delivery's own writes, what ran before it and is not settled, what
    was settled lately, the store.
    """

    def __init__(self, names: Iterable[str], rekeyed: bool, load: Callable[[str, Any], bytes | None]) -> None:
        self.names = frozenset(names)
        self.rekeyed = rekeyed
        self._load = load
        self._lock = threading.Lock()

    def read(self, hand: Hand, cell: tuple[str, Key]) -> bytes | None:
        """A cell as the delivery in hand sees it."""
        run = hand.run
        unsettled, settled = run.part.cells
        data = hand.cells.get(cell, _ABSENT) if hand.cells else _ABSENT
        if data is _ABSENT:
            data = run.cells.get(cell, _ABSENT)
        if data is _ABSENT:
            data = unsettled.get(cell, _ABSENT)
        if data is _ABSENT:
            data = settled.get(cell, _ABSENT)
        if data is _ABSENT:
            data = settled[cell] = self._load(*cell)
        return data  # type: ignore[no-any-return]

    def give(self, part: Part, cells: dict[Any, bytes | None]) -> None:
        """A stretch of a run is done: who comes after it sees its writes. (Within the run they are in `run.cells`.)"""
        with self._lock:
            part.cells[0].update(cells)

    def settled(self, results: Iterable[Result]) -> None:
        """These results are durable: their cells, if still the newest, need no longer be held."""
        with self._lock:
            for result in results:
                unsettled, settled = result.part.cells
                if len(settled) > KEPT:
                    settled.clear()
                for cell, data in result.cells.items():
                    if unsettled.get(cell, _ABSENT) is data:
                        settled[cell] = data
                        del unsettled[cell]


class Table(Generic[T]):
    """A named mapping of keys to values of one type. Inside a handler whose consumer names it in `tables=[...]`: read,
    assign, delete; only assignment writes, reads are copies. From outside: `with table.open() as view`, read-only."""

    def __init__(self, app: Any, name: str, type_: Any) -> None:
        self.app = app
        self.name = name
        self.type = type_
        try:
            self._decode = msgspec.msgpack.Decoder(known(Any if type_ is None else type_)).decode
        except TypeError as error:
            how = "use a msgspec Struct, a dataclass, a TypedDict or a plain type"
            raise DeclarationError(f"table {name!r}: type {type_!r} cannot be stored ({error}); {how}") from None
        self._exact: Any = None if type_ is Any else typing.get_origin(type_) or type_  # None: it takes anything

    def _fits(self, value: Any) -> None:
        """Refuse what nobody could read again."""
        try:
            self._decode(_encode(value))
        except msgspec.DecodeError as error:
            raise TableError(f"the table {self.name!r} is one of {self.type!r}, and {value!r:.200} is none: {error}") from error

    def _cell(self, key: Any) -> tuple[Hand, tuple[str, Key]]:
        hand = CURRENT.get()
        if hand is None or not hand.open or hand.tables is None or self.name not in hand.tables.names:
            how = f"name it in the consumer's tables=[...], or read it from outside: with {self.name}.open() as view"
            raise TableError(f"the table {self.name!r} is used outside of a handler that owns it; {how}")
        stored = key if type(key) is str else as_key(key)
        if hand.row[1] != stored and not hand.tables.rekeyed and not hand.has_key(stored):
            raise TableError(
                f"the table {self.name!r} is used under the key {key!r} while the message's key is {hand.row[1]!r}: another "
                "partition, so another process, may own that key; send the messages under that key, or declare the "
                "topic rekeyed=True if all messages of one table key share a partition"
            )
        return hand, (self.name, stored)

    def __getitem__(self, key: Any) -> T:
        value = self.get(key, _ABSENT)
        if value is _ABSENT:
            raise KeyError(key)
        return value  # type: ignore[no-any-return]

    __iter__ = None  # else Python asks for the keys 0, 1, 2 and so on

    def get(self, key: Any, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        hand = CURRENT.get()
        if hand is not None and hand.open and hand.row[1] == key and self.name in hand.names:  # most: no call for it
            cell = (self.name, key)
        else:
            hand, cell = self._cell(key)
        data = hand.run.cells.get(cell, _ABSENT) if not hand.cells else _ABSENT
        if data is _ABSENT:
            data = hand.tables.read(hand, cell)
        try:
            return default if data is None else self._decode(data)
        except msgspec.DecodeError:
            return self.value(key, data)

    def value(self, key: Any, data: bytes) -> Any:
        """What a cell holds. Raises BarnabasError where that is of another type."""
        try:
            return self._decode(data)
        except msgspec.DecodeError as error:
            what = f"the table {self.name!r} holds under {key!r} what is no {self.type!r} ({error}); if that was changed, give"
            raise BarnabasError(f"{what} new fields defaults, or begin anew: `barnabas reset` with --clear-tables") from error

    def __contains__(self, key: Any) -> bool:
        hand, cell = self._cell(key)
        return hand.tables.read(hand, cell) is not None

    def __setitem__(self, key: Any, value: T) -> None:
        if type(value) is not self._exact and self._exact is not None:
            self._fits(value)
        hand = CURRENT.get()
        if hand is not None and hand.open and hand.row[1] == key and self.name in hand.names:
            hand.cells[self.name, key] = _encode(value)
        else:
            hand, cell = self._cell(key)
            hand.cells[cell] = _encode(value)
        hand.used = True

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        hand, cell = self._cell(key)
        hand.cells[cell] = None
        hand.used = True

    def open(self) -> "AbstractContextManager[View[T]]":
        """A read-only view from outside, as of what is settled: `with totals.open() as view: view["AA"]`."""
        return nullcontext(View(self))


class View(Mapping[str, T]):
    """A table as it was last settled. Read-only."""

    def __init__(self, table: Table[T]) -> None:
        self._table = table

    def __getitem__(self, key: Any) -> T:
        data = self._table.app.events.cell(self._table.name, as_key(key))
        if data is None:
            raise KeyError(key)
        return self._table.value(key, data)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Any]:
        return (key for key, _ in self._table.app.events.cells(self._table.name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> Any:
        """Pairs of key and value."""
        return [(key, self._table.value(key, data)) for key, data in self._table.app.events.cells(self._table.name)]
