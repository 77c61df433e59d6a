"""Prompts of ``ullm generate`` and numbers of options, read without a model."""

from __future__ import annotations

import io
import os
import sys

import pytest

import ullm
from ullm.cli.early import unset_empty_variables
from ullm.cli.prompt import compose, read_prompt, with_literal_prompt
from ullm.errors import UsageError


@pytest.fixture(autouse=True)
def no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("what nobody may read"))


@pytest.mark.parametrize(
    "prompt", ["--help", "-x", "--", "--nope=a b", "- milk", "plain"], ids=lambda text: text.replace(" ", "_")
)
def test_behind_two_dashes_everything_is_a_prompt(prompt: str) -> None:
    line = with_literal_prompt(["generate", "--raw", "--", prompt])
    assert read_prompt(line[-1]) == prompt


@pytest.mark.parametrize("prompt", ["- milk", "--- a/file b/file", "-5", "---"])
def test_a_text_may_begin_with_dashes(prompt: str) -> None:
    assert read_prompt(prompt) == prompt


@pytest.mark.parametrize("prompt", ["-x", "--nope", "--nope=a b"])
def test_what_looks_like_an_option_is_none(prompt: str) -> None:
    with pytest.raises(UsageError, match="unknown option"):
        read_prompt(prompt)


def test_only_generate_takes_prompts() -> None:
    assert with_literal_prompt(["serve", "--", "--x"]) == ["serve", "--", "--x"]


def test_what_is_no_pipe_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, encoding="utf-8") as null:
        monkeypatch.setattr(sys, "stdin", null)
        assert read_prompt("hello") == "hello"
        with pytest.raises(UsageError, match="needs a prompt"):
            read_prompt(None)


def test_an_empty_pipe_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(write)
    with open(read, encoding="utf-8") as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        assert read_prompt("hello") == "hello"


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on POSIX only")
@pytest.mark.parametrize("locale", ["ascii", "utf-8"])
def test_arguments_are_utf_8_whatever_the_locale(locale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode(locale, "surrogateescape"))
    monkeypatch.setattr("sys.stdin", None)
    given = "Größe ☂".encode().decode(locale, "surrogateescape")
    assert read_prompt(given) == "Größe ☂"
    assert compose("?", given, raw=False)[0] == {"role": "system", "content": "Größe ☂"}
    latin = "Größe".encode("latin-1").decode(locale, "surrogateescape")
    with pytest.raises(UsageError, match="not UTF-8; convert it"):
        read_prompt(latin)


def test_empty_variables_are_removed() -> None:
    environ = {"ULLM_MODEL": "", "HF_HOME": "", "ULLM_PORT": "80", "OTHER": ""}
    unset_empty_variables(environ)
    assert environ == {"ULLM_PORT": "80", "OTHER": ""}


def test_the_public_names_are_listed() -> None:
    assert set(ullm.__all__) <= set(dir(ullm))
