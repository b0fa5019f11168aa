"""What is written of a text and its answers: a row of classify, or one whose answers a model learns to write.

Probabilities go along as both kinds of rows take them: of each label, and as weights of completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .label_file import LabelFile, QuestionSpec

LEAST_WEIGHT = 0.01  # less likely labels are no completions


def row_of(spec: LabelFile, text: str, answers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """`answers`: of each question that has one, how likely each label is."""
    if spec.prompt is None:
        return {
            "text": text,
            "answers": {name: _answer(answer, spec.questions[name], spec.soft) for name, answer in answers.items()},
        }
    prompt = prompt_of(spec.prompt, text)
    (name, answer) = next(iter(answers.items()))
    if len(spec.questions) == 1 and not spec.questions[name].several:
        if not spec.soft:
            return {"prompt": prompt, "completion": _answer(answer, spec.questions[name], soft=False)}
        return {
            "prompt": prompt,
            "completions": [
                {"completion": label, "weight": round(chance, 4)}
                for label, chance in answer.items()
                if chance >= LEAST_WEIGHT
            ],
        }
    said = {name: _answer(answer, spec.questions[name], soft=False) for name, answer in answers.items()}
    row: dict[str, Any] = {"prompt": prompt, "completion": json.dumps(said, ensure_ascii=False)}
    if spec.soft:
        row["weight"] = round(min(confidence(answer, spec.questions[name]) for name, answer in answers.items()), 4)
    return row


def prompt_of(prompt: str, text: str) -> str:
    """The label file's `prompt` about `text`."""
    return prompt.replace("{text}", text)


def confidence(answer: Mapping[str, float], question: QuestionSpec) -> float:
    """Of the likeliest label; with `several`, of the one that is least certain."""
    if question.several:
        return min(max(chance, 1 - chance) for chance in answer.values())
    return max(answer.values())


def _answer(answer: Mapping[str, float], question: QuestionSpec, soft: bool) -> Any:
    if soft and question.several:
        return [{"label": label, "probability": round(chance, 4)} for label, chance in answer.items()]
    if soft:
        return {label: round(chance, 4) for label, chance in answer.items()}
    if question.several:
        return [label for label, chance in answer.items() if chance >= 0.5]
    return max(answer, key=lambda label: answer[label])
