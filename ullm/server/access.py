"""Access: keys, origins of web pages, and names of requests."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import uuid
from collections.abc import Iterable, Sequence

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
    """Require an API key of clients, if there are any, and the admin key of administrators.

    Without an admin key, admin endpoints answer 403. Neither kind of key is accepted in place of the other.
    """
    api_keys, admin_keys = _digests(config.api_keys), _digests(filter(None, [config.admin_key]))

    async def check() -> None:
        access = access_of(request.path)
        if access is Access.ADMIN:
            if config.admin_key is None:
                raise errors.AdminDisabled
            if not _is_among(_bearer_token(), admin_keys):
                raise errors.AdminUnauthorized(
                    "the admin key is missing or wrong; send 'Authorization: Bearer <admin key>'"
                )
        elif access is Access.KEY and api_keys and not _sends_one_of(api_keys):
            raise errors.Unauthorized(
                "the API key is missing or wrong; send 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'"
            )

    app.before_request(check)


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def _sends_one_of(digests: Sequence[bytes]) -> bool:
    tokens = (_bearer_token(), request.headers.get("X-Api-Key", "").encode("latin-1"))
    return any([_is_among(token, digests) for token in tokens])


def _bearer_token() -> bytes:
    """Return the token of the Authorization header (RFC 6750, 2.1), or nothing."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # the bytes that were sent


def _is_among(sent: bytes, digests: Sequence[bytes]) -> bool:
    """Compare with all keys, in a time that depends neither on the keys nor on which one it is."""
    digest = hashlib.sha256(sent).digest()
    return any([hmac.compare_digest(digest, each) for each in digests])  # a list: every comparison is made


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
