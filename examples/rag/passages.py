"""Texts as sentences that may be quoted, and the prompt of them that the adapter `quote` was trained on.

A sentence is a piece of its text as it stands there, white space aside. So whether a quotation is one needs no model:
`source_of` looks for it.
"""

import re
from collections.abc import Sequence

NOT_FOUND = "not found"
PASSAGE_CHARS = 240  # about 60 tokens
SENTENCE_CHARS = (24, 200)  # shorter ones go with the next, longer ones are cut at a word
BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(*])|(?<=:)\s+(?=\*)|\s+(?=\*\s)")


def one_line(text: str) -> str:
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Pieces of `one_line(text)`, in its order; bullets are pieces, too."""
    least, most = SENTENCE_CHARS
    whole = one_line(text)
    pieces: list[str] = []
    begin = 0
    for end in [*(match.start() for match in BREAK.finditer(whole)), len(whole)]:
        piece = whole[begin:end].strip()
        if end < len(whole) and len(piece) < least:
            continue
        piece = piece.removeprefix("* ")
        if len(piece) > most:
            piece = piece[:most].rsplit(" ", 1)[0]
        if piece:
            pieces.append(piece)
        begin = end
    return pieces


def passage(text: str) -> list[str]:
    """The first sentences of a text that together have PASSAGE_CHARS at most, one at least if there is any."""
    found = sentences(text)
    num_chars = 0
    for idx, piece in enumerate(found):
        num_chars += len(piece) + 1
        if num_chars > PASSAGE_CHARS and idx:
            return found[:idx]
    return found


def prompt(question: str, passages: Sequence[Sequence[str]]) -> str:
    """The question stands before and behind the passages: a causal model reads them for it, and has it at hand."""
    listed = "\n".join(f"[{number}] {' '.join(pieces)}" for number, pieces in enumerate(passages, 1))
    task = f"Quote the sentence that answers the question, or say {NOT_FOUND}."
    return f"{task}\nQuestion: {question}\n\n{listed}\n\nQuestion: {question}"


def answer(number: int, sentence: str) -> str:
    return f"[{number}] {sentence}"


def choices(passages: Sequence[Sequence[str]]) -> list[str]:
    """All answers that quote: what a grammar of choices may leave open."""
    found = [answer(number, piece) for number, pieces in enumerate(passages, 1) for piece in pieces]
    return [*dict.fromkeys(found), NOT_FOUND]


def source_of(text: str, passages: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """The number (from 1) of the passage that an answer names and the words that it quotes; None if it quotes none.

    Raises:
        ValueError: what it quotes is not in that passage, or there is no such passage.
    """
    if text.strip() == NOT_FOUND:
        return None
    match = re.fullmatch(r"\[(\d+)\] (.+)", text.strip())
    if match is None:
        raise ValueError(f"not a quotation: {text!r}")
    number, quoted = int(match[1]), match[2]
    if not 1 <= number <= len(passages):
        raise ValueError(f"there is no passage {number}")
    if quoted not in " ".join(passages[number - 1]):
        raise ValueError(f"passage {number} does not say {quoted!r}")
    return number, quoted
