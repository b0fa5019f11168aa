"""Sends planned requests to an OpenAI-compatible server and notes when what arrived.

Owns the HTTP and the clocks; draws nothing and sums nothing up. Open loop: a request is sent at its scheduled time,
however many are under way, and its latencies count from that time, so that a client or server that falls behind cannot
hide it (no coordinated omission). Invariant: every planned request that was due gives exactly one `Record`, whatever
went wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from ..errors import UserError
from .plan import PlannedRequest

MAX_EVENT_BYTES = 1 << 20


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Logprobs(msgspec.Struct):
    content: list[Any] | None = None  # chat
    tokens: list[Any] | None = None  # completions


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class SpeculationStats(msgspec.Struct):
    num_forwards: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    speculation: SpeculationStats | None = None


class Event(msgspec.Struct):
    """What is read of a stream's event; servers send more."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Model(msgspec.Struct):
    id: str
    owned_by: str = ""


class Models(msgspec.Struct):
    data: list[Model]


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and the fields that all of them share."""

    url: str  # without /v1
    is_chat: bool
    fields: dict[str, Any]
    timeout_s: float
    max_in_flight: int
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Chunk:
    """Output that was read at once. What the server wrote in several events but arrived together is one chunk."""

    at_s: float
    num_chars: int
    num_tokens: int | None  # None: the server does not say


@dataclass(slots=True)
class Record:
    """One request. Times are seconds after the start of the level."""

    model: str
    scheduled_s: float  # latencies count from here
    sent_s: float = 0.0
    end_s: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    finished: bool = False
    usage: Usage | None = None
    error: str | None = None  # kind
    error_text: str = ""


class RequestFailed(Exception):
    """A request went wrong in a way that has a name."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def open_session(target: Target) -> aiohttp.ClientSession:
    """A session without a limit of connections: requests must never queue in the client."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        connector=connector, headers=target.headers, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 20
    )


async def list_models(session: aiohttp.ClientSession, target: Target) -> list[Model]:
    """What GET /v1/models names. Raises `UserError` when the server cannot be used."""
    where = f"{target.url}/v1/models"
    try:
        async with asyncio.timeout(target.timeout_s), session.get(where) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot reach {where} ({reason}); is the server running, and is --url right?") from None
    if response.status in (401, 403):
        raise UserError(f"{where} answers {response.status}; give the server's key with --api-key")
    try:
        if response.status == 200:
            return msgspec.json.decode(body, type=Models).data
    except msgspec.MsgspecError:
        pass
    raise UserError(f"{where} answers {response.status} without a list of models; name an OpenAI server with --url")


async def open_loop(session: aiohttp.ClientSession, target: Target, plan: Sequence[PlannedRequest]) -> list[Record]:
    """Send each request at its arrival; one that would exceed `max_in_flight` is not sent and counts as an error."""
    records: list[Record] = []
    start_s = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        for planned in plan:
            assert planned.arrival_s is not None
            await asyncio.sleep(start_s + planned.arrival_s - time.perf_counter())
            record = Record(planned.model, planned.arrival_s)
            records.append(record)
            if len(running) >= target.max_in_flight:
                record.sent_s = record.end_s = time.perf_counter() - start_s
                record.error, record.error_text = "not_sent", f"{len(running)} requests under way (--max-in-flight)"
                continue
            task = group.create_task(_send(session, target, planned, record, start_s))
            running.add(task)
            task.add_done_callback(running.discard)
    return records


async def closed_loop(
    session: aiohttp.ClientSession,
    target: Target,
    plan: Sequence[PlannedRequest],
    concurrency: int,
    duration_s: float,
) -> list[Record]:
    """Keep `concurrency` requests under way until the plan ends; none is started after `duration_s`."""
    records: list[Record] = []
    waiting = iter(plan)
    start_s = time.perf_counter()

    async def worker() -> None:
        while (now_s := time.perf_counter() - start_s) <= duration_s and (planned := next(waiting, None)) is not None:
            records.append(record := Record(planned.model, now_s))
            await _send(session, target, planned, record, start_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return records


async def _send(
    session: aiohttp.ClientSession, target: Target, planned: PlannedRequest, record: Record, start_s: float
) -> None:
    """Fill in `record`; raises nothing but bugs."""
    body: dict[str, Any] = {**target.fields, "model": planned.model, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if target.is_chat:
        body["messages"] = planned.messages
    else:
        body["prompt"] = "\n\n".join(message["content"] for message in planned.messages)
    path = "/v1/chat/completions" if target.is_chat else "/v1/completions"
    started = False
    record.sent_s = time.perf_counter() - start_s
    try:
        async with asyncio.timeout(target.timeout_s):
            async with session.post(target.url + path, json=body, allow_redirects=False) as response:
                if response.status != 200:
                    text = (await response.content.read(2000)).decode(errors="replace")
                    raise RequestFailed(f"http_{response.status}", text)
                started = True
                await _read_stream(response.content, record, start_s)
    except RequestFailed as error:
        record.error, record.error_text = error.kind, str(error)
    except TimeoutError:
        record.error, record.error_text = "timeout", f"not answered within {target.timeout_s:g} s (--timeout)"
    except (aiohttp.ClientError, OSError) as error:
        record.error = "broken_stream" if started else "connection"
        record.error_text = f"{type(error).__name__}: {error}"
    if record.error is not None or not record.end_s:
        record.end_s = time.perf_counter() - start_s


async def _read_stream(content: aiohttp.StreamReader, record: Record, start_s: float) -> None:
    """Server-sent events until [DONE] or the end; raises `RequestFailed` unless the output was finished."""
    rest = b""
    async for data in content.iter_any():
        at_s = time.perf_counter() - start_s
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise RequestFailed("bad_event", f"an event is longer than {MAX_EVENT_BYTES} bytes")
        chunk = Chunk(at_s, 0, None)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                record.end_s = at_s  # read on: a connection that is not read to its end cannot be used again
                break
            _take(payload, record, chunk)
        if chunk.num_chars or chunk.num_tokens:
            record.chunks.append(chunk)
    if not record.finished:
        raise RequestFailed("truncated", "the stream ended before a finish_reason")


def _take(payload: bytes, record: Record, chunk: Chunk) -> None:
    try:
        event = msgspec.json.decode(payload, type=Event)
    except msgspec.MsgspecError as error:
        raise RequestFailed("bad_event", f"{error}: {payload[:200].decode(errors='replace')}") from None
    if event.error is not None:
        raise RequestFailed("error_event", str(event.error))
    record.usage = event.usage or record.usage
    for choice in event.choices:
        delta = choice.delta or Delta()
        chunk.num_chars += sum(len(text) for text in (choice.text, delta.content, delta.reasoning_content) if text)
        if choice.logprobs is not None:
            tokens = choice.logprobs.content or choice.logprobs.tokens or []
            chunk.num_tokens = (chunk.num_tokens or 0) + len(tokens)
        record.finished = record.finished or choice.finish_reason is not None
