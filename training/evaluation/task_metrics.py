"""How good answers are: exact match for every task, field by field for JSON objects, ROUGE-L for free text.

ROUGE-L is Lin 2004's F-measure over lower-cased words. Knows nothing of models or speed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any


def task_metrics(answers: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Scores in [0, 1]; "main" names the one to compare runs by."""
    exact = sum(a.strip() == g.strip() for a, g in zip(answers, gold, strict=True)) / len(gold)
    objects = [_object(text) for text in gold]
    if all(value is not None for value in objects):
        return {"exact_match": exact, **_json_metrics([_object(text) for text in answers], objects)}
    rouge = sum(rouge_l(a, g) for a, g in zip(answers, gold, strict=True)) / len(gold)
    return {"exact_match": exact, "rouge_l": rouge, "main": rouge}


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words."""
    a, b = _words(answer), _words(gold)
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for idx, other in enumerate(b, 1):
            diagonal, row[idx] = row[idx], diagonal + 1 if word == other else max(row[idx], row[idx - 1])
    return 2 * row[-1] / (len(a) + len(b))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _json_metrics(answers: Sequence[dict | None], gold: Sequence[dict | None]) -> dict[str, float]:
    fields, right = 0, 0
    found, wanted, common = 0, 0, 0
    for answer, truth in zip(answers, gold, strict=True):
        answer = answer or {}
        for key, value in (truth or {}).items():
            fields += 1
            right += key in answer and answer[key] == value
            if isinstance(value, list):
                a, g = (_items(x) for x in (answer.get(key), value))
                found, wanted, common = found + a.total(), wanted + g.total(), common + (a & g).total()
    scores = {
        "valid_json": sum(answer is not None for answer in answers) / len(answers),
        "field_match": right / max(1, fields),
    }
    if wanted:
        scores["list_micro_f1"] = 2 * common / max(1, found + wanted)
    return {**scores, "main": scores["field_match"]}


def _items(value: Any) -> Counter[str]:
    return Counter(json.dumps(item, sort_keys=True) for item in value) if isinstance(value, list) else Counter()
