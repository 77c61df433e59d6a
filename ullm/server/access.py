"""Who may call what: keys, origins, and names of requests."""

from __future__ import annotations

import hmac
import ipaddress
import re
import uuid

import trio
from quart import Response, g, request
from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server.api import errors

OPEN = frozenset({"/live", "/ready", "/health", "/version", "/metrics", "/openapi.json", "/is_sleeping"})
"""Paths that need no key, ever."""
ADMIN = frozenset({"/sleep", "/wake", "/wake_up"})
"""Paths that change the engine, beside all below ``/admin``."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def is_admin(path: str) -> bool:
    """Whether a path is for those who run the server, and not for its clients."""
    return path in ADMIN or path == "/admin" or path.startswith("/admin/")


def install_request_ids(app: QuartTrio) -> None:
    """Take the client's ``X-Request-Id``, or make one, and send it back; note when the request arrived."""

    async def receive() -> None:
        g.arrived = trio.current_time()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    async def send(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    app.before_request(receive)
    app.after_request(send)


def install_keys(app: QuartTrio, config: ServerConfig) -> None:
    """Ask clients for the API key, if there is one, and administrators for theirs; without one they get 403.

    Neither key opens what the other does. A comparison takes the same time for any key.
    """

    async def check() -> None:
        if is_admin(request.path):
            if config.admin_key is None:
                raise errors.AdminDisabled
            if not _sent(config.admin_key):
                raise errors.AdminUnauthorized(
                    "the admin key is missing or wrong; send 'Authorization: Bearer <admin key>'"
                )
        elif config.api_key is not None and request.path not in OPEN and not _sent(config.api_key):
            raise errors.Unauthorized("the API key is missing or wrong; send 'Authorization: Bearer <key>'")

    app.before_request(check)


def _sent(key: str) -> bool:
    given = request.headers.get("Authorization", "").encode("latin-1")  # the bytes that were sent
    return hmac.compare_digest(given, f"Bearer {key}".encode())


def install_local_only(app: QuartTrio, *, by_name: bool) -> None:
    """Refuse what a web page makes its visitor's browser send here: no key protects this app.

    Browsers name the page's origin, and call a loopback address by the name that the page resolved.

    Args:
        by_name: it listens on an address, which names resolve to; no browser reaches a unix socket.
    """

    async def check() -> None:
        if "Origin" in request.headers:
            raise errors.ForeignOrigin("the admin listener takes no requests from web pages")
        host = request.headers.get("Host", "")
        if by_name and not _is_loopback(host):
            raise errors.ForeignOrigin(
                f"the admin listener is called localhost or by its address, not {host}"
            )

    app.before_request(check)


def _is_loopback(host: str) -> bool:
    name = re.sub(r":\d*$", "", host).strip("[]")
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def install_cors(app: QuartTrio, origins: tuple[str, ...]) -> None:
    """Let pages of these origins call the API (Fetch standard, CORS protocol); ``*`` is any."""

    def allowed() -> str | None:
        origin: str | None = request.headers.get("Origin")
        return origin if origin is not None and ("*" in origins or origin in origins) else None

    async def preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if allowed() is None:
            return None
        return Response(
            b"",
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
                "Access-Control-Max-Age": "600",
            },
        )

    async def grant(response: Response) -> Response:
        origin = allowed()
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id"
            response.headers["Vary"] = "Origin"
        return response

    if origins:
        app.before_request(preflight)
        app.after_request(grant)
