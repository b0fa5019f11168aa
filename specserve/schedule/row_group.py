"""The logit rows of one sequence in a step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal

import msgspec

from .sequence import Sequence


class RowGroup(msgspec.Struct, gc=False, eq=False):
    """The logit rows of one sequence in this step: rows first_row .. first_row + len(drafts)."""

    seq: Sequence
    first_row: int
    drafts: Seq[int] = ()
    failure: Literal["nan", "grammar"] | None = None  # why its first row gave no token; the sampler says

    @property
    def num_rows(self) -> int:
        return len(self.drafts) + 1

    @property
    def is_greedy(self) -> bool:
        return self.seq.is_greedy
