"""Labelling functions that are prompts: a teacher answers each with a label in JSON, or says that it cannot tell."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ...errors import UserError
from ...strict_json import decode_json
from ...teachers import Ask, Teacher, TeacherError
from .label_file import FunctionSpec, QuestionSpec
from .votes import Vote, digest_of

MAX_TOKENS = 128
_FIELD = re.compile(r"\{(text|labels)\}")


class PromptFunction:
    """Votes what the teacher answers; an answer that is no label abstains. A text that could not be asked about gets no
    vote, so that another run asks again."""

    def __init__(self, spec: FunctionSpec, question: QuestionSpec, teacher: Teacher):
        assert spec.prompt is not None
        self._prompt, self._question, self._teacher = spec.prompt, question, teacher
        self._schema = _schema(question)
        self._num_unreadable = self._num_failed = 0
        self._first_error: TeacherError | None = None
        self.digest = digest_of(
            "prompt", spec.prompt, json.dumps(self._schema), teacher.backend.identity, *question.labels
        )

    async def votes(self, texts: Sequence[tuple[int, str]]) -> AsyncGenerator[tuple[int, Vote]]:
        """In the order of the answers. Raises `TeacherError` where no other text can be asked about either."""
        asks = (Ask(({"role": "user", "content": self._filled(text)},), MAX_TOKENS, schema=self._schema)
                for _, text in texts)  # fmt: skip
        async with aclosing(self._teacher.answers(asks)) as answers:
            async for index, result in answers:
                if isinstance(result, TeacherError):
                    self._num_failed += 1
                    self._first_error = self._first_error or result
                else:
                    yield texts[index][0], self._vote(result[0].text)

    def problems(self) -> list[str]:
        """For the report."""
        found = []
        if self._num_unreadable:
            found.append(f"has {self._num_unreadable} answers that are none of the labels")
        if self._num_failed:
            found.append(f"has no answer to {self._num_failed} texts; the first error: {self._first_error}")
        return found

    def _filled(self, text: str) -> str:
        values = {"text": text, "labels": ", ".join(self._question.labels)}
        return _FIELD.sub(lambda field: values[field[1]], self._prompt)

    def _vote(self, answer: str) -> Vote:
        try:
            said: Any = decode_json(answer.encode("utf-8", "replace"), "the answer")
        except UserError:
            said = None
        labels = self._question.labels
        if isinstance(said, dict):
            if self._question.several and isinstance(given := said.get("labels"), list):
                return {label: label in given for label in labels}
            if not self._question.several and "label" in said and (said["label"] is None or said["label"] in labels):
                return said["label"]
        self._num_unreadable += 1
        return None


def _schema(question: QuestionSpec) -> dict[str, Any]:
    if question.several:
        properties: dict[str, Any] = {"labels": {"type": "array", "items": {"enum": list(question.labels)}}}
    else:
        properties = {"label": {"type": ["string", "null"], "enum": [*question.labels, None]}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
