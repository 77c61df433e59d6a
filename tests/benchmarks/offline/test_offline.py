"""Engines without a server, and options of ullm: the load, who takes part, what is parsed, the verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from tests.benchmarks.batch.batch_report import EngineReport, report
from tests.benchmarks.batch.batch_rounds import BatchSetup, FinishedRounds
from tests.benchmarks.batch.contenders import Contender
from tests.benchmarks.batch.engine_load import LOADING, EngineResult
from tests.benchmarks.command_line import main
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import Limits, MeasuredDevice, ModelShape, roofline
from tests.benchmarks.compare.scenarios import Figures, Metric, decode_metric
from tests.benchmarks.compare.test_compare import write_gguf
from tests.benchmarks.offline import defaults_command, offline_command
from tests.benchmarks.offline.defaults_command import choose_variants, measure
from tests.benchmarks.offline.defaults_report import judge, suspects
from tests.benchmarks.offline.offline_command import OfflinePeers, contenders
from tests.benchmarks.offline.offline_load import OfflineLoad, OfflineOptions
from tests.benchmarks.offline.variants import AGAIN, DEFAULT, VARIANTS, Variant
from tests.benchmarks.scripts import batched_bench
from tests.benchmarks.scripts.batched_bench import Row, Run
from ullm.errors import UsageError
from ullm.testing import write_tiny_model

LOAD = OfflineLoad((1, 4), prompt_tokens=8, output_tokens=5, prefill_tokens=40)
LIMITS = Limits(bandwidth=1e9, arithmetic=1e12)
SHAPE = ModelShape(parameters=1000, kv_bytes=10, head=200, layers=800)
PEER = """
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["-m"].endswith("broken"):
    sys.exit("it has no legs")
print(arguments["-m"], "loaded")
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |")
print("|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|")
for count in arguments["-npl"].split(","):
    print(f"| {arguments['-npp']} | {arguments['-ntg']} | {count} | 9 | 0.5 | 1 | {count}.0 | 1 | 1 | 1 |")
"""
FAST = Metric("fast", "tok/s")


# --- the load ----------------------------------------------------------------------------------------------


def test_decoding_is_the_difference_of_two_runs() -> None:
    job = LOAD.job(512)
    assert job == LOAD.job(512)
    assert job != LOAD.job(512, 1)
    forms = {name: [(len(r.prompt), r.max_tokens) for r in run] for name, run in job.runs.items()}
    assert forms["4 × 1"] == [(8, 1)] * 4
    assert forms["4 × 5"] == [(8, 5)] * 4
    assert forms["prefill 2"] == [(40, 1)]
    prompts = [request.prompt for run in job.runs.values() for request in run]
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)  # so that no prefix is cached
    seconds = {
        "1 × 1": 1.0,
        "1 × 5": 3.0,
        "4 × 1": 1.0,
        "4 × 5": 5.0,
        **{f"prefill {n}": 2.0 for n in range(3)},
    }
    figures = LOAD.figures(job, EngineResult("1", "cpu", 0.5, seconds))
    assert figures == {decode_metric(1): 2.0, decode_metric(4): 4.0, LOAD.prefill: 20.0, LOADING: 0.5}


def test_the_head_is_not_part_of_the_prefill_bound() -> None:
    bounds = LOAD.bounds(LOAD.job(512), SHAPE, LIMITS, 16.0)
    assert bounds[decode_metric(4)] == roofline(4, SHAPE, LIMITS, 16.0, context=10.5)
    assert bounds[LOAD.prefill] == pytest.approx(40 / (800 * 2 / 1e9))
    assert bounds.keys() == {decode_metric(1), decode_metric(4), LOAD.prefill}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (OfflineOptions(streams=["1,x"]), "--streams"),
        (OfflineOptions(output_tokens=1), "--output-tokens"),
        (OfflineOptions(prefill_tokens=0), "--prefill-tokens"),
    ],
)
def test_what_cannot_be_measured(options: OfflineOptions, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        options.load((1,))


# --- llama-batched-bench -----------------------------------------------------------------------------------


def test_one_command_measures_all_runs_of_one_length_of_prompt() -> None:
    runs = [Run(1, 32, 1), Run(1, 32, 128), Run(16, 32, 1), Run(16, 32, 128), Run(1, 900, 1)]
    decode, prefill = batched_bench.commands("/l/bench", "m.gguf", runs, ["-t", "2"])
    assert decode[:3] == ["/l/bench", "-m", "m.gguf"]
    options = dict(zip(decode[1::2], decode[2::2], strict=True))
    assert (options["-npp"], options["-ntg"], options["-npl"], options["-t"]) == ("32", "127", "1,16", "2")
    assert int(options["-c"]) == 16 * (32 + 127)
    options = dict(zip(prefill[1::2], prefill[2::2], strict=True))
    assert (options["-npp"], options["-ntg"], options["-npl"]) == ("900", "1", "1")


def test_the_table_is_parsed_among_other_lines() -> None:
    output = """
llama_context: n_ctx = 2544
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    32 |    127 |   16 |   2544 |    0.921 |   555.92 |    9.803 |   207.28 |   10.724 |   237.23 |
llama_perf_context_print: |  total | 1 |
"""
    (row,) = batched_bench.parse(output)
    assert row == Row(32, 127, 16, 0.921, 9.803)
    assert batched_bench.seconds_of(Run(16, 32, 1), [row]) == 0.921
    assert batched_bench.seconds_of(Run(16, 32, 128), [row]) == pytest.approx(0.921 + 9.803)
    with pytest.raises(RuntimeError, match="no row of 4 prompts of 32 tokens"):
        batched_bench.seconds_of(Run(4, 32, 1), [row])


def test_requests_of_different_lengths_cannot_be_a_run() -> None:
    with pytest.raises(ValueError, match="one length"):
        batched_bench.run_of([{"prompt": [1], "max_tokens": 1}, {"prompt": [1], "max_tokens": 2}])


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that prints llama-batched-bench's table."""
    path = tmp_path / "bench"
    path.write_text(f"#!{sys.executable}\n{PEER}")
    path.chmod(0o755)
    return path


def take(program: Path, model: str, tmp_path: Path) -> tuple[int, Path]:
    job, result = tmp_path / "job", tmp_path / "result"
    job.write_text(json.dumps({**msgspec.to_builtins(LOAD.job(512)), "options": {}}))
    return batched_bench.main(str(program), model, str(job), str(result)), result


@pytest.mark.process
def test_the_program_takes_a_turn(program: Path, tmp_path: Path) -> None:
    status, file = take(program, "m", tmp_path)
    assert status == 0
    result = msgspec.json.decode(file.read_bytes(), type=EngineResult)
    figures = LOAD.figures(LOAD.job(512), result)
    assert figures[decode_metric(1)] == figures[decode_metric(4)] == 4.0  # 1.0 s for each prompt
    assert figures[LOAD.prefill] == 80.0


@pytest.mark.process
def test_a_program_that_fails(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="status 1"):
        take(program, "broken", tmp_path)
    assert "it has no legs" in capsys.readouterr().out
    assert take(tmp_path / "none", "m", tmp_path)[0] == batched_bench.MISSING
    assert "cannot run" in capsys.readouterr().err


# --- who takes part ----------------------------------------------------------------------------------------


def test_who_takes_part(tmp_path: Path) -> None:
    import gguf

    file = write_gguf(tmp_path / "w.gguf", gguf.GGMLQuantizationType.Q4_1)
    peers = OfflinePeers(
        ullm=["a=", "b=--cpu-threads 1"],
        openvino_python="/o/python",
        batched_bench=["/l/bench", "ik=/i/bench"],
        batched_bench_options="-t 2",
    )
    found = contenders(file, SHAPE, peers, LOAD)
    assert [each.name for each in found] == ["ullm a", "ullm b", "OpenVINO GenAI", "llama.cpp", "ik"]
    assert {each.weight_bits for each in found} == {5.0}
    assert found[1].options["cpu_threads"] == 1
    assert found[0].options["max_bs"] == 0  # ullm's own default
    command = found[-1].command(file, tmp_path / "j", tmp_path / "r")
    assert Path(command[1]).is_file()
    assert command[2:4] == ["/i/bench", str(file)]
    assert found[-1].options == {"arguments": ["-t", "2"]}
    for specs in (["/l/bench", "/m/bench"], ["x="], ["=/l"]):
        with pytest.raises(UsageError, match=r"twice|--batched-bench"):
            contenders(file, SHAPE, OfflinePeers(batched_bench=specs), LOAD)


def test_variants_are_options_of_ullm(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    found = defaults_command.contenders((DEFAULT, AGAIN, *VARIANTS), tmp_path, SHAPE, LOAD)
    default = found[0].options
    changed = [{k for k, v in each.options.items() if v != default[k]} for each in found[2:]]
    assert all(changed)
    assert len({each.name for each in found}) == len(found)
    assert choose_variants(None) == VARIANTS
    assert choose_variants(["1 thread,int8"]) == (VARIANTS[0], *(v for v in VARIANTS if v.name == "int8"))
    with pytest.raises(UsageError, match="--only nope"):
        choose_variants(["nope"])


# --- reports -----------------------------------------------------------------------------------------------


def finished(rates: dict[str, list[float]], texts: dict[str, str]) -> FinishedRounds:
    turns = [
        Turn(
            number,
            name,
            Figures({FAST: rate, LOADING: 1 / rate}, {}, {"1 × 5": texts.get(name, "same")}),
            LIMITS,
        )
        for name, values in rates.items()
        for number, rate in enumerate(values)
    ]
    count = max(map(len, rates.values()))
    return FinishedRounds(turns, [LOAD.job(512, number) for number in range(count)], "cpu")


def figures_of(rounds: FinishedRounds, *baselines: str) -> EngineReport:
    names = dict.fromkeys(turn.candidate for turn in rounds.turns)
    who = [Contender(name, "ullm" if name.startswith("ullm") else "openvino", ("p",)) for name in names]
    return report(who, rounds, LOAD, "m", SHAPE, baselines)


def test_ullm_is_compared_with_each_peer() -> None:
    rounds = finished({"ullm default": [100, 120], "x": [50, 40], "y": [200, 120]}, {})
    text = figures_of(rounds, "x", "y").markdown()
    assert "Against x, round by round" in text
    assert "| fast, tok/s | 2.50 (2.00–3.00) | 3.50 (3.00–4.00) |" in text
    assert "| fast, tok/s | 0.75 (0.50–1.00) | 0.29 (0.25–0.33) |" in text


@pytest.mark.parametrize(
    ("rates", "counts", "texts", "beaten"),
    [
        ([112, 108, 115], True, {}, ["fast"]),
        ([112, 108, 109], True, {}, []),  # the median decides
        ([150, 150, 150], False, {}, []),
        ([150, 150, 150], True, {"ullm v": "other"}, []),
    ],
)
def test_what_beats_the_default(
    rates: list[float], counts: bool, texts: dict[str, str], beaten: list[str]
) -> None:
    rounds, variant = (
        finished({"ullm default": [100] * 3, "ullm v": rates}, texts),
        Variant("v", "--v", counts),
    )
    found = judge(figures_of(rounds, "ullm default"), rounds.turns, "ullm default", [variant])
    (verdict,) = found.verdicts
    assert (verdict.beaten, verdict.same_texts) == (beaten, not texts)
    assert suspects(found, [variant]) == ([variant] if beaten else [])
    text = found.markdown("ullm default")
    assert f"| ullm v `--v` | {'yes' if counts else 'no'} | {'other' if texts else 'same'} | 1." in text
    assert ("ullm v beats the default: fast" in text) == bool(beaten)
    assert json.loads(found.json())["verdicts"][0]["beaten"] == beaten


SCRIPTED = """
import json, sys
engine, model, job, result = sys.argv[1:]
job = json.load(open(job))
number = len(json.load(open(model + "/turns")))
json.dump([*range(number + 1)], open(model + "/turns", "w"))
quick = job["options"]["cpu_threads"] == 1 and number < 3
seconds = {run: 1.0 + asks[0]["max_tokens"] * (0.5 if quick else 1.0) for run, asks in job["runs"].items()}
texts = dict.fromkeys(seconds, "same")
found = {"version": "1", "device": "x", "load_seconds": 1, "seconds": seconds, "texts": texts}
json.dump(found, open(result, "w"))
"""


@pytest.mark.process
async def test_what_seems_to_beat_the_default_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lucky turn is not enough: the second time it is as fast as the default."""
    write_tiny_model(tmp_path)
    (tmp_path / "turns").write_text("[]")
    (tmp_path / "offline_batch.py").write_text(SCRIPTED)
    monkeypatch.setattr("tests.benchmarks.batch.contenders.SCRIPTS", tmp_path)
    said: list[str] = []
    variants = (VARIANTS[0], Variant("none", "", counts=True))
    setup = BatchSetup(tmp_path, LOAD, "cpu", tmp_path)
    found = await measure(
        setup, "m", SHAPE, variants, 1, said.append, lambda device: MeasuredDevice("x", LIMITS)
    )
    assert "to be measured again: 1 thread" in said
    assert [turn.split(":")[1].strip() for turn in said if turn.startswith("round 2")] == [
        "ullm 1 thread",
        "ullm default",
    ]
    assert found.figures.rounds == 2


@pytest.mark.parametrize("module", [defaults_command, offline_command])
def test_neighbours_are_beside_all_rounds(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def told(count: int, *work: Any) -> Any:
        raise UsageError(f"beside {count}")

    monkeypatch.setattr(module, "beside", told)
    monkeypatch.setattr(module, "model_shape", lambda path: SHAPE)
    file = write_gguf(tmp_path / "w.gguf", Kind.Q4_1)
    monkeypatch.setattr(defaults_command, "find_model", lambda *names: file)
    given = ["defaults"] if module is defaults_command else ["offline", "--gguf", str(file)]
    assert main([*given, "--neighbours", "3", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: beside 3\n"
    load = OfflineOptions(neighbours=3).load((1,))
    assert load.describe().endswith("; beside 3 spinning processes all the time")
    assert load.settings()["neighbours"] == 3
    assert "beside" not in LOAD.describe()


# --- all of it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
def test_a_thread_beside_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model; whether one thread is faster is not what is tested."""
    monkeypatch.setattr("tests.benchmarks.compare.hardware.measure_bandwidth", lambda: 1e9)
    write_tiny_model(tmp_path / "model")
    arguments: list[Any] = ["defaults", "--model", tmp_path / "model", "--only", "1 thread", "--rounds", "1"]
    arguments += [
        "--streams",
        "1,2",
        "--output-tokens",
        "4",
        "--prefill-tokens",
        "20",
        "--output",
        tmp_path / "out",
    ]
    status = main(list(map(str, arguments)))
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "defaults.json").read_text("utf-8"))
    assert [each["name"] for each in found["verdicts"]] == ["ullm default again", "ullm 1 thread"]
    assert all(each["same_texts"] for each in found["verdicts"])
    assert status == int(any(each["beaten"] for each in found["verdicts"]))
    assert not found["figures"]["errors"]
    assert "| ullm 1 thread `--cpu-threads 1` | yes | same |" in shown
