"""All options of the HTTP server and its front ends, and which of them cannot be together."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ullm.config.keys import check_key, keys_in
from ullm.config.options import MINUTES, explained, option
from ullm.config.values import convert_fields, flag
from ullm.errors import ConfigError, ResourceUnavailable

_OF_THE_API = (
    *("host", "port", "uds", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "http2", "admin_key"),
    *(
        "sse_keep_alive",
        "max_choices",
        "max_stop_chars",
        "priority",
        "openai_finish_reasons",
        "strict_fields",
    ),
    *("trust_request_chat_template", "tool_call_parser", "reasoning_parser", "cors_origins"),
    *("engine_timeout", "max_waiting"),
)
_OF_FRONT_ENDS = ("engine_key_file", "engine_timeout", "max_waiting")
_STORED = ("journal", "max_stored_answers", "stored_answer_hours")
_MEANINGLESS: Mapping[str, tuple[str, ...]] = {
    "headless": (*_OF_THE_API, *_STORED),
    "connect": _STORED,
    "answers_listen": (
        *("host", "uds", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "http2", "admin_key"),
        *("access_log", "cors_origins", "allowed_hosts"),
    ),
    "api_server_count": ("engine_key_file",),
}
"""Option → those that have no effect beside it."""
_REMEDY: Mapping[str, str] = {
    "headless": "give it to the front ends",
    "connect": "this front end keeps no answers, so leave it out, or say by --answers where they are kept",
    "answers_listen": "clients do not connect there, so give it to the front ends",
    "api_server_count": "the engine is only for the front ends, so leave it out",
}


@explained
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    uds: str | None = option(
        None,
        "Path of a unix socket to listen on, instead of a host and a port; the umask gives its mode. "
        "Default: none.",
    )
    api_key: str | tuple[str, ...] | None = option(
        None,
        "Key that clients must send, as a bearer token or in X-Api-Key; several: repeat the option. Other "
        "users of the machine see the command line, but neither variables nor --api-key-file. Default: none "
        "is needed.",
        secret=True,
    )
    api_key_file: str | None = option(
        None, "File of further such keys, one per line; blank lines and lines that begin with # are ignored."
    )
    ssl_certfile: str | None = option(
        None,
        "PEM file of the certificate, with its chain, by which the API is served over TLS; needs "
        "--ssl-keyfile. Default: plain HTTP.",
    )
    ssl_keyfile: str | None = option(
        None, "PEM file of the certificate's private key, without a password; needs --ssl-certfile."
    )
    http2: bool = option(
        False, "Speak HTTP/2, too: over TLS where a client asks for it, else by prior knowledge."
    )
    access_log: bool = option(
        False,
        "Log one line per request, at level info: its id, path, status, tokens and seconds; never its texts.",
    )
    admin_key: str | None = option(
        None,
        "Key that opens the admin endpoints on the API's port to those who send it as a bearer token; "
        "default: they are closed there.",
        secret=True,
    )
    admin_listen: str | None = option(
        None,
        "Where to serve the admin endpoints without a key: unix:PATH, or HOST:PORT of loopback; default: "
        "nowhere.",
    )
    sse_keep_alive: float = option(
        10.0, "Seconds of silence after which a comment line is sent on a stream of server-sent events."
    )
    stall_timeout: float = option(
        60.0, "Seconds that a client may leave its stream unread before the request is aborted."
    )
    max_body: int | None = option(
        None,
        "Maximum size of a request's body in bytes; larger ones are refused with status 413. Default: 256 "
        "for each token of the model's context, at least 1 MiB and at most 4 MiB. Bodies larger than "
        "4 MiB are parsed one at a time, each in a process of its own.",
    )
    max_entries: int = option(
        4096,
        "Maximum number of entries of a list in a request: messages, tools, biases, stop tokens. A whole "
        "body may have 16 times as many lists and objects. Token ids of prompts are limited by the context.",
    )
    max_choices: int = option(256, "Maximum number of choices of one request: its prompts, times n.")
    max_stop_chars: int = option(4096, "Maximum number of characters of a request's stop strings together.")
    priority: bool = option(
        True, "Take the priority that requests ask for; otherwise those that ask for one are refused."
    )
    journal: str | None = option(
        None,
        "SQLite file that answers are kept in, those of chats, completions and messages, too, so that they "
        "go on after the end of the process. Default: a file in the cache folder, for answers in the "
        "background only.",
    )
    max_stored_answers: int = option(
        1000, "Number of stored answers that are kept; the oldest that have ended make room."
    )
    stored_answer_hours: float = option(24.0, "Hours for which they are kept.")
    openai_finish_reasons: bool = option(
        False,
        "Answer finish_reason length where it would be timeout or abort, which OpenAI does not have; the "
        "field finish_cause has the cause.",
    )
    trust_request_chat_template: bool = option(
        False,
        "Let requests bring chat templates of their own. They run in a sandbox, with limits of time and "
        "memory.",
    )
    strict_fields: bool = option(
        False,
        "Refuse requests with fields that nobody knows, instead of ignoring them with a warning in the log "
        "and in the header X-Ullm-Ignored-Fields.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "pythonic"] = option(
        "auto", "How the model writes calls of tools; auto: as its chat template shows."
    )
    reasoning_parser: Literal["auto", "think", "none"] = option(
        "auto",
        "How reasoning is told from the answer: between <think> and </think>, or not at all; auto: if the "
        "chat template knows these tags.",
    )
    pooling: Literal["last", "mean"] = option(
        "last",
        "The hidden states of a prompt that make its vector in /v1/embeddings, if the request does not say.",
    )
    cors_origins: tuple[str, ...] = option(
        (), "Origins whose web pages may call the API, as in https://example.org; default: none."
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Names by which clients may call the API, beside addresses and localhost, as in llm.example.org, "
        "*.example.org or *; others are refused with status 403. Default: none on loopback without API keys, "
        "else all.",
    )
    api_server_count: int = option(
        1,
        "Number of front ends, each a process of its own, on one port; from 2 on they are apart from the "
        "engine, and either is started again without the other.",
        aliases=("-asc",),
    )
    headless: bool = option(False, "Run the engine without the API, for front ends that connect to --listen.")
    listen: str | None = option(
        None,
        "Where a --headless engine listens for front ends: unix:PATH (on Linux also unix:@NAME, which has no "
        "file), for programs of the same user, or HOST:PORT, which needs --engine-key-file.",
    )
    connect: str | None = option(
        None,
        "Serve the API for the engine that listens there, instead of running one: unix:PATH or HOST:PORT.",
    )
    answers: str | None = option(
        None,
        "Where the stored answers of this front end are kept: unix:PATH, the --answers-listen of another. "
        "Default: nowhere; requests for stored answers are refused.",
    )
    answers_listen: str | None = option(
        None,
        "Keep the stored answers of other front ends, instead of serving the API: unix:PATH (on Linux also "
        "unix:@NAME, which has no file), where these say --answers.",
    )
    engine_key_file: str | None = option(
        None,
        "File with the key that an engine and its front ends share, of at least 16 characters. Default: the "
        "variable ULLM_ENGINE_KEY; without either, none, which only unix sockets allow.",
    )
    engine_timeout: float = option(
        5 * MINUTES,
        "Seconds that requests of a front end wait for an engine that is away; then they end with an error, "
        "and new ones are refused with status 503 until it is back.",
    )
    max_waiting: int = option(
        1024,
        "Maximum number of choices that a front end has while its engine is away; further requests are "
        "refused with status 503.",
    )

    def __post_init__(self) -> None:
        convert_fields(self)
        self._check_front_ends()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.host.startswith("unix:"):
            raise ConfigError(f"--host {self.host}: use --uds {self.host.removeprefix('unix:')}")
        if self.uds is not None and (self.host, self.port) != (ServerConfig.host, ServerConfig.port):
            raise ConfigError(f"--uds {self.uds} takes the place of --host and --port; leave those out")
        if self.uds == "":
            raise ConfigError("--uds is empty; leave it out, or give a path")
        if self.max_body is not None and self.max_body < 1:
            raise ConfigError(f"--max-body must be at least 1 byte, got {self.max_body}")
        for name in ("max_entries", "max_choices", "max_stop_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("sse_keep_alive", "stall_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{flag(name)} must be above 0 seconds, got {getattr(self, name)}")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|(\*\.)?[\w.-]+", name):
                raise ConfigError(f"--allowed-hosts: {name!r} is no name; leave out scheme, port and path")
        if self.max_stored_answers < 1 or not self.stored_answer_hours > 0:
            raise ConfigError("--max-stored-answers and --stored-answer-hours must be above 0")
        if self.admin_key == "":
            raise ConfigError("--admin-key is empty; leave it out, or give a key")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given, missing = ("cert", "key") if self.ssl_keyfile is None else ("key", "cert")
            raise ConfigError(f"--ssl-{given}file needs --ssl-{missing}file; give both, or neither")
        check_key("--admin-key", self.admin_key)
        if self.admin_key in self.api_keys:  # reads the file, too, before anything is started
            raise ConfigError("--admin-key equals --api-key: each client could stop the server; change it")

    def _check_front_ends(self) -> None:
        """Check the options about front ends in processes of their own."""
        if self.api_server_count < 1 or self.max_waiting < 1:
            raise ConfigError("--api-server-count and --max-waiting must be at least 1")
        if not self.engine_timeout > 0:
            raise ConfigError(f"--engine-timeout must be above 0 seconds, got {self.engine_timeout}")
        parts = [name for name in ("headless", "connect") if getattr(self, name)]
        if self.api_server_count > 1:
            parts.append("api_server_count")
        if len(parts) > 1:
            raise ConfigError(
                f"{flag(parts[0])} and {flag(parts[1])} exclude each other: a process is an engine, a "
                "front end, or starts both"
            )
        if self.headless != (self.listen is not None):
            given, missing = ("headless", "listen") if self.headless else ("listen", "headless")
            raise ConfigError(f"--{given} needs --{missing}, where front ends connect; give both, or neither")
        alone = [
            name
            for name in _OF_FRONT_ENDS
            if not parts and getattr(self, name) != getattr(ServerConfig, name)
        ]
        if alone:
            raise ConfigError(
                f"{flag(alone[0])} has no effect without front ends of their own; leave it out, or "
                "use --api-server-count or --connect"
            )
        self._check_answers()
        if self.answers_listen is not None:
            parts = ["answers_listen"]
        elif self.answers is not None:
            parts.clear()
        for part, options in _MEANINGLESS.items():
            if part in parts:
                self._check_unset(part, options)

    def _check_answers(self) -> None:
        """Check the options that say which front end keeps the stored answers, and where."""
        given = [name for name in ("answers", "answers_listen") if getattr(self, name) is not None]
        for name in given:
            where = getattr(self, name)
            if not where.removeprefix("unix:").strip("@") or not where.startswith("unix:"):
                raise ConfigError(f"{flag(name)} {where}: expected unix:PATH")
            if sys.platform == "win32":
                raise ResourceUnavailable(
                    f"{flag(name)} {where}: no unix sockets on this system; leave it out"
                )
            if where.startswith("unix:@") and sys.platform != "linux":
                raise ResourceUnavailable(
                    f"{flag(name)} {where}: only Linux has sockets without a file; use unix:PATH"
                )
            if self.connect is None:
                raise ConfigError(f"{flag(name)} needs --connect: only a front end has others beside it")
        if len(given) > 1:
            raise ConfigError(
                "--answers and --answers-listen exclude each other: answers are kept here, or elsewhere"
            )

    def _check_unset(self, part: str, names: tuple[str, ...]) -> None:
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{flag(name)} has no effect with {flag(part)}; {_REMEDY[part]}")

    @cached_property
    def api_keys(self) -> tuple[str, ...]:
        """All API keys, those of the file as they were when this was made; none: everybody is let in.

        Raises:
            ConfigError: a key that no client could send, or a file that has none; does not show keys.
        """
        given = self.api_key
        keys = (given,) if isinstance(given, str) else given or ()
        for key in keys:
            check_key("--api-key", key)
        return keys if self.api_key_file is None else keys + keys_in(self.api_key_file)
