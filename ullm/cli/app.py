"""The command line: ``ullm serve | chat | generate | bench | pull | doctor``.

Only what parses the command line is imported here; a command's own imports happen when it runs, so
that ``ullm --help`` answers at once. Exit status: 0 done; 1 it could not be done, one line on stderr
says why; 2 the command line is wrong; 70, 71 and 128 + N as docs/configuration.md lists them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

import ullm
from ullm.cli.flags import (
    build,
    engine_options,
    sampling_options,
    sampling_params,
    server_options,
    with_options,
)
from ullm.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from ullm.errors import EngineDead, UllmError, UsageError
from ullm.logs import flush
from ullm.machine import collect_rarely, lasting_imports
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_FAILED

FAILED = 1
USAGE = 2
INTERRUPTED = 130

CHAT_DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 1024}
"""Temperature and top_p as SmolLM2's model card recommends them."""
GENERATE_DEFAULTS = {"temperature": 0.0, "max_tokens": 512}
"""Greedy, so that the same prompt gives the same answer; bounded, because small models may ramble."""

Url = Annotated[
    str | None, Parameter(help="Ask this server, as in http://127.0.0.1:8000, instead of loading a model.")
]
ApiKey = Annotated[str | None, Parameter(help="Bearer token for --url.", env_var="ULLM_API_KEY")]
System = Annotated[str | None, Parameter(help="System message.")]
Name = Annotated[str | None, Parameter(name="MODEL", help="As --model.")]
Prompt = Annotated[str | None, Parameter(help="The prompt; - reads stdin.", allow_leading_hyphen=True)]

load = Group("Load")
Concurrency = Annotated[str, Parameter(help="Requests in flight, one run for each.", group=load)]
Requests = Annotated[
    int | None, Parameter(help="Requests per run; default: the concurrency, at least 4.", group=load)
]
PromptWords = Annotated[str, Parameter(help="Words per prompt: a number or a range.", group=load)]
OutputTokens = Annotated[str, Parameter(help="Tokens to generate: a number or a range.", group=load)]
SharedPrefix = Annotated[int, Parameter(help="Words that all prompts begin with.", group=load)]
Seed = Annotated[int, Parameter(help="The same seed asks the same.", group=load)]
LoadTemperature = Annotated[float, Parameter(name="--temperature", help="0: greedy.", group=load)]
LoadTopP = Annotated[float, Parameter(name="--top-p", help="At a temperature above 0.", group=load)]
JsonObject = Annotated[str, Parameter(help="Its own options, as a JSON object.", allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(help="Print JSON instead of a table.", negative="")]
Output = Annotated[Path | None, Parameter(help="Also write the report there; .md for Markdown, else JSON.")]

app = App(
    name="ullm",
    help="Serve, chat with and measure language models. An option such as --max-bs can also be set by an "
    "environment variable, ULLM_MAX_BS.",
    version=ullm.__version__,
    result_action="return_value",
)
bench = App(name="bench", help="Measure latency and throughput.", result_action="return_value")
app.command(bench)


@app.command
@with_options(server_options(), engine_options())
def serve(name: Name = None, /, **given: Any) -> int:
    """Serve an OpenAI-compatible API."""
    with lasting_imports():
        from ullm.cli.serve import serve as run
    collect_rarely()
    return run(build(EngineConfig, _named(name, given)), build(ServerConfig, given))


@app.command
@with_options(sampling_options(CHAT_DEFAULTS), engine_options())
def chat(
    name: Name = None, /, *, system: System = None, url: Url = None, api_key: ApiKey = None, **given: Any
) -> int:
    """Chat on the terminal, with a model or with a running server."""
    from ullm.cli.chat import chat as run

    given = _named(name, given)
    params = sampling_params(given, CHAT_DEFAULTS)
    return run(_quiet(given), params, system=system, url=url, model=given.get("model"), api_key=api_key)


@app.command
@with_options(sampling_options(GENERATE_DEFAULTS), engine_options())
def generate(
    prompt: Prompt = None,
    /,
    *,
    raw: Annotated[bool, Parameter(help="Go on from the prompt as it is, without a chat template.")] = False,
    system: System = None,
    url: Url = None,
    api_key: ApiKey = None,
    **given: Any,
) -> int:
    """Answer one prompt on stdout."""
    from ullm.cli.generate import compose, read_prompt
    from ullm.cli.generate import generate as run

    config = _quiet(given)
    params = sampling_params(given, GENERATE_DEFAULTS)
    question = compose(read_prompt(prompt), system, raw=raw)
    return run(config, question, params, url=url, model=given.get("model"), api_key=api_key)


@bench.command(name="serve")
def bench_serve(
    *,
    url: Annotated[str, Parameter(help="The server to measure.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, Parameter(help="Model to ask for; default: the first listed.")] = None,
    api_key: ApiKey = None,
    chat: Annotated[bool, Parameter(help="Use chat completions.", negative="")] = False,
    concurrency: Concurrency = "1,4,16,32",
    requests: Requests = None,
    prompt_words: PromptWords = "32",
    output_tokens: OutputTokens = "128",
    shared_prefix: SharedPrefix = 0,
    seed: Seed = 0,
    temperature: LoadTemperature = 0.0,
    top_p: LoadTopP = 1.0,
    json: Json = False,
    output: Output = None,
) -> int:
    """Measure a running OpenAI-compatible server: ullm, vLLM, llama.cpp's."""
    from ullm.cli import bench as run
    from ullm.client.http import Endpoint

    workload = run.make_workload(prompt_words, output_tokens, shared_prefix, seed, temperature, top_p)
    levels = run.parse_concurrency(concurrency)
    report = run.bench_server(Endpoint.parse(url, api_key), model, workload, levels, requests, chat=chat)
    return run.publish(report, output, as_json=json)


@bench.command(name="engine")
@with_options(engine_options())
def bench_engine(
    *,
    concurrency: Concurrency = "1,4,16,32",
    requests: Requests = None,
    prompt_words: PromptWords = "32",
    output_tokens: OutputTokens = "128",
    shared_prefix: SharedPrefix = 0,
    seed: Seed = 0,
    temperature: LoadTemperature = 0.0,
    top_p: LoadTopP = 1.0,
    json: Json = False,
    output: Output = None,
    **given: Any,
) -> int:
    """Measure an engine in this process, without HTTP."""
    from ullm.cli import bench as run

    workload = run.make_workload(prompt_words, output_tokens, shared_prefix, seed, temperature, top_p)
    report = run.bench_engine(_quiet(given), workload, run.parse_concurrency(concurrency), requests)
    return run.publish(report, output, as_json=json)


@bench.command(name="compare")
def bench_compare(
    *,
    model: Annotated[str, Parameter(help="As ullm serve --model; peers get its folder.")] = DEFAULT_MODEL,
    ullm: Annotated[
        list[str] | None,
        Parameter(help="NAME=OPTIONS of ullm serve, as in 'int8=--quantization int8'; may be repeated."),
    ] = None,
    vllm: Annotated[str, Parameter(help="The vllm executable, or a Python that has it.")] = "",
    vllm_options: Annotated[str, Parameter(help="More of vllm serve.", allow_leading_hyphen=True)] = "",
    llama_server: Annotated[str, Parameter(help="llama.cpp's llama-server.")] = "",
    llama_options: Annotated[str, Parameter(help="More of llama-server.", allow_leading_hyphen=True)] = "",
    gguf: Annotated[Path | None, Parameter(help="The weights for --llama-server.")] = None,
    transformers: Annotated[str, Parameter(help="A Python that has transformers; static batches.")] = "",
    concurrency: Annotated[str, Parameter(help="Streams at once.")] = "1,4,16,32",
    scenarios: Annotated[str, Parameter(help="Some of these.")] = "decode,sampled,prefill,prefix",
    output_tokens: Annotated[int, Parameter(help="New tokens per stream.")] = 128,
    rounds: Annotated[int, Parameter(help="How often each is started and measured.")] = 3,
    baseline: Annotated[str | None, Parameter(help="Whom to compare with; default: the first peer.")] = None,
    seed: Seed = 0,
    plot: Annotated[Literal["png", "svg", "none"], Parameter(help="The plot's format.")] = "png",
    output: Annotated[Path, Parameter(help="Folder for compare.md, .json, the plot and logs.")] = Path(
        "compare"
    ),
) -> int:
    """Measure ullm beside vLLM, llama.cpp and transformers, one at a time, in rounds. Needs ullm[bench]."""
    from tests.benchmarks.commands.compare import Peers
    from tests.benchmarks.commands.compare import bench_compare as run
    from tests.benchmarks.compare.scenarios import Load
    from ullm.cli.bench import parse_concurrency

    peers = Peers(tuple(ullm or ()), vllm, vllm_options, llama_server, llama_options, gguf, transformers)
    chosen = tuple(name.strip() for name in scenarios.split(","))
    levels = tuple(parse_concurrency(concurrency))
    load = Load(levels, chosen, output_tokens=output_tokens, seed=seed)
    return run(model, peers, load, rounds, baseline, output, "" if plot == "none" else plot)


@bench.command(name="batch")
def bench_batch(
    *,
    model: Annotated[str, Parameter(help="Hub id or folder that all engines load.")] = DEFAULT_MODEL,
    shape: Annotated[
        Literal["", "qwen3-0.6b", "tiny"],
        Parameter(help="Instead of --model: random bfloat16 weights of this shape, written below --output."),
    ] = "",
    ullm: Annotated[
        list[str] | None,
        Parameter(help="NAME=OPTIONS of ullm serve, as in 'eager=--enforce-eager'; may be repeated."),
    ] = None,
    transformers: Annotated[str, Parameter(help="A Python that has transformers 5 (generate_batch).")] = "",
    transformers_options: JsonObject = "",
    nano_vllm: Annotated[str, Parameter(help="A Python that has nano-vllm.")] = "",
    nano_vllm_options: JsonObject = "",
    vllm: Annotated[str, Parameter(help="A Python that has vLLM.")] = "",
    vllm_options: JsonObject = "",
    requests: Annotated[int, Parameter(help="At once.", group=load)] = 256,
    prompt_tokens: Annotated[
        str, Parameter(help="Of a prompt: a number or a range.", group=load)
    ] = "100-1024",
    output_tokens: OutputTokens = "100-1024",
    single_tokens: Annotated[int, Parameter(help="Of one request alone.", group=load)] = 256,
    temperature: LoadTemperature = 0.6,
    seed: Seed = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="For those that can be told.")] = "auto",
    rounds: Annotated[int, Parameter(help="How often each is loaded and measured.")] = 3,
    baseline: Annotated[str | None, Parameter(help="Whom to compare with; default: the first peer.")] = None,
    output: Annotated[Path, Parameter(help="Folder for batch.md, .json and logs.")] = Path("batch"),
) -> int:
    """Give many requests to each engine at once, offline, in rounds. Needs ullm[bench]."""
    from tests.benchmarks.batch.load import BatchLoad
    from tests.benchmarks.commands.batch import Peers
    from tests.benchmarks.commands.batch import bench_batch as run
    from ullm.bench.workload import Length

    prompt = Length.parse(prompt_tokens, "--prompt-tokens")
    out = Length.parse(output_tokens, "--output-tokens")
    pythons = (("transformers", transformers), ("nano-vllm", nano_vllm), ("vllm", vllm))
    options = (
        ("transformers", transformers_options),
        ("nano-vllm", nano_vllm_options),
        ("vllm", vllm_options),
    )
    peers = Peers(tuple(ullm or ()), pythons, options)
    asked = BatchLoad(requests, prompt, out, single_tokens, temperature, seed)
    return run(model, shape, peers, asked, device, rounds, baseline, output)


@bench.command(name="chaos")
def bench_chaos(
    *,
    model: Annotated[str, Parameter(help="scripted, tiny, or as ullm serve --model.")] = "scripted",
    seed: Annotated[int, Parameter(help="The same seed draws the same faults in the same order.")] = 0,
    faults: Annotated[int, Parameter(help="How many.")] = 300,
    seconds: Annotated[float, Parameter(help="By when they must all have been injected.")] = 600.0,
    streams: Annotated[int, Parameter(help="Clients that ask one request after another.")] = 8,
    kinds: Annotated[str, Parameter(help="Only these, separated by commas, as in worker,client.slow.")] = "",
    server: Annotated[str, Parameter(help="More options of ullm serve.", allow_leading_hyphen=True)] = "",
    json: Json = False,
    output: Annotated[Path | None, Parameter(help="Also write the report there, as JSON.")] = None,
    log: Annotated[Path | None, Parameter(help="Also keep the server's log there.")] = None,
) -> int:
    """Disturb a server under load by random faults, and check that nothing is lost. Needs ullm[bench]."""
    import shlex

    from ullm.chaos.run import Plan
    from ullm.cli.chaos import chaos

    only = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
    plan = Plan(model, tuple(shlex.split(server)), seed, faults, seconds, streams, only=only)
    return chaos(plan, output, log, as_json=json)


@bench.command(name="events")
def bench_events(
    *,
    server: Annotated[
        list[str] | None,
        Parameter(
            help="NAME=COMMAND with {port}; after ' -- ', options to drain with {seconds}.", negative=""
        ),
    ] = None,
    only: Annotated[
        list[str] | None, Parameter(help="Only this event; may be repeated.", negative="")
    ] = None,
    streams: Annotated[int, Parameter(help="In flight at each event.")] = 8,
    start_up: Annotated[
        float, Parameter(help="Seconds into its start at which a server gets SIGTERM.")
    ] = 1.0,
    output: Annotated[Path | None, Parameter(help="Also write what was found there, as JSON.")] = None,
) -> int:
    """See what clients get when servers are stopped, or lose a worker. Needs ullm[bench]."""
    from tests.benchmarks.commands.events import events

    return events(server or (), only or (), streams, start_up, output)


@bench.command(name="soak")
def bench_soak(
    *,
    model: Annotated[str, Parameter(help="scripted, tiny, or as ullm serve --model.")] = "scripted",
    server: Annotated[str, Parameter(help="More options of ullm serve.", allow_leading_hyphen=True)] = "",
    step_ms: Annotated[float, Parameter(help="Of the scripted model.")] = 20.0,
    streams: Annotated[int, Parameter(help="Clients that ask one request after another.")] = 16,
    seconds: Annotated[float, Parameter(help="How long at the least.")] = 1800.0,
    requests: Annotated[int, Parameter(help="How many must be answered at the least.")] = 0,
    interval: Annotated[float, Parameter(help="Seconds between two samples.")] = 10.0,
    prompt_words: PromptWords = "8-64",
    output_tokens: OutputTokens = "8-64",
    seed: Seed = 0,
    warm_up: Annotated[
        float, Parameter(help="Share of the run that is not judged; the KV cache fills.")
    ] = 0.1,
    max_time_growth: Annotated[float, Parameter(help="Of processor time per step, as a share.")] = 0.05,
    max_memory_growth: Annotated[float, Parameter(help="As a share.")] = 0.03,
    memory_slack: Annotated[float, Parameter(help="MiB beyond that.")] = 4.0,
    max_slowdown: Annotated[float, Parameter(help="Of steps and tokens per second, as a share.")] = 0.1,
    plot: Annotated[Literal["png", "svg", "none"], Parameter(help="The plot's format.")] = "png",
    output: Annotated[Path, Parameter(help="Folder for soak.md, .json, the plot and the log.")] = Path(
        "soak"
    ),
) -> int:
    """Keep a server busy, and fail if its costs grow with time or with requests. Needs ullm[bench]."""
    import shlex

    from tests.benchmarks.commands.soak import soak
    from tests.benchmarks.soak.judge import Tolerance
    from tests.benchmarks.soak.run import Plan
    from ullm.bench.workload import Length

    words = Length.parse(prompt_words, "--prompt-words")
    tokens = Length.parse(output_tokens, "--output-tokens")
    tolerance = Tolerance(max_slowdown, max_time_growth, max_memory_growth, memory_slack)
    arguments = tuple(shlex.split(server))
    lasts = (streams, seconds, requests, interval)
    plan = Plan(model, arguments, *lasts, words, tokens, seed, warm_up, tolerance)
    return soak(plan, step_ms, output, "" if plot == "none" else plot)


@bench.command(name="front-end")
def bench_front_end(
    *,
    streams: Annotated[int, Parameter(help="At once.")] = 1000,
    output_tokens: Annotated[int, Parameter(help="New tokens per stream.")] = 128,
    step_ms: Annotated[float, Parameter(help="Of the scripted model.")] = 40.0,
    rounds: Annotated[int, Parameter(help="How often, with one server.")] = 3,
    server: Annotated[str, Parameter(help="More options of ullm serve.", allow_leading_hyphen=True)] = "",
    json: Json = False,
    output: Output = None,
    log: Annotated[Path, Parameter(help="Keep the server's log there.")] = Path("front-end.log"),
) -> int:
    """Measure the front end alone: many streams of a model that only takes time. Needs ullm[bench]."""
    import shlex

    from tests.benchmarks.commands.front_end import front_end
    from tests.benchmarks.front_end import Load

    load = Load(streams, output_tokens, step_ms / 1000, rounds, tuple(shlex.split(server)))
    return front_end(load, output, log, as_json=json)


@bench.command(name="startup")
def bench_startup(
    *,
    model: Annotated[str, Parameter(help="As ullm serve --model.")] = DEFAULT_MODEL,
    server: Annotated[str, Parameter(help="More options of ullm serve.", allow_leading_hyphen=True)] = "",
    contexts: Annotated[str, Parameter(help="Context lengths.")] = "512,2048,8192",
    blocks: Annotated[str, Parameter(help="Numbers of KV blocks; default: as the server chooses.")] = "",
    rounds: Annotated[int, Parameter(help="How often each is started.")] = 5,
    max_growth: Annotated[
        float, Parameter(help="Of processor time to the first token over the first one's, as a share.")
    ] = 0.1,
    output: Output = None,
) -> int:
    """See what a start costs against context length, in alternation. Needs ullm[bench]."""
    import shlex

    from tests.benchmarks.commands.startup import parse_numbers, startup

    lengths, counts = parse_numbers(contexts, "--contexts"), parse_numbers(blocks, "--blocks")
    return startup(model, shlex.split(server), lengths, counts, rounds, max_growth, output)


@bench.command(name="pauses")
def bench_pauses(
    *,
    model: Annotated[str, Parameter(help="As ullm serve --model.")] = DEFAULT_MODEL,
    server: Annotated[str, Parameter(help="More options of ullm serve.", allow_leading_hyphen=True)] = "",
    streams: Annotated[int, Parameter(help="In flight at each event.")] = 6,
    rounds: Annotated[int, Parameter(help="How often each is measured.")] = 3,
    output: Output = None,
) -> int:
    """See how long clients wait when a worker is lost, a server stops, or sleeps. Needs ullm[bench]."""
    import shlex

    from tests.benchmarks.commands.pauses import pauses

    return pauses(model, shlex.split(server), streams, rounds, output)


@app.command
@with_options([option for option in engine_options() if option.name in ("model", "revision", "tokenizer")])
def pull(name: Name = None, /, **given: Any) -> int:
    """Fetch a model, or its newer files, and print where it is."""
    from ullm.cli.pull import pull as run

    return run(_quiet(_named(name, given)))


@app.command
@with_options([option for option in server_options() if option.name in ("host", "port")])
def doctor(*, json: Json = False, **given: Any) -> int:
    """Say what this machine can do, and what would keep ullm from running."""
    from ullm.cli.doctor import doctor as run

    return run(build(ServerConfig, given), as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        return _complain(" ".join(str(error).split()), USAGE)
    except BaseException as error:
        return _failed(error, debug=_wants_debug(arguments))
    return int(status or 0)


def _failed(error: BaseException, *, debug: bool) -> int:
    """The exit status for an exception; one that is neither the user's nor a signal's goes on."""
    from ullm.supervision.errors import SupervisionError, root_cause  # trio comes with it

    match root_cause(error):
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            # Whoever read our output has enough; Python must not complain about it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        case OSError() as cause if cause.errno is not None:
            return _complain(f"{cause.filename or 'stdout'}: {cause.strerror}", FAILED)
        case (UllmError() | SupervisionError()) as cause:
            if debug:
                traceback.print_exception(error)
            return _complain(" ".join(str(cause).split()), _status(cause))
    raise error


def _status(cause: Exception) -> int:
    if isinstance(cause, UsageError):
        return USAGE
    return EXIT_FAILED if isinstance(cause, EngineDead) else FAILED


def _complain(line: str, status: int) -> int:
    flush(stop_budget.LOG_FLUSH)  # what was logged before comes first
    print(f"error: {line}", file=sys.stderr)
    return status


def _wants_debug(arguments: Sequence[str]) -> bool:
    flag = "--log-level"
    given = [b for a, b in zip(arguments, [*arguments[1:], ""], strict=True) if a == flag]
    given += [a.removeprefix(f"{flag}=") for a in arguments if a.startswith(f"{flag}=")]
    return (given or [os.environ.get("ULLM_LOG_LEVEL", "")])[-1] == "debug"


def _named(name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options with the model that was named without a flag."""
    if name is not None and "model" in given:
        raise UsageError(f"the model is named twice: {name} and --model {given['model']}")
    return given if name is None else {**given, "model": name}


def _quiet(given: dict[str, Any]) -> EngineConfig:
    """The engine's configuration for commands that talk to a person: logs only from warnings on."""
    from ullm.logs import configure

    config = build(
        EngineConfig, {"log_level": "warning", **given} if "ULLM_LOG_LEVEL" not in os.environ else given
    )
    configure(config.log_level)
    return config
