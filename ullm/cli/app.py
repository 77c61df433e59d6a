"""The command line: ``ullm serve | chat | generate | bench | chaos | pull | doctor``.

Only what parses the command line is imported here; a command's own imports happen when it runs, so
that ``ullm --help`` answers at once. Exit status: 0 done; 1 failed, one line on stderr says why; 2 the
command line is wrong; 70, 71 and 128 + N as docs/reference/exit-status.md lists them.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, Parameter

import ullm
from ullm.cli.distribution import other_distribution
from ullm.cli.exit_status import run_command_line
from ullm.cli.flags import (
    build,
    engine_options,
    sampling_options,
    sampling_params,
    server_options,
    with_options,
)
from ullm.cli.options import ApiKey, ChaosOptions, Json, LoadOptions, Output, split_commas
from ullm.cli.vllm_flags import check_without_effect, hint_for, with_both_names, without_effect
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import UsageError
from ullm.machine import collect_rarely, lasting_imports

CHAT_DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 1024}
"""Temperature and top_p as SmolLM2's model card recommends them."""
GENERATE_DEFAULTS = {"temperature": 0.0, "max_tokens": 512}
"""Greedy, so that the same prompt gives the same answer; bounded, because small models may ramble."""
PULL_OPTIONS = ("model", "revision", "tokenizer")
DOCTOR_OPTIONS = ("host", "port")

Url = Annotated[
    str | None,
    Parameter(help="Use the server at this URL, as in http://127.0.0.1:8000, instead of loading a model."),
]
System = Annotated[str | None, Parameter(help="System message.")]
Name = Annotated[str | None, Parameter(name="MODEL", help="The model, as with --model.")]
Prompt = Annotated[
    str | None, Parameter(help="The prompt; - reads it from stdin.", allow_leading_hyphen=True)
]

DEFAULT_LOAD, DEFAULT_CHAOS = LoadOptions(), ChaosOptions()
REPEATABLE = Parameter(allow_repeating=True)
"""The last of several values of one option counts; options that list take all of them."""

app = App(
    name="ullm",
    help="Serve, chat with and measure language models. Options such as --max-bs can also be set as "
    "environment variables, as in ULLM_MAX_BS.",
    version=ullm.__version__,
    result_action="return_value",
    default_parameter=REPEATABLE,
)
bench = App(name="bench", help="Measure latency and throughput.", result_action="return_value")
app.command(bench)


@app.command
@with_options(server_options(), engine_options(), without_effect())
def serve(name: Name = None, /, **options: Any) -> int:
    """Serve an OpenAI-compatible API."""
    check_without_effect(options)
    if line := other_distribution():
        sys.stderr.write(f"warning: {line}\n")
    with lasting_imports():
        from ullm.cli.serve import serve as run
    collect_rarely()
    return run(build(EngineConfig, _named(name, options)), build(ServerConfig, options))


@app.command
@with_options(sampling_options(CHAT_DEFAULTS), engine_options())
def chat(
    name: Name = None, /, *, system: System = None, url: Url = None, api_key: ApiKey = None, **options: Any
) -> int:
    """Chat on the terminal with a model or a running server."""
    from ullm.cli.chat import chat as run

    options = _named(name, options)
    params = sampling_params(options, CHAT_DEFAULTS)
    return run(_quiet(options), params, system=system, url=url, model=options.get("model"), api_key=api_key)


@app.command
@with_options(sampling_options(GENERATE_DEFAULTS), engine_options())
def generate(
    prompt: Prompt = None,
    /,
    *,
    raw: Annotated[bool, Parameter(help="Continue the prompt as it is, without a chat template.")] = False,
    system: System = None,
    url: Url = None,
    api_key: ApiKey = None,
    **options: Any,
) -> int:
    """Print the answer to one prompt."""
    from ullm.cli.generate import compose, read_prompt
    from ullm.cli.generate import generate as run

    config = _quiet(options)
    params = sampling_params(options, GENERATE_DEFAULTS)
    question = compose(read_prompt(prompt), system, raw=raw)
    return run(config, question, params, url=url, model=options.get("model"), api_key=api_key)


@bench.command(name="serve")
def bench_serve(
    *,
    url: Annotated[str, Parameter(help="URL of the server to measure.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, Parameter(help="Model to request; default: the first listed.")] = None,
    api_key: ApiKey = None,
    chat: Annotated[bool, Parameter(help="Use chat completions.", negative="")] = False,
    load: LoadOptions = DEFAULT_LOAD,
    json: Json = False,
    output: Output = None,
) -> int:
    """Measure a running OpenAI-compatible server: ullm, vLLM or llama.cpp's."""
    from ullm.cli import bench as run
    from ullm.client.http import Endpoint

    report = run.bench_server(Endpoint.parse(url, api_key), model, run.parse_load(load), chat=chat)
    return run.publish(report, output, as_json=json)


@bench.command(name="engine")
@with_options(engine_options())
def bench_engine(
    *,
    load: LoadOptions = DEFAULT_LOAD,
    json: Json = False,
    output: Output = None,
    **options: Any,
) -> int:
    """Measure an engine in this process, without HTTP."""
    from ullm.cli import bench as run

    report = run.bench_engine(_quiet(options), run.parse_load(load))
    return run.publish(report, output, as_json=json)


@app.command
def chaos(*, options: ChaosOptions = DEFAULT_CHAOS, json: Json = False) -> int:
    """Inject random faults into a server under load, and check that no request is lost. Needs psutil."""
    import shlex

    from ullm.chaos.chaos_run import ChaosPlan
    from ullm.cli.chaos import chaos as run

    plan = ChaosPlan(
        options.model,
        tuple(shlex.split(options.server)),
        options.seed,
        options.faults,
        options.seconds,
        options.streams,
        only=tuple(kind for kind in split_commas(options.kinds) if kind),
    )
    return run(plan, options.output, options.log, as_json=json)


@app.command
@with_options([option for option in engine_options() if option.name in PULL_OPTIONS])
def pull(name: Name = None, /, **options: Any) -> int:
    """Fetch a model, or its newer files, and print its path."""
    from ullm.cli.pull import pull as run

    return run(_quiet(_named(name, options)))


@app.command
@with_options([option for option in server_options() if option.name in DOCTOR_OPTIONS])
def doctor(
    name: Name = None,
    /,
    *,
    calibrate: Annotated[
        bool, Parameter(help="Measure the CPU kernels for the model, and keep the choice.", negative="")
    ] = False,
    json: Json = False,
    **options: Any,
) -> int:
    """Report what this machine can do, and what would keep ullm from running."""
    from ullm.cli.doctor import doctor as run

    if name is not None and not calibrate:
        raise UsageError(f"{name}: only ullm doctor --calibrate takes a model")
    if calibrate:
        from ullm.cli.calibrate import calibrate as measure

        return measure(_quiet({} if name is None else {"model": name}), as_json=json)
    return run(build(ServerConfig, options), as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    line = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what an encoding such as ASCII has not
    return run_command_line(app, line, hint_for, with_both_names)


def _named(name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the model that was named without a flag."""
    if name is not None and "model" in options:
        raise UsageError(f"the model is named twice: {name} and --model {options['model']}")
    return options if name is None else {**options, "model": name}


def _quiet(options: dict[str, Any]) -> EngineConfig:
    """Return the engine's configuration for commands that talk to a person: log warnings and worse only."""
    from ullm.logs import configure

    config = build(
        EngineConfig, options if os.environ.get("ULLM_LOG_LEVEL") else {"log_level": "warning", **options}
    )
    configure(config.log_level)
    return config
