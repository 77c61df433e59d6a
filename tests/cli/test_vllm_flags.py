"""Flags under vLLM's names: the same option, no effect, or one line that says what to use instead."""

from __future__ import annotations

from typing import Any

import pytest

import ullm.cli.serve
from ullm.cli.app import main
from ullm.cli.vllm_flags import NOTES, REFUSED, WITHOUT_EFFECT, vllm_flags
from ullm.config import EngineConfig, ServerConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Configurations that `ullm serve` was to run with."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ullm.cli.serve, "serve", lambda *args: calls.append(args) or 0)
    return calls


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--max-model-len 512", {"context_len": 512}),
        ("--max-num-seqs 8", {"max_bs": 8}),
        ("--tensor-parallel-size 2", {"tp_size": 2}),
        ("--pipeline-parallel-size 2", {"pp_size": 2}),
        ("--master-addr 127.0.0.2 --master-port 5000", {"master_addr": "127.0.0.2", "nccl_port": 5000}),
        ("-tp 2 -pp 1 -dp=3", {"tp_size": 2, "pp_size": 1, "replicas": 3}),
        ("--data-parallel-size 3", {"replicas": 3}),
        ("--num-speculative-tokens 4", {"speculate": 4}),
        ("--num-gpu-blocks-override 99", {"num_blocks": 99}),
        ("--kv-cache-memory-bytes 4096", {"kv_cache_memory": 4096}),
        ("--no-enable-prefix-caching", {"prefix_cache": False}),
        ("--served-model-name a --served-model-name b,c", {"served_model_name": ("a", "b", "c")}),
        ("--model m --served-model-name a b", {"model": "m", "served_model_name": ("a", "b")}),
        ("m --served-model-name a b -tp 2", {"model": "m", "served_model_name": ("a", "b"), "tp_size": 2}),
        ("--served-model-name a m", {"model": "m", "served_model_name": ("a",)}),
        ("--enable-lora --lora-modules a=x b=y m", {"model": "m", "lora": ("a=x", "b=y")}),
        ("m --lora a=x --lora b=y,c=z", {"model": "m", "lora": ("a=x", "b=y", "c=z")}),
        ("--max-model-len 5 --context-len 6", {"context_len": 6}),
        ("--max-bs 5 --max-bs 6", {"max_bs": 6}),
        ("--enforce-eager --no-enforce-eager", {}),
        ("--device-ids 3 --device-ids 1,2", {"device_ids": (3, 1, 2)}),
        (" ".join(WITHOUT_EFFECT), {}),
    ],
)
def test_flags_reach_their_option(served: list[tuple[Any, ...]], line: str, options: dict[str, Any]) -> None:
    assert main(["serve", *line.split()]) == 0
    assert served == [(EngineConfig(**options), ServerConfig())]


@pytest.mark.parametrize("flag", REFUSED)
@pytest.mark.parametrize("written", ["{} 1", "{}=1"])
def test_refusals_say_what_to_use(
    served: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str], flag: str, written: str
) -> None:
    assert main(["serve", *written.format(flag).split()]) == 2
    assert capsys.readouterr().err == f"error: {flag} is an option of vLLM: {REFUSED[flag]}\n"
    assert served == []


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--tensor-parallel-size 0", "--tensor-parallel-size (--tp-size) must be at least 1, got 0"),
        ("-tp=0", "-tp (--tp-size) must be at least 1, got 0"),
        ("--max-num-seqs many", "Invalid value for --max-num-seqs (--max-bs):"),
        ("--tp-size 0", "error: --tp-size must be at least 1, got 0"),
    ],
)
def test_errors_name_the_flag_as_it_was_given(
    capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    assert main(["serve", *line.split()]) in {1, 2}
    assert error in capsys.readouterr().err


def test_flags_without_effect_are_for_servers_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--disable-log-requests"]) == 2
    assert "option of ullm serve only" in capsys.readouterr().err


def test_flags_without_effect_cannot_be_turned_off(
    served: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--disable-log-requests=false"]) == 2
    assert "--disable-log-requests=false cannot be honoured" in capsys.readouterr().err
    assert main(["serve", "--no-disable-log-requests"]) == 2
    assert served == []


def test_every_flag_is_listed_once() -> None:
    rows = {flag: (option, note) for flag, option, note in vllm_flags()}
    assert len(rows) == len(list(vllm_flags()))
    assert rows["--max-num-seqs"] == ("--max-bs", "")
    assert rows["--max-model-len"] == ("--context-len", NOTES["--max-model-len"])
    assert rows["--port"] == ("--port", "")
    assert rows["--disable-log-requests"][1].startswith("Accepted, without effect: ")
    assert rows["--swap-space"][1].startswith("Refused: ")
