"""Responders: which topics a consumer answers on, and the check that it kept its word."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Never

import msgspec

from barnabas.engine.hand import Hand
from barnabas.errors import ResponderError, must, refuse_unknown
from barnabas.message import Message
from barnabas.verdict import Done


class RespondTo(msgspec.Struct, frozen=True, eq=False):
    """A declared answer: the topic, whether every delivery must give it, and whether one may give several."""

    topic: Any
    required: bool
    multiple: bool


def respond_to(topic: Any, *, required: bool = True, multiple: bool = False, **unknown: Never) -> RespondTo:
    """Declare an answer in `responds=[...]`: `required` by every delivery, at most once unless `multiple`."""
    refuse_unknown("respond_to", unknown, ("required", "multiple"))
    for name, value in (("required", required), ("multiple", multiple)):
        must(isinstance(value, bool), "respond_to", name, value, "give True or False")
    must(hasattr(topic, "outgoing"), "respond_to", "topic", topic, "give a topic, as app.topic(...) returns it")
    return RespondTo(topic, required, multiple)


class Respond:
    """What a handler that asks for it answers with: `respond(topic, value)`. Kept until the handler returns."""

    __slots__ = ("answers",)

    def __init__(self) -> None:
        self.answers: list[tuple[Any, Any, Any]] | None = []

    def __call__(self, topic: Any, value: Any, *, key: Any = None) -> None:
        """Answer on `topic`, one of those declared in `responds=[...]`; sent when the handler has returned."""
        if self.answers is None:
            raise ResponderError("respond(...) after its handler has returned would never leave: let the handler wait for it")
        self.answers.append((topic, value, key))


def make_answer(owner: str, declared: Sequence[RespondTo], batch: bool, optional: Collection[str]) -> Callable[[Hand, Any], None]:
    """The function that checks a handler's answers and puts them into its hand, in the order of their first use. optional: topics
    whose messages need no answer."""
    by_topic = {d.topic: d for d in declared}
    only = declared[0].topic if len(declared) == 1 else None
    required = [d.topic for d in declared if d.required]

    def answer(hand: Hand, out: Any) -> None:
        if out is Done:  # the handler failed and a hook forgave it
            return
        answers: list[tuple[Any, Any, Any]] = []
        if hand.respond is not None:  # of this delivery alone: the next one's method need not ask for any
            answers, hand.respond.answers, hand.respond = hand.respond.answers, None, None
        if out is not None:
            if only is None:
                what = f"returned a value but answers on {len(declared)} topics; say which with a Respond parameter"
                raise ResponderError(f"{owner} {what}")
            answers += [(only, value, None) for value in (out if batch and isinstance(out, list) else [out])]
        uses: dict[Any, int] = {}
        for topic, _, _ in answers:
            uses[topic] = uses.get(topic, 0) + 1
            if topic not in by_topic:
                raise ResponderError(f"{owner} answered on {topic!r}, which is not in its responds={[*by_topic]}; add it there")
            if uses[topic] > 1 and not by_topic[topic].multiple and not batch:
                may = f"if it may, declare respond_to({topic.name}, multiple=True)"
                raise ResponderError(f"{owner} answered on {topic.name!r} twice; {may}")
        for topic in required:
            if topic not in uses and hand.run.part.topic not in optional:
                need_not = f"declare respond_to({topic.name}, required=False) or annotate the handler with `-> T | None`"
                raise ResponderError(f"{owner} did not answer on {topic.name!r}; if it need not, {need_not}")
        for topic, value, key in answers:
            if isinstance(value, Message):
                hand.add(topic.outgoing(value.value, value.key, value.headers or None, value.timestamp))
            else:
                hand.add(topic.outgoing(value, key))

    return answer
