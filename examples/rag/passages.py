"""Texts as sentences that may be quoted, and the prompt of them that the adapter `quote` was trained on.

A sentence is a piece of its text as it stands there, white space aside. So whether a quotation is one needs no model:
`source_of` looks for it.
"""

import re
from collections.abc import Sequence

NOT_FOUND = "not found"
PASSAGE_CHARS = 200  # about 50 tokens
SENTENCE_CHARS = (24, 160)  # shorter ones go with the next, longer ones are cut at a word
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


def numbered(passages: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """All sentences in order, each with the place of its passage (from 0); an answer names a sentence by its number."""
    return [(place, piece) for place, pieces in enumerate(passages) for piece in pieces]


def prompt(question: str, passages: Sequence[Sequence[str]]) -> str:
    """The question stands before and behind the passages, and a sentence's number behind it.

    A causal model knows what it looks for when it reads a sentence, and at its number whether that was it.
    """
    numbers = iter(range(1, 1 + len(numbered(passages))))
    listed = "\n".join(" ".join(f"{piece} [{next(numbers)}]" for piece in pieces) for pieces in passages)
    task = f"Quote the sentence that answers the question, or say {NOT_FOUND}."
    return f"{task}\nQuestion: {question}\n\n{listed}\n\nQuestion: {question}"


def read_prompt(text: str) -> tuple[str, list[list[str]]]:
    """What `prompt` made it of."""
    _, listed, asked = text.split("\n\n")
    number, passages = 1, []
    for line in listed.split("\n"):
        pieces = []
        while line:
            piece, _, line = line.partition(f" [{number}]")
            pieces.append(piece.removeprefix(" "))
            number += 1
        passages.append(pieces)
    return asked.removeprefix("Question: "), passages


def answer(number: int, sentence: str) -> str:
    return f"[{number}] {sentence}"


def choices(passages: Sequence[Sequence[str]]) -> list[str]:
    """All answers that quote: what a grammar of choices may leave open."""
    return [*(answer(number, piece) for number, (_, piece) in enumerate(numbered(passages), 1)), NOT_FOUND]


def source_of(text: str, passages: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """The place (from 0) of the passage that an answer quotes, and its words; None if it says that there are none.

    Raises:
        ValueError: what it quotes is not in the passage of the sentence that it names, or there is no such sentence.
    """
    if text.strip() == NOT_FOUND:
        return None
    match = re.fullmatch(r"\[(\d+)\] (.+)", text.strip())
    if match is None:
        raise ValueError(f"not a quotation: {text!r}")
    number, quoted = int(match[1]), match[2]
    found = numbered(passages)
    if not 1 <= number <= len(found):
        raise ValueError(f"there is no sentence {number}")
    place = found[number - 1][0]
    if quoted not in " ".join(passages[place]):
        raise ValueError(f"the passage of sentence {number} does not say {quoted!r}")
    return place, quoted
