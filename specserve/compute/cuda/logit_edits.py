"""Penalties, bias and forbidden ends of a step's rows, on their way to the device: as few bytes as they name tokens.

A sequence's tokens and counts are kept on the host as records that grow with its output (`NamedTokens`), and go up
once a step for all of its rows. Buffers are static, for graphs; a step that names more has its own, and no graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.logit_edits import ENTRY, ENTRY_INTS, ROW, ROW_INTS, UNSEEN, edit_logits_, restore_logits_
from ...schedule.row_group import RowGroup
from ...schedule.sequence import Sequence
from .buffers import Layout, Page

MOST_ENTRIES = 1 << 18  # of a step, 4 MiB; 256 sequences with 1,024 tokens each
MOST_SAVED = 1 << 20  # entries of all rows, 4 MiB
_LEAST_ENTRIES = 1 << 10


class NamedTokens:
    """What the edits of one sequence name: each token of its bias and ends, and where it is penalized, of its text."""

    def __init__(self, seq: Sequence, end_ids: Iterable[int]):
        params = seq.sampling
        self._places: dict[int, int] = {}
        self._records = np.zeros(64, ENTRY)
        self._penalizes = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self._num_counted = seq.prompt_len
        self._set("bias", params.logit_bias, [*params.logit_bias.values()])
        if params.min_tokens:
            self._set("ends", {*end_ids, *params.stop_token_ids}, 1)
        if params.repetition_penalty != 1.0:
            self._set("count", seq.tokens[: seq.prompt_len], 0)

    def with_drafts(self, seq: Sequence, drafts: Seq[int]) -> np.ndarray:
        """Records [E] ENTRY, counted up to its newest token; those of `drafts` are among them. A view."""
        if self._penalizes:
            new = seq.tokens[self._num_counted :]
            for place in self._add([*new, *drafts])[: len(new)]:
                self._records["count"][place] = max(self._records["count"][place], 0) + 1
            self._num_counted = len(seq.tokens)
        return self._records[: len(self._places)]

    def _set(self, field: str, tokens: Iterable[int], values: Seq[float] | int) -> None:
        places = self._add(tokens)  # which may make new records
        self._records[field][places] = values

    def _add(self, tokens: Iterable[int]) -> list[int]:
        """The places of `tokens`, which are made where there is none."""
        before = len(self._places)
        places = [self._places.setdefault(token, len(self._places)) for token in tokens]
        num = len(self._places)
        if num > len(self._records):
            self._records = np.concatenate([self._records, np.zeros(2 * num - len(self._records), ENTRY)])
        if num > before:
            newest = itertools.islice(reversed(self._places), num - before)
            self._records["token"][before:num] = [*newest][::-1]
            self._records["count"][before:num] = UNSEEN
        return places


@dataclass(frozen=True, slots=True)
class StepEdits:
    """The edits of one step's rows, on the device."""

    rows: torch.Tensor  # [R * fields] int32, ROW records
    entries: torch.Tensor  # int32, ENTRY records
    saved: torch.Tensor  # float32
    eager_reason: str | None  # why these are not the buffers of graphs

    def apply_(self, logits: torch.Tensor) -> None:
        edit_logits_(logits, self.rows, self.entries, self.saved)

    def undo_(self, logits: torch.Tensor) -> None:
        restore_logits_(logits, self.rows, self.entries, self.saved)


class LogitEdits:
    """Uploads the edits of steps of up to `num_rows` padded rows, and of larger ones without a graph."""

    def __init__(self, num_rows: int, end_ids: Seq[int], device: torch.device):
        self._num_rows, self._end_ids, self._device = num_rows, end_ids, device
        self._page = Page(_layout(num_rows, MOST_ENTRIES).num_bytes, device)
        self._saved = torch.empty(MOST_SAVED, dtype=torch.float32, device=device)

    def upload(self, num_rows: int, groups: Seq[RowGroup]) -> StepEdits:
        """The edits of `groups`, whose sequences have some, among `num_rows` padded rows."""
        lists = [self._named(group) for group in groups]
        num_entries = sum(map(len, lists))
        num_saved = sum(len(records) * group.num_rows for group, records in zip(groups, lists, strict=True))
        page, saved, reason = self._page, self._saved, None
        layout = _layout(num_rows, max(_LEAST_ENTRIES, 1 << max(0, num_entries - 1).bit_length()))
        if num_rows > self._num_rows or num_entries > MOST_ENTRIES or num_saved > MOST_SAVED:
            reason = "its penalties and biases name more tokens than have a buffer"
            page = Page(layout.num_bytes, self._device)
            saved = torch.empty(num_saved, dtype=torch.float32, device=self._device)
        host = page.host(layout)
        rows, entries = host["rows"].view(ROW), host["entries"].view(ENTRY)
        rows[:] = np.zeros((), ROW)
        start, place = 0, 0
        for group, records in zip(groups, lists, strict=True):
            num = len(records)
            entries[start : start + num] = records
            own = rows[group.first_row : group.first_row + group.num_rows]
            _fill(own, group, start, num, place)
            start, place = start + num, place + num * group.num_rows
        page.upload(layout)
        fields = page.device(layout)
        return StepEdits(fields["rows"], fields["entries"], saved, reason)

    def _named(self, group: RowGroup) -> np.ndarray:
        seq = group.seq
        if seq.named_tokens is None:
            seq.named_tokens = NamedTokens(seq, self._end_ids)
        named: NamedTokens = seq.named_tokens
        return named.with_drafts(seq, group.drafts)


def _fill(rows: np.ndarray, group: RowGroup, start: int, num_entries: int, saved: int) -> None:
    """The rows of one sequence, whose entries begin at `start` and are kept from `saved` on."""
    params, idx = group.seq.sampling, np.arange(group.num_rows)
    rows["first"], rows["end"] = start, start + num_entries
    rows["num_drafts"], rows["token"][1:] = idx, group.drafts
    rows["saved"] = saved + idx * num_entries
    rows["forbids_ends"] = group.seq.output_len + idx < params.min_tokens
    rows["presence"], rows["frequency"] = params.presence_penalty, params.frequency_penalty
    rows["repetition"] = params.repetition_penalty


@functools.cache
def _layout(num_rows: int, num_entries: int) -> Layout:
    return Layout.of({"rows": (num_rows * ROW_INTS, torch.int32), "entries": (num_entries * ENTRY_INTS, torch.int32)})
