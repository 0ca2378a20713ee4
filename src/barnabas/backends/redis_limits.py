"""Slots of limits that are taken by hand, on Redis: their lease, which this process renews as long as it lives."""

import logging
import threading
import time
from typing import TYPE_CHECKING

from barnabas.backends import redis_life
from barnabas.errors import BackendError
from barnabas.jobs.limit import WANT, Need

if TYPE_CHECKING:
    from barnabas.backends.redis import RedisBackend

log = logging.getLogger("barnabas")


class Hands:
    """What this process has taken by hand. A thread renews it while there is anything."""

    def __init__(self, home: "RedisBackend") -> None:
        self._home = home
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Need, float]] = {}  # token -> until when it is good (monotonic seconds)
        self._thread: threading.Thread | None = None
        self.end = threading.Event()

    def hold(self, token: str, need: Need) -> float:
        """As the port's."""
        began = time.monotonic()
        wait = float(self._home.script("hold", token, need.text, redis_life.LEASE, WANT))
        if not wait and not need.span:
            with self._lock:
                self._held[token] = (need, began + redis_life.LEASE)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._keep, name="barnabas-hands", daemon=True)
                    self._thread.start()
        return wait

    def let_go(self, token: str, need: Need, begun: bool) -> None:
        """As the port's."""
        with self._lock:
            self._held.pop(token, None)
        self._home.script("drop", token, need.text, int(begun))

    def _keep(self) -> None:
        while not self.end.wait(redis_life.RENEW):
            with self._lock:
                held = dict(self._held)
                if not held:
                    self._thread = None
                    return
            for token, (need, until) in held.items():
                began, good = time.monotonic(), True
                try:
                    good = bool(self._home.script("keep", token, need.text, redis_life.LEASE))
                    until = began + redis_life.LEASE if good else 0.0
                except BackendError as error:
                    log.debug("a slot taken by hand could not be renewed: %s", error)
                    good = began < until
                with self._lock:
                    if token in self._held and good:
                        self._held[token] = (need, until)
                    elif self._held.pop(token, None) is not None:
                        log.critical("a slot taken by hand could not be renewed: others may have it beside this process")
