"""What an adapter's folder brings for people: examples of prompts, and the report of its training.

Neither is part of what the adapter is (../adapter_files.py), and both are untrusted: they are read within limits, from
within the folders of adapters, off the event loop. A report is shown without scripts, without requests and in an origin
of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from ..adapter_files import EXAMPLES_FILE, MAX_EXAMPLES, MAX_EXAMPLES_BYTES, MAX_TITLE_LEN, read_extra
from ..errors import AdapterError, OverloadedError, UserError
from ..strict_json import decode_json
from .access.caller import caller_of
from .adapter_store import AdapterStore
from .http_body import json_response
from .openai.response_types import AdapterExample
from .route import Handler

REPORT_FILE = "report.html"
MAX_REPORT_BYTES = 4 << 20
LOOK_TIMEOUT_S = 1.0  # for adapters that lie elsewhere than in the folder of them, whose disks may be away
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"

logger = logging.getLogger(__name__)

Extras = tuple[bool, bool]  # whether there is a report, and examples


class AdapterExtras:
    """Handlers over one store."""

    def __init__(self, store: AdapterStore):
        self._store = store

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {"adapter_examples": self.examples, "adapter_report": self.report}

    async def examples(self, request: web.Request) -> web.Response:
        name = _name_of(request)
        try:
            body = await self._read(name, EXAMPLES_FILE, MAX_EXAMPLES_BYTES)
            found = [] if body is None else examples_of(body, f"{EXAMPLES_FILE} of adapter {name!r}")
        except AdapterError as error:
            logger.warning("no examples are shown: %s", error)  # which names the adapter
            found = []
        return json_response({"object": "list", "data": found})

    async def report(self, request: web.Request) -> web.Response:
        name = _name_of(request)
        body = await self._read(name, REPORT_FILE, MAX_REPORT_BYTES)
        if body is None:
            message = f"adapter {name!r} has no {REPORT_FILE}; specserve train writes one"
            raise UserError(message, status=404, code="report_not_found")
        headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"}
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=headers)

    async def of(self, names: Iterable[str]) -> dict[str, Extras]:
        """What each of `names` brings; where a disk does not answer, nothing."""
        given = self._store.given_names()
        looks = [self._look("", set(names) - given), self._look("given adapters", given.intersection(names))]
        return {name: extras for found in await asyncio.gather(*looks) for name, extras in found.items()}

    async def _look(self, what: str, names: set[str]) -> dict[str, Extras]:
        if not names:
            return {}
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                return await self._store.look(self._extras_of, what, names)
        except (TimeoutError, OverloadedError):
            return {}

    def _extras_of(self, what: str, names: set[str]) -> dict[str, Extras]:
        found = {}
        for name in names:
            try:
                directory = self._store.path(name)
                found[name] = ((directory / REPORT_FILE).is_file(), (directory / EXAMPLES_FILE).is_file())
            except (UserError, OSError):  # it has gone, or nobody may look into it
                continue
        return found

    async def _read(self, name: str, file: str, max_bytes: int) -> bytes | None:
        def read(name: str) -> bytes | None:
            return read_extra(self._store.path(name), name, file, max_bytes, self._store.roots)

        return await self._store.look(read, name)


def _name_of(request: web.Request) -> str:
    """The adapter that the path names. Raises 404 for one that the key may not use."""
    name: str = request.match_info["name"]
    caller_of(request).check_adapter(name)
    return name


def examples_of(body: bytes, source: str) -> list[AdapterExample]:
    """The good ones among the first few in `body`; the log has what is wrong with others. Raises `AdapterError`.

    `source` is what `body` is called there.
    """
    try:
        entries = decode_json(body, source)
    except UserError as error:  # a request would be at fault
        raise AdapterError(str(error)) from None
    if not isinstance(entries, list):
        raise AdapterError(f"{source} holds no list")
    if len(entries) > MAX_EXAMPLES:
        logger.warning("%s has %d entries; the first %d are shown", source, len(entries), MAX_EXAMPLES)
    found = []
    for idx, entry in enumerate(entries[:MAX_EXAMPLES]):
        try:
            found.append(_example(entry))
        except (msgspec.ValidationError, UserError) as error:
            logger.warning("entry %d of %s is not shown: %s", idx, source, error)
    return found


def _example(entry: Any) -> AdapterExample:
    example = msgspec.convert(entry, AdapterExample)
    if not 1 <= len(example.title) <= MAX_TITLE_LEN:
        raise UserError(f"its title has {len(example.title)} characters; 1 to {MAX_TITLE_LEN} are shown")
    if (example.prompt is None) == (example.messages is None):
        raise UserError("it has neither messages nor a prompt, or both; one of them is shown")
    if example.messages is not None and not example.messages:
        raise UserError("its messages are an empty list; one message or more are shown")
    return example
