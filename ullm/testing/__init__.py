"""For tests of ullm and of what is built on it: runners and models that need no real weights.

`ScriptedRunner` takes a model's place in any kind of worker, without torch::

    ullm serve --model FOLDER --runner ullm.testing:ScriptedRunner

with a folder from `write_scripted_model`. `write_tiny_model` writes a real model of a few thousand
random weights.
"""

from __future__ import annotations

from ullm.testing.scripted import ScriptedRunner, ScriptedSettings, ScriptViolation, scripted_tokens

__all__ = [
    "ScriptViolation",
    "ScriptedRunner",
    "ScriptedSettings",
    "scripted_tokens",
]
