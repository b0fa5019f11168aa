"""The page at `/`, playground, live board and adapters, and the one that asks for the leaderboard's key, as files of
this package.

All of them are read at start, so that a request looks up a name and never a path. They hold no secret and need no key;
what the page asks of the API does. Its policy allows no inline script or style, no other host, and no text as HTML.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

PAGE_DIR = Path(__file__).with_name("page")
INDEX, LEADERBOARD = "index.html", "leaderboard.html"
_LEADERBOARD_LINK = re.compile(rb"\s*<a href=\"/leaderboard/\">.*</a>")
_REFUSED = re.compile(r"q\s*=\s*0(\.0*)?")
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
# Pages of the leaderboard are shown in a frame, with their styles in them.
_FRAME_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'") + "; frame-src blob:"
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    content_type: str
    etag: str  # without its quotes


class PageFiles:
    """Serves `PAGE_DIR` as it was when this was made. `has_leaderboard` says whether the page leads to one."""

    def __init__(self, has_leaderboard: bool = False):
        self._files = {
            path.relative_to(PAGE_DIR).as_posix(): _page_file(path.read_bytes(), path.suffix)
            for path in PAGE_DIR.rglob("*")
            if path.suffix in TYPES and path.is_file()
        }
        if not has_leaderboard:
            self._files[INDEX] = _page_file(_LEADERBOARD_LINK.sub(b"", self._files[INDEX].body), ".html")

    @property
    def files(self) -> Mapping[str, PageFile]:
        return self._files

    def index(self, request: web.Request) -> web.Response:
        """The page itself, from `/`, where clients that do not name HTML get something else."""
        response = self._answer(request, self._files[INDEX])
        response.headers["Vary"] = "Accept"
        return response

    def key_page(self, request: web.Request) -> web.Response | None:
        """For a browser at the leaderboard without the key that it needs, which it cannot send by itself: the page that
        asks for one, and fetches the others with it."""
        is_looking = request.method in ("GET", "HEAD") and wants_page(request)
        if not is_looking or not f"{request.path}/".startswith("/leaderboard/"):
            return None
        response = self._answer(request, self._files[LEADERBOARD])
        response.headers["Content-Security-Policy"] = _FRAME_POLICY
        response.headers["Vary"] = "Accept, Authorization"
        return response

    async def file(self, request: web.Request) -> web.Response:
        """One of `/ui/...`; 404 for what is no file of the page."""
        found = self._files.get(request.match_info["path"])
        if found is None:
            raise web.HTTPNotFound(reason="the page has no such file")
        return self._answer(request, found)

    def _answer(self, request: web.Request, file: PageFile) -> web.Response:
        headers = {**HEADERS, "ETag": f'"{file.etag}"'}
        known = request.if_none_match or ()
        if any(tag.value in (file.etag, "*") for tag in known):
            return web.Response(status=304, headers=headers)
        return web.Response(body=file.body, content_type=file.content_type, charset="utf-8", headers=headers)


async def leaderboard_root(request: web.Request) -> web.Response:
    """Pages name each other by addresses that begin behind the slash."""
    return web.Response(status=301, headers={"Location": "/leaderboard/"})


async def no_leaderboard(request: web.Request) -> web.Response:
    """Where the server was started without one."""
    raise web.HTTPNotFound(reason="this server has no leaderboard; start it with --leaderboard FILE")


def wants_page(request: web.Request) -> bool:
    """Whether a browser asks: others, who name no HTML, look whether anyone is there."""
    kinds = (kind for value in request.headers.getall("Accept", ()) for kind in value.lower().split(","))
    parts = ([part.strip() for part in kind.split(";")] for kind in kinds)
    return any(kind == "text/html" and not any(map(_REFUSED.fullmatch, params)) for kind, *params in parts)


def _page_file(body: bytes, suffix: str) -> PageFile:
    return PageFile(body, TYPES[suffix], hashlib.sha256(body).hexdigest()[:32])
