"""A question's way through three adapters of one server: search, re-rank, quote, check.

Nothing is answered that is not in a document: with `constrained` the grammar leaves only sentences of the passages, and
what comes is looked up in them either way.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from client import Server
from corpus import Document
from passages import choices, passage, prompt, source_of
from vectors import Index, embed, make_index

from specserve.errors import UserError

NUM_CANDIDATES, NUM_PASSAGES = 10, 3
MAX_QUESTION_CHARS = 400
MAX_TOKENS = 128  # the longest sentence has 200 characters


@dataclass(frozen=True, slots=True)
class Adapters:
    """Names that the server has them under."""

    search: str = "search"
    rerank: str | None = "rerank"  # None: the search's order is kept
    quote: str = "quote"


@dataclass(slots=True)
class Found:
    """What came of a question. `source` is None where nothing was found; `problem`: why the text is no quotation."""

    candidates: list[int]  # places of documents as the search has them, best first
    shown: list[int]  # those that the quoting adapter read, as the re-ranker has them
    text: str  # what it wrote
    source: int | None = None
    quote: str = ""
    problem: str = ""
    trace: list[dict[str, Any]] = field(default_factory=list)
    speculation: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage


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
        found = self.quoted(question, candidates, shown, constrained, drafts)
        clock.stop("quote")
        found.seconds = clock.seconds
        return found

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

    def quoted(
        self,
        question: str,
        candidates: list[int],
        shown: list[int],
        constrained: bool = True,
        drafts: bool = True,
        fields: Mapping[str, Any] = MappingProxyType({}),
    ) -> Found:
        """`fields`: more of the request's body."""
        passages = [passage(self._documents[idx].text) for idx in shown]
        body = {
            "model": self._adapters.quote,
            "messages": [{"role": "user", "content": prompt(question, passages)}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "speculation": {"mode": "auto" if drafts else "off", "trace": True},
            "return_speculation_stats": True,
            **fields,
        }
        if constrained:
            body["structured_outputs"] = {"choice": choices(passages)}
        answered = self._server.post("/v1/chat/completions", body)
        choice, usage = answered["choices"][0], answered["usage"]
        found = Found(candidates, shown, choice["message"]["content"] or "", trace=choice.get("trace") or [],
                      speculation=usage["speculation"], num_tokens=usage["completion_tokens"])  # fmt: skip
        try:
            source = source_of(found.text, passages)
        except ValueError as error:
            found.problem = str(error)
        else:
            if source is not None:
                found.source, found.quote = shown[source[0]], source[1]
        return found

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
