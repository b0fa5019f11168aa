"""The routes of OpenAI, Cohere, Jina and vLLM: embeddings, re-ranking, classification, scores, whatever is pooled.

Each reads a body as texts, has them pooled and shapes the answer. `/rerank` and `/classify` are shared with
text-embeddings-inference and LoRAX, whose bodies have other fields: `texts` and `inputs` are `tei_api`'s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...adapter_kinds import AdapterType
from ...errors import UserError
from ..access.caller import Caller
from ..http_body import convert
from ..route import Answer, Handler
from .answers import best_first, classification, cosines, everything, scores, vectors
from .fields import activation, cut_of, is_query, sides, texts_of
from .handlers import handler_of
from .pooler import CLASSIFY, RERANK, Pooler, Wanted
from .request_types import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from .response_types import (
    ClassifyResponse,
    CohereMeta,
    CohereTokens,
    CohereVersion,
    Embedding,
    EmbeddingResponse,
    PooledText,
    PoolingResponse,
    RankedDocument,
    RankedResult,
    RerankResponse,
    Score,
    ScoreResponse,
)
from .tei_api import TeiRoutes
from .texts import Text, listed

SCORE = Wanted("score", "score", ("rerank", "embed"))
TASKS: dict[str | None, tuple[AdapterType, ...]] = {
    None: ("embed", "rerank", "classify"),
    "embed": ("embed",),
    "classify": ("classify",),
    "score": ("rerank",),
}


class PoolingRoutes:
    """Handlers over one `Pooler`; `tei` takes the bodies that are its own."""

    def __init__(self, pooler: Pooler, tei: TeiRoutes):
        self._pooler, self._tei = pooler, tei

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        config, tei = self._pooler.config, self._tei
        rerank_v2 = partial(self.rerank, version="2", returns_documents=False)
        return {
            "embeddings": handler_of(config, self.embeddings),
            "rerank_v1": handler_of(config, self.rerank),
            "rerank_v2": handler_of(config, rerank_v2),
            "rerank": handler_of(config, self.rerank, "texts", tei.rerank),
            "score": handler_of(config, self.score),
            "classify": handler_of(config, self.classify, "inputs", tei.lorax_classify),
            "pooling": handler_of(config, self.pooling),
        }

    def answers(self) -> dict[str, Answer]:
        """Whole answers by path, for requests that come without HTTP. They raise `UserError`."""
        return {
            "/v1/embeddings": self.embeddings,
            "/v1/rerank": self.rerank,
            "/classify": self.classify,
            "/score": self.score,
            "/pooling": self.pooling,
        }

    async def embeddings(self, value: Any, caller: Caller) -> EmbeddingResponse:
        body = convert(value, EmbeddingRequest)
        wanted = Wanted("embeddings", "embd", ("embed",), body.pooling, activation(body), body.dimensions)
        texts = texts_of(body, is_query(body.input_type, body.prompt_name))
        done = await self._pooler.pool(body, caller, texts, wanted, cut_of(body))
        found = await done.shaped(vectors, done, body.encoding_format)
        data = [Embedding(idx, vector) for idx, vector in enumerate(found)]
        return EmbeddingResponse(data, done.job.model, done.usage())

    async def rerank(
        self, value: Any, caller: Caller, version: str = "1", returns_documents: bool = True
    ) -> RerankResponse:
        """`returns_documents`: where the body does not say."""
        body = convert(value, RerankRequest)
        if not body.query:
            raise UserError("query is empty; send a text", param="query")
        for name, least in (("top_n", 0), ("max_tokens_per_doc", 1)):
            number = getattr(body, name)
            if number is not None and number < least:
                raise UserError(f"{name} is {number}; at least {least} is allowed", param=name)
        documents = [each if isinstance(each, str) else each.text for each in body.documents]
        texts = listed(documents, "documents", query=body.query)
        cut = cut_of(body, cuts=body.truncation is not False, max_document_tokens=body.max_tokens_per_doc)
        done = await self._pooler.pool(body, caller, texts, RERANK, cut)
        values = await done.shaped(scores, done, body.use_activation is False)
        order = best_first(values)[: body.top_n or None]
        shows = body.return_documents if body.return_documents is not None else returns_documents
        results = [RankedResult(idx, values[idx]) for idx in order]
        for result in results if shows else ():
            result.document = RankedDocument(documents[result.index])
        usage = done.usage()
        meta = CohereMeta(CohereVersion("2" if version == "2" else "1"), CohereTokens(usage.prompt_tokens))
        if done.job.cut:
            shown = ", ".join(map(str, done.job.cut[:16])) + (", ..." if len(done.job.cut) > 16 else "")
            meta.warnings = [f"{len(done.job.cut)} documents were cut to what fits: {shown}"]
        return RerankResponse(done.job.id, done.job.model, results, usage, meta)

    async def score(self, value: Any, caller: Caller) -> ScoreResponse:
        body = convert(value, ScoreRequest)
        (first_name, first_texts), (second_name, second_texts) = sides(body)
        first, second = listed(first_texts, first_name, is_query=True), listed(second_texts, second_name)
        if len(first) not in (1, len(second)):
            raise UserError(
                f"{first_name} has {len(first)} texts and {second_name} {len(second)}; send one, or as many as there",
                param=first_name,
            )

        def texts(kind: AdapterType) -> list[Text]:
            if kind == "embed":
                return [*first, *second]
            queries = first * len(second) if len(first) == 1 else first
            return [Text(text.name, text.text, query=one.text) for one, text in zip(queries, second, strict=True)]

        done = await self._pooler.pool(body, caller, texts, SCORE, cut_of(body))

        def values() -> list[float]:
            if done.job.kind == "rerank":
                return scores(done, body.use_activation is False)
            found = done.values()
            return cosines(found[: len(first)], found[len(first) :])

        data = [Score(idx, score) for idx, score in enumerate(await done.shaped(values))]
        return ScoreResponse(done.job.id, done.job.created, done.job.model, data, done.usage())

    async def classify(self, value: Any, caller: Caller) -> ClassifyResponse:
        body = convert(value, ClassifyRequest)
        done = await self._pooler.pool(body, caller, texts_of(body), CLASSIFY, cut_of(body))
        assert done.info is not None
        questions, is_raw = done.info.questions, body.use_activation is False

        def shape() -> list[Any]:
            return [classification(idx, questions, outputs, is_raw) for idx, outputs in enumerate(done.values())]

        data = await done.shaped(shape)
        return ClassifyResponse(done.job.id, done.job.created, done.job.model, data, done.usage())

    async def pooling(self, value: Any, caller: Caller) -> PoolingResponse:
        body = convert(value, PoolingRequest)
        if body.task not in TASKS:
            names = ", ".join(repr(task) for task in TASKS if task is not None)
            raise UserError(f"task is {body.task!r}; one of {names} is served, or none", param="task")
        kinds, is_raw = TASKS[body.task], activation(body) is False
        wanted = Wanted("pooling", "pool", kinds, normalize=activation(body), dimensions=body.dimensions)
        done = await self._pooler.pool(body, caller, texts_of(body), wanted, cut_of(body))
        found = await done.shaped(everything, done, is_raw, body.encoding_format)
        data = [PooledText(idx, values) for idx, values in enumerate(found)]
        return PoolingResponse(done.job.id, done.job.created, done.job.model, data, done.usage())
