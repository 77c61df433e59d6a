"""For tests of ullm and of what is built on it: runners and models that need no real weights.

`ScriptedRunner` takes a model's place in any kind of worker, without torch::

    ullm serve --model FOLDER --runner ullm.testing:ScriptedRunner

with a folder from `write_scripted_model`. `write_tiny_model` writes a real model of a few thousand
random weights. `FakeWorkers` are workers in memory that die and hang when a test says so.
"""

from __future__ import annotations

from ullm.actors.transports.fake import FakeBehaviour, FakeWorker, FakeWorkers
from ullm.testing.models import local_model, tiny_tokenizer, write_scripted_model, write_tiny_model
from ullm.testing.scripted import ScriptedRunner, ScriptViolation, scripted_tokens
from ullm.testing.settings import ScriptedSettings

__all__ = [
    "FakeBehaviour",
    "FakeWorker",
    "FakeWorkers",
    "ScriptViolation",
    "ScriptedRunner",
    "ScriptedSettings",
    "local_model",
    "scripted_tokens",
    "tiny_tokenizer",
    "write_scripted_model",
    "write_tiny_model",
]
