"""Rows as token ids and a mask of the tokens that carry loss: the assistant's answers, each up to its stop.

Invariant: the tokens before an answer are exactly those that the server makes of the same messages, and the answer ends
with the token at which the server stops. A template that writes earlier turns otherwise once others follow (Qwen3 drops
their thinking) makes several examples of one row, so that each answer stands where it will be asked for.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ...errors import UserError
from ...text.known_tokens import check_known
from ...text.tokenizer import TextTokenizer
from .answers import Answer
from .chat_turns import TurnEncoder
from .row_messages import Conversation
from .rows import Row, read_rows
from .teacher_logits import TopLogits

__all__ = ["Example", "Row", "RowEncoder", "read_rows", "shared_prompts", "tokenize"]


@dataclass(frozen=True, slots=True)
class Example:
    """A row, or the part of one up to some answer. `loss_mask[i]` says whether token i is a target."""

    tokens: list[int]
    loss_mask: list[bool]
    line: int  # 1-based line of the file
    teacher: TopLogits | None = None  # of the tokens with loss, in order
    weight: float = 1.0  # of its loss

    @property
    def prompt_len(self) -> int:
        """Tokens before the last answer."""
        start = len(self.tokens)
        while start and self.loss_mask[start - 1]:
            start -= 1
        return start

    @property
    def content(self) -> bytes:
        """What makes it another example than others."""
        known = b"" if self.teacher is None else self.teacher.ids.tobytes() + self.teacher.logprobs.tobytes()
        weight = b"" if self.weight == 1.0 else array("d", [self.weight]).tobytes()
        return array("q", self.tokens).tobytes() + bytes(self.loss_mask) + known + weight

    @property
    def answers(self) -> list[list[int]]:
        """All answers, the last of them `completion`."""
        runs = itertools.groupby(zip(self.loss_mask, self.tokens, strict=True), key=lambda pair: pair[0])
        return [[token for _, token in run] for has_loss, run in runs if has_loss]

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_len]

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class RowEncoder:
    """Examples of rows; `eos_token_ids` are where the model's server stops, `system` is for rows without their own.

    vocab_size: the model's, where its tokenizer may know more tokens.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        eos_token_ids: Collection[int],
        system: str | None = None,
        vocab_size: int | None = None,
    ):
        self._turns = TurnEncoder(tokenizer, eos_token_ids)
        self._tokenizer, self._system, self._vocab_size = tokenizer, system, vocab_size

    def examples(self, row: Row) -> Iterator[Example]:
        """One example, or several where the template rewrites earlier turns or there are several answers.

        Raises `UserError` that names the row.
        """
        conversation = row.conversation if self._system is None else row.conversation.with_system(self._system)
        for one in (conversation, *conversation.others):
            yield from self._examples(one, row)

    def _examples(self, conversation: Conversation, row: Row) -> Iterator[Example]:
        messages = conversation.for_template()
        tokens: list[int] = []
        mask: list[bool] = []
        for idx, message in enumerate(messages):
            if message["role"] != "assistant" or idx in conversation.no_loss:
                continue
            answer = Answer(message, conversation.reasoning.get(idx))
            try:
                turn = self._turns.turn(messages[:idx], answer, conversation.tools)
                check_known(itertools.chain(turn.prompt, turn.answer), self._tokenizer, self._vocab_size)
            except UserError as error:
                raise UserError(f"{row.where}: messages[{idx}]: {error}", param=error.param) from None
            if tokens and turn.prompt[: len(tokens)] != tokens:
                yield Example(tokens, mask, row.line, weight=conversation.weight)
                tokens, mask = [], []
            mask = mask + [False] * (len(turn.prompt) - len(tokens)) + [True] * len(turn.answer)
            tokens = turn.prompt + turn.answer
        yield Example(tokens, mask, row.line, weight=conversation.weight)


def shared_prompts(train: Sequence[Example], held_out: Sequence[Example]) -> list[tuple[int, int]]:
    """(line of a training row, line of a held-out row with the same prompt)."""
    lines = {tuple(example.prompt): example.line for example in held_out}
    return [(e.line, lines[tuple(e.prompt)]) for e in train if tuple(e.prompt) in lines]


def tokenize(
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    eos_token_ids: Collection[int],
    system: str | None = None,
    vocab_size: int | None = None,
) -> list[Example]:
    """Examples of all `rows` in order, with a `RowEncoder` of these settings. Raises `UserError`."""
    encoder = RowEncoder(tokenizer, eos_token_ids, system, vocab_size)
    return [example for row in rows for example in encoder.examples(row)]
