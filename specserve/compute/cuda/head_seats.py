"""What the runner's seats hold in the pool of prompts that heads on the device read, and which heads are there.

A seat of the pool holds a sequence's prompt and its copy pointer, which stands behind as many tokens as the heads have
followed. One that is not up to date is taken anew, by the sequence as it is then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch

from ...drafters.head_device import DeviceHeads, SeatedSequence
from ...drafters.head_files import HeadError, LookaheadHeadFile
from ...schedule.sequence import Sequence
from .buffers import Writer
from .seats import Seats

logger = logging.getLogger(__name__)


class HeadSeats:
    """Brings sequences, and the heads that draft for them, to `heads` on `device`; they sit as in `seats`."""

    def __init__(self, heads: DeviceHeads, seats: Seats, device: torch.device):
        self._heads, self._seats, self._device, self._write = heads, seats, device, Writer(device)
        num_seats = len(seats.owners)
        # By seat: the pool's copy pointer stands behind so many tokens of the sequence that was its owner by number.
        self._owners = np.full(num_seats, -1, np.int64)
        self._num_tokens = np.zeros(num_seats, np.int64)
        self._head_ids = np.zeros(num_seats, np.int64)
        self._known: dict[int, LookaheadHeadFile] = {}  # by id: heads that were added, or refused

    def holds(self, seats: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """Whether each seat's sequence is there as it is with so many tokens, [S] bool."""
        return (self._owners[seats] == self._seats.owners[seats]) & (self._num_tokens[seats] == num_tokens)

    def head_ids(self, seats: np.ndarray) -> np.ndarray:
        """The numbers of the heads that draft for who sits there."""
        return self._head_ids[seats]

    def take(self, sequences: Iterable[tuple[Sequence, int, LookaheadHeadFile]]) -> list[int]:
        """Make the seats those of the sequences, which they are not; nothing where a head cannot draft.

        Seats of sequences that were not there before are returned.
        """
        new = [one for one in sequences if self._is_known(one[2])]
        if not new:
            return []
        seated, owners = [], self._seats.owners
        for seq, seat, head in new:
            has_prompt = bool(self._owners[seat] == owners[seat])
            seated.append(SeatedSequence(seat, seq.tokens[: seq.prompt_len], head, seq.output_ids, has_prompt))
            self._owners[seat] = -1
        fits = self._heads.add_sequences(seated, self._write)
        for (seq, seat, head), has_room in zip(new, fits, strict=True):
            if has_room:
                self._owners[seat], self._num_tokens[seat] = owners[seat], len(seq.tokens)
                self._head_ids[seat] = self._heads.id_of(head)
        return [one.seat for one in seated if not one.has_prompt]

    def followed(self, seats: np.ndarray, num_tokens: np.ndarray) -> None:
        """The heads have followed the seats' sequences up to so many tokens."""
        self._num_tokens[seats] = num_tokens

    def clear(self) -> None:
        self._owners[:] = -1

    def keep_only(self, heads: Iterable[LookaheadHeadFile]) -> None:
        """Let go of all but these; nothing that runs names others."""
        live = {id(head) for head in heads}
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
