"""Mutual TLS between hosts: who is let in, and what either end says of a certificate that does not fit."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from tests.support.link_files import LinkFiles, make_link_files
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import ConfigError, HandshakeRefused
from ullm.hosting.front_ends import check_link_tls
from ullm.tls.link_tls import LinkTls, link_tls, tls_refusal


def tls_of(files: LinkFiles, authority: Path | None = None) -> LinkTls:
    found = link_tls(EngineConfig(**files.options(authority)))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> LinkFiles:
    return make_link_files(tmp_path_factory.mktemp("link") / "files")


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> LinkFiles:
    """Of another authority."""
    return make_link_files(tmp_path_factory.mktemp("link") / "others")


Ends = tuple[str | bytes, str | bytes]


async def meet(server: LinkTls, client: LinkTls | None) -> Ends:
    """Connect two ends; return what each got from the other, or why there was nothing."""
    ends: list[str | bytes] = ["", ""]
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]

    async def serve() -> None:
        async with await listener.accept() as stream:
            try:
                async with await server.accept(stream) as secured:
                    await secured.send_all(b"greeting")
                    ends[0] = bytes(await secured.receive_some(100))
            except HandshakeRefused as error:
                ends[0] = str(error)

    async def connect() -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            try:
                secured = stream if client is None else await client.connect(stream, "127.0.0.1")
                async with secured:
                    if client is None:
                        await stream.send_all(b"\0" * 100)
                    ends[1] = bytes(await secured.receive_some(100))
                    await secured.send_all(b"login")
            except HandshakeRefused as error:
                ends[1] = str(error)
            except trio.BrokenResourceError as error:
                ends[1] = tls_refusal(error) or ""

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(connect)
    return ends[0], ends[1]


@pytest.mark.process
async def test_both_ends_of_one_authority_talk(files: LinkFiles) -> None:
    assert await meet(tls_of(files), tls_of(files)) == (b"login", b"greeting")


@pytest.mark.process
async def test_a_caller_of_another_authority_is_told(files: LinkFiles, others: LinkFiles) -> None:
    server, client = await meet(tls_of(files), tls_of(others, files.authority))
    assert isinstance(server, str)
    assert "certificate is not accepted: unable to get local issuer certificate" in server
    assert client == (
        "the other end does not accept this one's certificate (unknown ca); --link-certfile must be of its "
        "--link-ca-file"
    )


@pytest.mark.process
async def test_a_listener_of_another_authority_is_not_trusted(files: LinkFiles, others: LinkFiles) -> None:
    server, client = await meet(tls_of(others, files.authority), tls_of(files))
    assert isinstance(server, str)
    assert "does not accept this one's certificate (unknown ca)" in server
    assert isinstance(client, str)
    assert "the other end's certificate is not accepted: unable to get local issuer" in client


@pytest.mark.process
async def test_a_certificate_for_another_name_is_not_trusted(tmp_path: Path) -> None:
    elsewhere = make_link_files(tmp_path / "elsewhere", "elsewhere.example")
    _, client = await meet(tls_of(elsewhere), tls_of(elsewhere))
    assert isinstance(client, str)
    assert "IP address mismatch" in client
    assert "for the name by which the engine is called" in client


@pytest.mark.process
async def test_a_caller_without_tls_is_turned_away(files: LinkFiles) -> None:
    server, client = await meet(tls_of(files), None)
    assert isinstance(server, str)
    assert "does not speak TLS" in server
    assert client != b"greeting"


@pytest.mark.process
async def test_a_caller_without_a_certificate_is_turned_away(files: LinkFiles) -> None:
    context = ssl.create_default_context(cafile=str(files.authority))
    server, client = await meet(tls_of(files), LinkTls(context, context))
    assert server == ("the other end shows no certificate; give it --link-certfile and --link-keyfile, too")
    assert isinstance(client, str)
    assert "certificate required" in client


# --- options -------------------------------------------------------------------------------------------


def test_the_three_options_go_together(files: LinkFiles) -> None:
    options = files.options()
    del options["link_keyfile"]
    with pytest.raises(ConfigError, match="--link-certfile needs --link-keyfile; give all three, or none"):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("link_certfile", None, "--link-certfile {path}: No such file or directory"),
        ("link_certfile", "x", "--link-certfile {path}: no certificate in PEM format"),
        ("link_keyfile", "x", "--link-keyfile {path}: no private key in PEM format"),
        ("link_ca_file", "x", "--link-ca-file {path}: no certificate in PEM format"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    files: LinkFiles, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    config = EngineConfig(**{**files.options(), name: str(path)})
    with pytest.raises(ConfigError) as raised:
        link_tls(config)
    assert str(raised.value).startswith(says.format(path=path))


@pytest.mark.parametrize("places", [{}, {"headless": True, "listen": "unix:/x"}, {"connect": "unix:/x"}])
def test_without_a_network_the_options_are_refused(files: LinkFiles, places: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError,
        match="--link-certfile, --link-keyfile and --link-ca-file have no effect without --nnodes, --listen",
    ):
        check_link_tls(EngineConfig(**files.options()), ServerConfig(**places))


@pytest.mark.parametrize("option", ["listen", "connect"])
def test_with_a_network_they_are_taken(files: LinkFiles, option: str) -> None:
    more = {"headless": True} if option == "listen" else {}
    check_link_tls(EngineConfig(**files.options()), ServerConfig(**{option: "10.0.0.1:1", **more}))


def test_link_is_not_needed() -> None:
    assert link_tls(EngineConfig()) is None
    check_link_tls(EngineConfig(), ServerConfig())
