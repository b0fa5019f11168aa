"""A question's way through three adapters of one server: search, re-rank, quote.

Nothing is answered that is not in a document. The index is of the files that the search adapter has at the moment.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from client import Server
from corpus import Document
from passages import passage
from quoting import Quoted, quote
from vectors import Index, embed, make_index

from specserve.errors import UserError

NUM_CANDIDATES, NUM_PASSAGES = 10, 3
MAX_QUESTION_CHARS = 400


@dataclass(frozen=True, slots=True)
class Adapters:
    """Names that the server has them under."""

    search: str = "search"
    rerank: str | None = "rerank"  # None: the search's order is kept
    quote: str = "quote"


@dataclass(frozen=True, slots=True)
class Found:
    """`shown`: places of the documents that the quoting adapter read, as the re-ranker has them."""

    shown: list[int]
    quoted: Quoted
    seconds: dict[str, float]  # of each stage

    @property
    def source(self) -> int | None:
        """The document that is quoted."""
        return None if self.quoted.place is None else self.shown[self.quoted.place]


class Answerer:
    def __init__(
        self,
        server: Server,
        documents: Sequence[Document],
        cache: Path,
        adapters: Adapters = Adapters(),
        told: Callable[[int, int], object] = lambda done, of: None,
    ) -> None:
        self._server, self._documents, self._cache, self._told = server, documents, cache, told
        self._adapters = adapters
        for name in (adapters.search, adapters.rerank, adapters.quote):
            if name is not None:
                server.content_hash(name)  # all that is missing is said before anything is embedded
        self._index = self._made_index()

    def answer(self, question: str, constrained: bool = True, drafts: bool = True) -> Found:
        question = question.strip()
        if not 0 < len(question) <= MAX_QUESTION_CHARS:
            raise UserError(f"a question has 1 to {MAX_QUESTION_CHARS} characters; this one has {len(question)}")
        clock = _Clock()
        candidates = self.search(question)
        clock.stop("search")
        shown = self.ranked(question, candidates)[:NUM_PASSAGES]
        clock.stop("rerank")
        quoted = quote(self._server, self._adapters.quote, question, self.passages(shown), constrained, drafts)
        clock.stop("quote")
        return Found(shown, quoted, clock.seconds)

    def search(self, question: str) -> list[int]:
        """Places of the nearest documents, by vectors of the files that the adapter has now."""
        (vector,) = embed(self._server, self._adapters.search, [question], "query")
        if self._server.content_hash(self._adapters.search) != self._index.content_hash:
            self._index = self._made_index()
            (vector,) = embed(self._server, self._adapters.search, [question], "query")
        return self._index.nearest(vector, NUM_CANDIDATES)

    def ranked(self, question: str, candidates: Sequence[int]) -> list[int]:
        """`candidates`, the best first."""
        if self._adapters.rerank is None:
            return list(candidates)
        texts = [self._documents[idx].text for idx in candidates]
        body = {"model": self._adapters.rerank, "query": question, "documents": texts, "return_documents": False}
        return [candidates[result["index"]] for result in self._server.post("/v1/rerank", body)["results"]]

    def passages(self, shown: Sequence[int]) -> list[list[str]]:
        return [passage(self._documents[idx].text) for idx in shown]

    def _made_index(self) -> Index:
        texts = [document.text for document in self._documents]
        return make_index(self._server, self._adapters.search, texts, self._cache, self._told)


class _Clock:
    """Seconds from one stop to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
