"""Outputs that are stored elsewhere: each leaves once, whatever becomes of those beside it."""

from types import SimpleNamespace

import pytest

from barnabas.engine.checkpoint import checkpoint
from barnabas.errors import MessageRefused, SendError
from barnabas.future import Future
from barnabas.ports import Part, Result

TOPIC = SimpleNamespace(name="out", parent=None)


class Sink:
    """Stores what it is not told to refuse."""

    def __init__(self) -> None:
        self.stored, self.troubles = [], {}

    def send(self, outgoing) -> None:
        for out in outgoing:
            error = self.troubles.get(out[3])
            if error is None:
                self.stored.append(out[3])
            out[-1].settle(error or out[3])


def test_what_is_stored_is_not_sent_again_while_another_output_cannot_be() -> None:
    sink, settled, futures = Sink(), [], [Future(), Future(), None]
    source = SimpleNamespace(atomic="home", settle=settled.extend)
    outputs = [(TOPIC, None, None, value, (), 0.0, future) for value, future in zip("abc", futures, strict=True)]
    results = [Result(Part("in", 0, 1), [(0,)], [*outputs, "own"], {}, {})]
    sink.troubles["b"] = SendError("away")
    for _ in range(3):
        with pytest.raises(SendError, match="an output to 'out' could not be stored: away"):
            checkpoint(source, lambda out: "home" if out == "own" else sink, results, None)
    assert sink.stored == ["a", "c"] and futures[0].result(0) == "a" and not futures[1].done() and not settled
    sink.troubles.clear()
    checkpoint(source, lambda out: "home" if out == "own" else sink, results, None)
    assert sink.stored == ["a", "c", "b"] and futures[1].result(0) == "b" and settled[0].outputs == ["own"]


def test_what_is_refused_for_good_is_left_to_who_buries_it() -> None:
    sink, settled, refused = Sink(), [], MessageRefused("no key")
    sink.troubles["b"] = refused
    outputs = [(TOPIC, None, None, value, (), 0.0, None) for value in "abc"]

    def bury(results, found):
        assert found == [(outputs[1], refused)] and results[0].outputs == [outputs[1]]
        return [results[0]._replace(outputs=[(TOPIC, None, None, "letter", (), 0.0, None)])]

    source = SimpleNamespace(atomic=None, settle=settled.extend)
    checkpoint(source, lambda out: sink, [Result(Part("in", 0, 1), [(0,)], list(outputs), {}, {})], bury)
    assert sink.stored == ["a", "c", "letter"] and settled[0].outputs == []
