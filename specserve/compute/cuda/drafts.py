"""Lookahead heads of the GPU path: they draft right behind verification, on the device, for the step to come.

Nothing is asked position by position, as `HeadRunner` is: verification and the heads' whole loop are queued behind
sampling, and their guesses come to the host with the step's tokens, into a table of chains. A sequence's `ChainSource`
speaks its row of that as long as the draft follows its own chain; a row is found by its request while somebody holds
its source. If drafting fails, it is switched off, and everything goes on without heads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...adapters.lora import LoraAdapter
from ...drafters.chains import NOBODY, ChainSource, ChainTable
from ...drafters.head_device import DeviceHeads
from ...drafters.head_files import LookaheadHeadFile
from ...kernels.head_loop import LoopRows
from ...kernels.verify import verify_drafts_
from ...schedule.row_group import RowGroup
from ...schedule.scheduler import ScheduledSequence
from ...schedule.sequence import Sequence
from ..path import StepLimits
from .buckets import padded
from .buffers import Layout, Page
from .head_seats import HeadSeats
from .parts import DeviceParts

logger = logging.getLogger(__name__)

_CHAIN_LENS = (4, 8, 16)  # guesses of a launch
_SIZES = (1, 4, 16, 64, 128, 256, 512)  # sequences of a launch, padded
_MAX_PROMPT_LEN = 16384  # tokens; a longer prompt goes without its head


class DeviceDrafts:
    """Drafts by the heads of as many adapters, and as long, as `limits` say.

    `sampled` [L] int64 is where the sampler leaves tokens, `adapters` who is there.
    """

    def __init__(
        self,
        parts: DeviceParts,
        sampled: torch.Tensor,
        adapters: Mapping[str, LoraAdapter],
        limits: StepLimits,
    ):
        config, device = parts.decoder.config, parts.decoder.device
        self._parts, self._sampled, self._adapters = parts, sampled, adapters
        longest = min(limits.max_draft_tokens, _CHAIN_LENS[-1])
        self._chain_lens = (*(n for n in _CHAIN_LENS if n < longest), longest)
        num_seats = padded(parts.seats.tables.shape[0])
        self._heads = DeviceHeads(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            tap_layers=parts.layers.tap_layers,
            max_heads=limits.max_adapters,
            max_num_seqs=num_seats,
            max_prompt_len=min(limits.max_model_len, _MAX_PROMPT_LEN),
            max_draft_len=longest,
            device=device,
        )
        self._page = Page(_layout(num_seats).num_bytes, device)
        self._verified = torch.zeros(2, num_seats, dtype=torch.int32, device=device)  # tokens accepted, last row
        self._host = torch.zeros(self._heads.results.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._seats = HeadSeats(self._heads, num_seats, device)
        self._chains = ChainTable(longest)
        self._sizes = (*(size for size in _SIZES if size < num_seats), num_seats)
        # Of the launch that is under way, by its sequences: their rows of logits, of the table, and their seats.
        self._groups: list[RowGroup] = []
        self._rows = np.zeros(0, np.int64)
        self._seats_of: list[int] = []
        self._is_off = False
        self._longest = longest  # draft lately, decaying
        self._num_guesses = 0

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Seq[int]) -> ChainSource:
        """The head's voice among a sequence's sources."""
        return self._chains.source(request_id, head)

    def release_weights(self) -> None:
        """Let go of heads whose adapters have left; nothing that runs names them."""
        self._seats.keep_only(self._adapters)

    # -- the step

    def capture(self) -> None:
        """Capture every launch: a launch moves pointers and a capture repeats it, so it must not meet a sequence."""
        if not self._parts.graphs.is_enabled:
            return
        for size in self._sizes:
            for num_guesses in self._chain_lens:
                self._upload(size)
                self._queue(size, num_guesses)

    def prepare(self, items: Seq[ScheduledSequence], seats: Seq[int]) -> None:
        """Bring sequences that will draft to their seats; before the step is queued, which reads them."""
        if self._is_off or not self._chains.wanted.any():
            return
        with self._or_off():
            rows = self._rows_of([item.seq for item in items])
            heads = self._chains.heads
            wanted = [
                (items[idx], seats[idx], heads[rows[idx]]) for idx in np.flatnonzero(self._chains.wanted[rows]).tolist()
            ]
            self._seats.take(
                (item.seq, seat, head) for item, seat, head in wanted if item.reaches_end and head is not None
            )

    def launch(self, groups: Seq[RowGroup]) -> None:
        """Queue verification and drafts behind sampling."""
        with self._or_off():
            self._launch(groups)

    @contextlib.contextmanager
    def _or_off(self) -> Iterator[None]:
        """Drafts are never worth a step: whatever they raise ends them and nothing else."""
        try:
            yield
        except Exception:
            logger.exception("drafting on the device failed; lookahead heads are off from now on")
            self._is_off, self._groups = True, []
            self._seats.clear()

    def _launch(self, groups: Seq[RowGroup]) -> None:
        assert not self._groups, "the chains of the last launch were not collected"
        chains, seat_of = self._chains, self._parts.seats.seat_of
        rows = self._rows_of([group.seq for group in groups])
        found = []
        for idx in np.flatnonzero(chains.wanted[rows]).tolist():
            group, row = groups[idx], int(rows[idx])
            seat, head = seat_of(group.seq), chains.heads[row]
            if self._seats.holds(group.seq, seat) and head is not None:
                found.append((self._heads.id_of(head), row, seat, group))
        chains.wanted[rows] = False
        found.sort(key=lambda entry: entry[0])  # equal heads are neighbours
        self._groups = [group for *_, group in found]
        if not found:
            return
        head_ids, table_rows, self._seats_of, _ = map(list, zip(*found, strict=True))
        self._rows = np.array(table_rows)
        nums = [len(group.drafts) for group in self._groups]
        self._longest = max(self._longest - 1, *nums)
        self._num_guesses = next((n for n in self._chain_lens if n > self._longest), self._chain_lens[-1])
        size = next(size for size in self._sizes if size >= len(found))
        first_rows = [group.first_row for group in self._groups]
        self._upload(size, seats=self._seats_of, heads=head_ids, first_rows=first_rows, num_drafts=nums)
        self._queue(size, self._num_guesses)
        self._host.copy_(self._heads.results, non_blocking=True)

    @property
    def is_drafting(self) -> bool:
        """Whether a launch is under way whose chains are to be collected."""
        return bool(self._groups)

    def collect(self, kept: Mapping[int, int]) -> None:
        """Hand out the chains, once the device is done; `kept` is how many tokens a sequence keeps, by its id().

        A sequence that is not there has failed: it keeps none and needs no chain.
        """
        num, num_guesses, row_of = len(self._groups), self._num_guesses, self._chains.row_of
        lens = []
        for group, seat, row in zip(self._groups, self._seats_of, self._rows.tolist(), strict=True):
            seq = group.seq
            num_tokens = -1
            if (num_kept := kept.get(id(seq))) and row_of.get(seq.request_id) == row:  # else aborted meanwhile
                num_tokens = len(seq.tokens) + num_kept
            lens.append(num_tokens)
            self._seats.followed(seat, num_tokens)
        guesses, probabilities = self._host[0].numpy(), self._host[1].view(torch.float32).numpy()
        self._chains.set(self._rows, guesses[:num, :num_guesses], probabilities[:num, :num_guesses], lens)
        self._groups = []

    def _rows_of(self, sequences: Seq[Sequence]) -> np.ndarray:
        """The sequences' rows in the table of chains; nobody's where no chain is wanted."""
        if not self._chains.wanted.any():
            return np.full(len(sequences), NOBODY)
        row_of = self._chains.row_of
        return np.array([row_of.get(seq.request_id, NOBODY) for seq in sequences], np.int64)

    def _upload(self, size: int, **fields: list[int]) -> None:
        """What `_layout` says of each sequence; those beyond are nobody's."""
        layout = _layout(size)
        host = self._page.host(layout)
        for name, array in host.items():
            values = fields.get(name, [])
            array[: len(values)], array[len(values) :] = values, 0 if name == "num_drafts" else -1
        self._page.upload(layout)

    def _queue(self, size: int, num_guesses: int) -> None:
        self._parts.graphs.launch(("heads", size, num_guesses), lambda: self._draft(size, num_guesses))

    def _draft(self, size: int, num_guesses: int) -> None:
        """The launches: verification of `size` sequences, then their heads."""
        fields, logits = self._page.device(_layout(size)), self._parts.logits
        accepted, last_row = self._verified[0, :size], self._verified[1, :size]
        verify_drafts_(
            accepted, last_row, self._sampled, logits.picked_tokens, fields["first_rows"], fields["num_drafts"]
        )
        rows = LoopRows(fields["seats"], fields["heads"], fields["first_rows"], accepted, last_row, self._sampled)
        self._heads.launch(rows, logits.picked_hidden, logits.picked_taps, num_guesses)


@functools.cache
def _layout(num_seqs: int) -> Layout:
    return Layout.of(dict.fromkeys(("seats", "heads", "first_rows", "num_drafts"), (num_seqs, torch.int32)))
