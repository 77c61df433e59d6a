"""Configuration: checks, combinations, and what the environment may say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ullm.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from ullm.errors import ConfigError
from ullm.hosting.config_sources import from_env
from ullm.system.interpreter import SECRET_VARIABLES, without_secrets


def test_defaults_are_valid_and_frozen() -> None:
    config = EngineConfig()
    assert config.model == DEFAULT_MODEL
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_bs = 3  # type: ignore[misc]


@pytest.mark.parametrize("link", ["tcp://10.96.12.7:8000", "udp://[fd00::7]:53", "TCP://10.96.12.7:80"])
@pytest.mark.parametrize(
    ("cls", "field"), [(ServerConfig, "port"), (EngineConfig, "nccl_port"), (EngineConfig, "model")]
)
def test_links_to_services_are_no_options(
    cls: Any, field: str, link: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = from_env(cls, {f"ULLM_{field.upper()}": link})
    assert getattr(config, field) == getattr(cls(), field)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "enableServiceLinks" in caplog.text


def test_round_trip_through_a_frame() -> None:
    config = EngineConfig(model="x", device_ids=(0, 1), tp_size=2, kv_cache_memory=5, dtype="float32")
    config = dataclasses.replace(config, served_model_name=("a", "b"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, "--block-size must be at least 1, got 0"),
        ({"max_bs": -1}, "--max-bs must be at least 0"),
        ({"tp_size": 0}, "--tp-size must be at least 1"),
        ({"context_len": 0}, "--context-len must be at least 1"),
        ({"num_blocks": 0}, "--num-blocks must be at least 1"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout must be at least 0"),
        ({"shutdown_timeout": float("nan")}, "--shutdown-timeout"),
        ({"step_timeout": 0}, "--step-timeout must be above 0"),
        ({"gpu_memory_utilization": 0}, "--gpu-memory-utilization must be above 0"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization must be above 0 and at most 1"),
        ({"steps_ahead": 2}, "--steps-ahead must be 0 or 1"),
        ({"speculate": -1}, "--speculate must be at least 0"),
        (
            {"max_bs": 64, "max_num_batched_tokens": 63},
            "--max-num-batched-tokens 63 is less than --max-bs 64",
        ),
        ({"transport": "thread", "tp_size": 2}, "use --transport process"),
        ({"standby_workers": -1}, "--standby-workers must be at least 0"),
        ({"transport": "thread", "standby_workers": 1}, "--standby-workers 1 needs processes"),
        ({"transport": "thread", "pp_size": 2}, "use --transport process"),
        ({"master_addr": "10.0.0.1"}, "and there is one host; use 127.0.0.1, or --nnodes for several"),
        ({"master_addr": "localhost"}, "--master-addr localhost is not a loopback address"),
        ({"nccl_port": 65536}, "--nccl-port must be between 0 and 65535"),
        ({"device_ids": (0,), "tp_size": 2}, "--device-ids names 1 devices"),
        ({"roles": ("prefill", "decode")}, "--roles prefill,decode names 2 role(s), but --replicas is 1"),
        ({"roles": ("decode", "decode"), "replicas": 2}, "needs a replica with prefill, or with both"),
        ({"roles": ("encode",)}, "--roles encode: 'encode' is none of prefill, decode, both"),
        ({"roles": ("prefill",)}, "needs a replica with decode, or with both"),
        ({"roles": ("both",), "prefix_cache": False}, "leave out --no-prefix-cache, or --roles"),
        ({"roles": ("both",), "kv_handover": False}, "leave out --no-kv-handover, or --roles"),
        ({"prefill_threshold": 9}, "--prefill-threshold 9 has no effect without --roles; leave it out"),
        ({"device": "cpu", "device_ids": (0,)}, "--device-ids has no effect with --device cpu"),
        ({"prefill_threshold": 0}, "--prefill-threshold must be at least 1, got 0"),
    ],
)
def test_refusals_name_the_option(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (
            EngineConfig,
            {"dtype": "fp8"},
            "--dtype must be one of auto, float32, bfloat16, float16, got 'fp8'",
        ),
        (EngineConfig, {"device": "tpu"}, "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (EngineConfig, {"max_bs": 2.5}, "--max-bs must be a whole number, got 2.5"),
        (EngineConfig, {"max_bs": True}, "--max-bs must be a whole number, got True"),
        (EngineConfig, {"max_bs": None}, "--max-bs must be a whole number, got None"),
        (EngineConfig, {"cpu_kernels": "0"}, "--cpu-kernels must be True or False, got '0'"),
        (EngineConfig, {"cpu_kernels": 0}, "--cpu-kernels must be True or False, got 0"),
        (EngineConfig, {"step_timeout": "20"}, "--step-timeout must be a number, got '20'"),
        (EngineConfig, {"model": 5}, "--model must be a text, got 5"),
        (EngineConfig, {"context_len": "2k"}, "--context-len must be a whole number or None, got '2k'"),
        (EngineConfig, {"device_ids": ["0"]}, "--device-ids must be a list, each a whole number or None"),
        (EngineConfig, {"sleep_after": object}, "--sleep-after must be a number or None"),
        (EngineConfig, {"log_level": "loud"}, "--log-level must be one of debug, info, warning, error"),
        (ServerConfig, {"port": "http"}, "--port must be a whole number, got 'http'"),
        (ServerConfig, {"cors_origins": 5}, "--cors-origins must be a list, each a text, got 5"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(cls: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**options)
    assert says in str(caught.value)


def test_values_of_other_libraries_become_pythons() -> None:
    config = EngineConfig(
        model=Path("/models/x"),  # type: ignore[arg-type]
        max_bs=np.int64(3),  # type: ignore[arg-type]
        step_timeout=np.float32(2.5),  # type: ignore[arg-type]
        shutdown_timeout=3,
        device_ids=[np.int64(1)],  # type: ignore[arg-type]
    )
    values = (config.model, config.max_bs, config.step_timeout, config.shutdown_timeout, config.device_ids)
    assert values == ("/models/x", 3, 2.5, 3.0, (1,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": -1}, "--port"),
        ({"port": 65536}, "--port"),
        ({"api_key": ""}, "--api-key is empty"),
        ({"api_key": ("a", "")}, "--api-key is empty"),
        ({"api_key": "k\n"}, "--api-key: the key begins or ends with white space"),
        ({"admin_key": "a\x07b"}, "--admin-key: .* control characters"),
        ({"api_key": ("a", "b"), "admin_key": "b"}, "--admin-key equals --api-key"),
        ({"api_key_file": "/nowhere/keys"}, "--api-key-file /nowhere/keys: No such file or directory"),
        ({"ssl_certfile": "c"}, "--ssl-certfile needs --ssl-keyfile"),
        ({"ssl_keyfile": "k"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"api_key_file": "/"}, "--api-key-file /: Is a directory"),
    ],
)
def test_server_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig(**options)


def test_keys_come_from_options_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the web front end\n\n  k1 \nk2, with a comma\r\n#k3\n", encoding="utf-8-sig")
    assert ServerConfig().api_keys == ()
    assert ServerConfig(api_key="one").api_keys == ("one",)
    both = ServerConfig(api_key=("one", "two"), api_key_file=str(file))
    assert both.api_keys == ("one", "two", "k1", "k2, with a comma")
    with pytest.raises(ConfigError, match="--admin-key equals --api-key"):
        ServerConfig(api_key_file=str(file), admin_key="k1")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no keys"), (b"# none\n \n", "no keys"), (b"s\xe9same\n", "not UTF-8"), (b"a\tb\n", "control")],
)
def test_a_file_without_usable_keys_is_refused_and_not_shown(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        ServerConfig(api_key_file=str(file))
    assert str(caught.value).startswith(f"--api-key-file {file}: ")
    assert "same" not in str(caught.value)


def test_a_key_in_a_variable_is_one_key_whatever_it_looks_like(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("a,b", "null", "tcp://10.96.12.7:8000"):
        assert from_env(ServerConfig, {"ULLM_API_KEY": key}).api_keys == (key,)
    assert not caplog.records


def test_keys_are_in_no_text_form_and_in_no_childs_environment() -> None:
    config = ServerConfig(api_key=("sesame", "other"), admin_key="simsim")
    assert not {"sesame", "other", "simsim"} & set(re.findall(r"\w+", repr(config)))
    secret = {spec.name for spec in dataclasses.fields(ServerConfig) if spec.metadata["secret"]}
    assert {f"ULLM_{name.upper()}" for name in secret} | {"ULLM_ENGINE_KEY"} == SECRET_VARIABLES
    environ = {"ULLM_API_KEY": "k", "ULLM_ADMIN_KEY": "a", "ULLM_CACHE": "/c", "HOME": "/h"}
    assert without_secrets(environ) == {"ULLM_CACHE": "/c", "HOME": "/h"}


@pytest.mark.parametrize(
    ("model", "name"),
    [("owner/name", "name"), ("/models/x/", "x"), ("x.gguf", "x.gguf"), ("name", "name")],
)
def test_model_name(model: str, name: str) -> None:
    assert EngineConfig(model=model).model_name == name
    assert {*EngineConfig(model=model).model_names} == {name, model}
    assert EngineConfig(model=model, served_model_name="mine").model_names == ("mine",)
    assert EngineConfig(model=model, served_model_name=("a", "b")).model_names == ("a", "b")
    assert EngineConfig(model=model, served_model_name=("a", "b")).model_name == "a"


def test_from_env() -> None:
    environ = {
        "ULLM_MODEL": "m",
        "ULLM_MAX_BS": "8",
        "ULLM_DEVICE_IDS": "0, 2",
        "ULLM_PREFIX_CACHE": "false",
        "ULLM_SHUTDOWN_TIMEOUT": "1.5",
        "ULLM_CACHE": "/elsewhere",
        "ULLM_PORT": "80",
        "ULLM_TP_SIZE": "",
        "OTHER": "x",
    }
    config = from_env(EngineConfig, environ, model="mine")
    assert (config.model, config.max_bs, config.device_ids) == ("mine", 8, (0, 2))
    assert (config.prefix_cache, config.shutdown_timeout) == (False, 1.5)
    assert from_env(ServerConfig, environ).port == 80


@pytest.mark.parametrize(
    ("cls", "name", "text"),
    [
        (EngineConfig, "ULLM_MAX_BS", "many"),
        (EngineConfig, "ULLM_DTYPE", "float12"),
        (EngineConfig, "ULLM_DEVICE_IDS", "0,x"),
        (EngineConfig, "ULLM_PREFIX_CACHE", "perhaps"),
        (ServerConfig, "ULLM_PORT", "http"),
    ],
)
def test_from_env_names_the_variable(cls: type[EngineConfig], name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{text}'"):
        from_env(cls, {name: text})


def test_a_variable_out_of_range_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"--max-bs \(ULLM_MAX_BS\) must be at least 0"):
        from_env(EngineConfig, {"ULLM_MAX_BS": "-1"})


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({}, "cpu", (64, 512)),
        ({}, "cuda:1", (256, 8192)),
        ({"max_bs": 5}, "cuda", (5, 8192)),
        ({"max_bs": 1000}, "cpu", (1000, 1000)),
        ({"max_num_batched_tokens": 16}, "cpu", (16, 16)),
        ({"max_bs": 7, "max_num_batched_tokens": 9}, "none", (7, 9)),
    ],
)
def test_batch_limits_follow_the_device(
    given: dict[str, Any], device: str, expected: tuple[int, int]
) -> None:
    config = EngineConfig(**given).on_device(device)
    assert (config.max_bs, config.max_num_batched_tokens) == expected
