"""``--config FILE``: options by their names, below the command line and variables, above the defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ullm.cli import options_doc
from ullm.cli.app import main
from ullm.cli.flags import build, sampling_params, with_options
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import ConfigError
from ullm.hosting.config_sources import ConfigFile, from_env


def written(folder: Path, text: str) -> str:
    path = folder / "ullm.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_over_variable_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'max-bs = 8\nblock_size = 32\nmax-queue = 7\nport = 81\nhost = "::1"\ntemperature = 1\n'
    file = ConfigFile.read(written(tmp_path, text))
    monkeypatch.setenv("ULLM_BLOCK_SIZE", "64")
    monkeypatch.setenv("ULLM_PORT", "82")
    options = {"config": file, "max_bs": 3, "port": 83}
    config, server = build(EngineConfig, options), build(ServerConfig, options)
    assert (config.max_bs, config.block_size, config.max_queue) == (3, 64, 7)
    assert config.dtype == EngineConfig().dtype
    assert (server.port, server.host) == (83, "::1")
    assert sampling_params(options, {"temperature": 0.2}).temperature == 1
    assert sampling_params({**options, "temperature": 0.5}, {}).temperature == 0.5


def test_lists_switches_and_keys(tmp_path: Path) -> None:
    text = 'device-ids = [0, 1]\nprefix-cache = false\napi-key = ["a,b", "c"]\nstop = ["x"]\n'
    options = {"config": ConfigFile.read(written(tmp_path, text))}
    config = build(EngineConfig, options)
    assert (config.device_ids, config.prefix_cache) == ((0, 1), False)
    assert build(ServerConfig, options).api_keys == ("a,b", "c")
    assert sampling_params(options, {}).stop_strings == ("x",)
    assert "a,b" not in repr(options)


def test_a_variable_names_the_file_where_there_is_no_command_line(tmp_path: Path) -> None:
    assert from_env(EngineConfig, {"ULLM_CONFIG": written(tmp_path, "max_bs = 5")}).max_bs == 5


def test_every_command_with_options_of_the_engine_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ConfigFile] = []

    @with_options()
    def command(**given: Any) -> int:
        seen.append(given["config"])
        return 0

    path = written(tmp_path, "port = 1")
    command(config=path)
    monkeypatch.setenv("ULLM_CONFIG", path)
    command()
    assert [file.values for file in seen] == [{"port": 1}] * 2


WRONG = [
    ("max-sb = 1", "max-sb is no option; is max-bs meant?"),
    ("max-num-seqs = 1", "max-num-seqs is no option; is max-bs meant?"),
    ("gobbledygook = 1", "gobbledygook is no option"),
    ("[server]\nport = 1", "there are no tables, such as [server]; write all options at the top"),
    ("max-bs = 1\nmax_bs = 2", "max_bs is given twice, with - and with _"),
    ("max-bs =", "not TOML: Invalid value (at end of document)"),
    ('max-bs = "many"', "max-bs: Expected `int`, got `str`"),
    ('port = "1"', "port: Expected `int`, got `str`"),
    ("admin-key = 5", "admin-key: Expected `str | null`, got `int`"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[text.split("\n")[0] for text, _ in WRONG])
def test_what_is_wrong_is_one_line_and_status_2(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    assert main(["serve", "--config", path]) == 2
    assert capsys.readouterr().err == f"error: --config {path}: {says}\n"


@pytest.mark.parametrize(
    "command",
    ["serve", "chat", "generate hi", "bench engine", "run-batch in -o out", "pull", "doctor", "doctor model"],
)
def test_every_command_reads_it(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "gobbledygook = 1")
    assert main([*command.split(), "--config", path]) == 2
    assert capsys.readouterr().err == f"error: --config {path}: gobbledygook is no option\n"


def test_values_out_of_range_say_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "max-bs = -1\ntop-p = 3\n")
    assert main(["serve", "--config", path]) == 2
    assert capsys.readouterr().err == f"error: --max-bs ({path}) must be at least 0, got -1\n"
    assert main(["generate", "hi", "--max-bs", "1", "--config", path]) == 2
    assert f"error: --config {path}: top_p must be" in capsys.readouterr().err


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    (example,) = re.findall(r"(?ms)^```toml\n(.*?)^```$", options_doc.page())
    options = {"config": ConfigFile.read(written(tmp_path, example))}
    assert build(EngineConfig, options).max_bs == 32
    assert build(ServerConfig, options).cors_origins == ("https://example.org",)
    assert sampling_params(options, {}).temperature == 0.2


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err == f"error: --config {tmp_path}/no: No such file or directory\n"
    with pytest.raises(ConfigError, match="No such file"):
        from_env(ServerConfig, {"ULLM_CONFIG": str(tmp_path / "no")})


@pytest.mark.parametrize("by", ["--config FILE", "--config=FILE", "variable"])
def test_the_level_in_the_file_shows_tracebacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    path = written(tmp_path, 'log-level = "debug"\n')
    line = ["generate", "hi", "--model", "/nothing"]
    if by == "variable":
        monkeypatch.setenv("ULLM_CONFIG", path)
    else:
        line += by.replace("FILE", path).split()
    assert main(line) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ULLM_LOG_LEVEL", "warning")
    assert main(line) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_cannot_be_read_shows_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "hi", "--config", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
