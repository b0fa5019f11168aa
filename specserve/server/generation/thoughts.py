"""Which thoughts an answer to a prompt may begin with, by what the tokenizer and its chat template know of them.

Owns no text: prompts are read by their last tokens. Where a grammar leaves no room for thoughts, a block that the
prompt has opened is closed in it, as rows without thoughts close it in training, and an answer's channel is opened.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...chat.thinking_marks import MARK_TOKENS, ThinkingMarks, known_marks, opened_marks, thoughtless
from ...text.hidden_chat import Marks
from ...text.tokenizer import TextTokenizer

_END = 32  # tokens of a prompt that are looked at


def marks_of(tokenizer: TextTokenizer) -> tuple[ThinkingMarks, ...]:
    """How answers to a chat's prompts may think; none: not at all."""
    return known_marks(tokenizer.template.text, tokenizer.added_tokens(MARK_TOKENS)[0])


def special_marks(tokenizer: TextTokenizer, known: Sequence[ThinkingMarks]) -> set[int]:
    """The special tokens that marks are made of: texts of answers have none otherwise."""
    texts = "\n".join(text for marks in known for text in marks.texts)
    return {token for text, token in tokenizer.special_tokens.items() if text in texts}


def opened_by(
    tokenizer: TextTokenizer, prompt_ids: Sequence[int], known: Sequence[ThinkingMarks]
) -> ThinkingMarks | None:
    """Whose block a prompt has opened at its end."""
    return opened_marks(tokenizer.decode(prompt_ids[-_END:]), known) if known else None


def thoughtless_ids(tokenizer: TextTokenizer, prompt_ids: Sequence[int], known: Sequence[ThinkingMarks]) -> list[int]:
    """What stands between a prompt and an answer without thoughts."""
    end = tokenizer.decode(prompt_ids[-_END:])
    return tokenizer.encode_marked(thoughtless(end, known), Marks(), end)
