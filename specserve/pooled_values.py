"""What pooled values mean: bytes as numbers, and outputs of a score matrix as probabilities and labels.

The same for the server's answers and the trainer's evaluation.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence

from .adapter_kinds import Question

_THRESHOLD = 0.5


def floats(values: bytes) -> array[float]:
    """Little-endian float32 as numbers."""
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def sigmoid(value: float) -> float:
    """Of any finite value, without overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0.0 else 1.0 - 1.0 / (1.0 + math.exp(value))


def probabilities(question: Question, outputs: Sequence[float]) -> list[float]:
    """Of each label of `question`, in [0, 1]; `outputs` are all of the adapter's, finite."""
    first = question.first_output
    logits = [value / question.temperature for value in outputs[first : first + len(question.labels)]]
    if question.kind == "multi_label":
        return [sigmoid(logit) for logit in logits]
    most = max(logits)
    weights = [math.exp(logit - most) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def labels_of(question: Question, chances: Sequence[float]) -> list[str]:
    """The labels that hold, by `probabilities`: the likeliest of multi_class, the first one of equals."""
    if question.kind == "multi_class":
        return [question.labels[max(range(len(chances)), key=chances.__getitem__)]]
    thresholds = question.thresholds or (_THRESHOLD,) * len(chances)
    each = zip(question.labels, chances, thresholds, strict=True)
    return [label for label, chance, threshold in each if chance >= threshold]
