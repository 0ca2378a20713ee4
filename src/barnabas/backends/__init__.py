"""Where messages and jobs live. A backend is reached by its URL; its driver is imported when it is first used."""

import atexit
import os
import weakref
from importlib import import_module
from typing import Any

from barnabas.errors import SettingError
from barnabas.ports import Backend

_MODULES = {
    "sqlite": "barnabas.backends.sqlite",
    "memory": "barnabas.backends.memory",
    "kafka": "barnabas.backends.kafka",
    "redis": "barnabas.backends.redis",
    "rediss": "barnabas.backends.redis",
}
_open: "weakref.WeakSet[Any]" = weakref.WeakSet()
_inherited: list[Any] = []  # a forked child keeps its parent's backends, and with them its handles, untouched, here
_EXTRAS = {"kafka": "confluent_kafka", "redis": "redis", "rediss": "redis"}  # the drivers, installed as barnabas[NAME]


def open_url(url: str, settings: Any, kind: str, clock: Any) -> Backend:
    """Open the backend of a URL for "events" or "jobs"."""
    scheme = url.split(":", 1)[0]
    if scheme not in _MODULES:
        raise SettingError(f"{kind}={url!r}: no backend for {scheme}: yet; use sqlite:///FILE or memory:")
    if scheme == "kafka" and kind == "jobs":
        raise SettingError(f"jobs={url!r}: Kafka carries topics, not queues; set jobs=redis://HOST or jobs=sqlite:///FILE.db")
    try:
        module = import_module(_MODULES[scheme])
    except ModuleNotFoundError as error:
        if error.name != _EXTRAS.get(scheme):
            raise
        raise SettingError(f"{kind}={url!r}: {error.name} is not installed; pip install 'barnabas[{scheme}]'") from None
    backend: Backend = module.open_backend(url, settings, clock)
    if scheme != "memory":
        _open.add(backend)
    return backend


def _at_exit() -> None:
    for backend in list(_open):
        backend.close()


def _in_child() -> None:
    """After a fork: the parent's handles are its own; the child opens new ones at its next use."""
    for backend in [each for each in _open if not each.closed]:
        backend.closed = True
        if hasattr(backend, "disown"):  # what would outlive the parent if it stayed open here, too
            backend.disown()
        _inherited.append(backend)
    _open.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
