"""The grammar masks of one step: which rows get one beforehand, and how a row that needs one later gets it.

A greedy row rarely needs its mask: where the most likely token of all is allowed it is also the most likely of the
allowed ones, and asking costs a microsecond where a mask and its application cost a hundred. Rows that are drawn at a
temperature need theirs, because what is forbidden takes mass from the distribution; theirs are computed once the
forward is under way. Invariant: a constrained row is never sampled without one or the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..grammar.mask_batch import MaskBatch
from ..schedule.row_group import RowGroup


@dataclass(frozen=True, slots=True)
class StepMasks:
    """`bits[i]` says what logit row `rows[i]` may sample: bit t % 32 of word t // 32 is token t; none: nothing may."""

    rows: list[int]
    bits: np.ndarray  # [len(rows), ceil(V / 32)] int32


class MaskMaker:
    """Computes the masks of a step and counts the seconds that took."""

    def __init__(self, mask_words: int) -> None:
        self._num_words = mask_words
        self._batch: MaskBatch | None = None  # its threads start with the first mask
        self.seconds = 0.0

    def masks(
        self,
        groups: Sequence[RowGroup],
        also_greedy: bool = False,
        room: Callable[[int], np.ndarray] | None = None,
    ) -> StepMasks | None:
        """Masks of the rows that are drawn at a temperature under a grammar; on a device, while its forward runs.

        `also_greedy` is for who cannot ask row by row. `room(num_rows)` is where the masks are written, [num_rows,
        mask_words] int32; None: they get memory of their own.
        """
        drawn = [g for g in groups if g.seq.grammar is not None and (also_greedy or not g.is_greedy)]
        if not drawn:
            return None
        start = time.perf_counter()
        rows = [group.first_row + idx for group in drawn for idx in range(group.num_rows)]
        bits = room(len(rows)) if room is not None else np.empty((len(rows), self._num_words), dtype=np.int32)
        self._batch = self._batch or MaskBatch()
        self._batch.fill([(g.seq.grammar, g.drafts) for g in drawn if g.seq.grammar is not None], bits)
        self.seconds += time.perf_counter() - start
        return StepMasks(rows, bits)

    def constrain_greedy(
        self, group: RowGroup, tokens: list[int], masked_best: Callable[[int, np.ndarray], int | None]
    ) -> list[int]:
        """`tokens`, the most likely of each row of a greedy group, as they are under its grammar.

        Row idx counts only while the tokens before it equal the drafts, so the result ends with the first that does
        not, or before a row where nothing is allowed. `masked_best(idx, bits [1, mask_words])` is the most likely of
        the allowed tokens of row idx, None if all of them are forbidden otherwise.
        """
        grammar = group.seq.grammar
        assert grammar is not None
        start = time.perf_counter()
        grammar.rewind()
        drafts = group.drafts
        num_right = 0  # drafts are allowed tokens, so those that the model agrees with need no question
        while num_right < len(drafts) and tokens[num_right] == drafts[num_right]:
            num_right += 1
        result = list(tokens[:num_right])
        grammar.advance(result)
        for idx in range(num_right, len(tokens)):
            token = tokens[idx]
            if not grammar.allows(token):
                row = np.zeros((1, self._num_words), dtype=np.int32)
                best = masked_best(idx, row) if grammar.fill_mask(row[0]) else None
                if best is None:
                    break
                token = best
            result.append(token)
            if idx == len(drafts) or token != drafts[idx] or not grammar.advance((token,)):
                break
        grammar.rewind()
        self.seconds += time.perf_counter() - start
        return result


def allowed_tokens(bits: np.ndarray, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Bit masks [R, mask_words] int32 as booleans [R, V] on `device`."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(np.bool_))[
            :, :vocab_size
        ]
    words = torch.from_numpy(bits).to(device, non_blocking=True)  # 6 KB a row of 49,152 tokens, not 48
    places = torch.arange(32, dtype=torch.int32, device=device)
    return ((words.unsqueeze(-1) >> places) & 1).bool().flatten(1)[:, :vocab_size]
