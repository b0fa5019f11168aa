"""Which rows of a step need logits, and what for: sampling, verification, log-probabilities of prompts."""

from __future__ import annotations

from .row_group import RowGroup
from .scheduler import ScheduledSequence


class LogitsRows:
    """Collects them sequence by sequence, in row order."""

    def __init__(self) -> None:
        self.rows: list[int] = []  # ascending
        self.groups: list[RowGroup] = []  # to sample; first_row counts in `rows`
        self.items: list[ScheduledSequence] = []  # whose they are
        self.prompt_rows: list[tuple[ScheduledSequence, int, int]] = []  # (item, first in `rows`, how many)

    def add(self, item: ScheduledSequence, first_row: int) -> int:
        """The rows of `item`, which stand in the step from `first_row` on; returns how many need logits."""
        seq, start, before = item.seq, item.seq.num_computed, len(self.rows)
        if seq.wants_prompt_logprobs and start < seq.prompt_len - 1 and seq.output_len == 0:
            # Row i scores prompt token i + 1; the last prompt token's row samples the first output token.
            num_scored = min(start + item.num_rows, seq.prompt_len - 1) - start
            self.prompt_rows.append((item, before, num_scored))
            self.rows += range(first_row, first_row + num_scored)
        if item.reaches_end:
            self.groups.append(RowGroup(seq, len(self.rows), item.drafts))
            self.items.append(item)
            self.rows += range(first_row + item.num_rows - 1, first_row + item.num_rows + len(item.drafts))
        return len(self.rows) - before
