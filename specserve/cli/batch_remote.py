"""`specserve batch --url`: the rows of a file as batches of a server, through its /v1/files and /v1/batches.

The rows run there, behind the server's other requests, whether this command goes on or not. Owns the list of batches in
OUT.progress, with which the same command finds them again, and the way of their lines back into the order of IN. Works
with whatever speaks OpenAI's API.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any

import aiohttp
import msgspec

from ..errors import UserError
from ..server.batches.rows import parse_row
from ..server.batches.types import RequestCounts
from ..whole_files import replace_file
from .batch import MAX_ROW_BYTES, BatchFiles, BatchFlags, Progress

MAX_ROWS, MAX_BYTES = 50_000, 100 << 20  # of one batch
PAGE = 100  # batches of a list
POLL_S = 1.0
PATIENCE_S = 600.0  # with a server that cannot be reached
ENDED = ("completed", "failed", "expired", "cancelled")
RUN, PART = "specserve_run", "specserve_part"  # keys of metadata, by which a batch is known


class Part(msgspec.Struct):
    """Rows that are one batch: so many bytes of IN from there on."""

    offset: int
    num_bytes: int
    num_rows: int
    batch_id: str | None = None


class Run(msgspec.Struct):
    """What is kept between two runs of the command."""

    id: str
    sha256: str
    url: str
    endpoint: str
    parts: list[Part]
    is_begun: bool = True  # the server was asked for a batch


async def run_remote(flags: BatchFlags, files: BatchFiles) -> int:
    """As `batch`, on the server at `flags.url`."""
    assert flags.url is not None
    url = flags.url.rstrip("/").removesuffix("/v1")
    run = _kept(files, url if "://" in url else f"http://{url}")
    with files.held():
        headers = {"Authorization": f"Bearer {flags.api_key}"} if flags.api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            server = _Server(session, run.url)
            await _begin(server, run, files, flags.window)
            batches, progress = await _wait(server, run)
            output = files.progress / "output.jsonl"
            with output.open("wb") as target:
                for part, batch in zip(run.parts, batches, strict=True):
                    await _collect(server, files, part, batch, target)
        files.put(output)
    return progress.result(files.target)


_Asked = AbstractAsyncContextManager[aiohttp.ClientResponse]


class _Server:
    """Its answers as JSON. Raises `UserError`; one that cannot be reached is asked again for a while."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self._session, self._url = session, url

    async def get(self, path: str) -> dict[str, Any]:
        return _decoded(await self.content(path))

    async def content(self, path: str) -> bytes:
        return await self._ask(partial(self._session.get, self._url + path))

    async def upload(self, source: Path, part: Part) -> dict[str, Any]:
        ask = partial(self._session.post, self._url + "/v1/files")
        return _decoded(await self._ask(lambda: ask(data=_form(source, part))))

    async def begin(self, body: dict[str, Any]) -> dict[str, Any]:
        """A new batch. It is not asked for again where nobody knows whether it was made."""
        ask = partial(self._session.post, self._url + "/v1/batches", json=body)
        return _decoded(await self._ask(ask, is_repeatable=False))

    async def _ask(self, ask: Callable[[], _Asked], is_repeatable: bool = True) -> bytes:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                async with ask() as response:
                    data = await response.read()
                    if response.status == 200:
                        return data
                    error = _error(data, response.status, self._url)
                    if response.status not in (429, 503):
                        raise error
            except aiohttp.InvalidURL:
                raise UserError(f"--url {self._url!r} is no address; give one such as http://127.0.0.1:8000") from None
            except (aiohttp.ClientError, TimeoutError, OSError) as failure:
                error = UserError(f"cannot reach {self._url}: {failure}; the same command goes on where this one ends")
                if not is_repeatable:
                    raise error from None
            if time.monotonic() > deadline:
                raise error
            await asyncio.sleep(POLL_S)


def _kept(files: BatchFiles, url: str) -> Run:
    """The run that was begun, or a new one. Raises `UserError`."""
    state = files.progress / "run.json"
    if state.exists():
        run = msgspec.json.decode(state.read_bytes(), type=Run)
        if run.sha256 != files.digest():
            raise files.changed()
        if run.url != url:
            raise UserError(
                f"{files.progress} was begun with {run.url}; give that as --url, or remove the folder to begin anew"
            )
        return run
    check = files.check()
    run = Run(uuid.uuid4().hex, files.digest(), url, check.endpoint or "", list(_parts(files.source)), False)
    files.progress.mkdir(exist_ok=True)
    _keep(files, run)
    return run


def _keep(files: BatchFiles, run: Run) -> None:
    data = msgspec.json.encode(run)
    replace_file(files.progress / "run.json", lambda path: path.write_bytes(data), sync=True)


def _parts(path: Path) -> Iterator[Part]:
    part = Part(0, 0, 0)
    with path.open("rb") as file:
        for line in file:
            if part.num_rows and (part.num_rows == MAX_ROWS or part.num_bytes + len(line) > MAX_BYTES):
                yield part
                part = Part(part.offset + part.num_bytes, 0, 0)
            part.num_rows += bool(line.strip())
            part.num_bytes += len(line)
    yield part


async def _begin(server: _Server, run: Run, files: BatchFiles, window: str) -> None:
    """Make the batches that are not there; one that was made just before an end is found by its metadata."""
    is_asked = run.is_begun  # whether the first part without a batch may have one
    for number, part in enumerate(run.parts):
        if part.batch_id is None and is_asked:
            part.batch_id, is_asked = await _made(server, run, number), False
        if not run.is_begun:
            run.is_begun = True
            _keep(files, run)
        if part.batch_id is None:
            file = await server.upload(files.source, part)
            body = {
                "input_file_id": file["id"], "endpoint": run.endpoint, "completion_window": window,
                "metadata": {RUN: run.id, PART: str(number)},
            }  # fmt: skip
            part.batch_id = (await server.begin(body))["id"]
        _keep(files, run)


async def _made(server: _Server, run: Run, number: int) -> str | None:
    """The batch of that part, among all that the server lists, newest first."""
    wanted, after = {RUN: run.id, PART: str(number)}, ""
    while True:
        page = await server.get(f"/v1/batches?limit={PAGE}{after}")
        for batch in page["data"]:
            if wanted.items() <= (batch.get("metadata") or {}).items():
                return str(batch["id"])
        if not page.get("has_more") or not page["data"]:
            return None
        after = f"&after={page['data'][-1]['id']}"


def _form(source: Path, part: Part) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    with source.open("rb") as file:
        file.seek(part.offset)
        form.add_field("file", file.read(part.num_bytes), filename=source.name)
    return form


async def _wait(server: _Server, run: Run) -> tuple[list[dict[str, Any]], Progress]:
    """The batches when all have ended."""
    progress: Progress | None = None
    found: list[dict[str, Any]] = [{} for _ in run.parts]
    try:
        while True:
            for idx, part in enumerate(run.parts):
                if found[idx].get("status") not in ENDED:
                    found[idx] = await server.get(f"/v1/batches/{part.batch_id}")
            failed = next((batch for batch in found if batch["status"] == "failed"), None)
            if failed is not None:
                why = "; ".join(error["message"] for error in (failed.get("errors") or {}).get("data", []))
                raise UserError(f"{failed['id']} failed: {why or 'the server does not say why'}")
            counts = RequestCounts(total=sum(part.num_rows for part in run.parts))
            for batch in found:
                counts.completed += batch["request_counts"]["completed"]
                counts.failed += batch["request_counts"]["failed"]
            progress = progress or Progress(counts)
            progress.show(counts)
            if all(batch["status"] in ENDED for batch in found):
                return found, progress
            await asyncio.sleep(POLL_S)
    finally:
        if progress is not None:
            progress.close()


async def _collect(server: _Server, files: BatchFiles, part: Part, batch: dict[str, Any], target: IO[bytes]) -> None:
    """The lines of a batch's files, in the order of its rows."""
    lines: dict[str, bytes] = {}
    for name in ("output_file_id", "error_file_id"):
        if (file_id := batch.get(name)) is not None:
            for line in (await server.content(f"/v1/files/{file_id}/content")).splitlines():
                lines[json.loads(line)["custom_id"]] = line
    with files.source.open("rb") as source:
        source.seek(part.offset)
        for raw in source.read(part.num_bytes).split(b"\n"):
            if raw := raw.strip():
                custom_id = parse_row(raw, 0, MAX_ROW_BYTES).custom_id
                if custom_id not in lines:
                    raise UserError(f"{batch['id']} has no line for the row {custom_id[:100]!r}")
                target.write(lines[custom_id] + b"\n")


def _decoded(data: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(data)
    return value


def _error(data: bytes, status: int, url: str) -> UserError:
    try:
        found = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        found = f"status {status}: {data[:200]!r}"
    hint = " (--api-key, or SPECSERVE_API_KEY)" if status == 401 else ""
    return UserError(f"{url}: {found}{hint}", status=status)
