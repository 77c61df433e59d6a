"""What is said of a model before it is loaded, and the comparison with transformers after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.model.gguf_fixtures import write_model
from tests.model.model_fixtures import config, load_runner, save_tiny
from tests.model.tiny_architectures import save_tiny_model
from ullm.cli.describe import lines
from ullm.errors import ModelUnsupported
from ullm.model.describe import Description, describe
from ullm.model.layers.linear import RMSNorm


def examine(path: Path, *, compare: bool = False, **options: Any) -> Description:
    return describe(config(path, **options), str(path), compare=compare)


def test_a_native_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "gemma3")
    found = examine(tmp_path, compare=True)
    assert (found.architecture, found.runs, found.reason) == ("Gemma3ForCausalLM", "native", "")
    assert (found.dtype, found.quantization, found.context_len) == ("float32", "float32", 256)
    assert found.parameters == model.num_parameters()
    assert found.weight_bytes == 4 * model.num_parameters()
    assert found.kv_bytes_per_token == 2 * 3 * 2 * 32 * 4
    assert found.memory == {256: found.weight_bytes + 256 * found.kv_bytes_per_token}
    assert found.fits is True
    assert "equal to transformers on 16 tokens" in found.verified


def test_a_text_longer_than_the_window_takes_no_more_memory(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "mistral")  # a window of 8 in all layers
    found = examine(tmp_path, max_num_batched_tokens=16)
    assert (found.window, found.context_len) == (8, 256)
    assert found.memory == {256: 4 * model.num_parameters() + 7 * 4 * (found.kv_bytes_per_token or 0)}
    facts = lines(msgspec.to_builtins(found), "tiny")
    assert ("window", "8 tokens; what is behind it takes no memory") in facts


def test_a_model_of_transformers(tmp_path: Path) -> None:
    model = save_tiny_model("gpt_oss", tmp_path)
    found = examine(tmp_path, compare=True)
    assert (found.runs, found.reason) == ("transformers", "GptOssForCausalLM is not native")
    assert found.parameters == model.num_parameters()
    assert (found.kv_bytes_per_token, found.verified) == (2 * 4 * 2 * 16 * 4, "")


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("bloom", {}, "cannot be replaced by paged attention"),
        ("lfm2", {}, "layers of type conv"),
        ("gpt_oss", {"quantization": "int8"}, None),
    ],
)
def test_a_refusal_is_known_before_the_weights_are_read(
    kind: str, options: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    save_tiny_model(kind, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    if reason is None:
        with pytest.raises(Exception, match="--quantization int8 needs"):
            examine(tmp_path, **options)
        return
    found = examine(tmp_path, **options)
    assert found.runs == "refused"
    assert reason in found.reason
    assert "\n" not in found.reason


def test_a_config_that_makes_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 0}))
    assert examine(tmp_path).reason.endswith("says that the model has 0 layers")


def test_a_gguf_file_is_not_compared(tmp_path: Path) -> None:
    found = examine(write_model(tmp_path / "model.gguf"), compare=True)
    assert found.runs == "native"
    assert found.verified == "not compared with transformers: it is a GGUF file"


def test_what_a_person_reads(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    found = examine(tmp_path)
    facts = lines(json.loads(json.dumps(_plain(found))), "mine")
    assert facts[:3] == [("model", "mine"), ("architecture", "LlamaForCausalLM"), ("runs", "natively")]
    assert ("context", "256 tokens") in facts
    assert "fits into" in facts[-1][1]


def _plain(found: Description) -> Any:
    return msgspec.json.decode(msgspec.json.encode(found))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"cpu_kernels": False}])
def test_verify_lets_an_equal_model_pass(options: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2-moe")
    load_runner(tmp_path, verify=True, **options)


def test_verify_refuses_a_model_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    right = RMSNorm.__init__

    def wrong(self: RMSNorm, size: int, eps: float, offset: float = 0.0) -> None:
        right(self, size, 100 * eps + 0.1, offset)

    monkeypatch.setattr(RMSNorm, "__init__", wrong)
    load_runner(tmp_path)
    with pytest.raises(ModelUnsupported, match="computes something else than transformers") as caught:
        load_runner(tmp_path, verify=True)
    assert "\n" not in str(caught.value)
