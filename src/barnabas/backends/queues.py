"""In which order a worker looks at its queues: strict (the first that has jobs), or at random by weight."""

import random
from collections.abc import Mapping, Sequence


class QueueOrder:
    """`["a", "b"]`: strict. `{"a": 5, "b": 1}`: `a` is looked at first five times out of six."""

    def __init__(self, queues: Sequence[str] | Mapping[str, int], rand: random.Random | None = None) -> None:
        self.names = list(queues)
        self._weights = dict(queues) if isinstance(queues, Mapping) and len(queues) > 1 else None
        self._rand = rand or random.Random()

    def next(self) -> list[str]:
        """The queues in the order for this look."""
        if self._weights is None:
            return self.names
        keys = {name: self._rand.random() ** (1.0 / max(1, weight)) for name, weight in self._weights.items()}
        return sorted(keys, key=lambda name: -keys[name])
