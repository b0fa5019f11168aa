"""Whether a candidate becomes a row: compared with seeds, others and held-out rows, measured, held to a schema.

An input is compared with all that were new before it, whatever became of them: what was dropped once is no news when
it comes again. Invariant: the same candidates in the same order have the same verdicts.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UserError, shortened
from ...training.data.near_duplicates import NearDuplicates
from ...training.data.text_identity import common_shingles, normal_text, shingles, text_key
from ..answer_schema import AnswerSchema
from ..contamination import HeldOut, Match
from .review import Verdict
from .row_shapes import Input, input_text
from .seeds import Seeds

_LEAST_OPENING = 16  # characters; shorter ones may be chance
_LEAST_SEEDS = 3


class Dropped(Exception):
    """Why a candidate is no row."""

    def __init__(self, verdict: Verdict, reason: str):
        super().__init__(reason)
        self.verdict, self.reason = verdict, reason


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a row, its input and answer together, in tokens of `count`."""

    least: int | None = None
    most: int | None = None
    count: Callable[[str], int] | None = None


class Judge:
    """`held_out` are texts by their names. Raises `UserError` for a schema that cannot be served."""

    def __init__(self, seeds: Seeds, held_out: Mapping[str, str], near: float, limits: Limits):
        texts = [pair.text for pair in seeds.pairs]
        self._near = NearDuplicates(near, common_shingles([shingles(text) for text in texts]))
        self._equal: dict[str, str] = {}
        for pair in seeds.pairs:
            self.add(f"seed line {pair.line}", pair.input)
        self._held_out = HeldOut(held_out, texts, near) if held_out else None
        schema = seeds.shape.answer_schema
        self._schema = AnswerSchema(schema) if schema is not None else None
        self._limits = limits
        self._opening = common_opening(texts)
        self.seeds_held_out: list[tuple[int, Match]] = []  # (line of a seed, the held-out row that it repeats)
        for pair in seeds.pairs if self._held_out else ():
            if (match := self._held_out_match(pair.text)) is not None:
                self.seeds_held_out.append((pair.line, match))

    def add(self, key: str, input: Input) -> None:
        """Compare later inputs with this one, too."""
        text = input_text(input)
        self._near.add(key, text)
        self._equal.setdefault(text_key(text), key)

    def check_input(self, input: Input, but: str | None = None) -> None:
        """Raises `Dropped`. `but` is the key of an input that this one replaces."""
        text = input_text(input)
        if not normal_text(text).startswith(normal_text(self._opening)):
            raise Dropped("other_form", f"it does not begin as all seeds do, with {self._opening!r}")
        equal = self._equal.get(text_key(text))
        if equal is not None and equal != but:
            raise Dropped("duplicate", f"the same as {equal}")
        if (near := self._near.nearest(text, but)) is not None:
            raise Dropped("near_duplicate", f"similarity {near.similarity:.2f} with {near.key}")
        if (match := self._held_out_match(text)) is not None:
            raise Dropped("held_out", f"{match.how} as {match.key}")
        self._check_len(text, has_all=False)

    def checked_answer(self, input: Input, answer: str) -> str:
        """The answer as it is written into the row. Raises `Dropped`."""
        if not answer.strip():
            raise Dropped("malformed", "the answer is empty")
        if self._schema is not None:
            try:
                answer = self._schema.normal(answer)
            except UserError as error:
                raise Dropped("not_of_schema", shortened(error)) from None
        self._check_len(f"{input_text(input)}\n{answer}", has_all=True)
        return answer

    def check_whole(self, input: Input) -> None:
        """Of an input that gets no answer here. Raises `Dropped`."""
        self._check_len(input_text(input), has_all=True)

    def _held_out_match(self, text: str) -> Match | None:
        return self._held_out.match(text) if self._held_out is not None else None

    def _check_len(self, text: str, has_all: bool) -> None:
        limits = self._limits
        if limits.count is None:
            return
        num = limits.count(text)
        if limits.most is not None and num > limits.most:
            raise Dropped("too_long", f"{num} tokens; at most {limits.most} are wanted")
        if limits.least is not None and has_all and num < limits.least:
            raise Dropped("too_short", f"{num} tokens; at least {limits.least} are wanted")


def common_opening(texts: Sequence[str]) -> str:
    """The whole words with which all of at least three texts begin, such as an instruction; "" where it is short."""
    shared = os.path.commonprefix(list(texts))
    opening = shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1].rstrip()
    return opening if len(texts) >= _LEAST_SEEDS and len(opening) >= _LEAST_OPENING else ""
