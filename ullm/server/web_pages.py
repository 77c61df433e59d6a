"""Web pages: which may call a server through the browsers of their visitors.

A browser sends a page's origin with what the page has it send, and as the host the name by which the page
calls the server. A name of the page's own may lead to this machine (DNS rebinding); an address may not.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from quart import Response, g, request
from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server.api import errors

SHOWN = 200
"""Characters of a header that an error shows."""


def install_strangers(app: QuartTrio, config: ServerConfig, *, local: bool | None) -> None:
    """Refuse what strange web pages have the browsers of this machine send, where no key keeps them out.

    Those are pages of origins that are neither the server's own nor among ``--cors-origins``, and all that
    call it by a name outside ``--allowed-hosts``. If hosts are given, the name is checked in any case.

    Args:
        local: only this machine reaches the server; None: to be told from each request.
    """
    is_allowed = _host_filter(config.allowed_hosts)
    origins, open_to_all = config.cors_origins, not config.api_keys

    async def check() -> None:
        exposed = open_to_all and (_came_over_loopback() if local is None else local)
        host = request.headers.get("Host", "")
        if (exposed or config.allowed_hosts) and not is_allowed(_name(host)):
            raise errors.ForeignHost(
                f"this server is not called {host[:SHOWN]!r}; use localhost or its address, or name the host "
                "in --allowed-hosts"
            )
        origin = request.headers.get("Origin")
        known = origin is None or _is_own(origin, host) or "*" in origins or origin in origins
        if exposed and not known:
            raise errors.ForeignOrigin(
                f"pages of {str(origin)[:SHOWN]!r} may not call this server; name their origin in "
                "--cors-origins"
            )

    app.before_request(check)


def _came_over_loopback() -> bool:
    """Return whether the current request came to a loopback address, and not to an app around this one."""
    server = request.scope.get("server")
    return server is not None and not request.scope.get("root_path") and is_loopback(str(server[0]))


def _host_filter(allowed: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a function that says whether a server may be called so: by addresses always."""
    exact = {"", "localhost", *(name.lower() for name in allowed)}
    domains = (".localhost", *(name[1:].lower() for name in allowed if name.startswith("*.")))

    def is_allowed(name: str) -> bool:
        return "*" in exact or name in exact or name.endswith(domains) or _is_address(name)

    return is_allowed


def _name(host: str) -> str:
    """Return the name or address of a Host header, without the port."""
    return re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()


def _is_own(origin: str, host: str) -> bool:
    """Return whether a page comes from the server that it calls; a proxy may have taken TLS off."""
    own = origin.lower().partition("://")[2]
    return bool(own) and own == host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Return whether a name or address without port can mean this machine only."""
    if name in ("", "localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name.partition("%")[0]).is_loopback


def install_local_only(app: QuartTrio, *, by_name: bool) -> None:
    """Refuse requests that a web page makes its visitor's browser send: no key protects this app.

    Browsers send the page's origin, and as the host the name that the page used for the loopback address.

    Args:
        by_name: check the host's name, too; not needed on a unix socket, which no browser reaches.
    """

    async def check() -> None:
        if "Origin" in request.headers:
            raise errors.ForeignOrigin("the admin listener takes no requests from web pages")
        host = request.headers.get("Host", "")
        if by_name and not is_loopback(_name(host)):
            raise errors.ForeignOrigin(
                f"the admin listener accepts localhost or its address as the host, not {host}"
            )

    app.before_request(check)


def install_cors(app: QuartTrio, origins: tuple[str, ...]) -> None:
    """Allow web pages of these origins to call the API (Fetch standard, CORS); ``*`` allows all."""

    async def grant() -> Response | None:
        origin: str | None = request.headers.get("Origin")
        if origin is None or not ("*" in origins or origin in origins):
            return None
        g.common_headers |= {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "X-Request-Id, X-Ullm-Ignored-Fields",
            "Vary": "Origin",
        }
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        return _preflight_response() if is_preflight else None

    if origins:
        app.before_request(grant)


def _preflight_response() -> Response:
    return Response(
        b"",
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
            "Access-Control-Max-Age": "600",
        },
    )
