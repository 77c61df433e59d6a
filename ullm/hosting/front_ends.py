"""Front ends as hosts open them: what their configuration may say, and the engine at the other end."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from ullm.config import LINK_FILES, EngineConfig, ServerConfig
from ullm.engine.running import running
from ullm.errors import ConfigError
from ullm.link import RemoteEngine
from ullm.link.address import Address
from ullm.logs import get_logger
from ullm.tls.link_tls import link_tls

OWN = frozenset(
    {"shutdown_timeout", "log_level", "log_format", "max_restarts", "restart_period", *LINK_FILES}
)
"""Options of `EngineConfig` that a front end follows itself; the others are the engine's."""

log = get_logger(__name__)


def refuse_engine_options(given: Collection[str]) -> None:
    """Check that a front end's command line has no options that only its engine can follow.

    Args:
        given: names of the options on it.

    Raises:
        ConfigError: it has one; names it.
    """
    for name in _of_engine():
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} has no effect with --connect; give it to the engine")


def check_link_tls(config: EngineConfig, server_config: ServerConfig) -> None:
    """Check the files of ``--link-certfile``, and that there is a connection which they encrypt.

    Raises:
        ConfigError: there is none, or a file cannot be used.
    """
    if link_tls(config) is None:
        return
    places = [(option, getattr(server_config, option)) for option in ("listen", "connect")]
    addresses = [Address.parse(f"--{option}", where) for option, where in places if where is not None]
    if config.nnodes == 1 and all(address.is_unix for address in addresses):
        raise ConfigError(
            "--link-certfile, --link-keyfile and --link-ca-file have no effect without --nnodes, "
            "--listen HOST:PORT or --connect HOST:PORT: "
            "nothing else goes between hosts; leave them out"
        )


def note_engine_variables(config: EngineConfig) -> None:
    """Say which variables and lines of a file a front end ignores: it may share them with its engine."""
    default = EngineConfig()
    names = [name for name in _of_engine() if getattr(config, name) != getattr(default, name)]
    if names:
        options = " ".join("--" + name.replace("_", "-") for name in names)
        log.info("a front end ignores what is for its engine", options=options)


def _of_engine() -> list[str]:
    return [spec.name for spec in dataclasses.fields(EngineConfig) if spec.name not in OWN]


@asynccontextmanager
async def open_remote_engine(
    config: EngineConfig, server_config: ServerConfig
) -> AsyncIterator[RemoteEngine]:
    """Connect to an engine, and stop in order on leaving, without it.

    Raises:
        ConfigError: an address that is none, or a key that cannot be used.
        LinkRefused: the engine does not let this front end in.
    """
    note_engine_variables(config)
    check_link_tls(config, server_config)
    engine = RemoteEngine(config, server_config)
    async with running(engine):
        yield engine


def check_asgi(server_config: ServerConfig) -> None:
    """Check that an ASGI application is not asked for what only ``ullm serve`` does.

    Raises:
        ConfigError: it is.
    """
    if server_config.headless:
        raise ConfigError("ULLM_HEADLESS: only ullm serve runs an engine without the API")
    if server_config.answers_listen is not None:
        raise ConfigError("ULLM_ANSWERS_LISTEN: only ullm serve keeps the answers of front ends")
    if server_config.api_server_count > 1:
        raise ConfigError(
            "ULLM_API_SERVER_COUNT: start an engine by ullm serve --headless, set ULLM_CONNECT to its "
            "--listen, and let the ASGI server start as many workers"
        )
