"""How a scripted model behaves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ullm.errors import ModelFileBroken


@dataclass(frozen=True, kw_only=True)
class ScriptedSettings:
    """How a `ScriptedRunner` behaves.

    Read from the section ``scripted`` of the model's config.json, or from a model path such as
    ``scripted:step_seconds=0.01,vocab_size=300``; ``ULLM_SCRIPTED_<FIELD>`` variables win.

    Args:
        vocab_size: token ids are below it.
        first_token: generated ids are at or above it, so that special tokens are never drawn.
        eos_token_id: drawn only by ``eos_after``.
        eos_after: generated tokens after which the sequence ends; None: never by itself.
        repeat: a token mostly equals the one ``repeat`` places before it, so that drafts of the scheduler are
            right as often as in a text with repetitions; None: never, but for chance.
        context_len, num_blocks: of the model; the engine's configuration wins.
        window: tokens that are seen, as in models with a sliding window, so that blocks behind them are given
            back; 0: all.
        load_seconds, wake_seconds, step_seconds, token_seconds: real time that is slept.
        asynchronous: steps run beside the host, as on a GPU.
    """

    vocab_size: int = 1000
    first_token: int = 3
    eos_token_id: int = 2
    eos_after: int | None = None
    repeat: int | None = None
    context_len: int = 4096
    num_blocks: int = 1024
    window: int = 0
    load_seconds: float = 0.0
    wake_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    asynchronous: bool = False

    @staticmethod
    def read(model_path: str, environ: Mapping[str, str] = os.environ) -> ScriptedSettings:
        """Read the settings of a model.

        Raises:
            ModelFileBroken: config.json or a value in it cannot be read.
        """
        values: dict[str, Any] = {}
        if model_path.startswith("scripted:"):
            values = dict(pair.split("=", 1) for pair in model_path[len("scripted:") :].split(",") if pair)
        elif (file := Path(model_path) / "config.json").is_file():
            config = json.loads(file.read_text("utf-8"))
            values = {key: config[key] for key in ("vocab_size",) if key in config} | config.get(
                "scripted", {}
            )
        names = ScriptedSettings.__dataclass_fields__
        values |= {n: given for n in names if (given := environ.get(f"ULLM_SCRIPTED_{n.upper()}"))}
        try:
            return msgspec.convert(values, ScriptedSettings, strict=False)
        except msgspec.ValidationError as error:
            raise ModelFileBroken(model_path, f"not settings of a scripted model: {error}") from None
