"""One specserve server over HTTP, with the standard library alone, and its start where none runs.

Whatever goes wrong is a `UserError` with one line for people. Owns the server that it starts, and ends it.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from specserve.errors import UserError

START_S = 300.0
TIMEOUT_S = 600.0  # of one request


class Server:
    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> dict[str, Any]:
        return self._send(path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._send(path, json.dumps(body).encode())

    def content_hash(self, adapter: str) -> str:
        """Of the files that `adapter` means now; None comes only before its first use.

        Raises:
            UserError: the server has no such adapter.
        """
        hashes = self._content_hashes()
        if adapter in hashes:
            return str(hashes[adapter])
        raise UserError(
            f"{self.url} has no adapter {adapter!r}; start the server with --adapters-dir examples/adapters, "
            "or train one: docs/rag.md"
        )

    def has(self, adapter: str) -> bool:
        return adapter in self._content_hashes()

    def is_ready(self) -> bool | None:
        """False where a server answers that is not ready yet, None where nothing answers."""
        try:
            self._open("/health", None)
        except urllib.error.HTTPError:
            return False
        except (OSError, HTTPException, ValueError):
            return None
        return True

    def _content_hashes(self) -> dict[str, str | None]:
        return {found["id"]: found["content_hash"] for found in self.get("/v1/adapters")["data"]}

    def _send(self, path: str, data: bytes | None) -> dict[str, Any]:
        try:
            return self._open(path, data)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}{path}: {_said(error)}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"{self.url} cannot be asked: {getattr(error, 'reason', error)}") from None

    def _open(self, path: str, data: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read())


def _said(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:200]}"


@contextmanager
def running(server: Server, *flags: str) -> Iterator[None]:
    """A server that is ready: the one that answers there, or `specserve serve FLAGS` while the context lasts."""
    process = None if server.is_ready() is not None else _start(server.url, flags)
    try:
        end = time.monotonic() + START_S
        while not server.is_ready():
            if process is not None and process.poll() is not None:
                raise UserError(f"the server ended with status {process.returncode} while it started")
            if time.monotonic() > end:
                raise UserError(f"{server.url} was not ready within {START_S:.0f} s")
            time.sleep(0.2)
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def _start(url: str, flags: Sequence[str]) -> subprocess.Popen[bytes]:
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost") or not parts.port:
        raise UserError(f"nothing answers at {url}; give the --url of a server that runs")
    command = [sys.executable, "-m", "specserve.cli", "serve", "--port", str(parts.port), *flags]
    return subprocess.Popen(command, env={"SPECSERVE_LOG_LEVEL": "warning", **os.environ}, stdin=subprocess.DEVNULL)
