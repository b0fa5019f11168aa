"""Where an adapter may be fetched from: addresses under allowed prefixes, and allowed repositories of the hub.

Owns what an address may look like. Whatever two programs could read in two ways is refused: credentials, queries, dots
and slashes in percent signs, chains of file systems. Off unless the settings name something.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from ...config import ServeConfig
from ...errors import UserError

HUB = "hf"
MAX_LEN = 2048
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.\-]*)://(?P<place>[A-Za-z0-9._~\-:\[\]]+)(?P<path>(/[A-Za-z0-9._~!$&'()*+,;=:@%\-]+)*)/?"
)
_REPOSITORY = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(@(?P<revision>[A-Za-z0-9][\w.\-/]*))?", re.ASCII
)
_REPOSITORIES = re.compile(r"[A-Za-z0-9*?][\w.\-*?]*/[A-Za-z0-9*?][\w.\-*?]*|\*", re.ASCII)
_DISGUISED = re.compile(r"%(2e|2f|5c|00)|%(?![0-9a-f]{2})", re.IGNORECASE)
_LOCAL_SCHEMES = {"file", "local"}  # folders are for --adapters-dir, which knows about links


@dataclass(frozen=True, slots=True)
class Location:
    """A checked address: of a folder, or of a repository as `hf://owner/name@revision`. Fit for logs and errors."""

    scheme: str
    place: str  # host and port, bucket, or the repository's owner/name
    path: str  # from "/" on, without one at the end; of a repository, its revision

    @property
    def url(self) -> str:
        if self.scheme == HUB:
            return f"{HUB}://{self.place}" + (f"@{self.path}" if self.path else "")
        return f"{self.scheme}://{self.place}{self.path}"

    def holds(self, other: Location) -> bool:
        same_place = (self.scheme, self.place) == (other.scheme, other.place)
        return same_place and (other.path == self.path or other.path.startswith(self.path + "/"))


@dataclass(frozen=True, slots=True)
class AllowedSources:
    """What the settings allow. `networks`: addresses that a name may lead to though they are not public."""

    prefixes: tuple[Location, ...]
    repositories: tuple[str, ...]  # owner/name, or patterns with * and ?
    networks: tuple[str, ...]

    def location(self, text: str) -> Location:
        """`text` as an allowed address. Raises `UserError`."""
        if text.startswith(f"{HUB}://"):
            return self._repository(text)
        location = parse(text, "lora_path")
        if not self.allows(location):
            raise _not_allowed(location.url, "--allowed-adapter-urls")
        return location

    def allows(self, location: Location) -> bool:
        return any(prefix.holds(location) for prefix in self.prefixes)

    def _repository(self, text: str) -> Location:
        match = _REPOSITORY.fullmatch(text.removeprefix(f"{HUB}://"))
        if match is None or ".." in text or len(text) > MAX_LEN:
            raise UserError(
                f"lora_path {text[:200]!r} is no repository; write hf://owner/name or hf://owner/name@revision",
                param="lora_path",
            )
        location = Location(HUB, match["id"], match["revision"] or "")
        if not any(fnmatchcase(location.place, pattern) for pattern in self.repositories):
            raise _not_allowed(location.url, "--allowed-hub-repos")
        return location


def is_address(path: str) -> bool:
    return "://" in path


def parse(text: str, param: str) -> Location:
    """`text` as the address of a folder. Raises `UserError`."""
    match = _URL.fullmatch(text)
    if match is None or len(text) > MAX_LEN or _DISGUISED.search(text) or not _has_place(text):
        raise UserError(
            f"{param} {_shown(text)!r} is no address of a folder; write scheme://host/path without credentials, query, "
            "fragment or encoded dots and slashes",
            param=param,
        )
    scheme, place, path = match["scheme"], match["place"], match["path"]
    if any(part in (".", "..") for part in path.split("/")):
        raise UserError(f"{param} {text[:200]!r} goes up in its path; write where it leads", param=param)
    if scheme in _LOCAL_SCHEMES:
        raise UserError(f"{param} {text[:200]!r} is a local folder; --adapters-dir is for these", param=param)
    return Location(scheme, place.lower() if scheme in ("http", "https") else place, path)


def allowed_sources(config: ServeConfig) -> AllowedSources:
    """Raises `UserError` for settings that are no addresses, repositories or networks."""
    for network in config.allowed_adapter_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise UserError(f"allowed_adapter_networks: {error}", param="allowed_adapter_networks") from None
    prefixes = tuple(parse(text, "allowed_adapter_urls") for text in config.allowed_adapter_urls)
    if any(prefix.scheme == HUB for prefix in prefixes):
        raise UserError("allowed_adapter_urls: repositories of the hub are for --allowed-hub-repos")
    for repository in config.allowed_hub_repos:
        if not _REPOSITORIES.fullmatch(repository):
            raise UserError(
                f"allowed_hub_repos {repository[:200]!r} matches no repository; write owner/name, where * and ? match",
                param="allowed_hub_repos",
            )
    return AllowedSources(prefixes, config.allowed_hub_repos, config.allowed_adapter_networks)


def address_allowed(address: str, host: str, networks: Iterable[str]) -> bool:
    """Whether a connection to the name `host` may go to `address`: a public one, or one of `networks`.

    A prefix whose host is an address, or localhost, has named it.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    if host == "localhost" and ip.is_loopback:
        return True
    if any(ip in ipaddress.ip_network(network) for network in networks):
        return True
    return ip.is_global and not ip.is_multicast


def _has_place(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.port != 0 and bool(parts.hostname)
    except ValueError:  # brackets or a port that are none
        return False


def _shown(text: str) -> str:
    """Without what may be a password or a signature."""
    if not is_address(text):
        return text.partition("?")[0].rpartition("@")[2][:200]
    try:
        parts = urlsplit(text)
    except ValueError:
        return text.partition("://")[0][:20] + "://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]


def _not_allowed(url: str, setting: str) -> UserError:
    return UserError(
        f"lora_path {url[:200]!r} is not among what this server may fetch ({setting})",
        param="lora_path",
        status=403,
        code="source_not_allowed",
    )
