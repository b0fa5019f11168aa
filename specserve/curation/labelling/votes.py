"""What a labelling function says of a text, and the file in which a function's votes are kept.

A vote is a label, or of a question with `several` an object of the labels that it speaks for and whether each holds,
or null: it abstains. Votes are appended as they come and found again by what made them, the function's digest and the
texts', so that a run that was interrupted, and one with another function more, ask nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ...errors import UserError

Vote = str | dict[str, bool] | None
DIGEST_LENGTH = 16  # hex digits in file names


def digest_of(*parts: str) -> str:
    """Of texts and their borders."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


class VoteFile:
    """One function's votes on `texts`, by place; a context manager that holds the file open.

    Files of the same function with another digest, of a definition or of texts that are no more, are removed.
    """

    def __init__(self, folder: Path, question: str, function: str, digest: str, num_texts: int):
        stem = re.sub(r"[^\w-]+", "_", f"{question}.{function}")[:80] + "-" + digest_of(question, function)[:8]
        self._path = folder / f"{stem}-{digest[:DIGEST_LENGTH]}.jsonl"
        self._num_texts = num_texts
        self.votes: dict[int, Vote] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob(f"{stem}-*.jsonl"):
                if other != self._path:
                    other.unlink(missing_ok=True)
            whole = self._read()
            self._file = open(self._path, "r+b" if whole is not None else "wb")
            self._file.truncate(whole or 0)  # half a line, where a process was killed
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise UserError(f"cannot keep votes in {folder}: {error.strerror or error}", param="output") from None

    def missing(self, texts: Sequence[str]) -> list[tuple[int, str]]:
        """(place, text) of those without a vote."""
        return [(place, text) for place, text in enumerate(texts) if place not in self.votes]

    def add(self, place: int, vote: Vote) -> None:
        """Keep one vote, over the end of this process."""
        try:
            self._file.write(json.dumps([place, vote], ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}", param="output") from None
        self.votes[place] = vote

    def _read(self) -> int | None:
        """Bytes of whole lines; None without a file."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                place, vote = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(place, int) or not 0 <= place < self._num_texts:
                break
            self.votes[place] = vote
            whole += len(line)
        return whole

    def __enter__(self) -> VoteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
