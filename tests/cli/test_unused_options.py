"""Options that would have no effect are refused by their names, in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio

from tests.support.link_files import LinkFiles, make_link_files
from ullm.cli.app import main
from ullm.cli.unused import without_link_files
from ullm.config import LINK_FILES, EngineConfig, ServerConfig
from ullm.engine import open_engine
from ullm.errors import ConfigError

LINK = ["--link-certfile", "a", "--link-keyfile", "b", "--link-ca-file", "c"]
NAMES = "--link-certfile, --link-keyfile, --link-ca-file"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["generate", "hi", *LINK], f"no effect without --nnodes, except in ullm serve: {NAMES}"),
        (["chat", *LINK], f"no effect without --nnodes, except in ullm serve: {NAMES}"),
        (["bench", "engine", *LINK], f"no effect without --nnodes, except in ullm serve: {NAMES}"),
        (["run-batch", "x", "-o", "y", *LINK], f"no effect without --nnodes, except in ullm serve: {NAMES}"),
        (
            ["generate", "hi", "--url", "http://127.0.0.1:1", "--max-bs", "8"],
            "no effect with --url: --max-bs",
        ),
        (["chat", "--url", "http://127.0.0.1:1", "--tp-size", "2"], "no effect with --url: --tp-size"),
        (["generate", "hi", "--raw", "--system", "x"], "--system has no effect with --raw"),
        (["generate", "hi", "--api-key", "x"], "--api-key has no effect without --url"),
        (["chat", "--api-key", "x"], "--api-key has no effect without --url"),
        (["serve", "--node-secret-file", "x"], "--node-secret-file has no effect without --nnodes"),
        (["serve", "--node-timeout", "9"], "--node-timeout has no effect without --nnodes"),
        (["serve", "--max-waiting", "3"], "--max-waiting has no effect without front ends"),
        (["serve", "--engine-timeout", "3"], "--engine-timeout has no effect without front ends"),
        (["serve", "--engine-key-file", "x"], "--engine-key-file has no effect without front ends"),
        (["serve", "--prefill-threshold", "9"], "--prefill-threshold 9 has no effect without --roles"),
        (["serve", "--device", "cpu", "--device-ids", "0"], "--device-ids has no effect with --device cpu"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_they_are_refused(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert says in told


@pytest.fixture
def link_files(tmp_path: Path) -> LinkFiles:
    return make_link_files(tmp_path / "link")


def test_a_program_with_one_host_is_told_so(link_files: LinkFiles) -> None:
    async def start() -> None:
        async with open_engine(EngineConfig(**link_files.options())):
            raise AssertionError("it has started")

    with pytest.raises(
        ConfigError, match="--link-certfile, --link-keyfile and --link-ca-file have no effect"
    ):
        trio.run(start)


def test_a_shared_file_serves_all_commands(link_files: LinkFiles) -> None:
    config = EngineConfig(**link_files.options())
    assert without_link_files(config, {}) == EngineConfig()
    several = dataclasses.replace(config, nnodes=2, tp_size=2, node_secret_file="x")
    assert without_link_files(several, dict.fromkeys(LINK_FILES)) == several


def test_front_ends_take_what_is_for_them(tmp_path: Path) -> None:
    ServerConfig(api_server_count=2, engine_timeout=3.0, max_waiting=3)
    ServerConfig(connect="unix:/x", engine_timeout=3.0, engine_key_file=str(tmp_path))
    ServerConfig(headless=True, listen="unix:/x", engine_key_file=str(tmp_path))
