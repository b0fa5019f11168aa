"""What a shared store says of its adapters, and on which addresses of it a server holds them."""

from __future__ import annotations

import re

import msgspec

from ..sources.fetching import FetchedFile

LIST_FILE = "version.json"
_VERSION = re.compile(r"[0-9a-f]{64}")


class NamedVersion(msgspec.Struct, frozen=True):
    """What a name means, since when (seconds since 1970)."""

    version: str
    since: float


class Version(msgspec.Struct, frozen=True):
    """An adapter's files. Their hash is the version's; `content_hash` leaves out template and tokenizer."""

    files: dict[str, FetchedFile]
    content_hash: str
    pushed_at: float  # seconds since 1970

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def is_version(text: str) -> bool:
    return _VERSION.fullmatch(text) is not None
