"""Very many schemas against the default model, which writes by each of them what validates.

The public JSON Schema Test Suite comes from jsonschema's source distribution, which carries it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pydantic_core
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.support.random_schemas import random_schema
from tests.support.server import Server, starting_servers
from ullm.errors import InvalidParameter
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.structured_outputs import StructuredOutputs

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("ULLM_SCHEMA_SEED", "1"))
SCHEMAS = 500
MAX_TOKENS = 256
SUITE = "jsonschema==4.26.0"
DRAFTS: dict[str, Any] = {
    "draft7": jsonschema_rs.Draft7Validator,
    "draft2020-12": jsonschema_rs.Draft202012Validator,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with starting_servers() as start:
        yield start("--dtype", "float32", "--standby-workers", "0", "--context-len", "1024")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The groups of the suite's tests that every implementation must pass."""
    folder = tmp_path_factory.mktemp("suite")
    command = ["pip", "download", "-q", "--no-deps", "--no-binary", "jsonschema", "-d", folder, SUITE]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=600)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    groups = []
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if path.suffix == ".json" and path.parts[1:3] == ("json", "tests") and path.parts[3] in DRAFTS:
                if len(path.parts) == 5:
                    found = files.extractfile(member)
                    assert found is not None
                    groups += [
                        {"file": path.stem, "draft": path.parts[3], **group} for group in json.load(found)
                    ]
    assert len(groups) > 500
    return groups


def parse(text: str) -> Any:
    """Return JSON; numbers beyond those of Python become large ones."""
    return json.loads(text, parse_float=lambda number: max(-1e300, min(1e300, float(number))))


def ask(server: Server, number: int, schema: Any, draft: str, formats: bool) -> str:
    """Have the model answer by a schema; return how that ended, and fail if the answer is not valid.

    Args:
        formats: whether formats must hold, too; the suite uses some that nobody knows.
    """
    body = {
        "messages": [{"role": "user", "content": "Give me an example in JSON."}],
        "max_tokens": MAX_TOKENS,
        "temperature": 1,
        "seed": SEED * 1_000_000 + number,
        "structured_outputs": {"json": json.dumps(schema)},
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"] == "structured_outputs", error
        return "refused"
    assert answer.status_code == 200, (schema, answer.text)
    (choice,) = answer.json()["choices"]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        pydantic_core.from_json(text, allow_partial="trailing-strings")  # the beginning of JSON
        return "cut"
    assert choice["finish_reason"] == "stop"
    validator = DRAFTS[draft](schema, validate_formats=formats)
    assert validator.is_valid(parse(text)), (schema, text)
    return "valid"


def ask_all(server: Server, schemas: Iterable[tuple[Any, str, bool]]) -> Counter[str]:
    with ThreadPoolExecutor(16) as threads:
        return Counter(threads.map(lambda each: ask(server, each[0], *each[1]), enumerate(schemas)))


@pytest.mark.process
def test_random_schemas_with_the_default_model(server: Server) -> None:
    draw = random.Random(SEED)
    counts = ask_all(server, [(random_schema(draw), "draft2020-12", True) for _ in range(SCHEMAS)])
    sys.stdout.write(f"{SCHEMAS} random schemas, seed {SEED}: {dict(counts)}\n")
    assert counts["refused"] == 0
    assert counts["cut"] < SCHEMAS / 4


@pytest.mark.process
def test_the_schemas_of_the_public_suite(server: Server, suite: list[dict[str, Any]]) -> None:
    counts = ask_all(server, [(group["schema"], group["draft"], False) for group in suite])
    sys.stdout.write(f"{len(suite)} schemas of the suite, seed {SEED}: {dict(counts)}\n")
    assert counts["valid"] > counts["cut"]
    assert counts["refused"] < len(suite) / 2


def accepts(grammar: str, text: str) -> bool:
    """Return whether a grammar lets a text be an answer, byte for byte."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_no_grammar_takes_what_the_public_suite_calls_invalid(suite: list[dict[str, Any]]) -> None:
    """What it calls valid may be refused: a grammar has one order of properties, for example."""
    wrong, counts = [], Counter[str]()
    for group in suite:
        try:
            grammar = compile_grammar(StructuredOutputs(json=json.dumps(group["schema"])))
        except InvalidParameter:
            counts["refused schemas"] += 1
            continue
        counts["schemas"] += 1
        for test in group["tests"]:
            taken = accepts(grammar, json.dumps(test["data"], ensure_ascii=False))
            counts[f"{'valid' if test['valid'] else 'invalid'}, {'taken' if taken else 'not taken'}"] += 1
            if taken and not test["valid"]:
                wrong.append((group["file"], group["description"], test["description"]))
    sys.stdout.write(f"the suite's instances: {dict(counts)}\n")
    assert wrong == []
