"""Embeddings, classes and scores for a program, by the routes that serve them: calls as bodies, in vLLM's shapes.

A call has any number of texts; the engine gets some hundred at a time, two bodies side by side, so that it always has
some. Owns how a call is cut into bodies. What a text may be and what an adapter makes of it is the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import UserError
from ..server.access.caller import Caller
from ..server.generation.generator import Generator
from ..server.pooling.api import PoolingRoutes
from ..server.pooling.pooler import Pooler
from ..server.pooling.response_types import AnsweredQuestion, Classification, Embedding, Score
from ..server.pooling.tei_api import TeiRoutes
from .all_or_none import all_or_none
from .params import check_texts

MAX_TEXTS = 256  # of a body; with two of them more than a step of the largest batch takes
_AT_ONCE = 2
T = TypeVar("T")
OnDone = Callable[[int], object]  # told how many texts are done


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A text's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """`probs`: of all labels, question by question; `label`: the likeliest, where one question has one."""

    probs: list[float]
    label: str | None
    questions: list[AnsweredQuestion]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well a pair goes together."""

    score: float


@dataclass(frozen=True, slots=True)
class PoolingOutput(Generic[T]):
    """What came of one text, or of one pair; `lora_request` is the adapter's name."""

    outputs: T
    lora_request: str | None


class PooledCalls:
    """Of one service, as `caller`."""

    def __init__(self, generator: Generator, caller: Caller):
        pooler = Pooler(generator)
        self._routes, self._caller = PoolingRoutes(pooler, TeiRoutes(pooler)), caller

    async def embed(
        self, prompts: Any, adapter: str | None, fields: Mapping[str, Any], on_done: OnDone
    ) -> list[PoolingOutput[EmbeddingOutput]]:
        """Raises `UserError`, as all here do."""
        bodies = [{"input": texts, "encoding_format": "float"} for texts in _parts(_texts(prompts))]
        found: list[Embedding] = await self._all(self._routes.embeddings, bodies, adapter, fields, on_done)
        vectors = [each.embedding for each in found if not isinstance(each.embedding, str)]
        return [PoolingOutput(EmbeddingOutput(vector), adapter) for vector in vectors]

    async def classify(
        self, prompts: Any, adapter: str | None, fields: Mapping[str, Any], on_done: OnDone
    ) -> list[PoolingOutput[ClassificationOutput]]:
        bodies = [{"input": texts} for texts in _parts(_texts(prompts))]
        found: list[Classification] = await self._all(self._routes.classify, bodies, adapter, fields, on_done)
        return [PoolingOutput(ClassificationOutput(each.probs, each.label, each.questions), adapter) for each in found]

    async def score(
        self, first: Any, second: Any, adapter: str | None, fields: Mapping[str, Any], on_done: OnDone
    ) -> list[PoolingOutput[ScoringOutput]]:
        """Of pairs; one `first` goes with each of `second`."""
        ones, others = _texts(first), _texts(second)
        if len(ones) not in (1, len(others)):
            raise UserError(
                f"the first side has {len(ones)} texts and the second {len(others)}; give one, or as many as there",
                param="text_1",
            )
        lefts = _parts(ones) if len(ones) > 1 else [ones] * -(-len(others) // MAX_TEXTS)
        bodies = [{"text_1": left, "text_2": right} for left, right in zip(lefts, _parts(others), strict=True)]
        found: list[Score] = await self._all(self._routes.score, bodies, adapter, fields, on_done)
        return [PoolingOutput(ScoringOutput(each.score), adapter) for each in found]

    async def _all(
        self,
        answer: Callable[[Any, Caller], Any],
        bodies: Sequence[dict[str, Any]],
        adapter: str | None,
        fields: Mapping[str, Any],
        on_done: OnDone,
    ) -> list[Any]:
        """The entries of all answers, in their order. The first that fails ends all others."""
        if fields.keys() & {"model", "adapter_id"}:
            raise UserError("a call names its adapter as adapter=..., not as model or adapter_id", param="model")
        answers: list[list[Any]] = [[] for _ in bodies]
        todo = iter(enumerate(bodies))

        async def work() -> None:
            for idx, body in todo:
                try:
                    check_texts(body)
                    answers[idx] = (await answer({**fields, **body, "model": adapter}, self._caller)).data
                except UserError as error:
                    if idx:
                        error.add_note(f"texts are counted from text {idx * MAX_TEXTS} of the call")
                    raise
                on_done(len(answers[idx]))

        await all_or_none(work() for _ in range(_AT_ONCE))
        return [entry for found in answers for entry in found]


def _texts(prompts: Any) -> list[Any]:
    """A text, token ids or a mapping of either, or several, as texts and lists of ids. Raises `UserError`."""
    if isinstance(prompts, str | Mapping):
        return [_text(prompts)]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise UserError(
            f"what is given is {type(prompts).__name__}; give a text, token ids, or a list of these", param="prompt"
        )
    given = list(prompts)
    is_one = bool(given) and isinstance(given[0], int)
    return [_text(prompt) for prompt in ([given] if is_one else given)]


def _text(prompt: Any) -> Any:
    if isinstance(prompt, Mapping):
        unknown = next((key for key in prompt if key not in ("prompt", "prompt_token_ids")), None)
        if unknown is not None:
            raise UserError(f"a text has no key {unknown!r}; it has prompt or prompt_token_ids", param="prompt")
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    return list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) else prompt


def _parts(texts: Sequence[Any]) -> list[list[Any]]:
    return [list(texts[start : start + MAX_TEXTS]) for start in range(0, len(texts), MAX_TEXTS)]
