"""The SHA-256 of a file's content: what rows, weights and inputs are known by when their run goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import UserError


def file_hash(path: Path) -> str:
    """64 hexadecimal digits. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_hash(path: Path) -> str:
    """The same of a file that a user names. Raises `UserError`."""
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
