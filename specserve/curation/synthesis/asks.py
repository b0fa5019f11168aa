"""The requests of a synthesis to its teacher: which seeds they show, how long answers may be, what is drawn at random.

Invariant: an ask follows from the settings, the seeds and its number or its input alone. So the same run makes the same
asks again, which the teacher's cache answers.
"""

from __future__ import annotations

import random

from ...teachers import Ask
from .prompts import Prompts
from .review import Settings
from .row_shapes import Input, Pair, input_text
from .seeds import Seeds

_BYTES_A_TOKEN = 3  # at least, in most languages and tokenizers
_TOP_P = 0.95
_CRITIQUE_TOKENS = 512
_CRITIQUE_EXAMPLES = 2


class Asks:
    """Of one run."""

    def __init__(self, settings: Settings, seeds: Seeds, prompts: Prompts):
        self._settings, self._seeds, self._prompts = settings, seeds, prompts
        self._max_input_tokens = 96 + max(_room_for(pair.text) for pair in seeds.pairs)
        longest_answer = max(_room_for(pair.answer) for pair in seeds.pairs)
        self.max_answer_tokens = settings.max_answer_tokens or 96 + longest_answer

    def examples(self, number: int) -> list[Pair]:
        """The seeds that proposal `number` shows."""
        return self._sample(str(number))

    def proposal(self, number: int) -> Ask:
        """For `per_ask` new inputs."""
        settings = self._settings
        direction = settings.vary[number % len(settings.vary)]
        messages, schema = self._prompts.propose(self.examples(number), settings.per_ask, direction)
        return Ask(
            messages=tuple(messages),
            max_tokens=settings.per_ask * self._max_input_tokens,
            temperature=settings.temperature,
            top_p=_TOP_P if settings.temperature else 1.0,
            seed=settings.seed * 1_000_003 + number,
            schema=schema,
        )

    def answer(self, input: Input, system: str | None) -> Ask:
        examples = self._sample(f"answer {input_text(input)}")
        messages = tuple(self._prompts.answer(input, system, examples))
        return Ask(messages=messages, max_tokens=self.max_answer_tokens, schema=self._seeds.shape.answer_schema)

    def critique(self, input: Input, answer: str | None) -> Ask:
        messages, schema = self._prompts.critique(input, answer, self._few(input))
        return Ask(messages=tuple(messages), max_tokens=_CRITIQUE_TOKENS, schema=schema)

    def refinement(self, input: Input, answer: str | None, critique: str) -> Ask:
        messages, schema = self._prompts.refine(input, answer, critique, self._few(input))
        num = self.max_answer_tokens + self._max_input_tokens + _room_for(input_text(input))
        return Ask(messages=tuple(messages), max_tokens=num, schema=schema)

    def _few(self, input: Input) -> list[Pair]:
        return self._sample(f"critique {input_text(input)}")[:_CRITIQUE_EXAMPLES]

    def _sample(self, what: str) -> list[Pair]:
        return self._seeds.sample(self._settings.examples, random.Random(f"{self._settings.seed} {what}"))


def _room_for(text: str) -> int:
    """Tokens of which half as many again as a text like this has are no more."""
    return 3 * len(text.encode()) // (2 * _BYTES_A_TOKEN)
