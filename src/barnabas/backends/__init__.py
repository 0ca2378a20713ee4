"""Where messages and jobs live. A backend is reached by its URL; its driver is imported when it is first used."""

import atexit
import os
import sys
import threading
import weakref
from functools import cache
from importlib import import_module
from typing import Any

from barnabas.engine.hand import CURRENT
from barnabas.errors import SettingError

_FILES = {"sqlite": "sqlite", "memory": "memory", "kafka": "kafka", "redis": "redis", "rediss": "redis"}
_open: "weakref.WeakSet[Any]" = weakref.WeakSet()
_ended: list[bool] = []  # the process is at its end
_inherited: list[Any] = []  # a forked child keeps its parent's backends, and with them its handles, untouched, here
_DRIVERS = ("confluent_kafka", "redis", "hiredis")  # installed as barnabas[NAME]


def open_url(url: str, settings: Any, kind: str, clock: Any) -> Any:
    """Open the Backend of a URL for "events" or "jobs"."""
    scheme, shown = url.split(":", 1)[0], f"{kind}={settings.shown(kind)!r}"
    if scheme == "kafka" and kind == "jobs":
        raise SettingError(f"{shown}: Kafka carries topics, not queues; set jobs=redis://HOST or jobs=sqlite:///FILE.db")
    try:
        module = import_module(f"barnabas.backends.{_FILES[scheme]}")
    except ModuleNotFoundError as error:
        if error.name not in _DRIVERS:
            raise
        raise SettingError(f"{shown}: {error.name} is not installed; pip install 'barnabas[{_FILES[scheme]}]'") from None
    backend = module.open_backend(url, settings, clock)
    if scheme != "memory":
        _open.add(backend)
        _look_after()
        child = sys.modules.get("multiprocessing.process")
        if child is not None and child.parent_process() is not None:  # it ends without what atexit has
            sys.modules["multiprocessing.util"].Finalize(None, _at_exit, exitpriority=0)
        if _ended or not threading.main_thread().is_alive():  # a send of somebody's own exit function: nobody flushes it later
            send = backend.send
            backend.send = lambda *given: (send(*given), backend.flush(settings.send_timeout))
    return backend


@cache
def _look_after() -> None:
    """See to the end of what is open. Not before the first is: what its file imports, logging above all, ends after it."""
    atexit.register(_at_exit)
    os.register_at_fork(after_in_child=_in_child)


def _at_exit() -> None:
    _ended.append(True)
    for backend in list(_open):
        backend.close()


def _in_child() -> None:
    """After a fork: the parent's handles are its own; the child opens new ones at its next use. Nobody settles a handler here,
    so what it sends leaves at once."""
    CURRENT.set(None)
    for backend in [each for each in _open if not each.closed]:
        backend.closed = True
        if hasattr(backend, "disown"):  # what would outlive the parent if it stayed open here, too
            backend.disown()
        _inherited.append(backend)
    _open.clear()
