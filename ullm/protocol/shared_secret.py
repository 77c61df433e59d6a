"""A secret that two ends of a connection share: its file, and the proof of knowing it.

The proof is a keyed hash (HMAC-SHA-256, RFC 2104) of random bytes from both ends, so the secret itself never
travels, and what was overheard is worth nothing on another connection. It shows who is there when a
connection opens; it does not encrypt what follows.
"""

from __future__ import annotations

import hmac
import os
import secrets

from ullm.errors import ConfigError, ResourceUnavailable

NONCE_BYTES = 32
LEAST = 16
"""Bytes of the shortest secret that is taken: whoever listens to a handshake can try shorter ones out."""


def nonce() -> bytes:
    """Return random bytes for one handshake."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, side: str, first: bytes, second: bytes) -> bytes:
    """Return what only somebody with the secret can say.

    Args:
        side: who says it, so that nobody can send it back.
        first: random bytes of the end that was called.
        second: those of the caller.
    """
    return hmac.digest(secret, b"ullm\0" + side.encode() + b"\0" + first + second, "sha256")


def is_proof(given: bytes, secret: bytes, side: str, first: bytes, second: bytes) -> bool:
    """Return whether a proof is right."""
    return hmac.compare_digest(given, proof(secret, side, first, second))


def read_secret(path: str, option: str) -> bytes:
    """Return the secret in a file, without white space around it.

    Args:
        option: the option that names the file, for errors.

    Raises:
        ConfigError: it cannot be read, others than its owner may write it, or the secret is too short.
    """
    try:
        with open(path, "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(1 << 16).strip()
    except OSError as error:
        raise ResourceUnavailable(f"{option} {path}: {error.strerror or error}") from None
    if os.name == "posix" and status.st_mode & 0o022:
        raise ResourceUnavailable(f"{option} {path}: others may write this file; chmod go-w {path}")
    check_length(secret, f"{option} {path}")
    return secret


def check_length(secret: bytes, where: str) -> None:
    """Return if a secret is long enough.

    Raises:
        ConfigError: it is not; does not show it.
    """
    if len(secret) < LEAST:
        raise ConfigError(
            f"{where}: {len(secret)} bytes are too few for a secret; take at least {LEAST}, as openssl rand "
            "-hex 32 makes them"
        )
