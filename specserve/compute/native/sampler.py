"""The sampler on the native path: the step gives each row's most likely token, one more call draws where that is asked.

The same function of logits, parameters, masks and random numbers as `Sampler`, whose way it goes where logits are
edited, or a mask forbids a greedy row's best token. Such small torch operations take some 40 us each behind a step, as
they come from memory then.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...kernels.native import DrawRow, Team
from ...schedule.row_group import RowGroup
from ..grammar_masks import MaskMaker, StepMasks
from ..sampler import Drawn, HotRow, Sampler
from .best_rows import BestRows


class NativeSampler(Sampler):
    """Samples the target's token for every row of every group; used from the thread that runs the `team`."""

    def __init__(self, eos_token_ids: Seq[int], masks: MaskMaker, team: Team, best: BestRows):
        super().__init__(eos_token_ids, masks)
        self._team, self._best = team, best

    def _draw(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> Drawn:
        tokens, bad = self._best.of(logits)
        dead: Seq[int] = ()
        if all([group.seq.takes_best for group in groups]):
            return Drawn(tokens, bad)
        best, drawn = self._other_rows(logits, groups)
        for row, row_logits in best:
            tokens[row] = int(row_logits.argmax())
        if drawn:
            dead = self._draw_rows(drawn, self._masks.masks(groups), logits.shape[1], tokens)
        return Drawn(tokens, bad, dead)

    def _draw_rows(self, rows: list[HotRow], masks: StepMasks | None, vocab_size: int, tokens: np.ndarray) -> Seq[int]:
        """Write the tokens that are drawn to `tokens` [L]; gives which rows' masks leave nothing, or nothing at all."""
        structs = (DrawRow * len(rows))()
        mask_of: dict[int, int] = {}
        if masks is not None:
            first, step = masks.bits.ctypes.data, masks.bits.strides[0]
            mask_of = {row: first + idx * step for idx, row in enumerate(masks.rows)}
        for struct, row in zip(structs, rows, strict=True):
            params = row.params
            struct.logits, struct.mask, struct.number = row.logits.data_ptr(), mask_of.get(row.idx), row.number
            struct.temperature, struct.top_k = params.temperature, params.top_k
            struct.top_p, struct.min_p = params.top_p, params.min_p
        self._team.draw_rows(structs, vocab_size)
        dead: list[int] = []
        for struct, row in zip(structs, rows, strict=True):
            tokens[row.idx] = struct.token
            if struct.is_dead and row.idx in mask_of:
                dead = dead or [0] * len(tokens)
                dead[row.idx] = 1
        return dead
