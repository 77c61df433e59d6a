"""``python -m tests.benchmarks``: one command line, with errors of one line."""

from __future__ import annotations

import pytest

from tests.benchmarks.command_line import main

NAMES = (
    "batch compare defaults disturbance events front-end holds migration offline pauses perplexity soak "
    "startup".split()
)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"Usage: python -m tests.benchmarks {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("soak --nope", "Unknown option: --nope"),
        ("soak --seconds 60", "--interval 10 is too long for --seconds 60"),
        ("compare --scenarios decode,nope", "--scenarios nope"),
        ("compare --concurrency 1 --concurrency x", "--concurrency 1,x"),
        ("batch --requests 0", "--requests must be at least 1"),
        ("batch --rounds 5 --rounds 0", "--rounds must be at least 1, got 0"),
        ("defaults --only nope", "--only nope: expected some of 1 thread"),
        ("defaults --rounds 0", "--rounds must be at least 1"),
        ("offline --gguf no/such.gguf", "--gguf no/such.gguf: no such file"),
        ("offline --gguf x --streams 1,y", "--streams 1,y"),
        ("offline --gguf x --neighbours -1", "--neighbours must be at least 0"),
        ("disturbance --only nope", "--only nope: expected some of undisturbed, 1 neighbour"),
        ("disturbance --rounds 0", "--rounds must be at least 1"),
        ("disturbance --seconds 0", "--seconds must be above 0, got 0"),
        ("disturbance --output-tokens 0", "--output-tokens must be at least 1"),
        ("disturbance --concurrency 1,x", "--concurrency 1,x"),
        ("events --only nope", "--only 'nope'"),
        ("startup --contexts 512,x", "--contexts 512,x"),
        ("front-end --streams 0", "--streams must be at least 1"),
        ("migration --rounds 0", "--context 1500 --tokens 500 --rounds 0: at least 1 each"),
        ("holds --patience 0", "--patience must be above 0"),
        ("holds --tree no/such", "--tree no/such: no folder ullm in it"),
        ("perplexity --tokens 0", "--tokens must be at least 1, got 0"),
        ("perplexity --only Q9_0", "--only Q9_0: expected some of Q4_0, Q4_1"),
        ("pauses --rounds 0", "--rounds must be at least 1"),
    ],
)
def test_errors_are_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
