"""Flags of llama.cpp: each says what is used instead, and that is an option."""

from __future__ import annotations

import re

import pytest

from ullm.cli.app import main
from ullm.cli.flags import engine_options, sampling_options, server_options
from ullm.cli.llama_flags import LLAMA_CPP
from ullm.cli.vllm_flags import REFUSED, hint_for

OPTIONS = [*engine_options(), *server_options(), *sampling_options({})]
NAMES = {name for option in OPTIONS for name in (option.flag, *option.aliases)}


def test_flags_are_not_options_and_their_replacements_are() -> None:
    assert not set(LLAMA_CPP) & (NAMES | set(REFUSED))
    for advice in LLAMA_CPP.values():
        assert set(re.findall(r"--[a-z-]+", advice)) <= NAMES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--ctx-size", "4096"], "--ctx-size is an option of llama.cpp: use --context-len"),
        (["serve", "-c", "4096"], "-c is an option of llama.cpp: use --context-len"),
        (["serve", "-ngl", "99"], "-ngl is an option of llama.cpp: use --device cuda"),
        (["generate", "hi", "--temp", "1"], "--temp is an option of llama.cpp: use --temperature"),
        (["generate", "--temp", "1", "hi"], "--temp is an option of llama.cpp: use --temperature"),
        (["chat", "--threads=4"], "--threads is an option of llama.cpp: use --cpu-threads"),
    ],
)
def test_what_to_use_instead(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_other_flags_have_no_hint() -> None:
    assert hint_for("--nope") is None
