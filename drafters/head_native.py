"""Lookahead heads on the CPU through the native kernel: one call a position for all sequences, whatever their heads.

Stands in for `HeadRunner` where the engine has a native team. Each row names its own head by address, so heads of any
sizes share a call and nothing is stacked when adapters come and go. Weights are held in bf16, as the files have them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..kernels.native import HEAD_BIASES, HEAD_MATRICES, Head, HeadRow, Team
from .head_files import LookaheadHeadFile
from .head_source import HeadSource


class _NativeHead:
    """The C struct of one head, and the tensors that it points into."""

    def __init__(self, head: LookaheadHeadFile):
        weights = head.weights
        self.head = head
        self._tensors = {
            **{name: getattr(weights, name)[0].to(torch.bfloat16).contiguous() for name in HEAD_MATRICES},
            **{name: getattr(weights, name)[0].float().contiguous() for name in HEAD_BIASES},
        }
        self.struct = Head(
            hidden_size=weights.init_weight.shape[1] // 2,
            d=weights.init_weight.shape[2],
            window=weights.window,
            num_tokens=len(head.config.vocab),
            num_vocab=weights.embed.shape[1],
            **{name: tensor.data_ptr() for name, tensor in self._tensors.items()},
        )


class NativeHeadRunner:
    """Runs the heads of a step's sequences, position by position."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._heads: dict[int, _NativeHead] = {}
        self.clear()

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Sequence[int]) -> HeadSource:
        """The head's voice for a sequence."""
        return HeadSource(head, prompt)

    def clear(self) -> None:
        self._row_of: dict[int, tuple[HeadRow, ctypes.Array]] = {}  # id of a source -> its row and window
        self._kept: list[torch.Tensor] = []  # what the rows point into

    @torch.inference_mode()
    def begin(self, sources: Sequence[HeadSource]) -> None:
        """Start the drafts of those sources that are ready."""
        self.clear()
        ready = [source for source in sources if source.is_ready]
        rows = (HeadRow * len(ready))()
        for row, source in zip(rows, ready, strict=True):
            head = self._heads.get(id(source.head))
            if head is None:
                head = self._heads[id(source.head)] = _NativeHead(source.head)
            last, tapped = (tensor.float().contiguous() for tensor in source.hidden)
            state = torch.empty(head.struct.d)
            window = (ctypes.c_int32 * head.struct.window)()
            row.head = ctypes.pointer(head.struct)
            row.state, row.last, row.tapped = state.data_ptr(), last.data_ptr(), tapped.data_ptr()
            row.window = ctypes.addressof(window)
            self._row_of[id(source)] = row, window
            self._kept += (state, last, tapped)
        if ready:
            self._team.begin_heads(rows, len(ready))

    def step(self, sources: Sequence[HeadSource]) -> None:
        """Feed those of `sources` that are ready what they were told to follow, and give each its next guess."""
        going = [source for source in sources if id(source) in self._row_of]
        if not going:
            return
        rows = (HeadRow * len(going))()
        for idx, source in enumerate(going):
            row, window = self._row_of[id(source)]
            row.token, row.moved, window[:] = source.input
            rows[idx] = row
        self._team.step_heads(rows, len(going))
        for row, source in zip(rows, going, strict=True):
            source.set_guess(row.choice, row.probability)

    def release_weights(self) -> None:
        """Let go of all weights, when an adapter has left; the next draft takes what it needs."""
        self.clear()
        self._heads = {}
