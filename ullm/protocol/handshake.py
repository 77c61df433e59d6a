"""Two ends of a connection prove to each other that they know one secret, and that they are of one release.

A challenge and a response in each direction; see `ullm.protocol.shared_secret` for the proofs.
"""

from __future__ import annotations

import msgspec

from ullm.errors import HandshakeRefused
from ullm.protocol.shared_secret import NONCE_BYTES, is_proof, nonce, proof

MAX_HANDSHAKE = 1024
"""Bytes of the longest message of a handshake, before which nobody has proved anything."""


class Challenge(msgspec.Struct, tag=True, frozen=True):
    """The first message of the end that was called: its release and a random number."""

    version: str
    number: bytes


class Response(msgspec.Struct, tag=True, frozen=True):
    """The caller's answer, with a challenge of its own."""

    version: str
    number: bytes
    proof: bytes


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The called end's answer to that challenge."""

    proof: bytes


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """The called end's answer where it lets the caller not in, for the caller's user."""

    reason: str


Handshake = Challenge | Response | Welcome | Refusal


def challenge(version: str) -> Challenge:
    """Return a new challenge."""
    return Challenge(version, nonce())


def respond(secret: bytes, asked: Challenge, version: str) -> Response:
    """Return the caller's answer to a challenge.

    Raises:
        HandshakeRefused: the other end is of another release, or its challenge is none.
    """
    _check_release(asked.version, version)
    _check_number(asked.number)
    own = nonce()
    return Response(version, own, proof(secret, "caller", asked.number, own))


def welcome(secret: bytes, asked: Challenge, answer: Response) -> Welcome:
    """Return the called end's proof, once the caller has given its own.

    Raises:
        HandshakeRefused: the caller has another secret, or is of another release.
    """
    _check_release(answer.version, asked.version)
    _check_number(answer.number)
    if not is_proof(answer.proof, secret, "caller", asked.number, answer.number):
        raise HandshakeRefused("the secrets differ: give every host the same file")
    return Welcome(proof(secret, "called", asked.number, answer.number))


def check_welcome(secret: bytes, asked: Challenge, answer: Response, reply: Welcome | Refusal) -> None:
    """Return if the called end has proved that it knows the secret.

    Raises:
        HandshakeRefused: it has not, or it lets this one not in.
    """
    if isinstance(reply, Refusal):
        raise HandshakeRefused(reply.reason)
    if not is_proof(reply.proof, secret, "called", asked.number, answer.number):
        raise HandshakeRefused("the other end does not know the secret")


def _check_release(theirs: str, ours: str) -> None:
    if theirs != ours:
        raise HandshakeRefused(f"releases differ: {theirs} there, {ours} here; install the same one")


def _check_number(number: bytes) -> None:
    if len(number) != NONCE_BYTES:
        raise HandshakeRefused("that was no challenge")
