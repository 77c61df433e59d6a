"""Two ends that prove to each other that they know one secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from ullm.errors import ConfigError, HandshakeRefused
from ullm.protocol.handshake import (
    Challenge,
    Refusal,
    Response,
    Welcome,
    challenge,
    check_welcome,
    respond,
    welcome,
)
from ullm.protocol.shared_secret import read_secret

SECRET = b"s" * 32


def test_both_are_let_in() -> None:
    asked = challenge("1")
    answer = respond(SECRET, asked, "1")
    check_welcome(SECRET, asked, answer, welcome(SECRET, asked, answer))


def test_another_secret() -> None:
    asked = challenge("1")
    with pytest.raises(HandshakeRefused, match="the secrets differ"):
        welcome(SECRET, asked, respond(b"t" * 32, asked, "1"))


def test_the_called_end_must_know_it_too() -> None:
    asked = challenge("1")
    answer = respond(SECRET, asked, "1")
    ignorant = welcome(b"t" * 32, asked, respond(b"t" * 32, asked, "1"))
    for reply in (Welcome(b""), Welcome(answer.proof), ignorant):
        with pytest.raises(HandshakeRefused, match="does not know the secret"):
            check_welcome(SECRET, asked, answer, reply)


def test_an_answer_is_good_for_its_own_challenge_only() -> None:
    answer = respond(SECRET, challenge("1"), "1")
    with pytest.raises(HandshakeRefused):
        welcome(SECRET, challenge("1"), answer)


def test_releases_must_be_equal() -> None:
    with pytest.raises(HandshakeRefused, match="releases differ: 2 there, 1 here"):
        respond(SECRET, challenge("2"), "1")
    asked = challenge("1")
    with pytest.raises(HandshakeRefused, match="releases differ: 2 there, 1 here"):
        welcome(SECRET, asked, Response("2", asked.number, b""))


def test_short_numbers_are_refused() -> None:
    with pytest.raises(HandshakeRefused, match="no challenge"):
        respond(SECRET, Challenge("1", b""), "1")


def test_a_refusal_says_why() -> None:
    asked = challenge("1")
    with pytest.raises(HandshakeRefused, match="full"):
        check_welcome(SECRET, asked, respond(SECRET, asked, "1"), Refusal("full"))


def test_the_file_of_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b" " + SECRET + b"\n")
    path.chmod(0o600)
    assert read_secret(str(path), "--x") == SECRET


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [(b"short\n", 0o600, "5 bytes are too few"), (SECRET, 0o622, "others may write this file; chmod go-w")],
)
def test_secrets_that_are_none(tmp_path: Path, content: bytes, mode: int, says: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        read_secret(str(path), "--node-secret-file")
    with pytest.raises(ConfigError, match=f"--node-secret-file {tmp_path}/other: No such file"):
        read_secret(f"{tmp_path}/other", "--node-secret-file")
