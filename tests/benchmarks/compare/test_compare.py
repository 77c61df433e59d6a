"""Comparing servers: who is started how, what is measured, how it is condensed; with servers from scripts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import trio
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize

from tests.benchmarks.compare import comparison_rounds, hardware, scenarios
from tests.benchmarks.compare.candidates import (
    ServerCandidate,
    llama_candidate,
    transformers_candidate,
    ullm_candidate,
    vllm_candidate,
)
from tests.benchmarks.compare.compare_command import ComparePeers, candidates, check
from tests.benchmarks.compare.comparison import Comparison, condense
from tests.benchmarks.compare.comparison_plot import draw
from tests.benchmarks.compare.comparison_rounds import (
    Turn,
    baseline_of,
    choose,
    measure_candidate,
    order,
    run_rounds,
)
from tests.benchmarks.compare.hardware import Limits, MachineUnknown, ModelShape, model_shape, roofline
from tests.benchmarks.compare.scenarios import ComparisonLoad, Figures, Metric, decode_metric
from tests.benchmarks.compare.weight_bits import bits_of
from ullm.errors import ModelFileBroken, UsageError
from ullm.testing import write_tiny_model

SHAPE = ModelShape(parameters=1_000_000, kv_bytes=100)
LIMITS = Limits(bandwidth=1e9, arithmetic=1e12)
SCRIPT = Path(__file__).with_name("scripted_peer.py")


def peer(name: str, *options: str) -> ServerCandidate:
    command = (sys.executable, str(SCRIPT), "{port}", *options)
    return ServerCandidate(name, command, "/health", "/health", start_seconds=20)


# --- candidates --------------------------------------------------------------------------------------------


def test_how_ullm_is_started() -> None:
    found = ullm_candidate("int8=--quantization int8 --max-bs 32", "m")
    assert (found.name, found.weight_bits) == ("ullm int8", 8.5)
    assert found.command(81)[1:] == [
        *("-m", "ullm", "serve", "--model", "m", "--port", "81"),
        *("--quantization", "int8", "--max-bs", "32"),
    ]
    assert ullm_candidate("q=--model other", "m").command(1).count("--model") == 1
    assert "m" not in ullm_candidate("q=--model=other", "m").command(1)[3:]
    assert ullm_candidate("bf16=", "m").weight_bits == 16.0
    assert ullm_candidate("float32=--dtype float32", "m").weight_bits == 16.0  # widened in registers
    assert ullm_candidate("PyTorch=--dtype float32 --no-cpu-kernels", "m").weight_bits == 32.0


@pytest.mark.parametrize("spec", ["int8", "=--dtype float32", "--dtype=float32"])
def test_specs_without_a_name(spec: str) -> None:
    with pytest.raises(UsageError, match="NAME=OPTIONS"):
        ullm_candidate(spec, "m")


def write_gguf(path: Path, kind: Kind) -> Path:
    """Matrices of a kind, and beside them more metadata than weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(1000)])
    values = np.ones((4, 64), np.float32)
    for name in ("a.weight", "b.weight"):
        plain = kind in (Kind.F32, Kind.F16)
        data = values.astype(np.float16 if kind == Kind.F16 else np.float32)
        writer.add_tensor(name, data if plain else quantize(values, kind), raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "options", "bits"),
    [
        (Kind.Q4_1, "", 5.0),
        (Kind.Q8_0, "", 8.5),
        (Kind.Q4_0, "--dtype float32", 4.5),
        (Kind.Q4_1, "--quantization none", 16.0),
        (Kind.Q4_1, "--quantization none --dtype float32", 32.0),
        (Kind.Q4_1, "--quantization int8", 8.5),
        (Kind.F32, "", 16.0),
        (Kind.F16, "", 16.0),
        (Kind.F32, "--dtype float32", 32.0),
        (Kind.F16, "--dtype float32", 16.0),
    ],
)
@pytest.mark.parametrize("flag", ["--model {}", "--model={}"])
def test_the_weights_of_a_gguf_file_are_as_they_are(
    tmp_path: Path, kind: Kind, options: str, bits: float, flag: str
) -> None:
    path = write_gguf(tmp_path / "w.gguf", kind)
    found = ullm_candidate(f"q={flag.format(path)} {options}", "m")
    assert found.weight_bits == bits
    assert ullm_candidate(f"q={options}", str(path)).weight_bits == bits


def test_a_head_of_eight_bits() -> None:
    assert ullm_candidate("q=--quantization int4", "m", head_share=0.0).weight_bits == 5.0
    assert ullm_candidate("q=--quantization int4", "m", head_share=0.5).weight_bits == 6.75


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(bytes(1000))
    with pytest.raises(ModelFileBroken, match="not a GGUF file"):
        ullm_candidate(f"q=--model {path}", "m")


def test_how_peers_are_started(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "w.gguf", Kind.Q4_1)
    vllm = vllm_candidate("/v/bin/vllm", tmp_path, "--gpu-memory-utilization 0.3")
    assert vllm.command(7)[:3] == ["/v/bin/vllm", "serve", str(tmp_path)]
    assert vllm.command(7)[-4:] == ["--port", "7", "--gpu-memory-utilization", "0.3"]
    assert vllm_candidate("/v/bin/python3", tmp_path, "").command(7)[1:3] == [
        "-m",
        "vllm.entrypoints.cli.main",
    ]
    llama = llama_candidate("/l/llama-server", weights, "-t 2")
    assert llama.command(7)[:5] == ["/l/llama-server", "-m", str(weights), "--port", "7"]
    assert (llama.weight_bits, llama.command(7)[-2:]) == (5.0, ["-c", "65536"])
    assert llama_candidate("l", weights, "-c 100").command(7).count("-c") == 1
    transformers = transformers_candidate("/t/python", tmp_path)
    assert transformers.command(7)[0] == "/t/python"
    assert Path(transformers.command(7)[1]).is_file()
    assert transformers.scenarios == ("decode",)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ([], 16.0),
        (["--dtype", "float32"], 32.0),
        (["--dtype=float32"], 32.0),
        (["--quantization", "int4", "--dtype", "float32"], 4.5),
        (["--quantization"], 16.0),
    ],
)
def test_bits_per_weight(options: list[str], bits: float) -> None:
    assert bits_of(options) == bits


def test_who_takes_part(tmp_path: Path) -> None:
    found = candidates("m", tmp_path, ComparePeers(ullm=["a=", "b="], vllm="v", transformers="t"), SHAPE)
    assert [each.name for each in found] == ["ullm a", "ullm b", "vLLM", "transformers"]
    assert choose(None, found) == "vLLM"
    assert choose("B", found) == "ullm b"
    assert choose(None, found[:2]) == "ullm a"
    done = [Turn(0, name, Figures({}, {}), LIMITS) for name in ("ullm a", "transformers")]
    failed = Turn(0, "vLLM", None, LIMITS, "it fell over")
    assert baseline_of(None, found, [failed, *done]) == "transformers"
    assert baseline_of("vllm", found, [failed, *done]) == "vLLM"
    with pytest.raises(UsageError, match="--baseline x: expected one of ullm a"):
        choose("x", found)
    with pytest.raises(UsageError, match="twice"):
        candidates("m", tmp_path, ComparePeers(ullm=["a=", "a="]), SHAPE)
    with pytest.raises(UsageError, match="--gguf"):
        candidates("m", tmp_path, ComparePeers(llama_server="l"), SHAPE)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="--scenarios nope"):
        check(ComparisonLoad((1,), ("decode", "nope")), 1)
    with pytest.raises(UsageError, match="--rounds"):
        check(ComparisonLoad((1,)), 0)


# --- the machine -------------------------------------------------------------------------------------------


def test_the_roofline_is_the_lower_of_two_bounds() -> None:
    alone = roofline(1, SHAPE, LIMITS, 16, context=0)
    assert alone == pytest.approx(1e9 / 2e6)
    assert roofline(1, SHAPE, LIMITS, 8, context=0) == pytest.approx(2 * alone)
    assert roofline(4, SHAPE, LIMITS, 16, context=0) == pytest.approx(4 * alone)
    assert roofline(1e6, SHAPE, LIMITS, 16, context=0) == pytest.approx(1e12 / 2e6)
    assert roofline(1, SHAPE, LIMITS, 16, context=20_000) == pytest.approx(alone / 2)


def test_shapes_are_read_from_a_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shape = model_shape(tmp_path)
    assert shape.kv_bytes == 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 16
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert shape.head == config["vocab_size"] * config["hidden_size"]
    assert shape.parameters == pytest.approx(size / 4, rel=0.1)  # float32, and a header
    with pytest.raises(UsageError, match=r"config\.json"):
        model_shape(tmp_path / "none")


def test_shapes_are_read_from_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"vocab_size": 4, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hardware, "tokenizer_folder", lambda model, progress: tmp_path)
    found = model_shape(write_gguf(tmp_path / "w.gguf", Kind.Q4_1))
    assert found == ModelShape(parameters=512, kv_bytes=2 * 2 * 2 * 64, head=256, layers=256)


X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 i8mm\nCPU part\t: 0xd40\n"


def test_the_processor_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86 + X86)
    assert hardware.read_processor(file) == ("Some CPU", ["avx2", "fma", "avx512f", "avx512_vnni"])
    file.write_text(ARM)
    assert hardware.read_processor(file)[1] == ["asimd", "asimddp", "i8mm", "bf16"]
    assert hardware.read_processor(tmp_path / "none")[1] == []
    monkeypatch.setattr(hardware, "read_processor", lambda: ("Some CPU", ["avx2"]))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    text = hardware.describe(hardware.machine())
    assert "(Some CPU; avx2)" in text
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in text


def test_few_bits_may_be_multiplied_as_integers() -> None:
    limits = Limits(bandwidth=1e15, arithmetic=1e12, integer=4e12)
    assert roofline(64, SHAPE, limits, 5.0, context=0) == pytest.approx(4e12 / 2e6)
    assert roofline(64, SHAPE, limits, 16.0, context=0) == pytest.approx(1e12 / 2e6)
    assert "1.00 TFLOP/s and 4.00 TOP/s in int8" in str(limits)


def test_bandwidth_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "READ_BYTES", 1 << 20)
    assert 1e7 < hardware.read_bandwidth(2) < 1e14
    assert 1e7 < hardware.measure_bandwidth() < 1e14


def test_a_machine_whose_arithmetic_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineUnknown, match="device_limits"):
        hardware.measure_limits()


# --- measuring ---------------------------------------------------------------------------------------------


def test_the_order_rotates() -> None:
    who = [peer(name) for name in "abc"]
    assert ["".join(each.name for each in order(who, number)) for number in range(4)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


@pytest.mark.slow
@pytest.mark.process
async def test_a_server_is_started_measured_and_stopped(tmp_path: Path) -> None:
    load = ComparisonLoad((1, 3), output_tokens=6)
    found = await measure_candidate(peer("p", "--start", "0.3"), load, tmp_path / "log")
    values = found.values
    assert values[scenarios.START_LIVE] <= values[scenarios.START_READY] <= values[scenarios.START_FIRST]
    assert values[scenarios.START_READY] >= 0.3
    assert {decode_metric(1), decode_metric(3), scenarios.SAMPLED, scenarios.PREFILL, scenarios.STOP} <= set(
        values
    )
    assert values[scenarios.PREFIX_COLD] > values[scenarios.PREFIX_WARM]
    assert 1 < values[scenarios.MEMORY] < 1000
    assert found.prompt_tokens == {
        "decode 1": 12 * 32,
        "decode 3": 12 * 32,
        "sampled": 16 * 32,
        "prefill": 6000,
        "prefix": 16 * 1016,
    }


@pytest.mark.process
async def test_a_candidate_that_fails_does_not_keep_the_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_rounds, "SETTLE", 0.0)
    said: list[str] = []
    who = [peer("good"), peer("gone", "--exit", "3"), peer("bad", "--refuse")]
    turns = await run_rounds(
        who, ComparisonLoad((1,), ("decode",), output_tokens=2), 1, tmp_path, said.append, lambda: LIMITS
    )
    assert [turn.figures is not None for turn in turns] == [True, False, False]
    assert "ended with status 3" in turns[1].error
    assert "no more memory" in turns[1].error  # what its log says
    assert "answered 500" in turns[2].error
    assert [line.split(":")[1].strip() for line in said] == ["good", "gone", "bad"]


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    missing = ServerCandidate("none", ("/no/such/program",), "/", "/")
    (turn,) = await run_rounds(
        [missing], ComparisonLoad((1,)), 1, tmp_path, lambda line: None, lambda: LIMITS
    )
    assert "cannot run /no/such/program" in turn.error


# --- condensing --------------------------------------------------------------------------------------------

FAST, SLOW = decode_metric(1), Metric("to first token", "ms", "lower")


def limits_of(number: int) -> Limits:
    return Limits((1 + number) * LIMITS.bandwidth / 2, LIMITS.arithmetic)


def comparison() -> Comparison:
    def turn(number: int, name: str, rate: float, wait: float, tokens: int = 9) -> Turn:
        figures = Figures({FAST: rate, SLOW: wait}, {"decode 1": tokens})
        return Turn(number, name, figures, limits_of(number))

    turns = [
        turn(0, "ullm a", 200, 10),
        turn(0, "peer", 100, 20, tokens=10),
        turn(1, "ullm a", 300, 10),
        turn(1, "peer", 100, 50, tokens=10),
        turn(2, "ullm a", 330, 10),
        Turn(2, "peer", None, limits_of(2), "it fell over"),
    ]
    who = [ServerCandidate("ullm a", ("ullm",), "/", "/"), ServerCandidate("peer", ("peer",), "/", "/")]
    return condense(who, turns, ComparisonLoad((1, 4)), "peer", SHAPE)


def test_ratios_are_within_a_round_and_above_1_is_better() -> None:
    found = comparison()
    rate, wait = (line.entries["ullm a"] for line in found.lines)
    assert (rate.values, rate.median) == ([200, 300, 330], 300)
    assert rate.ratio is not None
    assert (rate.ratio.min, rate.ratio.median, rate.ratio.max) == (2.0, 2.5, 3.0)
    assert wait.ratio is not None
    assert (wait.ratio.min, wait.ratio.max) == (2.0, 5.0)
    assert found.lines[0].entries["peer"].ratio is None
    assert found.rounds == 3
    assert found.unequal == ["decode 1"]
    assert found.errors == ["peer, round 3: it fell over"]


def test_reports_for_people_and_for_programs() -> None:
    found = comparison()
    text = found.markdown()
    bounds = [roofline(1, SHAPE, limits_of(number), 16, 96) for number in range(3)]
    share = sorted(rate / bound for rate, bound in zip((200, 300, 330), bounds, strict=True))[1]
    assert found.limits == LIMITS  # by the medians
    assert f"| decode, 1 stream, tok/s | 300 ({share:.0%}) | 100 " in text
    assert "| to first token, ms | 3.50 (2.00–5.00) |" in text
    assert "Not measured: peer, round 3: it fell over" in text
    assert "not equally long in: decode 1" in text
    assert json.loads(found.json())["competitors"][0]["bounds"].keys() == {"1", "4"}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plot.{suffix}"
    draw(comparison(), file, 96)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert suffix == "png" or b"bound, 16 bits" in content
    assert len(content) > 5000


# --- the runner for transformers ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
async def test_transformers_in_static_batches_speaks_the_dialect(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    candidate = transformers_candidate(sys.executable, tmp_path / "model")
    with trio.fail_after(120):
        found = await measure_candidate(candidate, ComparisonLoad((1, 3), output_tokens=5), tmp_path / "log")
    assert all(math.isfinite(value) and value > 0 for value in found.values.values())
    assert set(found.prompt_tokens) == {"decode 1", "decode 3"}
    counts: Any = found.prompt_tokens
    assert min(counts.values()) > 0
