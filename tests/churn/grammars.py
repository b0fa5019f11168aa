"""Requests whose right text needs no reference: each under a grammar of its own that allows that text alone.

Whichever weights the name holds then, the answer is the same; and every request compiles a grammar that nobody had.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from typing import Any

from .history import Disturbances, Reply, Timeline, Verdict, judge_error

NUM_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Forced:
    """One such request. `text` is None where the grammar is bad, which is to be told."""

    body: dict[str, Any]
    text: str | None
    is_json: bool = False


def forced(name: str, rng: random.Random) -> Forced:
    """Under a choice, an expression, a schema, or one time in ten under a schema that is refused."""
    word = "".join(rng.choices(string.ascii_lowercase, k=12))
    body = {"model": name, "prompt": "Say it:", "max_tokens": NUM_TOKENS, "temperature": rng.choice([0, 1])}
    body |= {"speculation": {"mode": rng.choice(["auto", "auto", "off", "fixed"])}}
    way = rng.choice(["choice", "regex", "schema"] * 3 + ["bad"])
    if way == "schema":
        value = {word[:4]: word[4:], "n": rng.randrange(1000)}
        properties = {key: {"const": const} for key, const in value.items()}
        schema = {"type": "object", "properties": properties, "required": [*value], "additionalProperties": False}
        return Forced(body | {"guided_json": schema}, json.dumps(value), is_json=True)
    if way == "bad":
        return Forced(body | {"guided_json": {"type": "object", "properties": {word: {"not": {}}}}}, None)
    text = f"{word[:6]} is {word[6:]}"
    return Forced(body | {"structured_outputs": {way: [text] if way == "choice" else text}}, text)


def judge_forced(
    asked: Forced, name: str, reply: Reply, timeline: Timeline, disturbances: Disturbances, grace: float
) -> tuple[Verdict, str]:
    """The verdict, and for a fault what it is in words; as `history.judge`."""
    if reply.error:
        if asked.text is None and reply.status == 400 and "not" in reply.error:
            return "refused", ""
        return judge_error(reply, timeline.between(reply.start - grace, reply.end), disturbances)
    if reply.we_left:
        return "left", ""
    if not reply.is_whole:
        if reply.is_cut and disturbances.overlaps(reply.start - 1, reply.end):
            return "refused", ""
        return "broken stream", "no end of the answer"
    if asked.text is None or not _is_right(asked, reply.text):
        return "wrong text", f"{name} under a grammar for {asked.text!r}"
    return "right", ""


def _is_right(asked: Forced, text: str) -> bool:
    if not asked.is_json:
        return text == asked.text
    try:
        return json.loads(text) == json.loads(asked.text or "")
    except ValueError:
        return False
