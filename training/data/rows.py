"""Rows of a JSONL file as messages, in the shape in which a client sends them to the server.

Owns the row formats and the wording of what is wrong with a row, by file, line and field. Nothing that shapes a
conversation is passed over: it is read, or refused by name. How messages become tokens is dataset.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UserError
from ...routing_profile import routed_text
from .open_rows import with_answer
from .row_messages import Conversation, read_conversation

MAX_ROW_BYTES = 16 << 20  # some millions of tokens: more than any context holds, and a minute to tokenize
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row before it is tokenized."""

    conversation: Conversation
    line: int  # 1-based
    where: str = ""  # file and line, for messages
    is_open: bool = False  # its last answer is a stand-in

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages as a client sends them."""
        return self.conversation.messages


def read_rows(path: str | Path, max_rows: int | None = None, *, may_be_open: bool = False) -> list[Row]:
    """Read a JSONL file of `messages`, `prompt`/`completion`, `conversations` or `instruction`/`output` rows.

    With `may_be_open` rows may lack their last answer, and have a stand-in for it that is not to be learned. Lines
    behind the first `max_rows` rows are not looked at. Raises `UserError` that names the file, the line and the field.
    """
    rows = [
        parse_row(text, number, f"{path} line {number}", may_be_open=may_be_open)
        for number, text in islice(row_texts(path), max_rows)
    ]
    if not rows:
        raise UserError(f"{path} holds no rows", param="data")
    return rows


def routed_texts(rows: Sequence[Row], system: str | None = None) -> list[str]:
    """What routing compares of each row, with `system` as its system message unless it has one."""
    conversations = [row.conversation if system is None else row.conversation.with_system(system) for row in rows]
    return [
        routed_text((m["role"], m["content"]) for m in conversation.messages if isinstance(m.get("content"), str))
        for conversation in conversations
    ]


def row_texts(path: str | Path) -> Iterator[tuple[int, str]]:
    """(1-based line, its text) of every line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            number = 0
            while text := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                if len(text) > MAX_ROW_BYTES:
                    raise UserError(
                        f"{path} line {number} is longer than {MAX_ROW_BYTES} characters; split the row", param="data"
                    )
                if text.strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", param="data") from None


def parse_row(text: str, line: int, where: str, *, may_be_open: bool = False) -> Row:
    """One line of the file as a conversation. Raises `UserError` that starts with `where`."""
    value = parse_object(text, where)
    filled = with_answer(value) if may_be_open else None
    return Row(read_conversation(filled or value, where), line, where, filled is not None)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """One line of a file, of any row format. Raises `UserError` that starts with `where`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UserError as error:
        raise UserError(f"{where}: {error}", param="data") from None
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair, which is no character", param="data") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deep", param="data") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; give one JSON object a line", param="data") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is {type(value).__name__}, not an object; give one JSON object a line", param="data")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for idx, key in enumerate(keys) if key in keys[:idx])
        raise UserError(f"the key {twice[:100]!r} stands twice in one object; which one is meant?")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not a JSON number")
