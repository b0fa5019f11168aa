"""Labelling functions that are adapters: what they classify becomes votes, where they are sure enough.

Adapters are loaded into one engine, which starts with the first text that has no vote; functions of one adapter share
its passes over the texts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from ...adapter_files import CONFIG_FILE
from ...errors import UserError
from ...llm.async_llm import AsyncLLM
from ...llm.pooled import ClassificationOutput
from .label_file import FunctionSpec, QuestionSpec
from .votes import Vote, digest_of

_CHUNK = 256  # texts whose votes are kept together


class Classifiers:
    """The engine and what it has said; close it at the end."""

    def __init__(self, model: str | None):
        self._model = model
        self._llm: AsyncLLM | None = None
        self._names: dict[str, str] = {}
        self._said: dict[tuple[str, str], ClassificationOutput] = {}  # of adapter and text

    async def answers(self, adapter: str, texts: Sequence[str]) -> list[ClassificationOutput]:
        """All questions of the adapter, of each text."""
        fresh = list(dict.fromkeys(text for text in texts if (adapter, text) not in self._said))
        if fresh:
            if self._llm is None:
                self._llm = await AsyncLLM(self._model).start()
            if adapter not in self._names:
                name = f"labels-{len(self._names)}"
                await self._llm.load_adapter(name, adapter)
                self._names[adapter] = name
            outputs = await self._llm.classify(fresh, adapter=self._names[adapter], truncate_prompt_tokens=-1)
            for text, output in zip(fresh, outputs, strict=True):
                assert isinstance(output.outputs, ClassificationOutput)
                self._said[adapter, text] = output.outputs
        return [self._said[adapter, text] for text in texts]

    async def close(self) -> None:
        if self._llm is not None:
            await self._llm.close()


class ClassifierFunction:
    """Votes what an adapter says of a question, where it is likely enough and one of the labels."""

    def __init__(self, spec: FunctionSpec, name: str, question: QuestionSpec, at: str, classifiers: Classifiers):
        assert spec.classifier is not None
        self._adapter, self._threshold, self._at = spec.classifier, spec.threshold, at
        self._asked = spec.question or name
        self._question, self._classifiers = question, classifiers
        config = Path(spec.classifier) / CONFIG_FILE
        if not config.is_file():
            raise UserError(
                f"{at}.classifier: {spec.classifier} is not an adapter's directory: it has no {CONFIG_FILE}",
                param=f"{at}.classifier",
            )
        self.digest = digest_of(
            "classifier", *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in
                            sorted(Path(spec.classifier).iterdir()) if path.is_file()),
            spec.classifier, self._asked, str(spec.threshold), str(question.several), *question.labels,
        )  # fmt: skip

    async def votes(self, texts: Sequence[tuple[int, str]]) -> AsyncGenerator[tuple[int, Vote]]:
        for first in range(0, len(texts), _CHUNK):
            chunk = texts[first : first + _CHUNK]
            answers = await self._classifiers.answers(self._adapter, [text for _, text in chunk])
            for (place, _), said in zip(chunk, answers, strict=True):
                yield place, self._vote(said)

    def _vote(self, said: ClassificationOutput) -> Vote:
        answer = next((answer for answer in said.questions if answer.name == self._asked), None)
        if answer is None:
            raise UserError(
                f"{self._at}.question: {self._adapter} answers no question {self._asked!r}; it answers "
                f"{', '.join(answer.name for answer in said.questions)}",
                param=f"{self._at}.question",
            )
        known = [label for label in self._question.labels if label in answer.probs]
        if self._question.several:
            sure = {label: label in answer.labels for label in known
                    if max(answer.probs[label], 1 - answer.probs[label]) >= self._threshold}  # fmt: skip
            return sure or None
        label = max(answer.probs, key=lambda name: answer.probs[name])
        return label if label in known and answer.probs[label] >= self._threshold else None
