"""The leaderboard over HTTP: the pages at /leaderboard/, made again when the file has changed.

An application of its own, or routes of another one. Reads the file and changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aiohttp import web

from ..errors import UserError
from ..whole_files import replace_file
from .pages import ANSWERS, BOARD_JSON, INDEX, Pages
from .store import open_board

ROOT = "/leaderboard"
# Styles stand in the page, scripts nowhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "sandbox allow-top-navigation-by-user-activation"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class LeaderboardSite:
    """Handlers over the file at `path`; raises `UserError` where that is no leaderboard."""

    def __init__(self, path: Path):
        self._path = path
        with open_board(path, read_only=True):
            pass
        self._made: dict[str, tuple[tuple[int, int], bytes]] = {}
        self._lock = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [web.get(ROOT, self._to_root), web.get(ROOT + "/{name:.*}", self.page)]

    async def _to_root(self, request: web.Request) -> web.Response:
        raise web.HTTPMovedPermanently(ROOT + "/")

    async def page(self, request: web.Request) -> web.Response:
        """The page that the route's `name` means, the board itself without one; 404 for what is none."""
        name = request.match_info.get("name") or INDEX
        try:
            async with self._lock:  # one is made at a time: they are alike
                body = await asyncio.to_thread(self._body, name)
        except UserError as error:  # the file has gone, or another one lies there
            raise web.HTTPServiceUnavailable(reason=" ".join(str(error).split())) from None
        if body is None:
            raise web.HTTPNotFound(reason="the leaderboard has no such page")
        etag = hashlib.sha256(body).hexdigest()[:32]
        headers = {**HEADERS, "ETag": f'"{etag}"'}
        if any(tag.value in (etag, "*") for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        kind = "application/json" if name == BOARD_JSON else "text/html"
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    def _body(self, name: str) -> bytes | None:
        state = self._state()
        kept = self._made.get(name)
        if kept is not None and kept[0] == state:
            return kept[1]
        with open_board(self._path, read_only=True) as store, store.snapshot():
            body = Pages(store).file(name)
        if body is not None:  # names that mean nothing are not kept
            self._made[name] = state, body
        return body

    def _state(self) -> tuple[int, int]:
        """When the file or its log was changed; another one at least whenever something was committed."""
        log = self._path.with_name(self._path.name + "-wal")
        times = [path.stat().st_mtime_ns if path.exists() else 0 for path in (self._path, log)]
        return times[0], times[1]


def application(path: Path) -> web.Application:
    """Raises `UserError`."""
    app = web.Application()
    app.add_routes(LeaderboardSite(path).routes())

    async def root(request: web.Request) -> web.Response:
        raise web.HTTPFound(ROOT + "/")

    app.add_routes([web.get("/", root)])
    return app


def export(path: Path, directory: Path) -> int:
    """Write all files into `directory`, made if need be, which any web server serves; returns how many.

    Raises `UserError` for one that holds other things, or cannot be written.
    """
    is_old = (directory / INDEX).is_file() and (directory / BOARD_JSON).is_file()
    if directory.exists() and not is_old and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} holds other things; give an empty folder, or one of an earlier export", param="dir"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open_board(path, read_only=True) as store, store.snapshot():
            pages, names = Pages(store), set[str]()
            for name in pages.names():
                body = pages.file(name)
                assert body is not None
                replace_file(directory / name, partial(_write, body))
                names.add(name)
        for path in directory.glob(
            f"*{ANSWERS}*.html"
        ):  # of tasks that have been removed, and of rows that are no more
            if path.name not in names:
                path.unlink()
        return len(names)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}", param="dir") from None


def _write(body: bytes, path: Path) -> None:
    path.write_bytes(body)


async def serve_until_stopped(path: Path, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises `UserError` where the address cannot be had."""
    runner = web.AppRunner(application(path))
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, shutdown_timeout=1.0)
        try:
            await site.start()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from None
        found = runner.addresses[0]
        say(f"the leaderboard is at http://{found[0]}:{found[1]}{ROOT}/ (Ctrl-C ends it)")
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        await stopped.wait()
    finally:
        await runner.cleanup()
