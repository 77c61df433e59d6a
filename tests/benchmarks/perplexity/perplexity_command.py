"""``python -m tests.benchmarks perplexity``: what GGUF's formats cost a model, and ullm's kernels for them.

Every format is written from the same weights, read once as the kernels take it and once dequantized to
float32 (``--quantization none``), and asked for the same text. The first difference is what the kernels cost,
the second what the format costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from tests.benchmarks.perplexity.results import FormatsReport
from tests.benchmarks.shared_options import Model
from ullm.cli.options import split_commas
from ullm.cli.terminal import stderr
from ullm.config import DEFAULT_MODEL, ModelConfig
from ullm.errors import UsageError
from ullm.hub import resolve

TEXT = Path(__file__).parents[2] / "model" / "architectures" / "alice.txt"
FORMATS = (
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS),
)


def perplexity(
    *,
    model: Model = DEFAULT_MODEL,
    only: Annotated[
        list[str] | None,
        Parameter(help="Names of the formats, separated by commas; default: all.", negative=""),
    ] = None,
    tokens: Annotated[int, Parameter(help="Tokens of the text that are predicted.")] = 1024,
    output: Annotated[Path, Parameter(help="Folder for perplexity.md and perplexity.json.")] = Path(
        "perplexity"
    ),
) -> int:
    """Measure what GGUF's formats cost a Llama model in perplexity, with ullm's kernels and without."""
    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {tokens}")
    kinds = choose_formats(only)
    path = resolve(ModelConfig(model=model)).path
    text = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    if tokens >= len(text):
        raise UsageError(f"--tokens must be less than {len(text)}, the length of the text, got {tokens}")
    from tests.benchmarks.perplexity.measured import measure  # which takes seconds to import

    output.mkdir(parents=True, exist_ok=True)
    report = measure(path, text[: tokens + 1], kinds, lambda line: stderr().print(line))
    (output / "perplexity.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    table = "\n".join(lines(report)) + "\n"
    (output / "perplexity.md").write_text(table, encoding="utf-8")
    print(table, end="")  # noqa: T201
    return 0


def choose_formats(names: list[str] | None) -> list[Kind]:
    """Return the formats of these names; all without any.

    Raises:
        UsageError: one is not measured.
    """
    known = {kind.name: kind for kind in FORMATS}
    chosen = split_commas(names) if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"--only {unknown[0]}: expected some of {', '.join(known)}")
    return [known[name] for name in chosen]


def lines(report: FormatsReport) -> Iterator[str]:
    """Return the table, in Markdown."""
    yield f"{report.model}, {report.tokens} tokens, perplexity unquantized {report.unquantized:.3f}"
    yield ""
    yield "| format | of the layers' weights | float32 | kernels | kernels' cost | format's cost |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for each in report.formats:
        numbers = f"{each.weights:.0%} | {each.dequantized:.3f} | {each.kernels:.3f}"
        costs = (each.kernels / each.dequantized - 1, each.dequantized / report.unquantized - 1)
        yield f"| {each.format} | {numbers} | " + " | ".join(f"{cost:+.2%}" for cost in costs) + " |"
