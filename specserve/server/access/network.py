"""Where a request may come from: Host names and browser origins. Pure functions of headers and settings."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from ...config import ServeConfig

LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost"}


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
