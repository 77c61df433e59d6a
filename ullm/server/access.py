"""Access: keys, origins of web pages, and names of requests."""

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
from ullm.server.api.route import Access
from ullm.server.routes.table import access_of

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def install_common_headers(app: QuartTrio) -> None:
    """Name each request and note when it arrived; give its answer the headers in ``g.common_headers``.

    Its name is the client's ``X-Request-Id``, or a new one, which is sent back. An event stream, which its
    handler writes itself, takes the headers from there, too; so they are known before the handler runs.
    """

    async def receive() -> None:
        g.arrived = trio.current_time()
        sent = request.headers.get("X-Request-Id", "")
        g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        g.common_headers = {"X-Request-Id": g.request_id}

    async def send(response: Response) -> Response:
        response.headers.update(g.common_headers)
        return response

    app.before_request(receive)
    app.after_request(send)


def install_keys(app: QuartTrio, config: ServerConfig) -> None:
    """Require the API key of clients, if there is one, and the admin key of administrators.

    Without an admin key, admin endpoints answer 403. Neither key is accepted in place of the other.
    Comparing takes the same time for every key.
    """

    async def check() -> None:
        access = access_of(request.path)
        if access is Access.ADMIN:
            if config.admin_key is None:
                raise errors.AdminDisabled
            if not _has_key(config.admin_key):
                raise errors.AdminUnauthorized(
                    "the admin key is missing or wrong; send 'Authorization: Bearer <admin key>'"
                )
        elif access is Access.KEY and config.api_key is not None and not _has_key(config.api_key):
            raise errors.Unauthorized("the API key is missing or wrong; send 'Authorization: Bearer <key>'")

    app.before_request(check)


def _has_key(key: str) -> bool:
    sent = request.headers.get("Authorization", "").encode("latin-1")  # the bytes that were sent
    return hmac.compare_digest(sent, f"Bearer {key}".encode())


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
        if by_name and not _is_loopback(host):
            raise errors.ForeignOrigin(
                f"the admin listener accepts localhost or its address as the host, not {host}"
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
    """Allow web pages of these origins to call the API (Fetch standard, CORS); ``*`` allows all."""

    async def grant() -> Response | None:
        origin: str | None = request.headers.get("Origin")
        if origin is None or not ("*" in origins or origin in origins):
            return None
        g.common_headers |= {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": "X-Request-Id",
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
