"""`barnabas run --reload`: watch the working directory's Python and settings files."""

import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from barnabas.cli.loading import Wrong

log = logging.getLogger("barnabas")


def watch(changed: Callable[[], Any]) -> Callable[[], None]:
    """Call `changed` after each change, from a thread; returns what ends that. Raises Wrong without watchfiles."""
    try:
        watchfiles: Any = importlib.import_module("watchfiles")
    except ImportError:
        raise Wrong("--reload needs watchfiles, which is not installed", "pip install 'barnabas[reload]'") from None
    end = threading.Event()
    folder = os.getcwd()

    def loop() -> None:
        wanted = watchfiles.PythonFilter(extra_extensions=(".toml",))
        for changes in watchfiles.watch(folder, watch_filter=wanted, stop_event=end, raise_interrupt=False):
            names = sorted({os.path.relpath(path, folder) for _, path in changes})
            log.info("changed: %s; starting again", ", ".join(names))
            changed()

    threading.Thread(target=loop, name="barnabas-reload", daemon=True).start()
    return end.set
