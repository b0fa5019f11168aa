"""Reads an upload, multipart/form-data, part by part: its file goes to the disk as it comes, within its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from ...errors import UserError
from ..http_body import convert
from ..to_the_end import to_the_end
from .disk import Incoming
from .types import ExpiresAfter

CHUNK_BYTES = 256 * 1024
MAX_FIELD_BYTES = 1024
MAX_NAME_LEN = 255
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(frozen=True, slots=True)
class Upload:
    content: Incoming  # in its place
    filename: str
    expires_after: ExpiresAfter | None


class UploadReader:
    """Into what `incoming` makes. `stack` closes what an upload leaves that is not kept. Each MiB has to come within
    `timeout_s`."""

    def __init__(
        self,
        request: web.Request,
        incoming: Callable[[], Incoming],
        max_bytes: int,
        timeout_s: float,
        stack: ExitStack,
    ):
        self._request, self._incoming, self._stack = request, incoming, stack
        self._max_bytes, self._timeout_s = max_bytes, timeout_s

    async def read(self) -> Upload:
        """Raises `UserError` with status 400, 403, 408, 413, 415, 503 or 507."""
        request = self._request
        if request.content_type != "multipart/form-data":
            raise UserError(
                f"the content type is {request.content_type[:100]!r}; send multipart/form-data with the parts file and "
                "purpose",
                status=415,
            )
        if request.content_length is not None and request.content_length > self._max_bytes + CHUNK_BYTES:
            raise self._too_large()
        fields: dict[str, str] = {}
        content: Incoming | None = None
        filename = ""
        try:
            async for part in await request.multipart():
                name = _printable(getattr(part, "name", None), 64)
                if not isinstance(part, BodyPartReader) or name not in _FIELDS:
                    raise UserError(f"the part {name!r} is unknown; there are {', '.join(_FIELDS)}", param=name)
                if name in fields or (name == "file" and content is not None):
                    raise UserError(f"the part {name!r} is there twice", param=name)
                if name == "file":
                    filename, content = _printable(part.filename, MAX_NAME_LEN), await self._file(part)
                else:
                    fields[name] = await self._text(part, name)
        except (ValueError, AssertionError, UnicodeDecodeError, HttpProcessingError) as error:  # the last: of headers
            reason = error.message if isinstance(error, HttpProcessingError) else str(error)
            raise UserError(f"the body is no valid multipart/form-data: {reason[:200]}") from None
        if content is None:
            raise UserError("the part 'file' is required", param="file")
        if (purpose := fields.pop("purpose", None)) != "batch":
            raise UserError(f"purpose is {(purpose or '')[:64]!r}; files here are for 'batch'", param="purpose")
        await to_the_end(asyncio.to_thread(content.finish))
        return Upload(content, filename or "upload.jsonl", _expires_after(fields))

    async def _file(self, part: BodyPartReader) -> Incoming:
        content = await asyncio.to_thread(self._incoming)
        self._stack.callback(content.close)
        while data := await self._some(part):
            if content.num_bytes + len(data) > self._max_bytes:
                raise self._too_large()
            await to_the_end(asyncio.to_thread(content.write, data))  # before it is closed for a client that leaves
        return content

    async def _text(self, part: BodyPartReader, name: str) -> str:
        text = b""
        while data := await self._some(part):
            text += data
            if len(text) > MAX_FIELD_BYTES:
                raise UserError(f"the part {name!r} is longer than {MAX_FIELD_BYTES} bytes", param=name)
        return text.decode()

    async def _some(self, part: BodyPartReader) -> bytes:
        """About a MiB, or what there is left; nothing at the end."""
        data = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(data) < 4 * CHUNK_BYTES and (chunk := await part.read_chunk(CHUNK_BYTES)):
                    data += chunk
        except TimeoutError:
            raise UserError(
                f"of the upload no MiB came within {self._timeout_s:g} s (--read-timeout-s)", status=408, code="timeout"
            ) from None
        return bytes(data)

    def _too_large(self) -> UserError:
        return UserError(
            f"the file is larger than {self._max_bytes} bytes (--batch-max-file-mib); split it",
            param="file",
            status=413,
            code="file_too_large",
        )


def _printable(name: str | None, most: int) -> str:
    """A name in a part's headers, at most so many characters; bytes that are no UTF-8 become replacement characters."""
    return (name or "")[:most].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _expires_after(fields: dict[str, str]) -> ExpiresAfter | None:
    if not fields:
        return None
    seconds = fields.get("expires_after[seconds]", "")
    if not seconds.isascii() or not seconds.isdigit() or len(seconds) > 18:
        raise UserError(f"expires_after[seconds] is {seconds[:64]!r}; send a whole number", param="expires_after")
    return convert({"anchor": fields.get("expires_after[anchor]", "created_at"), "seconds": int(seconds)}, ExpiresAfter)
