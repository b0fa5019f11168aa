"""Who answered better, pair by pair and row by row: by the task's metric, or by a judge who was asked both ways round.

A judge is asked twice, with the answers' places swapped; who wins in both places has won, all else is a tie. Equal
answers are a tie that nobody is asked about.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError
from ..strict_json import decode_json
from ..teachers import READ_ONLY, Ask, quoted
from .entries import KeptAnswer, TaskRow

Verdict = Literal["A", "B", "tie"]
_SCHEMA = {
    "type": "object",
    "properties": {"winner": {"enum": ["A", "B", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}
_MOST_CHARACTERS = 8000  # of a text that a judge reads


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A row, and the answers to it and their scores by the names of models; those that have none are not there."""

    row: TaskRow
    answers: Mapping[str, KeptAnswer]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OpenAsk:
    """What a judge has not been asked yet: of two answers to one row."""

    digest: str
    ask: Ask
    row: TaskRow
    texts: tuple[str, str]


def metric_wins(answered: Sequence[AnsweredRow], models: Sequence[str]) -> list[np.ndarray]:
    """For each row, how often model a won over b, [M, M]: 1, or a half where the task's metric is the same."""
    found = []
    for one in answered:
        scores = one.scores
        wins = np.zeros((len(models), len(models)))
        for a, b in itertools.combinations([idx for idx, name in enumerate(models) if name in scores], 2):
            difference = scores[models[a]] - scores[models[b]]
            _count(wins, a, b, "tie" if abs(difference) < 1e-9 else "A" if difference > 0 else "B")
        found.append(wins)
    return found


def judged_wins(
    answered: Sequence[AnsweredRow], models: Sequence[str], verdicts: Mapping[str, str]
) -> tuple[list[np.ndarray], int, int]:
    """The same by a judge's verdicts, of pairs that have both; and of how many pairs, how many were judged alike both
    ways round."""
    found, num_pairs, num_alike = [], 0, 0
    for one in answered:
        wins = np.zeros((len(models), len(models)))
        for a, b in itertools.combinations([idx for idx, name in enumerate(models) if name in one.answers], 2):
            texts = one.answers[models[a]].text, one.answers[models[b]].text
            if texts[0] == texts[1]:
                _count(wins, a, b, "tie")
                continue
            first, second = (verdicts.get(asked_hash(ask)) for ask in asks_of(one.row, *texts))
            if first is None or second is None:
                continue
            swapped = {"A": "B", "B": "A"}.get(second, second)
            num_pairs += 1
            num_alike += first == swapped
            _count(wins, a, b, first if first == swapped else "tie")
        found.append(wins)
    return found, num_pairs, num_alike


def open_asks(
    answered: Sequence[AnsweredRow], models: Sequence[str], verdicts: Mapping[str, str], about: Sequence[str] = ()
) -> Iterator[OpenAsk]:
    """All that a judge has not been asked yet, each once; only of pairs with one of `about`, if any."""
    seen = set(verdicts)
    for one in answered:
        present = [name for name in models if name in one.answers]
        for pair in itertools.combinations(present, 2):
            first, second = (one.answers[name].text for name in pair)
            if first == second or (about and not set(pair) & set(about)):
                continue
            for ask in asks_of(one.row, first, second):
                digest = asked_hash(ask)
                if digest not in seen:
                    seen.add(digest)
                    yield OpenAsk(digest, ask, one.row, (first, second))


def asks_of(row: TaskRow, first: str, second: str) -> tuple[Ask, Ask]:
    """Both ways round."""
    return _ask(row, first, second), _ask(row, second, first)


def asked_hash(ask: Ask) -> str:
    return ask.digest("leaderboard")


def verdict_of(text: str) -> Verdict | None:
    """What a judge's answer says; None where it says nothing of the kind."""
    try:
        value = decode_json(text.encode(), "the verdict")
    except UserError:
        return None
    winner = value.get("winner") if isinstance(value, dict) else None
    return winner if winner in ("A", "B", "tie") else None


def _ask(row: TaskRow, first: str, second: str) -> Ask:
    parts = [
        ("Task given to both", row.prompt),
        ("Reference answer", row.gold),
        ("Answer A", first),
        ("Answer B", second),
    ]
    shown = quoted([(name, text[:_MOST_CHARACTERS]) for name, text in parts])
    question = (
        "You compare two answers to the same task. Judge only how well each answer does the task; the reference shows "
        f"one right answer. Length and order say nothing. {READ_ONLY} "
        'Answer as JSON: {"winner": "A"}, {"winner": "B"} or {"winner": "tie"}.'
    )
    return Ask(messages=({"role": "user", "content": f"{question}\n\n{shown}"},), max_tokens=32, schema=_SCHEMA)


def _count(wins: np.ndarray, a: int, b: int, verdict: str) -> None:
    wins[a, b] += {"A": 1.0, "B": 0.0}.get(verdict, 0.5)
    wins[b, a] += {"A": 0.0, "B": 1.0}.get(verdict, 0.5)
