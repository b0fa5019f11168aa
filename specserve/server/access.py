"""Who may ask: API keys, Host names and browser origins. Pure functions of headers and settings."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from ..config import ServeConfig
from ..errors import UserError

LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost"}


def check_key(request: web.Request, key: str | None, kind: str) -> None:
    """Compare the bearer token with `key` in constant time; no key set, no key needed."""
    if key is None:
        return
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    valid = hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), key.encode())
    if scheme.lower() != "bearer" or not valid:
        error = UserError(
            f"a valid {kind}API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )
        error.type = "authentication_error"
        raise error


def host_allowed(host: str, config: ServeConfig) -> bool:
    """Against DNS rebinding: a server on loopback answers loopback names and the configured ones only."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in {item.lower() for item in (*config.allowed_hosts, config.host)}:
        return True
    if not is_loopback(config.host):
        return not config.allowed_hosts
    return is_loopback(name)


def origin_allowed(origin: str, host: str, config: ServeConfig) -> bool:
    same = urlsplit(origin).netloc.lower() == host.lower() and bool(host)
    return same or origin in config.allowed_origins or "*" in config.allowed_origins


def is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK_NAMES
