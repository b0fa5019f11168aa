"""Seconds of a step by its rows, sequences, adapters and keys, fitted to steps that an engine ran.

Piecewise linear in rows between the nodes of the engine's own cost table, linear in the rest, no part negative: more of
anything never costs less. What the host does between two forwards is in it, which the engine's table has not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specserve.drafting.cost_model import NODES

from ..common import RESULTS


@dataclass(frozen=True, slots=True)
class Step:
    """What one step held."""

    num_rows: int
    num_seqs: int
    num_adapters: int  # distinct
    num_keys: int  # of all contexts together


@dataclass(frozen=True, slots=True)
class FittedCosts:
    """Seconds; `rows[i]` for each row between NODES[i - 1] and NODES[i]."""

    fixed: float
    rows: tuple[float, ...]
    sequence: float
    adapter: float
    key: float

    @classmethod
    def fit(cls, steps: Sequence[Step], seconds: Sequence[float]) -> FittedCosts:
        """Least squares of relative errors. A step that took thrice the median of its kind is left out: it was
        interrupted, or read memory for the first time."""
        from scipy.optimize import nnls  # of the test extra; a saved table needs none

        table = np.array([_features(step) for step in steps])
        times = np.array(seconds)
        for _ in range(2):
            found, _ = nnls(table / times[:, None], np.ones(len(times)))
            usual = times < 3 * (table @ found)
            table, times = table[usual], times[usual]
        return cls(float(found[0]), tuple(map(float, found[1:-3])), *map(float, found[-3:]))

    @classmethod
    def saved(cls) -> FittedCosts:
        """Of the newest validation."""
        lines = (RESULTS / "simulator_validation.jsonl").read_text("utf-8").splitlines()
        return cls.of(json.loads(lines[-1])["costs"])

    @classmethod
    def of(cls, fields: dict[str, Any]) -> FittedCosts:
        return cls(**{**fields, "rows": tuple(fields["rows"])})

    def seconds(self, step: Step) -> float:
        total, before = self.fixed, 0
        for node, each in zip(NODES, self.rows, strict=True):
            if step.num_rows <= before:
                break
            total += each * (min(step.num_rows, node) - before)
            before = node
        else:
            total += self.rows[-1] * max(0, step.num_rows - NODES[-1])
        return total + self.sequence * step.num_seqs + self.adapter * step.num_adapters + self.key * step.num_keys


def _features(step: Step) -> list[float]:
    rows, before = [], 0
    for node in NODES:
        rows.append(max(0, min(step.num_rows, node) - before))
        before = node
    return [1.0, *rows, step.num_seqs, step.num_adapters, step.num_keys]
