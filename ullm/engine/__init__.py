"""The engine: one supervision tree of actors, its life (start, sleep, reload, stop) and its requests.

Imports the actors, supervision, hub and what is below them; no model code, nothing of HTTP.
"""

from ullm.engine.current_model import find_local_model
from ullm.engine.engine import Engine, open_engine
from ullm.engine.shutdown_report import ShutdownReport
from ullm.engine.state import EngineState

__all__ = ["Engine", "EngineState", "ShutdownReport", "find_local_model", "open_engine"]
