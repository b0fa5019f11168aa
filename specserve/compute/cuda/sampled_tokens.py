"""The tokens of a step's rows on the device, where the next step's rows and drafts read them, and on their way here.

Two pages on the host take turns: one is read while the copy to the other is under way, so that a step can be queued
before the tokens of the last one were read.
"""

from __future__ import annotations

import numpy as np
import torch

from .buffers import HostPage, Layout


class SampledTokens:
    """`tokens` [L] int64 and `flags` [L] int32 of up to `num_rows` rows on `device`."""

    def __init__(self, num_rows: int, device: torch.device):
        self.num_rows = num_rows
        self._layout = Layout.of({"tokens": (num_rows, torch.int64), "flags": (num_rows, torch.int32)})
        self._page = torch.zeros(self._layout.num_bytes, dtype=torch.uint8, device=device)
        fields = self._layout.views(self._page)
        self.tokens, self.flags = fields["tokens"], fields["flags"]
        self._copies = [HostPage(self._layout.num_bytes, device) for _ in range(2)]

    def queue_download(self) -> HostPage:
        """Queue their copy to the host, to be read before the next but one is queued."""
        copy = self._copies[0]
        self._copies.reverse()
        copy.copy_from(self._page, self._layout.num_bytes)
        return copy

    def read(self, copy: HostPage, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and flags of the first rows, once the copy is done; views, to be used before the next but one."""
        host = copy.fields(self._layout)  # sync: a step's one wait; all that follows needs the tokens
        return host["tokens"][:num_rows], host["flags"][:num_rows]
