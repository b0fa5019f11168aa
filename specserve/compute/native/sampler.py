"""The sampler on the native path: one call takes each row's most likely token, one more draws where that is asked for.

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


class NativeSampler(Sampler):
    """Samples the target's token for every row of every group; used from the thread that runs the `team`."""

    def __init__(self, eos_token_ids: Seq[int], masks: MaskMaker, team: Team):
        super().__init__(eos_token_ids, masks)
        self._team = team
        self._make_room(64)

    def _draw(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> Drawn:
        num_rows, vocab_size = logits.shape
        if num_rows > len(self._tokens):
            self._make_room(2 * num_rows)
        tokens = self._tokens[:num_rows]
        bad: Seq[int] = ()
        dead: Seq[int] = ()
        if num_rows and self._team.best_of_rows(
            logits.data_ptr(), logits.stride(0), num_rows, vocab_size, self._tokens_address, self._bad_address
        ):
            bad = self._bad[:num_rows].tolist()
        if all([group.seq.takes_best for group in groups]):
            return Drawn(tokens, bad)
        best, drawn = self._other_rows(logits, groups)
        for row, row_logits in best:
            tokens[row] = int(row_logits.argmax())
        if drawn:
            dead = self._draw_rows(drawn, self._masks.masks(groups), vocab_size, tokens)
        return Drawn(tokens, bad, dead)

    def _make_room(self, num_rows: int) -> None:
        self._tokens, self._bad = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.uint8)
        self._tokens_address, self._bad_address = self._tokens.ctypes.data, self._bad.ctypes.data

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
