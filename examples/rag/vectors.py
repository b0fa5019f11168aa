"""Embeddings of texts, kept on disk by who made them and of what: an adapter's content hash and the text's own.

A text is embedded once for an adapter's files, however often the corpus or the program changes. A part's file is put in
its place whole, so whoever is interrupted goes on behind the last part. An adapter that changes meanwhile has a folder
of its own: vectors of two adapters are never mixed.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from client import Server

from specserve.errors import UserError
from specserve.whole_files import replace_file

PART = 64  # texts of a request and of a file
MAX_CHANGES = 3  # of the adapter while texts are embedded


def embed(server: Server, adapter: str, texts: Sequence[str], input_type: str) -> np.ndarray:
    """Vectors [N, D] float32 of length 1; long texts are cut to what the adapter was made for."""
    body = {"model": adapter, "input": list(texts), "input_type": input_type, "truncate_prompt_tokens": -1}
    data = server.post("/v1/embeddings", body)["data"]
    return np.array([row["embedding"] for row in sorted(data, key=lambda row: row["index"])], dtype=np.float32)


class Index:
    """The vectors of `texts`, in their order; `content_hash` is the adapter's that made them."""

    def __init__(self, content_hash: str, vectors: np.ndarray) -> None:
        self.content_hash, self.vectors = content_hash, vectors

    def nearest(self, vector: np.ndarray, number: int) -> list[int]:
        """Places of texts, the nearest first."""
        return [int(idx) for idx in np.argsort(-(self.vectors @ vector), kind="stable")[:number]]


def make_index(
    server: Server, adapter: str, texts: Sequence[str], cache: Path, told: Callable[[int, int], object]
) -> Index:
    """Embed what the cache lacks. `told` hears how many of how many texts are done.

    Raises:
        UserError: the server's own, or the adapter's files change again and again.
    """
    embed(server, adapter, texts[:1], "document")  # loads the adapter: before that it has no hash
    for _ in range(MAX_CHANGES):
        content_hash = server.content_hash(adapter)
        folder = cache / content_hash[:16]
        known = _kept(folder)
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        while missing:
            part = list(missing)[:PART]
            told(len(texts) - len(missing), len(texts))
            vectors = embed(server, adapter, [missing.pop(key) for key in part], "document")
            if server.content_hash(adapter) != content_hash:
                break
            _keep(folder, part, vectors)
            known.update(zip(part, vectors, strict=True))
        else:
            told(len(texts), len(texts))
            return Index(content_hash, np.stack([known[key] for key in keys]))
    raise UserError(f"the files of adapter {adapter!r} change while texts are embedded; try again when they rest")


def _keep(folder: Path, keys: Sequence[str], vectors: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, keys=np.array(keys), vectors=vectors)

    replace_file(folder / f"{name}.npz", write)


def _kept(folder: Path) -> dict[str, np.ndarray]:
    """A part that cannot be read is made again."""
    known: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                known.update(zip(part["keys"].tolist(), part["vectors"], strict=True))
        except (OSError, ValueError, KeyError, BadZipFile):
            path.unlink(missing_ok=True)
    return known
