"""Clients: they ask whole answers and streams on three routes, leave in the middle, and freeze without reading."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from .history import Ask, Reply

CHAT, TEXT, LORAX = "/v1/chat/completions", "/v1/completions", "/generate"
ROUTES = (CHAT, TEXT, LORAX)
ANSWER_TIMEOUT_S = 300.0
PATIENCE_S = 45.0  # shorter freezes must lose nothing; longer ones the server may cut


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    num_tokens: int


def body_of(ask: Ask, prompt: Prompt, base_name: str, rng: random.Random | None) -> dict[str, Any]:
    """Greedy, of a fixed length. With `rng` the fields that must not change the text vary."""
    name = ask.name or base_name
    varied: dict[str, Any] = {"speculation": {"mode": "off"}}
    if rng is not None:
        varied = {"speculation": {"mode": rng.choice(["auto", "auto", "off", "fixed", "ngram"])}}
        if rng.random() < 0.2:
            varied["cache_salt"] = str(rng.randrange(3))
    if ask.route == LORAX:
        parameters = {"max_new_tokens": prompt.num_tokens, "ignore_eos_token": True, **varied}
        return {"inputs": prompt.text, "parameters": parameters | ({"adapter_id": ask.name} if ask.name else {})}
    body = {"model": name, "max_tokens": prompt.num_tokens, "temperature": 0, "ignore_eos": True, **varied}
    if ask.route == TEXT:
        return body | {"prompt": prompt.text}
    return body | {"messages": [{"role": "user", "content": prompt.text}]}


async def ask_once(
    session: aiohttp.ClientSession, url: str, ask: Ask, body: Mapping[str, Any], leave_after: int | None = None,
    is_streamed: bool = False,
) -> Reply:  # fmt: skip
    """One request to its end, or until we leave after so many events (0: before the first byte)."""
    reply = Reply(start=time.monotonic())
    path = "/generate_stream" if is_streamed and ask.route == LORAX else ask.route
    sent = {**body, "stream": True} if is_streamed and ask.route != LORAX else body
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S), session.post(url + path, json=sent) as response:
            reply.status = response.status
            if response.status == 200 and is_streamed:
                await _read_stream(response.content, reply, leave_after)
            else:
                _take_body(await response.read(), reply)
            if reply.we_left:
                response.close()
    except TimeoutError:
        reply.error = f"no end within {ANSWER_TIMEOUT_S:g} s"
    except (aiohttp.ClientError, ConnectionError) as error:
        reply.is_cut = True
        reply.error = "" if isinstance(error, aiohttp.ClientPayloadError) else reply.error
    reply.end = time.monotonic()
    return reply


async def _read_stream(content: aiohttp.StreamReader, reply: Reply, leave_after: int | None) -> None:
    num_events = 0
    while line := await content.readline():
        if line.startswith(b"data:"):
            if leave_after is not None and num_events >= leave_after:
                reply.we_left = True
                return
            num_events += 1
            take_event(line[5:].strip(), reply)


def take_event(data: bytes, reply: Reply) -> None:
    """One event of a stream of OpenAI's, where [DONE] is the end, or of LoRAX's, where the whole text is."""
    if data == b"[DONE]":
        reply.is_whole = True
        return
    event = json.loads(data)
    if "error" in event:
        _take_error(event, reply)
        reply.is_whole = reply.is_whole or "error_type" in event
    elif "token" in event:
        token = event["token"]
        reply.text += token["text"] if not token["special"] else ""  # as in the whole text, which the last event has
        if event.get("generated_text") is not None:
            reply.text, reply.is_whole = event["generated_text"], True
    else:
        for choice in event["choices"]:
            if choice["index"] == 0:
                reply.text += choice.get("text") or choice.get("delta", {}).get("content") or ""


def _take_body(data: bytes, reply: Reply) -> None:
    reply.is_whole = True
    try:
        value = json.loads(data)
    except ValueError:
        reply.error = f"not JSON: {data[:200]!r}"
        return
    if reply.status != 200:
        _take_error(value, reply)
    elif "generated_text" in value:
        reply.text = value["generated_text"]
    else:
        choice = value["choices"][0]
        reply.text = choice["text"] if "text" in choice else choice["message"]["content"]


def _take_error(value: Any, reply: Reply) -> None:
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):  # OpenAI's
        reply.error, reply.code, reply.is_json_error = error["message"], error["code"], bool(error["type"])
    elif isinstance(error, str):  # LoRAX's
        reply.error, reply.code, reply.is_json_error = error, value["error_type"], True
    else:
        reply.error = f"no error object: {str(value)[:200]}"


async def freeze_once(url: str, ask: Ask, body: Mapping[str, Any], frozen_s: float) -> Reply:
    """A stream that is too long for any buffer and is not read for `frozen_s`, then to its end."""
    host, port = url.removeprefix("http://").split(":")
    reply = Reply(start=time.monotonic(), status=200, may_be_cut=frozen_s > PATIENCE_S, is_longer=True)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    received = bytearray()
    writer = None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S + frozen_s):
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=sock, limit=4096)  # reads no further ahead than that
            data = json.dumps({**body, "stream": True, "n": 4, "logprobs": 20}).encode()
            head = f"POST {ask.route} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            await asyncio.sleep(frozen_s)
            while chunk := await reader.read(65536):
                received += chunk
    except (ConnectionError, TimeoutError):
        reply.is_cut = True
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                await writer.wait_closed()
        else:
            sock.close()
    head_bytes, _, chunked = bytes(received).partition(b"\r\n\r\n")
    if head_bytes:
        reply.status = int(head_bytes.split()[1])
    if reply.status != 200:
        _take_body(chunked, reply)
    else:
        payload, is_terminated = dechunk(chunked)
        for line in payload.split(b"\n")[:-1]:
            if line.startswith(b"data:"):
                take_event(line[5:].strip(), reply)
        reply.is_cut = reply.is_cut or not is_terminated
        reply.is_whole = reply.is_whole and is_terminated
    reply.end = time.monotonic()
    return reply


def dechunk(data: bytes) -> tuple[bytes, bool]:
    """The payload of a chunked body as far as it came, and whether its last chunk did."""
    payload, at = bytearray(), 0
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].split(b";")[0] or b"0", 16)
        if size == 0:
            return bytes(payload), True
        payload += data[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2
        if at > len(data):
            break
    return bytes(payload), False
