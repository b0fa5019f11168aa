"""The routes of OpenAI's files and batches, over one store; without --batch-dir they say what is missing.

Owns what belongs to whom: whoever asks sees files and batches of his own key's name alone.
"""

from __future__ import annotations

import asyncio
import functools
import re
import uuid
from contextlib import ExitStack
from typing import Any

import msgspec
from aiohttp import hdrs, web

from ...config import ServeConfig
from ...errors import UserError
from ..access.caller import caller_of
from ..http_body import convert, json_response, read_body
from ..route import Handler
from .retention import KEEP_S
from .service import BatchService
from .store import BatchStore
from .types import (
    MAX_BATCHES,
    MAX_FILES,
    MAX_KEEP_S,
    Batch,
    BatchError,
    BatchErrors,
    BatchList,
    BatchQuery,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    FileQuery,
)
from .upload import CHUNK_BYTES, UploadReader
from .worker import BatchWorker

_WINDOW = re.compile(r"([1-9]\d{0,4})([mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}


class BatchRoutes:
    """Of one server, over its store and worker."""

    def __init__(self, config: ServeConfig, service: BatchService):
        self._config, self._open = config, service.open

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {
            "upload_file": self.upload,
            "files": self.files,
            "file": self.file,
            "file_content": self.content,
            "delete_file": self.delete,
            "create_batch": self.create,
            "batches": self.batches,
            "batch": self.batch,
            "cancel_batch": self.cancel,
        }

    # -- files

    async def upload(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        owner = caller_of(request).name
        max_bytes = int(self._config.batch_max_file_mib * 2**20)
        with ExitStack() as stack:
            incoming = functools.partial(store.folder.incoming, owner)
            reader = UploadReader(request, incoming, max_bytes, self._config.read_timeout_s, stack)
            upload = await reader.read()
            keep_s = upload.expires_after.seconds if upload.expires_after is not None else KEEP_S
            file = await worker.on_disk(store.files.add, owner, upload.content, upload.filename, keep_s)
        return json_response(file)

    async def files(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        query, owner = convert(dict(request.query), FileQuery), caller_of(request).name
        limit, newest_first = _limit(query.limit, MAX_FILES), query.order == "desc"
        found = await worker.on_disk(store.files.page, owner, query.after, limit + 1, newest_first, query.purpose)
        if found is None:
            raise _unknown("file", query.after or "", "after")
        return json_response(FileList(found[:limit], *_ends(found[:limit]), len(found) > limit))

    async def file(self, request: web.Request) -> web.Response:
        return json_response(await self._file(request))

    async def delete(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        file_id = request.match_info["file_id"]
        if not await worker.on_disk(store.files.delete, caller_of(request).name, file_id):
            raise _unknown("file", file_id)
        return json_response(FileDeleted(file_id))

    async def content(self, request: web.Request) -> web.StreamResponse:
        store, _ = self._open()
        found = await self._file(request)
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/jsonl; charset=utf-8"})
        response.content_length = found.bytes
        opened = await asyncio.to_thread(store.folder.open, found.id)
        if opened is None:  # it was deleted meanwhile
            raise _unknown("file", found.id)
        with opened as file:
            await response.prepare(request)
            while request.method != "HEAD" and (data := await asyncio.to_thread(file.read, CHUNK_BYTES)):
                await response.write(data)
        await response.write_eof()
        return response

    async def _file(self, request: web.Request) -> FileObject:
        store, worker = self._open()
        file_id = request.match_info["file_id"]
        found: FileObject | None = await worker.on_disk(store.files.get, caller_of(request).name, file_id)
        if found is None:
            raise _unknown("file", file_id)
        return found

    # -- batches

    async def create(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        body = convert(await read_body(request, self._config), BatchRequest)
        owner, endpoints = caller_of(request).name, worker.endpoints
        if body.endpoint not in endpoints:
            raise UserError(f"endpoint is {body.endpoint[:100]!r}; there are {', '.join(endpoints)}", param="endpoint")
        window_s = window_seconds(body.completion_window)
        file = await worker.on_disk(store.files.get, owner, body.input_file_id)
        if file is None:
            raise _unknown("file", body.input_file_id, "input_file_id")
        if file.purpose != "batch":
            raise UserError(
                f"file {file.id!r} is of purpose {file.purpose!r}; upload the input with purpose 'batch'",
                param="input_file_id",
            )
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            status="validating",
            created_at=store.now,
            expires_at=store.now + window_s,
            metadata=body.metadata,
        )
        keep_s = body.output_expires_after.seconds if body.output_expires_after is not None else KEEP_S
        if not await worker.add(owner, batch, keep_s):
            raise _unknown("file", file.id, "input_file_id")
        return json_response(batch)

    async def batches(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        query, owner = convert(dict(request.query), BatchQuery), caller_of(request).name
        limit = _limit(query.limit, MAX_BATCHES)
        found = await worker.on_disk(store.batches, owner, query.after, limit + 1)
        if found is None:
            raise _unknown("batch", query.after or "", "after")
        shown = [self._told(batch, worker) for batch in found[:limit]]
        return json_response(BatchList(shown, *_ends(shown), len(found) > limit))

    async def batch(self, request: web.Request) -> web.Response:
        store, worker = self._open()
        return json_response(self._told(await self._batch(request, store, worker), worker))

    async def cancel(self, request: web.Request) -> web.Response:
        _, worker = self._open()
        batch = await worker.cancel(caller_of(request).name, request.match_info["batch_id"])
        if batch is None:
            raise _unknown("batch", request.match_info["batch_id"])
        if batch.status != "cancelling":
            raise UserError(
                f"batch {batch.id!r} is {batch.status}, so that there is nothing to cancel",
                param="batch_id",
                status=409,
                code="invalid_status",
            )
        return json_response(batch)

    async def _batch(self, request: web.Request, store: BatchStore, worker: BatchWorker) -> Batch:
        batch_id = request.match_info["batch_id"]
        found: Batch | None = await worker.on_disk(store.batch, caller_of(request).name, batch_id)
        if found is None:
            raise _unknown("batch", batch_id)
        return found

    def _told(self, batch: Batch, worker: BatchWorker) -> Batch:
        """With what keeps it from going on."""
        if (problem := worker.problems.get(batch.id)) is None:
            return batch
        return msgspec.structs.replace(batch, errors=BatchErrors([BatchError("waiting", problem)]))


def window_seconds(text: str) -> int:
    """Of a completion window. Raises `UserError`."""
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not 60 <= seconds <= MAX_KEEP_S:
        raise UserError(
            f"completion_window is {text[:64]!r}; send 24h, or other minutes (m), hours (h) or days (d) up to 30d",
            param="completion_window",
        )
    return seconds


def _limit(text: str, most: int) -> int:
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= limit <= most:
        raise UserError(f"limit is {text[:64]!r}; 1 to {most} is allowed", param="limit")
    return limit


def _ends(found: list[Any]) -> tuple[str | None, str | None]:
    return (found[0].id, found[-1].id) if found else (None, None)


def _unknown(what: str, name: str, param: str | None = None) -> UserError:
    return UserError(
        f"there is no {what} {name[:64]!r} of this key, or not any more",
        param=param or f"{what}_id",
        status=404,
        code="not_found",
    )
