"""The engines to measure: each has a Python and options."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import scripts
from tests.benchmarks.batch.engine_load import EngineLoad
from tests.benchmarks.compare.weight_bits import PLAIN, ullm_bits
from ullm.config import EngineConfig
from ullm.errors import UsageError

SCRIPTS = Path(scripts.__file__).parent
PEERS = {
    "vllm": "vLLM",
    "nano-vllm": "nano-vllm",
    "transformers": "transformers",
    "openvino": "OpenVINO GenAI",
}
"""Name of an engine in ``offline_batch.py`` → name in reports."""


@dataclass(frozen=True)
class Contender:
    """One engine to measure.

    Args:
        engine: its name in ``offline_batch.py``, or the first argument of another script.
        python: command that runs its Python.
        options: its own options, the script's ``options``.
        weight_bits: bits per weight, for the roofline.
        script: program of `tests.benchmarks.scripts` that takes its turn.
    """

    name: str
    engine: str
    python: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_bits: float = PLAIN
    script: str = "offline_batch.py"

    @property
    def is_peer(self) -> bool:
        """False for ullm."""
        return self.engine != "ullm"

    def command(self, model: Path, job: Path, result: Path) -> list[str]:
        """Return the command to run."""
        return [*self.python, str(SCRIPTS / self.script), self.engine, str(model), str(job), str(result)]


def ullm_contender(spec: str, model: Path, head_share: float, load: EngineLoad, device: str) -> Contender:
    """Parse ``NAME=OPTIONS``, with options of ``ullm serve``.

    Args:
        head_share: share of the model's weights that are the head's.

    Raises:
        UsageError: not of that form, or an unknown option.
        ConfigError: options that cannot work.
    """
    name, equals, text = spec.partition("=")
    if not equals or not name.strip() or name.strip().startswith("-"):
        raise UsageError(f"--ullm {spec}: expected NAME=OPTIONS, as in 'eager=--enforce-eager' or 'default='")
    words = shlex.split(text)
    config = engine_config(words, str(model), load, device)
    bits = ullm_bits(["--model", str(model), *words], head_share)
    return Contender(f"ullm {name.strip()}", "ullm", (sys.executable,), dataclasses.asdict(config), bits)


def peer_contender(engine: str, python: str, options: str, weight_bits: float = PLAIN) -> Contender:
    """Return a peer of `PEERS`.

    Args:
        python: command of a Python that has it.
        options: a JSON object, or empty.
        weight_bits: bits per weight, for the roofline.

    Raises:
        UsageError: the options are not a JSON object.
    """
    try:
        parsed = json.loads(options) if options else {}
    except json.JSONDecodeError as error:
        parsed = str(error)
    if not isinstance(parsed, dict):
        raise UsageError(
            f'--{engine}-options {options}: expected a JSON object such as {{"enforce_eager": true}}'
        )
    return Contender(PEERS[engine], engine, tuple(shlex.split(python)), parsed, weight_bits)


def engine_config(options: Sequence[str], model: str, load: EngineLoad, device: str) -> EngineConfig:
    """Return ullm's configuration, as the load needs it unless the options say otherwise.

    Raises:
        UsageError: an unknown option.
        ConfigError: options that cannot work.
    """
    from ullm.cli.flags import build

    defaults = {"model": model, "device": device, "log_level": "warning"}
    return build(EngineConfig, {**defaults, **load.engine_options(), **parse(options)})


def parse(options: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `EngineConfig` that command line options set.

    Raises:
        UsageError: an unknown option, or a value of the wrong type.
    """
    from cyclopts import App, CycloptsError

    from ullm.cli.flags import engine_options, with_options

    fields: dict[str, Any] = {}
    app = App(result_action="return_value", help_flags=[], version_flags=[])

    @app.default
    @with_options(engine_options())
    def take(**chosen: Any) -> int:
        fields.update(chosen)
        return 0

    try:
        app(list(options), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UsageError(f"--ullm …={shlex.join(options)}: {' '.join(str(error).split())}") from None
    return fields
