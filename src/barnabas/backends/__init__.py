"""Where messages and jobs live. A backend is reached by its URL; its driver is imported when it is first used."""

from importlib import import_module
from typing import Any

from barnabas.errors import SettingError
from barnabas.ports import Backend

_MODULES = {
    "sqlite": "barnabas.backends.sqlite",
    "memory": "barnabas.backends.memory",
    "redis": "barnabas.backends.redis",
    "rediss": "barnabas.backends.redis",
}


def open_url(url: str, settings: Any, kind: str, clock: Any) -> Backend:
    """Open the backend of a URL for "events" or "jobs"."""
    scheme = url.split(":", 1)[0]
    if scheme not in _MODULES:
        raise SettingError(f"{kind}={url!r}: no backend for {scheme}: yet; use sqlite:///FILE or memory:")
    backend: Backend = import_module(_MODULES[scheme]).open_backend(url, settings, clock)
    return backend
