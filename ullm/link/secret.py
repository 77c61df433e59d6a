"""The secret that an engine and its front ends share, and the proof of knowing it.

An engine at a unix socket may do without one; see `ullm.protocol.shared_secret` for the proofs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from ullm.config import ServerConfig
from ullm.protocol import shared_secret

VARIABLE = "ULLM_ENGINE_KEY"
"""Environment variable with the key. There is no such option: others can list command lines."""

Side = Literal["engine", "front end"]


def engine_key(config: ServerConfig, environ: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the key of ``--engine-key-file``, or else of ``ULLM_ENGINE_KEY``; None if there is none.

    Raises:
        ConfigError: the file cannot be read, or the key is too short; does not show it.
    """
    if config.engine_key_file is not None:
        return shared_secret.read_secret(config.engine_key_file, "--engine-key-file")
    if given := environ.get(VARIABLE):
        key = given.strip().encode()
        shared_secret.check_length(key, VARIABLE)
        return key
    return None


def proof(key: bytes | None, side: Side, greeting: bytes, login: bytes) -> bytes:
    """Return what only somebody with the key can say; empty without one.

    Args:
        side: who says it, so that nobody can send it back.
        greeting: the engine's random bytes.
        login: the front end's.
    """
    return b"" if key is None else shared_secret.proof(key, side, greeting, login)


def is_proven(given: bytes, key: bytes | None, side: Side, greeting: bytes, login: bytes) -> bool:
    """Return whether a proof is right; without a key there is nothing to prove."""
    return key is None or shared_secret.is_proof(given, key, side, greeting, login)
