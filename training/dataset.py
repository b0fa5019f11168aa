"""Rows of a JSONL file as token ids and a mask of the tokens that carry loss: the assistant's.

Owns the row formats and the wording of what is wrong with a row; the chat template is the base model's. Invariant: the
tokens before a completion are exactly those that the server makes of the same messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..tokenizer import TextTokenizer

_ROLE_NAMES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `loss_mask[i]` says whether token i is the assistant's, and so a target."""

    tokens: list[int]
    loss_mask: list[bool]
    line: int  # 1-based line of the file

    @property
    def prompt_len(self) -> int:
        """Tokens before the last turn of the assistant."""
        start = len(self.tokens)
        while start and self.loss_mask[start - 1]:
            start -= 1
        return start

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_len]

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_len :]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as messages, before it is tokenized."""

    messages: list[dict[str, str]]
    line: int


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file of `messages`, `prompt`/`completion`, `conversations` or `instruction`/`output` rows.

    Raises `UserError` that names the file, the line and the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", param="data") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}", param="data") from None
        if not isinstance(value, dict):
            raise UserError(f"{where} is {type(value).__name__}, not an object", param="data")
        rows.append(Row(_messages(value, where), number))
    if not rows:
        raise UserError(f"{path} holds no rows", param="data")
    return rows


def tokenize(rows: list[Row], tokenizer: TextTokenizer, eos_token_id: int, system: str | None = None) -> list[Example]:
    """Apply the chat template turn by turn, so that each assistant turn's tokens are known."""
    return [_tokenize(row, tokenizer, eos_token_id, system) for row in rows]


def _tokenize(row: Row, tokenizer: TextTokenizer, eos_token_id: int, system: str | None) -> Example:
    messages = row.messages
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tokens: list[int] = []
    mask: list[bool] = []
    for idx, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.encode_chat(messages[:idx], add_generation_prompt=True)
        if prompt[: len(tokens)] != tokens:  # the template rewrites earlier turns: only this one can be trained on
            tokens, mask = [], []
        mask += [False] * (len(prompt) - len(tokens))
        answer = [*tokenizer.encode_literal(message["content"]), eos_token_id]
        tokens = prompt + answer
        mask += [True] * len(answer)
    return Example(tokens, mask, row.line)


def _messages(value: dict[str, Any], where: str) -> list[dict[str, str]]:
    if "messages" in value:
        messages = list(_turns(value, "messages", "role", "content", where))
    elif "conversations" in value:
        messages = list(_turns(value, "conversations", "from", "value", where))
    elif "prompt" in value or "completion" in value:
        messages = [
            {"role": "user", "content": _text(value, "prompt", where)},
            {"role": "assistant", "content": _text(value, "completion", where)},
        ]
    elif "instruction" in value:
        question = _text(value, "instruction", where)
        if value.get("input"):
            question += "\n\n" + _text(value, "input", where)
        answer = "output" if "output" in value else "response"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(value, answer, where)},
        ]
    else:
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, value)) or 'none'}; wanted are 'messages', 'prompt' and "
            "'completion', 'conversations', or 'instruction' and 'output'",
            param="data",
        )
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    if len(messages) < 2 or messages[0]["role"] == "assistant":
        raise UserError(f"{where}: nothing stands before the assistant's message; a prompt is needed")
    return messages


def _turns(value: dict[str, Any], field: str, role_key: str, text_key: str, where: str) -> Iterator[dict[str, str]]:
    turns = value[field]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {field} is {type(turns).__name__}, not a list with messages", param="data")
    for idx, turn in enumerate(turns):
        at = f"{where}: {field}[{idx}]"
        if not isinstance(turn, dict):
            raise UserError(f"{at} is {type(turn).__name__}, not an object", param="data")
        role = _ROLE_NAMES.get(str(turn.get(role_key)))
        if role is None:
            raise UserError(
                f"{at}.{role_key} is {turn.get(role_key)!r}; wanted: {', '.join(_ROLE_NAMES)}", param="data"
            )
        yield {"role": role, "content": _text(turn, text_key, at)}


def _text(value: dict[str, Any], field: str, where: str) -> str:
    text = value.get(field)
    if not isinstance(text, str) or not text.strip():
        found = "missing" if field not in value else "empty" if isinstance(text, str) else type(text).__name__
        raise UserError(f"{where}: {field} is {found}; text is expected", param="data")
    return text
