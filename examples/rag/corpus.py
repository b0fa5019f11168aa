"""The texts that are searched, as files have them: one JSON object a line, with a name and a text."""

import json
from dataclasses import dataclass
from pathlib import Path

from passages import one_line

from specserve.errors import UserError


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """Raises `UserError` for a file without documents, and for the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found: list[Document] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is no JSON: {error}") from None
        name, text = (fields.get(key) if isinstance(fields, dict) else None for key in ("name", "text"))
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}:{number} is no document; one looks like {{"name": "kcalc", "text": "..."}}')
        found.append(Document(name, one_line(text)))
    if not found:
        raise UserError(f"{path} has no documents, so nothing can be found in it")
    return found
