"""Which rows of a step need logits, and what for: sampling, verification, log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from .row_group import RowGroup
from .scheduler import ScheduledSequence


class LogitsRows:
    """Those of `items`, whose rows, `counts` each, stand in the step one after the other."""

    def __init__(self, items: Sequence[ScheduledSequence], counts: Sequence[int]) -> None:
        self.rows: list[int] = []  # ascending
        self.groups: list[RowGroup] = []  # to sample; first_row counts in `rows`
        self.items: list[ScheduledSequence] = []  # whose they are
        self.prompt_rows: list[tuple[ScheduledSequence, int, int]] = []  # (item, first in `rows`, how many)
        if len(items) == sum(counts) and all(item.reaches_end for item in items):  # nothing but decodes, mostly
            self.rows, self.items = list(range(len(items))), list(items)
            self.groups = [RowGroup(item.seq, row) for row, item in enumerate(items)]
            return
        rows, groups, end = self.rows, self.groups, 0
        for item, count in zip(items, counts, strict=True):
            end, drafts = end + count, item.drafts
            if item.seq.wants_prompt_logprobs:
                self._add_prompt(item, end - count)
            if item.reaches_end:
                groups.append(RowGroup(item.seq, len(rows), drafts))
                self.items.append(item)
                if drafts:
                    rows += range(end - len(drafts) - 1, end)
                else:
                    rows.append(end - 1)

    def _add_prompt(self, item: ScheduledSequence, first_row: int) -> None:
        seq, start = item.seq, item.seq.num_computed
        if start < seq.prompt_len - 1 and seq.output_len == 0:
            # Row i scores prompt token i + 1; the last prompt token's row samples the first output token.
            num_scored = min(start + item.num_rows, seq.prompt_len - 1) - start
            self.prompt_rows.append((item, len(self.rows), num_scored))
            self.rows += range(first_row, first_row + num_scored)
