"""Lookahead heads of the GPU path: they draft right behind verification, on the device, for the step to come.

Nothing is asked position by position, as `HeadRunner` is: verification and the heads' whole loop are queued behind
sampling, and their guesses come to the host with the step's tokens. A sequence's `ChainSource` then speaks as long as
the draft follows its own chain; it is made here and found again by its request while somebody holds it. If drafting
fails, it is switched off, and everything goes on without heads.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from ...adapters.lora import LoraAdapter
from ...drafters.head_device import ChainSource, DeviceHeads
from ...drafters.head_files import LookaheadHeadFile
from ...kernels.head_loop import LoopRows
from ...kernels.verify import verify_drafts_
from ...schedule.row_group import RowGroup
from ...schedule.scheduler import ScheduledSequence
from ..path import StepLimits
from .buckets import padded
from .buffers import Layout, Page
from .head_seats import HeadSeats
from .parts import DeviceParts

logger = logging.getLogger(__name__)

_CHAIN_LENS = (4, 8, 16)  # guesses of a launch
_MAX_PROMPT_LEN = 16384  # tokens; a longer prompt goes without its head


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sequence that drafts in this step."""

    group: RowGroup
    source: ChainSource
    seat: int


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
        self._seats = HeadSeats(self._heads, device)
        self._sources: WeakValueDictionary[str, ChainSource] = WeakValueDictionary()  # by request id
        self._entries: list[_Entry] = []  # of the launch that is under way
        self._is_off = False
        self._longest = longest  # draft lately, decaying
        self._num_guesses = 0

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Seq[int]) -> ChainSource:
        """The head's voice among a sequence's sources."""
        source = self._sources[request_id] = ChainSource(head)
        return source

    def release_weights(self) -> None:
        """Let go of heads whose adapters have left; nothing that runs names them."""
        self._seats.keep_only(self._adapters)

    # -- the step

    def capture(self) -> None:
        """Capture every launch: a launch moves pointers and a capture repeats it, so it must not meet a sequence."""
        if not self._parts.graphs.is_enabled:
            return
        size, most = 1, self._verified.shape[1]
        while size <= most:
            for num_guesses in self._chain_lens:
                self._upload([], size)
                self._queue(size, num_guesses)
            size = padded(size + 1)

    def prepare(self, items: Seq[ScheduledSequence], seats: Seq[int]) -> None:
        """Bring sequences that will draft to their seats; before the step is queued, as it waits for copies."""
        if self._is_off:
            return
        with self._or_off():
            for item, seat in zip(items, seats, strict=True):
                source = self._sources.get(item.seq.request_id) if item.reaches_end else None
                if source is not None and source.wants_chain:
                    self._seats.take(item.seq, seat, source.head)

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
            self._is_off, self._entries = True, []
            self._seats.clear()

    def _launch(self, groups: Seq[RowGroup]) -> None:
        entries = []
        for group in groups:
            source = self._sources.get(group.seq.request_id)
            if source is None or not source.wants_chain:
                continue
            source.wants_chain = False
            seat = self._parts.seats.seat_of(group.seq)
            if self._seats.holds(group.seq, seat):
                entries.append((self._heads.id_of(source.head), _Entry(group, source, seat)))
        self._entries = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]  # equal heads are neighbours
        if not entries:
            return
        self._longest = max(self._longest - 1, *(len(entry.group.drafts) for _, entry in entries))
        self._num_guesses = next((n for n in self._chain_lens if n > self._longest), self._chain_lens[-1])
        size = padded(len(entries))
        self._upload(self._entries, size)
        self._queue(size, self._num_guesses)
        self._host.copy_(self._heads.results, non_blocking=True)

    @property
    def is_drafting(self) -> bool:
        """Whether a launch is under way whose chains are to be collected."""
        return bool(self._entries)

    def collect(self, kept: Mapping[int, int]) -> None:
        """Hand out the chains, once the device is done; `kept` is how many tokens a sequence keeps, by its id().

        A sequence that is not there has failed: it keeps none and needs no chain.
        """
        guesses, probabilities = self._host[0].numpy(), self._host[1].view(torch.float32).numpy()
        for idx, entry in enumerate(self._entries):
            seq, num = entry.group.seq, self._num_guesses
            if id(seq) not in kept:
                continue
            num_tokens = len(seq.tokens) + kept[id(seq)]
            entry.source.set_chain(guesses[idx, :num].tolist(), probabilities[idx, :num].tolist(), num_tokens)
            self._seats.followed(entry.seat, num_tokens)
        self._entries = []

    def _upload(self, entries: Seq[_Entry], size: int) -> None:
        layout = _layout(size)
        host, num = self._page.host(layout), len(entries)
        for name, values in (
            ("seats", [entry.seat for entry in entries]),
            ("heads", [self._heads.id_of(entry.source.head) for entry in entries]),
            ("first_rows", [entry.group.first_row for entry in entries]),
        ):
            host[name][:num], host[name][num:] = values, -1
        host["num_drafts"][:num], host["num_drafts"][num:] = [len(entry.group.drafts) for entry in entries], 0
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


def _layout(num_seqs: int) -> Layout:
    return Layout.of(dict.fromkeys(("seats", "heads", "first_rows", "num_drafts"), (num_seqs, torch.int32)))
