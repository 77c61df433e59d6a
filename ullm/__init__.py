"""ullm: an LLM inference engine and OpenAI-compatible server in which everything is supervised.

Nothing else is imported here, so that entry points are reached quickly: `LLM`, `open_engine` and the rest
load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ullm.release import __version__

if TYPE_CHECKING:
    from ullm.config import EngineConfig as EngineConfig
    from ullm.config import ServerConfig as ServerConfig
    from ullm.engine import Engine as Engine
    from ullm.engine import open_engine as open_engine
    from ullm.grammars.structured_outputs import StructuredOutputs as StructuredOutputs
    from ullm.llm import LLM as LLM
    from ullm.sampling import SamplingParams as SamplingParams

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "ServerConfig",
    "StructuredOutputs",
    "__version__",
    "open_engine",
]

_LAZY = {
    "LLM": "ullm.llm",
    "Engine": "ullm.engine",
    "EngineConfig": "ullm.config",
    "SamplingParams": "ullm.sampling",
    "ServerConfig": "ullm.config",
    "StructuredOutputs": "ullm.grammars.structured_outputs",
    "open_engine": "ullm.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ullm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not, and those that every module has; not what is imported here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
