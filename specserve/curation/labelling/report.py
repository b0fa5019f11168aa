"""How far the functions can be relied on: what each covers, where they disagree, and what is known answers' verdict.

Coverage, overlaps and conflicts as in Snorkel (Ratner et al. 2017). `agreement` needs no known answers: how often a
function says what all of them together say. Warnings are sentences for whoever wrote the functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any

from ...adapter_kinds import Question
from .label_file import QuestionSpec
from .label_model import MIN_FUNCTIONS, Answer, too_few
from .votes import Vote

Known = str | tuple[str, ...] | None  # a text's known answer, as rows of classify have it
Said = dict[str, bool]  # of a vote: each label that it speaks for, and whether that holds

_CHANCE_FLOOR = 1e-6
_SURELY_COPIES = 20  # common votes from which two functions that never differ count as one


def said_of(vote: Vote, question: QuestionSpec) -> Said:
    """Empty if it abstains; a label excludes the others unless `several` hold."""
    if isinstance(vote, str):
        return {label: label == vote for label in question.labels}
    return dict(vote) if vote else {}


def function_table(
    votes: Mapping[str, Sequence[Vote]], question: QuestionSpec, answers: Sequence[Answer], known: Sequence[Known]
) -> list[dict[str, Any]]:
    """Of each function shares of all texts (coverage, overlaps, conflicts) and of its own votes (the rest)."""
    said = {name: [said_of(vote, question) for vote in given] for name, given in votes.items()}
    num_texts = max(1, len(answers))
    table = []
    for name, own in said.items():
        others = [[other[place] for other_name, other in said.items() if other_name != name]
                  for place in range(len(own))]  # fmt: skip
        voted = [place for place, vote in enumerate(own) if vote]
        right = _share(_is_right(own[place], known[place]) for place in voted)
        table.append(
            {
                "function": name,
                "labels": sorted({label for vote in own for label, holds in vote.items() if holds}),
                "coverage": len(voted) / num_texts,
                "overlaps": sum(any(others[place]) for place in voted) / num_texts,
                "conflicts": sum(any(_differ(own[place], other) for other in others[place]) for place in voted)
                / num_texts,
                "agreement": _share(_agrees(own[place], answers[place], question) for place in voted),
                "accuracy": right,
            }
        )
    return table


def question_figures(question: QuestionSpec, name: str, answers: Sequence[Answer], known: Sequence[Known]) -> dict:
    """Of the texts that are answered and known: what a classifier would be judged by (training.pooling.metrics)."""
    from ...training.pooling.metrics import classification_metrics
    from ...training.pooling.questions import Target

    asked = Question(name, "multi_label" if question.several else "multi_class", question.labels, 0)
    outputs, targets = [], []
    for answer, right in zip(answers, known, strict=True):
        if answer is None or right is None:
            continue
        target: Target
        if isinstance(right, tuple):
            target = tuple(float(label in right) for label in question.labels)
            outputs.append([_logit(answer.get(label, 0.0)) for label in question.labels])
        elif right in question.labels:
            target = question.labels.index(right)
            outputs.append([math.log(max(answer.get(label, 0.0), _CHANCE_FLOOR)) for label in question.labels])
        else:
            continue
        targets.append((target,))
    if not targets:
        return {"rows": 0}
    found = classification_metrics((asked,), outputs, targets)["questions"][name]
    return {key: value for key, value in found.items() if key != "reliability"}


def warnings_of(
    name: str, question: QuestionSpec, votes: Mapping[str, Sequence[Vote]], answers: Sequence[Answer],
    table: Sequence[Mapping[str, Any]],
) -> list[str]:  # fmt: skip
    """What whoever wrote the functions should look at."""
    found = []
    voting = [row["function"] for row in table if row["coverage"]]
    found += [f"{name}: {row['function']!r} never votes" for row in table if not row["coverage"]]
    if few := too_few(votes, question):
        found.append(
            f"{name}: fewer than {MIN_FUNCTIONS} functions vote on {', '.join(few)}, from which no model learns how "
            f"they err; the majority decides there"
        )
    for first, second in combinations(voting, 2):
        pairs = [(a, b) for a, b in zip(votes[first], votes[second], strict=True) if a is not None and b is not None]
        if len(pairs) >= _SURELY_COPIES and all(a == b for a, b in pairs):
            found.append(
                f"{name}: {first!r} and {second!r} never differ in {len(pairs)} common votes; the model takes them for "
                f"two independent opinions, so keep one"
            )
    chance = 0.5 if question.several else 1 / len(question.labels)
    found += [
        f"{name}: {row['function']!r} is right in {row['accuracy']:.0%} of its votes, no more than by chance"
        for row in table
        if row["accuracy"] is not None and row["coverage"] and row["accuracy"] <= chance
    ]
    if (open_texts := sum(answer is None for answer in answers)) == len(answers):
        found.append(f"{name}: no function votes on any text")
    elif open_texts * 2 > len(answers):
        found.append(f"{name}: nobody votes on {open_texts} of {len(answers)} texts; they stay without an answer")
    return found


def _agrees(said: Said, answer: Answer, question: QuestionSpec) -> bool | None:
    if answer is None:
        return None
    likeliest = max(answer, key=lambda label: answer[label])
    holds = {label: answer.get(label, 0.0) >= 0.5 if question.several else label == likeliest for label in said}
    return holds == said


def _is_right(said: Said, known: Known) -> bool | None:
    if known is None:
        return None
    right = known if isinstance(known, tuple) else (known,)
    return all((label in right) == holds for label, holds in said.items())


def _differ(said: Said, other: Said) -> bool:
    return any(label in other and other[label] != holds for label, holds in said.items())


def _share(found: Any) -> float | None:
    known = [value for value in found if value is not None]
    return mean(map(float, known)) if known else None


def _logit(chance: float) -> float:
    chance = min(max(chance, _CHANCE_FLOOR), 1 - _CHANCE_FLOOR)
    return math.log(chance / (1 - chance))
