"""Many requests at once, offline: what is asked, what it costs at least, who takes part, and a whole run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
from safetensors import safe_open

from tests.benchmarks.batch import batch_rounds
from tests.benchmarks.batch.batch_command import BatchPeers, contenders
from tests.benchmarks.batch.batch_load import (
    ALL,
    FIRST,
    SINGLE,
    THROUGHPUT,
    WHOLE,
    BatchLoad,
    least_seconds,
    output_tokens,
)
from tests.benchmarks.batch.batch_report import report
from tests.benchmarks.batch.batch_rounds import BatchSetup, ContenderFailed, run_rounds, take_turn
from tests.benchmarks.batch.contenders import Contender, engine_config, peer_contender, ullm_contender
from tests.benchmarks.batch.engine_load import EngineJob
from tests.benchmarks.batch.shapes import SHAPES, tensors_of, write_shape
from tests.benchmarks.command_line import main
from tests.benchmarks.compare import hardware
from tests.benchmarks.compare.comparison_rounds import choose
from tests.benchmarks.compare.hardware import Limits, MeasuredDevice, ModelShape, model_shape
from ullm.bench.workload import Length
from ullm.errors import ConfigError, UsageError

LIMITS = Limits(bandwidth=1e9, arithmetic=1e12)
LOAD = BatchLoad(6, Length(20, 40), Length(4, 12), single_tokens=8)
ENGINE = """
import json, sys
engine, model, job, result = sys.argv[1:]
job = json.load(open(job))
print("loading")
if engine == "bad":
    sys.exit("it has no legs")
seconds = 2.0 if engine == "slow" else 1.0
runs = {"all at once": seconds, "one alone, one token": 0.2, "one alone, all tokens": 0.2 + 0.1 * seconds}
found = {"version": "1", "device": "paper", "load_seconds": 0.5, "seconds": runs}
if engine != "silent":
    json.dump(found, open(result, "w"))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape ``tiny``."""
    return write_shape("tiny", tmp_path_factory.mktemp("tiny") / "model")


# --- what is asked -----------------------------------------------------------------------------------------


def test_the_same_seed_asks_the_same() -> None:
    job = LOAD.job(512)
    assert job == LOAD.job(512)
    assert job != BatchLoad(6, Length(20, 40), Length(4, 12), single_tokens=8, seed=1).job(512)
    assert job != LOAD.job(512, 1)
    assert len(job.runs[ALL]) == len(job.warm_up) == 6
    assert all(20 <= len(ask.prompt) <= 40 and 4 <= ask.max_tokens <= 12 for ask in job.runs[ALL])
    assert {token for ask in job.runs[ALL] for token in ask.prompt} <= set(range(64, 448))
    assert [ask.max_tokens for ask in (*job.runs[FIRST], *job.runs[WHOLE])] == [1, 8]
    every = [*(ask for run in job.runs.values() for ask in run), *job.warm_up]
    assert max(len(ask.prompt) + ask.max_tokens for ask in every) <= job.longest


@pytest.mark.parametrize(
    ("load", "flag"),
    [
        (BatchLoad(requests=0), "--requests"),
        (BatchLoad(single_tokens=1), "--single-tokens"),
        (BatchLoad(temperature=-1.0), "--temperature"),
        (BatchLoad(temperature=float("nan")), "--temperature"),
    ],
)
def test_what_cannot_be_asked(load: BatchLoad, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        load.check()


def test_the_roofline_of_a_batch_counts_every_read() -> None:
    """Two requests: weights are read for the longer one's tokens, KV for all tokens but each first one."""
    requests = BatchLoad(2, Length(10, 10), Length(3, 3)).job(512).runs[ALL]
    shape = ModelShape(parameters=1000, kv_bytes=10)
    read = 3 * 2000 + 2 * (11 + 12) * 10
    assert least_seconds(requests, shape, LIMITS, 16.0) == pytest.approx(read / 1e9)
    slow = Limits(bandwidth=1e12, arithmetic=1e6)
    assert least_seconds(requests, shape, slow, 16.0) == pytest.approx(2 * 1000 * (20 + 6) / 1e6)
    integers = Limits(bandwidth=1e12, arithmetic=1e6, integer=4e6)
    assert least_seconds(requests, shape, integers, 5.0) == pytest.approx(2 * 1000 * (20 + 6) / 4e6)


def test_the_published_benchmark_on_an_h200() -> None:
    """The bound of docs/explanation/gpu-design.md: 4.3 TB/s allow about 40,000 tokens per second."""
    config = SHAPES["qwen3-0.6b"]
    parameters = sum(int(numpy.prod(shape)) for shape in tensors_of(config).values())
    assert parameters == 596_049_920
    kv_bytes = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert kv_bytes == 114_688
    requests = BatchLoad().job(config["vocab_size"]).runs[ALL]
    shape = ModelShape(parameters, kv_bytes)
    bound = output_tokens(requests) / least_seconds(requests, shape, Limits(4.3e12, 700e12), 16.0)
    assert 36_000 < bound < 41_000


# --- the model ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_shape_is_a_model_that_transformers_loads(tiny: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert sum(parameter.numel() for parameter in model.parameters()) == model_shape(tiny).parameters
    with safe_open(tiny / "model.safetensors", "pt") as file:
        weights = file.get_tensor("model.layers.1.mlp.up_proj.weight")
        assert torch.equal(weights, model.model.layers[1].mlp.up_proj.weight)
        assert torch.equal(file.get_tensor("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    assert weights.dtype == torch.bfloat16
    assert 0.018 < float(weights.float().std()) < 0.022
    assert hardware.read_config(tiny)["vocab_size"] == 512


def test_a_shape_is_written_once(tiny: Path) -> None:
    before = (tiny / "model.safetensors").stat()
    assert write_shape("tiny", tiny) == tiny
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UsageError, match=r"--shape huge: expected one of qwen3-0\.6b, tiny"):
        write_shape("huge", tiny.parent / "huge")


# --- who takes part ----------------------------------------------------------------------------------------


def test_ullm_gets_room_for_all_unless_told_otherwise(tiny: Path) -> None:
    config = engine_config([], str(tiny), LOAD, "cpu")
    assert (config.max_bs, config.max_num_batched_tokens, config.device) == (6, 8192, "cpu")
    assert config.context_len == LOAD.longest
    options = ["--max-bs", "3", "--enforce-eager", "--device", "auto", "--device-ids", "1,2"]
    config = engine_config(options, str(tiny), LOAD, "cpu")
    assert (config.max_bs, config.enforce_eager, config.device) == (3, True, "auto")
    assert config.device_ids == (1, 2)
    contender = ullm_contender("int8=--quantization int8", tiny, 0.5, LOAD, "cpu")
    assert (contender.name, contender.options["quantization"], contender.weight_bits) == (
        "ullm int8",
        "int8",
        8.5,
    )


@pytest.mark.parametrize("spec", ["eager", "=--enforce-eager", "x=--no-such-option", "x=--max-bs many"])
def test_specs_that_cannot_be(spec: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match="--ullm"):
        ullm_contender(spec, tiny, 0.0, LOAD, "cpu")
    with pytest.raises(ConfigError, match="--max-bs"):
        ullm_contender("x=--max-bs -1", tiny, 0.0, LOAD, "cpu")


def test_how_peers_are_run(tmp_path: Path) -> None:
    peer = peer_contender("vllm", "/v/bin/python -X dev", '{"enforce_eager": true}')
    command = peer.command(tmp_path, tmp_path / "j", tmp_path / "r")
    assert command[:3] == ["/v/bin/python", "-X", "dev"]
    assert Path(command[3]).is_file()
    assert command[4:] == ["vllm", str(tmp_path), str(tmp_path / "j"), str(tmp_path / "r")]
    assert peer.options == {"enforce_eager": True}
    for options in ("[1]", "{"):
        with pytest.raises(UsageError, match="--vllm-options"):
            peer_contender("vllm", "p", options)


def test_who_takes_part(tiny: Path) -> None:
    peers = BatchPeers(ullm=["a=", "b="], vllm="v", transformers="t")
    found = contenders(tiny, model_shape(tiny), peers, LOAD, "cpu")
    assert [each.name for each in found] == ["ullm a", "ullm b", "transformers", "vLLM"]
    assert choose(None, found) == "transformers"
    assert choose(None, found[:2]) == "ullm a"
    assert choose("vLLM", found) == "vLLM"
    with pytest.raises(UsageError, match="--baseline x"):
        choose("x", found)
    with pytest.raises(UsageError, match="twice"):
        contenders(tiny, model_shape(tiny), BatchPeers(ullm=["a=", "a="]), LOAD, "cpu")


# --- turns and rounds --------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Engines that only say how fast they were."""
    (tmp_path / "offline_batch.py").write_text(ENGINE)
    monkeypatch.setattr("tests.benchmarks.batch.contenders.SCRIPTS", tmp_path)
    return tmp_path


def contender(engine: str, *python: str) -> Contender:
    return Contender(engine, engine, python or (sys.executable,))


@pytest.mark.process
@pytest.mark.parametrize(
    ("engine", "python", "said"),
    [
        ("bad", (), "bad ended with status 1: it has no legs"),
        ("silent", (), "silent ended with status 0: loading"),
        ("good", ("/no/such/python",), "good cannot run /no/such/python: No such file"),
    ],
)
async def test_engines_that_fail_say_why(
    engine: str, python: tuple[str, ...], said: str, scripted: Path, tiny: Path
) -> None:
    bench = BatchSetup(tiny, LOAD, "cpu", scripted)
    with pytest.raises(ContenderFailed, match=said):
        await take_turn(contender(engine, *python), bench, bench.job(0), 0)


@pytest.mark.process
async def test_an_engine_that_takes_too_long_is_ended(
    scripted: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scripted / "offline_batch.py").write_text("import signal; signal.pause()")
    monkeypatch.setattr(batch_rounds, "TURN_SECONDS", 0.3)
    bench = BatchSetup(tiny, LOAD, "cpu", scripted)
    with pytest.raises(ContenderFailed, match="good was not done after 0 s"):
        await take_turn(contender("good"), bench, bench.job(0), 0)


@pytest.mark.process
async def test_rounds_rotate_and_go_on_after_a_failure(scripted: Path, tiny: Path) -> None:
    said: list[str] = []
    who = [contender("good"), contender("bad"), contender("slow")]
    bench = BatchSetup(tiny, LOAD, "cpu", scripted)
    finished = await run_rounds(who, bench, 2, said.append, lambda device: MeasuredDevice(device, LIMITS))
    assert [turn.candidate for turn in finished.turns] == ["good", "bad", "slow", "bad", "slow", "good"]
    assert [bool(turn.error) for turn in finished.turns] == [False, True, False, True, False, False]
    assert finished.jobs[0] != finished.jobs[1]
    assert len(said) == 6
    found = report(who, finished, LOAD, "tiny", model_shape(tiny), ["slow"])
    good = next(line for line in found.lines if line.metric == THROUGHPUT).entries["good"]
    assert good.values == [output_tokens(job.runs[ALL]) / 1.0 for job in finished.jobs]
    assert good.ratio is not None
    assert good.ratio.median == pytest.approx(2.0)
    assert good.share == pytest.approx(good.median / found.bounds["good"][THROUGHPUT.name], rel=0.5)
    assert next(line for line in found.lines if line.metric == SINGLE).entries[
        "good"
    ].median == pytest.approx(70)
    text = found.markdown()
    assert "| all requests at once, output, tok/s |" in text
    assert "Against slow, round by round" in text
    assert "Not measured: round 1: bad ended with status 1: it has no legs" in text
    assert json.loads(found.json())["errors"] == found.errors


# --- all of it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.slow
def test_ullm_beside_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tiny shape on a CPU; a peer that is not installed is one line."""
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda: 1e9)
    few = json.dumps({"num_blocks": 64, "max_batch_tokens": 256})
    arguments = ["--shape", "tiny", "--device", "cpu", "--requests", "5", "--prompt-tokens", "20-40"]
    arguments += ["--output-tokens", "4-12", "--single-tokens", "8", "--rounds", "1"]
    arguments += ["--transformers", sys.executable, "--transformers-options", few]
    arguments += ["--nano-vllm", sys.executable, "--output", str(tmp_path)]
    status = main(["batch", *arguments])
    shown = capsys.readouterr().out
    assert status == 1
    assert (tmp_path / "batch.md").read_text("utf-8") == shown
    assert shown.count("Not measured:") == 1
    assert "cannot import nano-vllm" in shown
    found = json.loads((tmp_path / "batch.json").read_text("utf-8"))
    assert [*found["ratios"]] == ["transformers"]
    throughput = found["lines"][0]["entries"]
    assert throughput.keys() == {"ullm default", "transformers"}
    assert throughput["ullm default"]["median"] > 0


def test_other_numbers_of_tokens_are_not_compared(tmp_path: Path) -> None:
    """The script checks what an engine returns."""
    from tests.benchmarks.scripts import offline_batch

    class Short:
        version = device = "paper"

        def run(self, asks: Any) -> list[list[int]]:
            return [[0] for _ in asks]

        def close(self) -> None:
            """Nothing is held."""

    job = tmp_path / "job"
    asked: EngineJob = LOAD.job(512)
    job.write_bytes(msgspec.json.encode(asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(offline_batch.ENGINES, "short", lambda model, job: Short())
        with pytest.raises(RuntimeError, match="6 tokens were generated, 48 were asked for"):
            offline_batch.main("short", "m", str(job), str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()
