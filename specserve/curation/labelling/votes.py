"""What a labelling function says of a text, and the file in which a function's votes are kept.

A vote is a label, or of a question with `several` an object of the labels that it speaks for and whether each holds,
or null: it abstains. Votes are appended as they come and found again by what made them, the function's digest and the
text's, so that a run that was interrupted, and one with another function or text more, ask nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ...errors import UserError
from ...whole_files import append_whole, cut_torn_end

Vote = str | dict[str, bool] | None
DIGEST_LENGTH = 16  # hex digits in file names
KEY_LENGTH = 32  # hex digits of a text's


def digest_of(*parts: str) -> str:
    """Of texts and their borders."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


class VoteFile:
    """One function's votes by texts; a context manager that holds the file open.

    Files of a function of this name with another digest, of a definition that is no more, are removed.
    """

    def __init__(self, folder: Path, question: str, function: str, digest: str):
        stem = re.sub(r"[^\w-]+", "_", f"{question}.{function}")[:80] + "-" + digest_of(question, function)[:8]
        self._path = folder / f"{stem}-{digest[:DIGEST_LENGTH]}.jsonl"
        self._votes: dict[str, Vote] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob(f"{stem}-*.jsonl"):
                if other != self._path:
                    other.unlink(missing_ok=True)
            self._file = open(self._path, "a+b", buffering=0)
            cut_torn_end(self._file)
            self._read(self._path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot keep votes in {folder}: {error.strerror or error}", param="output") from None

    def missing(self, texts: Sequence[str]) -> list[tuple[int, str]]:
        """(place, text) of those without a vote; of equal texts the first."""
        places: dict[str, int] = {}
        for place, text in enumerate(texts):
            places.setdefault(text, place)
        return [(place, text) for text, place in places.items() if _key(text) not in self._votes]

    def vote(self, text: str) -> Vote:
        """None where it abstained or has not been asked."""
        return self._votes.get(_key(text))

    def add(self, text: str, vote: Vote) -> None:
        """Keep one vote, over the end of this process."""
        line = json.dumps([_key(text), vote], ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            append_whole(self._file, line)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}", param="output") from None
        self._votes[_key(text)] = vote

    def _read(self, content: bytes) -> None:
        for line in content.splitlines():
            try:
                key, vote = json.loads(line)
            except (ValueError, TypeError):
                continue
            if isinstance(key, str):
                self._votes[key] = vote

    def __enter__(self) -> VoteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _key(text: str) -> str:
    return digest_of(text)[:KEY_LENGTH]
