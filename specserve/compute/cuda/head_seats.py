"""What the runner's seats hold in the pool of prompts that heads on the device read, and which heads are there.

A seat of the pool holds a sequence's prompt and its copy pointer, which stands behind as many tokens as the heads have
followed. One that is not up to date is taken anew, by the sequence as it is then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from ...adapters.lora import LoraAdapter
from ...drafters.head_device import DeviceHeads, SeatedSequence
from ...drafters.head_files import HeadError, LookaheadHeadFile
from ...schedule.sequence import Sequence
from .buffers import Writer

logger = logging.getLogger(__name__)


class HeadSeats:
    """Brings sequences, and the heads that draft for them, to `heads` on `device`."""

    def __init__(self, heads: DeviceHeads, num_seats: int, device: torch.device):
        self._heads, self._device, self._write = heads, device, Writer(device)
        # By seat: the pool's copy pointer stands behind so many tokens of the sequence with that table.
        self._table_ids: list[object] = [None] * num_seats
        self._num_tokens = [0] * num_seats
        self._known: dict[int, LookaheadHeadFile] = {}  # by id: heads that were added, or refused

    def holds(self, seq: Sequence, seat: int) -> bool:
        """Whether the seat is the sequence's, as that is now."""
        return self._table_ids[seat] is seq.table_id and self._num_tokens[seat] == len(seq.tokens)

    def take(self, sequences: Iterable[tuple[Sequence, int, LookaheadHeadFile]]) -> None:
        """Make the seats those of the sequences, unless they are; nothing where a head cannot draft."""
        new = [one for one in sequences if not self.holds(*one[:2]) and self._is_known(one[2])]
        if not new:
            return
        seated = []
        for seq, seat, head in new:
            has_prompt = self._table_ids[seat] is seq.table_id
            seated.append(SeatedSequence(seat, seq.tokens[: seq.prompt_len], head, seq.output_ids, has_prompt))
            self._table_ids[seat] = None
        fits = self._heads.add_sequences(seated, self._write)
        for (seq, seat, _), has_room in zip(new, fits, strict=True):
            if has_room:
                self._table_ids[seat], self._num_tokens[seat] = seq.table_id, len(seq.tokens)

    def followed(self, seat: int, num_tokens: int) -> None:
        """The heads have followed the seat's sequence up to so many tokens."""
        self._num_tokens[seat] = num_tokens

    def clear(self) -> None:
        self._table_ids = [None] * len(self._table_ids)

    def keep_only(self, adapters: Mapping[str, LoraAdapter]) -> None:
        """Let go of heads that belong to none of `adapters`; nothing that runs names them."""
        lookaheads = [adapter.lookahead for adapter in adapters.values()]
        live = {id(lookahead.head) for lookahead in lookaheads if lookahead is not None}
        for key, head in list(self._known.items()):
            if key not in live:
                self._heads.remove_head(head)
                del self._known[key]

    def _is_known(self, head: LookaheadHeadFile) -> bool:
        """Whether the head is on the device; one that does not fit there is refused, once, with the reason."""
        if id(head) in self._known:
            return self._heads.id_of(head) >= 0
        self._known[id(head)] = head
        try:
            self._heads.add_head(head)
        except HeadError as error:
            logger.warning("a lookahead head drafts nothing on %s: %s", self._device, error)
            return False
        return True
