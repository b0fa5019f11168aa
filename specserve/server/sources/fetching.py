"""One adapter from somewhere into an empty folder: as it stood at one time, within limits, or not at all.

The same for every kind of source: what is there, all of it, and whether what is there is still the same. Only files
that an adapter may have are asked for, so that nothing else, no pickle and no code, ever lies in the folder; what only
says of an adapter when it is to be asked is left out where it is too large, as it is where it lies on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from ...adapter_files import ALL_FILES, CONFIG_FILE, MAX_FILE_BYTES, WEIGHTS_FILE
from ...errors import AdapterError, UserError
from ...file_hash import file_hash
from ...routing_profile import MAX_PROFILE_BYTES, PROFILE_FILE

FETCHED_FILES = (*ALL_FILES, PROFILE_FILE)
MAX_FETCHED_BYTES = MAX_FILE_BYTES | {PROFILE_FILE: MAX_PROFILE_BYTES}
NUM_ATTEMPTS = 3
CHUNK_BYTES = 1 << 20


class FileState(msgspec.Struct, frozen=True):
    """What a source says of a file. `tag` changes with its content; None where the source has no such thing."""

    size: int | None
    tag: str | None
    sha256: str | None = None


class FetchedFile(msgspec.Struct, frozen=True):
    size: int
    sha256: str


def hash_of_files(files: Mapping[str, FetchedFile]) -> str:
    """SHA-256 over the names and hashes of all of them: chat template and tokenizer too, unlike the content hash."""
    text = "".join(f"{name}\0{file.sha256}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


class Source(Protocol):
    """An adapter's folder elsewhere. Raises `UserError` whose text has no secrets."""

    def states(self, names: tuple[str, ...]) -> dict[str, FileState]:
        """Of those of `names` that are there."""

    def read(self, name: str, target: Path, max_bytes: int) -> None:
        """Write the file to `target`, in bounded memory; raises before more than `max_bytes` are there."""


def fetch(
    source: Source, target: Path, known: Mapping[str, FileState], max_bytes: int
) -> tuple[dict[str, FileState], dict[str, FetchedFile] | None]:
    """(what the source says, the files in `target`); None for the files when the source says what is `known`.

    Raises `UserError`, then with parts of files in `target`.
    """
    for _ in range(NUM_ATTEMPTS):
        before = source.states(FETCHED_FILES)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if name not in before:
                raise AdapterError(f"there is no {name} at the source; a PEFT LoRA directory is expected")
        if before == known and all(state.tag is not None for state in before.values()):
            return before, None
        files = {}
        left = max_bytes
        for name, state in before.items():
            limit = min(left, MAX_FETCHED_BYTES.get(name, max_bytes))
            try:
                files[name] = _fetch_one(source, name, state, target / name, limit)
            except AdapterError:  # it is too large
                if name != PROFILE_FILE:
                    raise
                (target / name).unlink(missing_ok=True)
                continue
            left -= files[name].size
        if source.states(FETCHED_FILES) == before:
            return before, files
        for file in target.iterdir():
            file.unlink()
    raise UserError(
        "the adapter changes at its source while it is fetched; load it when its files are complete",
        code="adapter_changing",
        status=409,
    )


def _fetch_one(source: Source, name: str, state: FileState, path: Path, max_bytes: int) -> FetchedFile:
    if state.size is not None and state.size > max_bytes:
        raise too_large(name, max_bytes)
    source.read(name, path, max_bytes)
    found = measured(path)
    if found.size > max_bytes:
        raise too_large(name, max_bytes)
    if state.size not in (None, found.size):
        raise failed(f"{name} has {found.size} bytes, and the source said {state.size}")
    if state.sha256 not in (None, found.sha256):
        raise failed(f"{name} has another SHA-256 than the source said")
    return found


def measured(path: Path) -> FetchedFile:
    return FetchedFile(path.stat().st_size, file_hash(path))


def too_large(name: str, max_bytes: int) -> AdapterError:
    return AdapterError(
        f"{name} has more than {max_bytes} bytes; at most so many are fetched (of all files together: "
        "--adapter-cache-gib)"
    )


def failed(problem: str) -> UserError:
    """The source is at fault, or the way to it."""
    return UserError(f"the adapter cannot be fetched: {problem}", param="lora_path", code="fetch_failed", status=502)
