"""Access: keys, and names of requests. What web pages may do is in `ullm.server.web_pages`."""

from __future__ import annotations

import functools
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

FORWARDED_OWNER, FORWARDED_CLIENT = "X-Ullm-Owner", "X-Ullm-Client"
"""Headers by which a front end says whose a request is that it forwards; only there they mean anything."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def install_common_headers(app: QuartTrio) -> None:
    """Name each request, note when and from where it came; give its answer ``g.common_headers``.

    Its name is the client's ``X-Request-Id``, or a new one, which is sent back. An event stream, which its
    handler writes itself, takes the headers from there, too; so they are known before the handler runs.
    """

    async def receive() -> None:
        g.arrived, g.owner = trio.current_time(), ""
        g.client = _network(request.remote_addr or "")
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
        elif access is Access.KEY and api_keys:
            g.owner = _digest_among(api_keys).hex()
            if not g.owner:
                raise errors.Unauthorized(
                    "the API key is missing or wrong; send 'Authorization: Bearer <key>' or "
                    "'X-Api-Key: <key>'"
                )
            g.client = f"key {g.owner}"

    app.before_request(check)


def install_trust(app: QuartTrio) -> None:
    """Believe front ends, which have checked the keys of their clients, whose a request is."""

    async def believe() -> None:
        g.owner = request.headers.get(FORWARDED_OWNER, "")
        g.client = request.headers.get(FORWARDED_CLIENT, g.client)

    app.before_request(believe)


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]


@functools.lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """Return what stands for one client: its address; with IPv6 its network, all of which it may have."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # as for a unix socket
        return address
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _digest_among(digests: Sequence[bytes]) -> bytes:
    """Return the digest of the key that was sent, if it is one of these; else nothing."""
    tokens = (_bearer_token(), request.headers.get("X-Api-Key", "").encode("latin-1"))
    known = [hashlib.sha256(token).digest() for token in tokens if _is_among(token, digests)]
    return known[0] if known else b""


def _bearer_token() -> bytes:
    """Return the token of the Authorization header (RFC 6750, 2.1), or nothing."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # the bytes that were sent


def _is_among(sent: bytes, digests: Sequence[bytes]) -> bool:
    """Compare with all keys, in a time that depends neither on the keys nor on which one it is."""
    digest = hashlib.sha256(sent).digest()
    return any([hmac.compare_digest(digest, each) for each in digests])  # a list: every comparison is made
