"""For tests of ullm and of what is built on it: workers that fail on purpose, models without weights.

`ScriptedRunner` takes a model's place in any kind of worker, without torch::

    ullm serve --model FOLDER --runner ullm.testing:ScriptedRunner

with a folder from `write_scripted_model`. `write_tiny_model` writes a real model of a few thousand
random weights. `FakeWorkers` are workers in memory that die and hang when a test says so. The pytest
plugin `ullm.testing.plugin` makes fixtures of all that; docs/how-to/fault-injection.md shows how to use them.

`ullm.testing.strategies` are strategies for hypothesis.

Names load when they are first used: pytest imports this package in every project that has ullm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullm.actors.transports.fake import FakeBehaviour as FakeBehaviour
    from ullm.actors.transports.fake import FakeWorker as FakeWorker
    from ullm.actors.transports.fake import FakeWorkers as FakeWorkers
    from ullm.testing.assertions import assert_finished_once as assert_finished_once
    from ullm.testing.assertions import assert_no_token_lost as assert_no_token_lost
    from ullm.testing.assertions import assert_same_text as assert_same_text
    from ullm.testing.clock import run_virtually as run_virtually
    from ullm.testing.clock import virtual_clock as virtual_clock
    from ullm.testing.engine import open_scripted_engine as open_scripted_engine
    from ullm.testing.leaks import LeakCheck as LeakCheck
    from ullm.testing.models import local_model as local_model
    from ullm.testing.models import tiny_tokenizer as tiny_tokenizer
    from ullm.testing.models import write_scripted_model as write_scripted_model
    from ullm.testing.models import write_tiny_model as write_tiny_model
    from ullm.testing.scripted import ScriptedRunner as ScriptedRunner
    from ullm.testing.scripted import ScriptViolation as ScriptViolation
    from ullm.testing.scripted import scripted_tokens as scripted_tokens
    from ullm.testing.server import ServerProcess as ServerProcess
    from ullm.testing.settings import ScriptedSettings as ScriptedSettings

_LAZY = {
    "FakeBehaviour": "ullm.actors.transports.fake",
    "FakeWorker": "ullm.actors.transports.fake",
    "FakeWorkers": "ullm.actors.transports.fake",
    "LeakCheck": "ullm.testing.leaks",
    "ScriptViolation": "ullm.testing.scripted",
    "ScriptedRunner": "ullm.testing.scripted",
    "ScriptedSettings": "ullm.testing.settings",
    "ServerProcess": "ullm.testing.server",
    "assert_finished_once": "ullm.testing.assertions",
    "assert_no_token_lost": "ullm.testing.assertions",
    "assert_same_text": "ullm.testing.assertions",
    "local_model": "ullm.testing.models",
    "open_scripted_engine": "ullm.testing.engine",
    "run_virtually": "ullm.testing.clock",
    "scripted_tokens": "ullm.testing.scripted",
    "tiny_tokenizer": "ullm.testing.models",
    "virtual_clock": "ullm.testing.clock",
    "write_scripted_model": "ullm.testing.models",
    "write_tiny_model": "ullm.testing.models",
}

__all__ = [
    "FakeBehaviour",
    "FakeWorker",
    "FakeWorkers",
    "LeakCheck",
    "ScriptViolation",
    "ScriptedRunner",
    "ScriptedSettings",
    "ServerProcess",
    "assert_finished_once",
    "assert_no_token_lost",
    "assert_same_text",
    "local_model",
    "open_scripted_engine",
    "run_virtually",
    "scripted_tokens",
    "tiny_tokenizer",
    "virtual_clock",
    "write_scripted_model",
    "write_tiny_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ullm.testing' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
