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
from collections.abc import Iterator, Mapping, Sized
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...adapters.lora import LoraAdapter
from ...drafters.chains import ChainSource, ChainTable
from ...drafters.head_device import DeviceHeads
from ...drafters.head_files import LookaheadHeadFile
from ...kernels.head_loop_tables import LoopRows
from ...kernels.verify import verify_drafts_
from ...schedule.row_group import RowGroup
from ...schedule.scheduler import ScheduledSequence
from ..path import StepLimits
from .buckets import padded
from .buffers import Layout, Page
from .chain_lens import ChainLens
from .head_seats import HeadSeats
from .parts import DeviceParts
from .seated_chains import SeatedChains

logger = logging.getLogger(__name__)

_CHAIN_LENS = (4, 8, 16)  # guesses of a launch
_SIZES = (1, 4, 16, 64, 128, 256, 512)  # sequences of a launch, padded
MAX_PROMPT_LEN = 16384  # tokens; a longer prompt goes without its head


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launch that is under way, by its sequences, [S] each."""

    groups: np.ndarray  # which of the step's groups they are
    seats: np.ndarray
    rows: np.ndarray  # of the table of chains
    row_owners: np.ndarray
    lens: np.ndarray  # tokens, before those that the step gives
    num_guesses: int
    results: torch.Tensor  # on the host, as `DeviceHeads.results`


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
        base_head: LookaheadHeadFile | None = None,
    ):
        config, device = parts.decoder.config, parts.decoder.device
        self._parts, self._sampled, self._adapters = parts, sampled, adapters
        self._base_head = base_head
        longest = min(limits.max_draft_tokens, _CHAIN_LENS[-1])
        self._chain_lens = (*(n for n in _CHAIN_LENS if n < longest), longest)
        num_seats = padded(parts.seats.tables.shape[0])
        self._lens = ChainLens(self._chain_lens, num_seats)
        self._heads = DeviceHeads(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            tap_layers=parts.layers.tap_layers,
            max_heads=limits.max_adapters + 1,  # the base may have one
            max_num_seqs=num_seats,
            max_prompt_len=min(limits.max_model_len, MAX_PROMPT_LEN),
            max_draft_len=longest,
            device=device,
        )
        self._page = Page(_layout(num_seats).num_bytes, device)
        self._verified = torch.zeros(2, num_seats, dtype=torch.int32, device=device)  # tokens accepted, last row
        shape, is_cuda = self._heads.results.shape, device.type == "cuda"
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)]  # they take turns
        self._seats = HeadSeats(self._heads, parts.seats, device)
        self._chains = ChainTable(longest)
        self._seated = SeatedChains(self._chains, parts.seats)
        self._sizes = (*(size for size in _SIZES if size < num_seats), num_seats)
        self._under_way: dict[int, _Launched] = {}  # at most two, by the id() of their step's groups
        self._groups: list[RowGroup] = []  # of the latest launch
        self._is_off = False

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Seq[int]) -> ChainSource:
        """The head's voice among a sequence's sources."""
        return self._chains.source(request_id, head)

    def release_weights(self) -> None:
        """Let go of heads whose adapters have left; nothing that runs names them."""
        lookaheads = [adapter.lookahead for adapter in self._adapters.values()]
        heads = [lookahead.head for lookahead in lookaheads if lookahead is not None]
        self._seats.keep_only([head for head in (*heads, self._base_head) if head is not None])

    # -- the step

    def capture(self) -> None:
        """Capture every launch: a launch moves pointers and a capture repeats it, so it must not meet a sequence."""
        if not self._parts.graphs.is_enabled:
            return
        with self._or_off():  # a card that cannot run them serves without
            for size in self._sizes:
                for num_guesses in self._chain_lens:
                    self._upload(size)
                    self._queue(size, num_guesses)

    def prepare(self, items: Seq[ScheduledSequence], seats: np.ndarray, ends: np.ndarray) -> None:
        """Bring sequences that will draft to their seats, behind the layers and before the heads, which read them.

        `ends` [S] is the position behind each item's rows, without its drafts.
        """
        if self._is_off or not self._chains.wanted.any():
            return
        with self._or_off():
            rows = self._seated.rows([item.seq for item in items], seats)
            new = self._chains.wanted[rows] & ~self._seats.holds(seats, ends)
            taken = self._seats.take(
                (items[idx].seq, int(seats[idx]), head)
                for idx in np.flatnonzero(new).tolist()
                if items[idx].reaches_end and (head := self._chains.heads[rows[idx]]) is not None
            )
            self._lens.start(taken)

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
            self._is_off = True
            self._under_way.clear()
            self._seats.clear()

    def _launch(self, groups: Seq[RowGroup]) -> None:
        assert len(self._under_way) < 2, "the chains of the launches before were not collected"
        chains = self._chains
        if not chains.wanted.any():
            return
        sequences = [group.seq for group in groups]
        seats = self._parts.seats.seats_of(sequences)
        rows, lens = self._seated.rows(sequences, seats), np.array([len(seq.tokens) for seq in sequences])
        found = np.flatnonzero(chains.wanted[rows] & self._seats.holds(seats, lens))
        chains.wanted[rows] = False
        if not len(found):
            return
        found = found[np.argsort(self._seats.head_ids(seats[found]), kind="stable")]  # equal heads are neighbours
        seats, rows = seats[found], rows[found]
        self._groups = [groups[idx] for idx in found.tolist()]
        nums = np.array([len(group.drafts) for group in self._groups])
        num_guesses, wanted = self._lens.plan(seats, nums)
        self._hosts.reverse()
        host = self._hosts[0]
        launched = _Launched(found, seats, rows, chains.owners[rows], lens[found], num_guesses, host)
        size = next(size for size in self._sizes if size >= len(found))
        first_rows = [group.first_row for group in self._groups]
        heads = self._seats.head_ids(seats)
        self._upload(size, seats=seats, heads=heads, first_rows=first_rows, num_drafts=nums, num_guesses=wanted)
        self._queue(size, num_guesses)
        host.copy_(self._heads.results, non_blocking=True)
        self._under_way[id(groups)] = launched

    def collect(self, groups: Seq[RowGroup], tokens: Seq[Sized]) -> None:
        """Hand out the chains of the step with these groups, once the device is done; `tokens` are what they keep.

        One that keeps none has failed and needs no chain.
        """
        launched = self._under_way.pop(id(groups), None)
        if launched is None:
            return
        kept = np.array([*map(len, tokens)])[launched.groups]
        num, num_guesses = len(kept), launched.num_guesses
        goes_on = (kept > 0) & (self._chains.owners[launched.rows] == launched.row_owners)  # else aborted meanwhile
        lens = np.where(goes_on, launched.lens + kept, -1)
        self._seats.followed(launched.seats, lens)
        guesses, probabilities = launched.results[0].numpy(), launched.results[1].view(torch.float32).numpy()
        self._chains.set(launched.rows, guesses[:num, :num_guesses], probabilities[:num, :num_guesses], lens)

    def _upload(self, size: int, **fields: Seq[int] | np.ndarray) -> None:
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
        rows = LoopRows(
            fields["seats"], fields["heads"], fields["first_rows"], accepted, last_row, fields["num_guesses"],
            self._sampled,
        )  # fmt: skip
        self._heads.launch(rows, logits.picked_hidden, logits.picked_taps, num_guesses)


@functools.cache
def _layout(num_seqs: int) -> Layout:
    names = ("seats", "heads", "first_rows", "num_drafts", "num_guesses")
    return Layout.of(dict.fromkeys(names, (num_seqs, torch.int32)))
