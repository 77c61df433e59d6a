"""``ullm serve | chat | generate | run-batch | bench | chaos | pull | list | show | rm | doctor``.

Only what parses the command line is imported here; a command's own imports happen when it runs, so
that ``ullm --help`` answers at once. Exit status: 0 done; 1 failed, one line on stderr says why; 2 the
command line, a variable or the configuration file is wrong; 70, 71 and 128 + N as
docs/reference/exit-status.md lists them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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
    with_switches,
)
from ullm.cli.options import ApiKey, ChaosOptions, Json, LoadOptions, Output, whole_number
from ullm.cli.prompt import with_literal_prompt
from ullm.cli.stdout import prepare_stdin, prepare_stdout
from ullm.cli.unused import refuse_beside_raw, refuse_beside_url, without_link_files
from ullm.cli.vllm_flags import (
    check_without_effect,
    hint_for,
    with_all_names,
    with_both_names,
    without_effect,
)
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import UsageError
from ullm.hosting.config_sources import ConfigFile
from ullm.machine import collect_rarely, lasting_imports

CHAT_DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 1024}
"""Temperature and top_p as SmolLM2's model card recommends them."""
GENERATE_DEFAULTS = {"temperature": 0.0, "max_tokens": 512}
"""Greedy, so that the same prompt gives the same answer; bounded, because small models may ramble."""
PULL_OPTIONS = ("model", "revision", "tokenizer")
DOCTOR_OPTIONS = ("host", "port")
MODEL_OPTIONS = (
    *("revision", "dtype", "quantization", "context_len", "device", "cpu_kernels", "trust_remote_code"),
)
"""Options of ``ullm doctor`` that are about the model."""
BATCH_OPTIONS = (
    *("strict_fields", "tool_call_parser", "reasoning_parser", "trust_request_chat_template", "pooling"),
    *("openai_finish_reasons", "max_body", "max_entries", "max_choices", "max_stop_chars"),
)
"""Options of the server that say what requests mean, and what they may ask."""

Url = Annotated[
    str | None,
    Parameter(help="Use the server at this URL, as in http://127.0.0.1:8000, instead of loading a model."),
]
System = Annotated[str | None, Parameter(help="System message.")]
Name = Annotated[str | None, Parameter(name="MODEL", help="The model, as with --model.")]
Prompt = Annotated[
    str | None,
    Parameter(
        help="The prompt; text piped in goes before it, and - or none at all is that text alone. "
        "Behind --, it may look like an option.",
        allow_leading_hyphen=True,
    ),
]

DEFAULT_LOAD, DEFAULT_CHAOS = LoadOptions(), ChaosOptions()
REPEATABLE = Parameter(allow_repeating=True)
"""The last of several values of one option counts; options that list take all of them."""

app = App(
    name="ullm",
    help="Serve, chat with and measure language models. Options such as --max-bs can also be set as "
    "environment variables, as in ULLM_MAX_BS.",
    version=ullm.__version__,
    version_flags=["--version", "-V"],
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
    given = _named(name, options)
    config, server = build(EngineConfig, given), build(ServerConfig, given)
    if server.connect is not None:
        from ullm.hosting.front_ends import refuse_engine_options

        refuse_engine_options(given)
    collect_rarely()
    if config.node_rank > 0:
        from ullm.cli.node import run_node

        return run_node(config)
    with lasting_imports():
        from ullm.cli.serve import serve as run
    return run(config, server)


@app.command
@with_options(sampling_options(CHAT_DEFAULTS), engine_options())
def chat(
    name: Name = None, /, *, system: System = None, url: Url = None, api_key: ApiKey = None, **options: Any
) -> int:
    """Chat on the terminal with a model or a running server."""
    from ullm.cli.chat import chat as run

    options = _named(name, options)
    refuse_beside_url(url, options, api_key)
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
    from ullm.cli.generate import generate as run
    from ullm.cli.prompt import compose, read_prompt

    refuse_beside_url(url, options, api_key)
    refuse_beside_raw(raw, system)
    config = _quiet(options)
    params = sampling_params(options, GENERATE_DEFAULTS)
    question = compose(read_prompt(prompt), system, raw=raw)
    return run(config, question, params, url=url, model=options.get("model"), api_key=api_key)


@app.command(name="list")
def list_caches(*, json: Json = False) -> int:
    """List models, packed weights, tokenizers, kernels, tuning and journals in the caches, with sizes."""
    from ullm.cli.caches import list_caches as run

    return run(as_json=json)


@app.command
def show(name: Annotated[str, Parameter(help="As ullm list shows it.")], /, *, json: Json = False) -> int:
    """Show where an entry of the caches is, and its files."""
    from ullm.cli.caches import show as run

    return run(name, as_json=json)


@app.command
def rm(
    *names: Annotated[str, Parameter(help="As ullm list shows them; a kind, as in kernels, is all of it.")],
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], help="Do not ask.", negative="")] = False,
) -> int:
    """Remove entries of the caches, once you agree."""
    from ullm.cli.caches import rm as run

    return run(names, yes=yes)


@app.command(name="help")
def show_help(*command: Annotated[str, Parameter(help="The command; none: all commands.")]) -> int:
    """Show what a command does and takes, as its --help does."""
    return int(app([*command, "--help"], exit_on_error=False, print_error=False) or 0)


@app.command
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="The shell that reads the script.")], /
) -> int:
    """Print a script that has a shell complete commands and options."""
    sys.stdout.write(app.generate_completion(prog_name="ullm", shell=shell))
    return 0


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

    run.check_output(output)
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

    run.check_output(output)
    report = run.bench_engine(_quiet(options), run.parse_load(load))
    return run.publish(report, output, as_json=json)


@app.command(name="run-batch")
@with_options([option for option in server_options() if option.name in BATCH_OPTIONS], engine_options())
def run_batch(
    source: Annotated[Path, Parameter(name="FILE", help="Requests in the form of OpenAI's batches.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="File for the answers.")],
    concurrency: Annotated[
        int, Parameter(help="Requests in the engine at a time.", converter=whole_number)
    ] = 256,
    resume: Annotated[
        bool,
        Parameter(help="Go on with the output of an earlier run; what failed is run again.", negative=""),
    ] = False,
    **options: Any,
) -> int:
    """Answer the requests of a file, one line for each."""
    from ullm.cli.run_batch import run_batch as run

    server = build(ServerConfig, options)
    return run(_quiet(options), server, source, output, concurrency=concurrency, resume=resume)


@app.command
def chaos(*, options: ChaosOptions = DEFAULT_CHAOS, json: Json = False) -> int:
    """Inject random faults into a server under load, and check that no request is lost. Needs psutil."""
    from ullm.cli.chaos import chaos as run

    return run(options, as_json=json)


@app.command
@with_options([option for option in engine_options() if option.name in PULL_OPTIONS])
def pull(name: Name = None, /, **options: Any) -> int:
    """Fetch a model, or its newer files, and print its path."""
    from ullm.cli.pull import pull as run

    return run(_quiet(_named(name, options)))


@app.command
@with_options(
    [
        *(option for option in server_options() if option.name in DOCTOR_OPTIONS),
        *(option for option in engine_options() if option.name in MODEL_OPTIONS),
    ]
)
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
    """Report what this machine can do, and what would keep ullm, or a model, from running."""
    from ullm.cli.doctor import doctor as run

    about_model = [key for key in options if key in MODEL_OPTIONS]
    if calibrate:
        from ullm.cli.calibrate import calibrate as measure

        return measure(_quiet(_named(name, options)), as_json=json)
    if name is not None:
        from ullm.cli.describe import doctor_model

        return doctor_model(_quiet(_named(name, options)), as_json=json)
    if about_model:
        raise UsageError(f"{', '.join(about_model)}: only for a model, which ullm doctor takes as MODEL")
    return run(build(ServerConfig, options), as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    line = sys.argv[1:] if arguments is None else arguments
    prepare_stdin()
    prepare_stdout()
    return run_command_line(
        app, with_literal_prompt(with_switches(with_all_names(line))), hint_for, with_both_names
    )


def _named(name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the model that was named without a flag."""
    if name is not None and "model" in options:
        raise UsageError(f"the model is named twice: {name} and --model {options['model']}")
    return options if name is None else {**options, "model": name}


def _quiet(options: dict[str, Any]) -> EngineConfig:
    """Return the engine's configuration for commands that talk to a person: log warnings and worse only."""
    from ullm.logs import configure

    file: ConfigFile | None = options.get("config")
    told = os.environ.get("ULLM_LOG_LEVEL") or (file is not None and "log_level" in file.values)
    config = build(EngineConfig, options if told else {"log_level": "warning", **options})
    configure(config.log_level, as_json=config.log_format == "json")
    return without_link_files(config, options)
