"""Settings of the whole process while ``ullm.app`` runs in it; what the program has set is left alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ullm.logs import configure, get_logger, is_configured
from ullm.machine import collect_rarely

log = get_logger(__name__)

DEFAULT_THRESHOLDS = frozenset({700, 2000})
"""Python's own numbers of young objects that start a collection, in 3.11 to 3.14."""


@contextmanager
def settings_of_the_process(log_level: str, *, as_json: bool = False) -> Iterator[None]:
    """Send logs to stderr and collect garbage less often, unless the program has its own way.

    A program that configures logging, or sets a threshold, before its lifespan begins keeps what it has.
    """
    if is_configured():
        log.info("the program has configured logging: ULLM_LOG_LEVEL and ULLM_LOG_FORMAT are ignored")
    else:
        configure(log_level, as_json=as_json)
    with _rare_collections():
        yield


@contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    if before[0] not in DEFAULT_THRESHOLDS:
        log.info("the program has set the threshold of garbage collection: it stays", threshold=before[0])
        yield
        return
    collect_rarely()
    rare = gc.get_threshold()
    log.info("garbage is collected less often while the engine runs", threshold=rare[0], before=before[0])
    try:
        yield
    finally:
        if gc.get_threshold() == rare:
            gc.set_threshold(*before)
