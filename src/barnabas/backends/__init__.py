"""Where messages and jobs live. A backend is reached by its URL; its driver is imported when it is first used."""

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
    return backend
