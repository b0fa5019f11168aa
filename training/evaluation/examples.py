"""Held-out rows to show: prompts that a page offers (examples.json), and answers with where their tokens came from.

examples.json is no part of what an adapter is: other tools do not read it, and its hash is not of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from ...adapter_files import EXAMPLES_FILE, MAX_EXAMPLES, MAX_EXAMPLES_BYTES, ExampleRole
from ...engine.engine import Engine
from ...text.tokenizer import TextTokenizer
from ..data.dataset import Example
from ..data.rows import Row
from .answers import answer

_TITLE_LEN = 60
_NUM_SHADED = 4  # answers in report.html
_MOST_SHADED_TOKENS = 256  # of each


def write_examples(directory: Path, rows: Sequence[Row], system: str | None) -> None:
    """The shortest prompts of `rows`, each with a title. No file is written where nothing fits.

    Nor over one that is there: somebody may have chosen its prompts.
    Rows with tools or other roles than a page shows are left out: they ask for more than text.
    """
    if (directory / EXAMPLES_FILE).exists():
        return
    conversations = [row.conversation if system is None else row.conversation.with_system(system) for row in rows]
    prompts = []
    for conversation in conversations:
        messages = conversation.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages and not conversation.tools and all(map(_is_shown, messages)):
            prompts.append([{"role": m["role"], "content": m["content"]} for m in messages])
    prompts.sort(key=lambda messages: sum(len(m["content"]) for m in messages))
    chosen: list[dict[str, Any]] = []
    for messages in prompts:
        entry = {"title": _title(messages, {e["title"] for e in chosen}), "messages": messages}
        if len(chosen) == MAX_EXAMPLES or len(msgspec.json.encode([*chosen, entry])) * 2 > MAX_EXAMPLES_BYTES:
            break  # twice: the file is indented
        chosen.append(entry)
    if chosen:
        text = msgspec.json.format(msgspec.json.encode(chosen), indent=1)
        (directory / EXAMPLES_FILE).write_bytes(text + b"\n")


def _is_shown(message: dict[str, Any]) -> bool:
    return message["role"] in get_args(ExampleRole) and isinstance(message.get("content"), str)


def _title(messages: Sequence[dict[str, str]], taken: set[str]) -> str:
    """The first line of the last message that no other example has as its title, or the first with a number."""
    lines = [line.strip() for line in messages[-1]["content"].splitlines() if line.strip()] or ["empty"]
    titles = [line if len(line) <= _TITLE_LEN else line[: _TITLE_LEN - 1] + "…" for line in lines]
    number = len(taken) + 1
    return next((title for title in titles if title not in taken), f"{titles[0][: _TITLE_LEN - 4]} ({number})")


def shaded_answers(
    engine: Engine, adapter_hash: str | None, examples: Sequence[Example], tokenizer: TextTokenizer, max_tokens: int
) -> list[dict[str, Any]]:
    """The first few answers, each with its prompt and the trace of its tokens, as the HTTP API has it."""
    chosen = examples[:_NUM_SHADED]
    answers = answer(
        engine,
        adapter_hash,
        [example.prompt for example in chosen],
        min(max_tokens, _MOST_SHADED_TOKENS),
        batch=1,
        traced_by=tokenizer,
    )
    return [
        {"prompt": tokenizer.decode(example.prompt, skip_special_tokens=True), "tokens": msgspec.to_builtins(a.trace)}
        for example, a in zip(chosen, answers.answers, strict=True)
    ]
