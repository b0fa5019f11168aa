"""The routes of text-embeddings-inference, and LoRAX's beside them: embed, predict, similarity, classify.

Both have `/embed` with `inputs`, and answer in other shapes. A body with `parameters` or `stream` is LoRAX's, whose
client sends both with every request; any other is text-embeddings-inference's. Errors have the shape that both share.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ...errors import UserError
from ...pooled_values import probabilities
from ..access.caller import Caller
from ..http_body import convert
from ..lorax.api import BASE_MODEL
from ..lorax.conversion import check_adapter_source
from ..openai.conversion import refuse_unserved
from ..route import Handler
from .answers import as_function, best_first, chances, cosines, held, output_names, questions_of, scores
from .fields import is_query
from .handlers import handler_of
from .job import PooledTexts
from .pooler import CLASSIFY, RERANK, Pooler, Wanted
from .tei_types import (
    LoraxBatchRequest,
    LoraxEmbedding,
    LoraxEntity,
    LoraxTextRequest,
    PredictParameters,
    SimilarityParameters,
    SimilarityRequest,
    TeiEmbedRequest,
    TeiFields,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankRequest,
)
from .texts import Cut, Text, check_count, listed, texts_or_ids

EMBED = Wanted("embeddings", "embd", ("embed",))
Predictions = list[TeiPrediction] | list[list[TeiPrediction]]


class TeiRoutes:
    """Handlers over one `Pooler`."""

    def __init__(self, pooler: Pooler):
        self._pooler = pooler

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        config = self._pooler.config
        return {
            "embed": handler_of(config, self.embed),
            "predict": handler_of(config, self.predict),
            "similarity": handler_of(config, self.similarity),
            "classify_batch": handler_of(config, self.lorax_classify_batch),
        }

    async def embed(self, value: Any, caller: Caller) -> list[list[float]] | LoraxEmbedding:
        if isinstance(value, dict) and not value.keys().isdisjoint(("parameters", "stream")):
            lorax = _of_lorax(convert(value, LoraxTextRequest))
            done = await self._pooler.pool(lorax, caller, listed(lorax.inputs, "inputs"), EMBED, Cut())
            return LoraxEmbedding(done.values()[0])
        body = convert(value, TeiEmbedRequest)
        texts = texts_or_ids(body.inputs, "inputs", is_query(None, body.prompt_name))
        wanted = Wanted("embeddings", "embd", ("embed",), normalize=body.normalize, dimensions=body.dimensions)
        done = await self._pooler.pool(body, caller, texts, wanted, _cut(body))
        return await done.shaped(done.values)

    async def rerank(self, value: Any, caller: Caller) -> list[TeiRank]:
        body = convert(value, TeiRerankRequest)
        if not body.query:
            raise UserError("query is empty; send a text", param="query")
        texts = listed(body.texts, "texts", query=body.query)
        done = await self._pooler.pool(body, caller, texts, RERANK, _cut(body))
        values = await done.shaped(scores, done, body.raw_scores)
        return [TeiRank(idx, values[idx], body.texts[idx] if body.return_text else None) for idx in best_first(values)]

    async def similarity(self, value: Any, caller: Caller) -> list[float]:
        body = convert(value, SimilarityRequest)
        parameters = body.parameters or SimilarityParameters()
        as_query = is_query(None, parameters.prompt_name)
        source = listed(body.inputs.source_sentence, "inputs.source_sentence", is_query=as_query)
        texts = [*source, *listed(body.inputs.sentences, "inputs.sentences", is_query=as_query)]
        done = await self._pooler.pool(body, caller, texts, EMBED, _cut(parameters))
        found = await done.shaped(done.values)
        return await done.shaped(cosines, found[:1], found[1:])

    async def predict(self, value: Any, caller: Caller) -> Predictions:
        body = convert(value, TeiPredictRequest)
        texts, is_batch = _predicted(body.inputs)
        wanted = Wanted("classify", "classify", ("rerank",)) if texts[0].query is not None else CLASSIFY
        done = await self._pooler.pool(body, caller, texts, wanted, _cut(body))
        found = await done.shaped(_predictions, done, body)
        return found if is_batch or body.parameters is not None else found[0]

    async def lorax_classify(self, value: Any, caller: Caller) -> list[LoraxEntity]:
        body = _of_lorax(convert(value, LoraxTextRequest))
        done = await self._pooler.pool(body, caller, listed(body.inputs, "inputs"), CLASSIFY, Cut())
        return _entities(done, [body.inputs])[0]

    async def lorax_classify_batch(self, value: Any, caller: Caller) -> list[list[LoraxEntity]]:
        body = _of_lorax(convert(value, LoraxBatchRequest))
        done = await self._pooler.pool(body, caller, listed(body.inputs, "inputs"), CLASSIFY, Cut())
        return await done.shaped(_entities, done, body.inputs)


L = TypeVar("L", LoraxTextRequest, LoraxBatchRequest)


def _of_lorax(body: L) -> L:
    """The body, with its adapter where other bodies have it. Raises `UserError`."""
    if body.stream:
        raise UserError("stream is true, but there is nothing to stream; leave it out", param="stream")
    parameters = body.parameters
    if parameters is not None:
        refuse_unserved(parameters, {"merged_adapters": ()})
        check_adapter_source(parameters.adapter_source)
        if parameters.adapter_id not in (None, BASE_MODEL):
            body.adapter_id = parameters.adapter_id
    return body


def _cut(fields: TeiFields | SimilarityParameters) -> Cut:
    refuse_unserved(fields, {"truncation_direction": ("right", "Right")})
    return Cut(bool(fields.truncate))


def _predicted(inputs: str | list[Any]) -> tuple[list[Text], bool]:
    """(texts or pairs, whether they are a list of lists). Raises `UserError`."""
    is_batch = isinstance(inputs, list) and any(isinstance(item, list) for item in inputs)
    if is_batch:
        check_count(inputs, "inputs")
    found = []
    for idx, item in enumerate(inputs if is_batch else [inputs]):
        name = f"inputs[{idx}]" if is_batch else "inputs"
        parts = [item] if isinstance(item, str) else item
        if not isinstance(parts, list) or len(parts) not in (1, 2) or not all(isinstance(each, str) for each in parts):
            raise UserError(f"{name}: a text, or a list of one or two texts, is expected", param="inputs")
        if not all(parts):
            raise UserError(f"{name} is an empty text; send at least one character", param="inputs")
        found.append(Text(name, parts[-1], query=parts[0] if len(parts) == 2 else None))
    if len({text.query is None for text in found}) > 1:
        raise UserError("inputs: texts and pairs need different adapters; send them apart", param="inputs")
    return found, is_batch


def _predictions(done: PooledTexts, body: TeiPredictRequest) -> list[list[TeiPrediction]]:
    """Of each text every label with its score, best first."""
    assert done.info is not None
    parameters = body.parameters or PredictParameters()
    questions = as_function(questions_of(done.info), parameters.function_to_apply)
    is_raw, names = body.raw_scores or parameters.function_to_apply == "none", output_names(done.info)
    if parameters.top_k is not None and parameters.top_k < 1:
        raise UserError(f"top_k is {parameters.top_k}; at least 1 is allowed", param="parameters.top_k")
    found = []
    for outputs in done.values():
        flat = [value for each in chances(questions, outputs, is_raw) for value in each]
        found.append([TeiPrediction(flat[idx], names[idx]) for idx in best_first(flat)[: parameters.top_k]])
    return found


def _entities(done: PooledTexts, texts: list[str]) -> list[list[LoraxEntity]]:
    """Of each text the labels that hold."""
    assert done.info is not None
    names = output_names(done.info)
    found = []
    for text, outputs in zip(texts, done.values(), strict=True):
        entities = []
        for question in done.info.questions:
            values, labels = probabilities(question, outputs), held(question, outputs)
            for idx, (label, value) in enumerate(zip(question.labels, values, strict=True)):
                if label in labels:
                    entities.append(LoraxEntity(names[question.first_output + idx], value, text, 0, len(text)))
        found.append(entities)
    return found
