"""Hub ids, against a hub of our own on loopback; the client reads its address at import, so processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ullm.testing import tiny_tokenizer

pytestmark = pytest.mark.process
COMMIT = "a" * 40
RESOLVE = """
import sys
from ullm import hub
from ullm.config import EngineConfig
from ullm.errors import ModelError
calls = []
try:
    config = EngineConfig(model=sys.argv[1], revision=sys.argv[2] or None)
    model = hub.resolve(config, lambda *call: calls.append(call))
except ModelError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(model.path)
    print(calls[-1][1:] if calls else "cached")
"""


def run(name: str, url: str, tmp_path: Path, revision: str = "", **environ: str) -> list[str]:
    """Resolve in a process of its own; the lines that it printed."""
    own = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **environ}
    command = [sys.executable, "-c", RESOLVE, name, revision]
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A sharded model, beside files that nobody needs."""
    tiny_tokenizer(tmp_path / "tokenizer")
    shards = {f"model-{i}.safetensors": save({f"t{i}": np.ones(64, np.float32)}) for i in (1, 2)}
    index = {"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": (tmp_path / "tokenizer" / "tokenizer.json").read_bytes(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "consolidated.safetensors": b"the same weights once more",
        "pytorch_model.bin": b"and again",
        "README.md": b"text",
    }


def hub_of(files: dict[str, bytes], asked: list[str], *, status: int = 200, error: str = "") -> type:
    """A hub with one model, owner/name."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if status != 200:
                self._answer(status, b"{}", {"X-Error-Code": error})
            elif self.path.startswith("/api/models/owner/name"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                body = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self._answer(200, json.dumps(body).encode(), {})
            else:
                name = self.path.partition("/resolve/")[2].partition("/")[2]
                if name not in files:  # whether the hub can be reached is asked of any file
                    return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                digest = hashlib.sha256(files[name]).hexdigest()
                self._answer(200, files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    return Hub


def test_only_what_is_needed_is_fetched_and_once(
    tmp_path: Path, files: dict[str, bytes], serve: Callable[[Any], str]
) -> None:
    asked: list[str] = []
    url = serve(hub_of(files, asked))
    path, last = run("owner/name", url, tmp_path)
    weights = sum(len(files[f"model-{i}.safetensors"]) for i in (1, 2))
    assert {file.name for file in Path(path).iterdir()} == set(files) - {
        "consolidated.safetensors", "pytorch_model.bin", "README.md",
    }  # fmt: skip
    assert last == f"({weights}, {weights})"
    asked.clear()
    assert run("owner/name", url, tmp_path) == [path, "cached"]
    assert run("owner/name", url, tmp_path, HF_HUB_OFFLINE="1") == [path, "cached"]
    assert asked == []


def test_a_single_file_counts_before_an_index_of_others(
    tmp_path: Path, files: dict[str, bytes], serve: Callable[[Any], str]
) -> None:
    files["model.safetensors"] = save({"t": np.ones(64, np.float32)})
    path, _ = run("owner/name", serve(hub_of(files, [])), tmp_path)
    fetched = {file.name for file in Path(path).glob("*.safetensors")}
    assert fetched == {"model.safetensors"}


def test_a_shard_lost_from_the_cache_is_fetched_again(
    tmp_path: Path, files: dict[str, bytes], serve: Callable[[Any], str]
) -> None:
    asked: list[str] = []
    url = serve(hub_of(files, asked))
    path, _ = run("owner/name", url, tmp_path)
    shard = Path(path) / "model-2.safetensors"
    shard.resolve().unlink()
    shard.unlink(missing_ok=True)
    assert run("owner/name", url, tmp_path)[0] == path
    assert shard.read_bytes() == files["model-2.safetensors"]


def test_repository_without_safetensors(
    tmp_path: Path, files: dict[str, bytes], serve: Callable[[Any], str]
) -> None:
    files = {"config.json": files["config.json"], "model.Q4_1.gguf": b"GGUF", "pytorch_model.bin": b""}
    (line,) = run("owner/name", serve(hub_of(files, [])), tmp_path)
    assert line.startswith("ModelUnsupported: owner/name has no .safetensors file")
    assert "owner/name/FILE: model.Q4_1.gguf" in line


def part_name(number: int) -> str:
    return f"q/tiny-{number:05}-of-00003.gguf"


def test_all_parts_of_a_split_gguf_are_fetched_and_once(
    tmp_path: Path, tiny_gguf: Path, serve: Callable[[Any], str]
) -> None:
    data, asked = tiny_gguf.read_bytes(), []
    files = {part_name(1): data, part_name(2): b"two", part_name(3): b"three!", "q/other.gguf": b"GGUF"}
    url = serve(hub_of(files, asked))
    path, last = run(f"owner/name/{part_name(1)}", url, tmp_path)
    folder = Path(path).parent
    assert {file.name for file in folder.iterdir()} == {Path(part_name(number)).name for number in (1, 2, 3)}
    assert (folder / Path(part_name(2)).name).read_bytes() == b"two"
    assert "reading the tokenizer" not in last
    asked.clear()
    assert run(f"owner/name/{part_name(1)}", url, tmp_path, HF_HUB_OFFLINE="1") == [path, "cached"]
    assert asked == []
    lost = folder / Path(part_name(3)).name
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    assert run(f"owner/name/{part_name(1)}", url, tmp_path)[0] == path
    assert lost.read_bytes() == b"three!"


def test_a_part_that_the_hub_lacks(tmp_path: Path, serve: Callable[[Any], str]) -> None:
    asked: list[str] = []
    url = serve(hub_of({part_name(1): b"GGUF", part_name(3): b"GGUF"}, asked))
    (line,) = run(f"owner/name/{part_name(1)}", url, tmp_path)
    assert line == f"ModelNotFound: owner/name has no file {part_name(2)}, a part of {part_name(1)}"
    assert not any("resolve" in each and ".gguf" in each for each in asked)  # nothing is downloaded in vain


def test_another_part_than_the_first(tmp_path: Path, serve: Callable[[Any], str]) -> None:
    (line,) = run(f"owner/name/{part_name(2)}", serve(hub_of({}, [])), tmp_path)
    assert line == f"ModelUnsupported: {part_name(2)}: this is part 2 of a model; name part 00001"
    (line,) = run("owner/name", serve(hub_of({part_name(n): b"GGUF" for n in (1, 2, 3)}, [])), tmp_path)
    assert line.endswith(f"name one of its GGUF files, as owner/name/FILE: {part_name(1)}")


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, "RepoNotFound", "no such public model on the hub"),
        (403, "GatedRepo", "gated"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (500, "", "cannot be reached"),
    ],
)
def test_refusals(tmp_path: Path, serve: Callable[[Any], str], status: int, error: str, says: str) -> None:
    url = serve(hub_of({}, [], status=status, error=error))
    (line,) = run("owner/name", url, tmp_path, revision="v9")
    assert line.startswith("ModelNotFound: owner/name")
    assert says in line


def test_a_hub_out_of_reach_is_given_up_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    (line,) = run("owner/name", "http://127.0.0.1:1", tmp_path)
    assert "cannot be reached" in line
    assert time.monotonic() - started < 15
