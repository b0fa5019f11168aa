"""The most likely token of each row of logits, found by the step that made them or else by a call for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.native import Step, Team


class BestRows:
    """Of the latest logits; used from the thread that runs the `team`."""

    def __init__(self, team: Team):
        self._team = team
        self._known: torch.Tensor | None = None  # logits that a step has looked at
        self._num_bad = 0
        self._make_room(64)

    def ask(self, step: Step, num_rows: int) -> None:
        """Have a step find them."""
        self._reserve(num_rows)
        self._known = None
        step.best, step.bad = self._tokens_address, self._bad_address

    def know(self, logits: torch.Tensor, num_bad: int) -> None:
        """A step found them of `logits`, which nobody changes any more."""
        self._known, self._num_bad = logits, num_bad

    def of(self, logits: torch.Tensor) -> tuple[np.ndarray, Sequence[int]]:
        """Tokens [L] int64 of logits [L, V] float32, the first of equal ones, and whether each row holds NaN; empty
        where none does. Both hold until the next call, or step."""
        num_rows, num_bad = logits.shape[0], self._num_bad
        known, self._known = self._known, None  # held until the next step, a long prompt's would be 100 MB
        if logits is not known:
            self._reserve(num_rows)
            num_bad = self._team.best_of_rows(
                logits.data_ptr(), logits.stride(0), num_rows, logits.shape[1], self._tokens_address, self._bad_address
            )
        return self._tokens[:num_rows], self._bad[:num_rows].tolist() if num_bad else ()

    def _reserve(self, num_rows: int) -> None:
        if num_rows > len(self._tokens):
            self._make_room(2 * num_rows)

    def _make_room(self, num_rows: int) -> None:
        self._tokens, self._bad = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.uint8)
        self._tokens_address, self._bad_address = self._tokens.ctypes.data, self._bad.ctypes.data
