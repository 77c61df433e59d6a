"""The link between an engine and front ends in processes of their own: neither ends with the other.

The engine's side is the `Gate`; a front end has a `RemoteEngine`, which keeps of each request what it takes
to submit it again. Imports the engine and what is below it; nothing of HTTP.
"""

from ullm.link.gate import Gate
from ullm.link.remote_engine import RemoteEngine
from ullm.link.secret import engine_key

__all__ = ["Gate", "RemoteEngine", "engine_key"]
