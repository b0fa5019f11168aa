"""The golden texts: every content's, read on a server that nobody disturbs, twice and in different company."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from .callers import ROUTES, Prompt, ask_once, body_of
from .contents import Content
from .history import BASE, Ask
from .watch import Server

Key = tuple[str, str, int]


class NoReference(Exception):
    """Golden texts that differ between two readings, or that do not tell contents apart."""


async def read_golden(
    arguments: Sequence[str], contents: Mapping[str, Content], folder: Path, prompts: Sequence[Prompt], log: Path
) -> dict[Key, str]:
    """(content, route, prompt) -> greedy text. Raises `NoReference`."""
    server = await Server.start([*arguments, "--adapters-dir", str(folder)], log)
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(server.url + "/v1/models") as response:
                base_name = (await response.json())["data"][0]["id"]
            keys = list(itertools.product([BASE, *contents], ROUTES, range(len(prompts))))

            async def read(key: Key, rng: random.Random | None) -> str:
                ask = Ask(*key)
                reply = await ask_once(session, server.url, ask, body_of(ask, prompts[ask.prompt_idx], base_name, rng))
                if reply.status != 200 or not reply.text:
                    raise NoReference(f"{key}: {reply}")
                return reply.text

            golden = {key: await read(key, None) for key in keys}
            rng = random.Random(0)
            shuffled = rng.sample(keys, len(keys))
            for at in range(0, len(shuffled), 8):
                batch = shuffled[at : at + 8]
                again = await asyncio.gather(*(read(key, rng) for key in batch))
                for key, text in zip(batch, again, strict=True):
                    if text != golden[key]:
                        raise NoReference(
                            f"{key}: alone, without drafts: {golden[key]!r}; in a batch, with drafts: {text!r}; the "
                            "native CPU path gives the same bits in any batch: is there a C++ compiler?"
                        )
    finally:
        await server.stop()
    return golden


def telling_questions(golden: Mapping[Key, str], contents: Mapping[str, Content]) -> list[tuple[str, int]]:
    """The (route, prompt) that contents of different weights all answer differently; else wrong could pass for right.

    Raises `NoReference` when less than half of them are such.
    """
    questions = sorted({(route, idx) for _, route, idx in golden})
    alike: dict[tuple[str, int], str] = {}
    owners: dict[tuple[str, int, str], str] = {}
    for (name, route, idx), text in golden.items():
        weights = contents[name].weights if name in contents else "the base"
        other = owners.setdefault((route, idx, text), weights)
        if other != weights:
            alike[route, idx] = f"{weights} and {other} answer prompt {idx} on {route} alike: {text!r}"
    if 2 * len(alike) > len(questions):
        raise NoReference("; ".join(alike.values()))
    return [question for question in questions if question not in alike]
