"""Adapters on HTTP servers: redirects and addresses held to what is allowed, lengths to what was said.

A redirect is followed by hand, and only to an allowed address. Names are resolved once, by the connection itself, so
that what was checked is what is connected to. No proxies, no cookies, no netrc, nothing compressed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ...errors import UserError
from .fetching import CHUNK_BYTES, FileState, failed, too_large
from .locations import AllowedSources, Location, address_allowed, parse

MAX_REDIRECTS = 5
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)  # the whole fetch has a limit of its own
_REDIRECTS = {301, 302, 303, 307, 308}


class HttpSource:
    """The folder at `location`. A context manager."""

    def __init__(self, location: Location, allowed: AllowedSources):
        self._location = location
        self._allowed = allowed
        self._runner = asyncio.Runner()

    def __enter__(self) -> HttpSource:
        self._session = self._runner.run(self._open())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._runner.run(self._session.close())
        self._runner.close()

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Resolver(self._allowed.networks), limit=4),
            timeout=TIMEOUT,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "specserve"},
        )

    def states(self, names: tuple[str, ...]) -> dict[str, FileState]:
        return self._runner.run(self._states(names))

    async def _states(self, names: tuple[str, ...]) -> dict[str, FileState]:
        states = [await self._state(name) for name in names]  # one after the other: errors name the first that fails
        return {name: state for name, state in zip(names, states, strict=True) if state is not None}

    async def _state(self, name: str) -> FileState | None:
        async with self._answer("HEAD", name) as answer:
            if answer is None:
                return None
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            return FileState(answer.content_length, tag)

    def read(self, name: str, target: Path, max_bytes: int) -> None:
        self._runner.run(self._read(name, target, max_bytes))

    async def _read(self, name: str, target: Path, max_bytes: int) -> None:
        async with self._answer("GET", name) as answer:
            if answer is None:
                raise failed(f"{name} has just gone")
            num_bytes = 0
            with target.open("wb") as file:
                async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes:
                        raise too_large(name, max_bytes)
                    file.write(chunk)

    @asynccontextmanager
    async def _answer(self, method: str, name: str) -> AsyncIterator[aiohttp.ClientResponse | None]:
        """The last answer of what may be redirects; None when there is no such file."""
        url = f"{self._location.url}/{name}"
        try:
            for _ in range(MAX_REDIRECTS + 1):
                async with self._session.request(method, URL(url, encoded=True), allow_redirects=False) as answer:
                    if answer.status in _REDIRECTS:
                        url = self._redirected(url, answer.headers.get("Location", ""))
                    elif answer.status in (404, 410):
                        yield None
                        return
                    elif answer.status != 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
                        raise failed(f"{method} {name} answers {answer.status}, not 200 and uncompressed")
                    else:
                        yield answer
                        return
            raise failed(f"{name} is redirected more than {MAX_REDIRECTS} times")
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _AddressRefused):
                refusal = str(error.os_error)
                raise UserError(refusal, param="lora_path", code="source_not_allowed", status=403) from None
            raise failed(f"{self._location.place} cannot be reached: {type(error.os_error).__name__}") from None
        except TimeoutError:
            raise failed(f"{self._location.place} says nothing for {TIMEOUT.sock_read:g} s") from None
        except aiohttp.ClientError as error:
            raise failed(f"{method} {name} from {self._location.place}: {type(error).__name__}") from None

    def _redirected(self, url: str, to: str) -> str:
        """Where a redirect leads, when that is allowed; it may have a query, which is how stores sign addresses."""
        try:
            address, mark, query = urljoin(url, to).partition("#")[0].partition("?")
            location = parse(address, "redirect")
        except (UserError, ValueError):
            raise _redirect_refused(self._location) from None
        if not self._allowed.allows(location):
            raise _redirect_refused(self._location)
        return location.url + mark + query


def _redirect_refused(location: Location) -> UserError:
    """Where it leads is not said: it may hold a signature, and may be what an attacker looks for."""
    return UserError(
        f"{location.url} redirects to an address that this server may not fetch from (--allowed-adapter-urls)",
        param="lora_path",
        code="source_not_allowed",
        status=403,
    )


class _AddressRefused(OSError):
    pass


class _Resolver(AbstractResolver):
    """Addresses of names, all of which must be allowed."""

    def __init__(self, networks: tuple[str, ...]):
        self._networks = networks

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results = []
        for kind, _, proto, _, address in found:
            if not address_allowed(str(address[0]), host, self._networks):
                raise _AddressRefused(
                    f"{host} leads to an address that is not public; --allowed-adapter-networks names those that are "
                    "allowed"
                )
            flags = socket.AI_NUMERICHOST
            result = ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=proto, flags=flags
            )
            results.append(result)
        return results

    async def close(self) -> None:
        pass
