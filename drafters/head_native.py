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
        self._clear()

    def _clear(self) -> None:
        self._sources: list[HeadSource] = []
        self._rows: ctypes.Array | None = None
        self._windows: list[ctypes.Array] = []
        self._kept: list[torch.Tensor] = []  # what the rows point into

    @torch.inference_mode()
    def begin(self, sources: Sequence[HeadSource]) -> None:
        """Start the drafts of those sources that are ready."""
        self._clear()
        self._sources = [source for source in sources if source.is_ready]
        if not self._sources:
            return
        rows = self._rows = (HeadRow * len(self._sources))()
        for row, source in zip(rows, self._sources, strict=True):
            head = self._heads.get(id(source.head))
            if head is None:
                head = self._heads[id(source.head)] = _NativeHead(source.head)
            last, tapped = (tensor.float().contiguous() for tensor in source.hidden)
            state = torch.empty(head.struct.d)
            window = (ctypes.c_int32 * head.struct.window)()
            row.head = ctypes.pointer(head.struct)
            row.state, row.last, row.tapped = state.data_ptr(), last.data_ptr(), tapped.data_ptr()
            row.window = ctypes.addressof(window)
            self._windows.append(window)
            self._kept += (state, last, tapped)
        self._team.begin_heads(rows, len(self._sources))

    def step(self) -> None:
        """Feed what each source was told to follow, and give each its next guess."""
        if self._rows is None:
            return
        for row, window, source in zip(self._rows, self._windows, self._sources, strict=True):
            row.token, row.moved, window[:] = source.input
        self._team.step_heads(self._rows, len(self._sources))
        for row, source in zip(self._rows, self._sources, strict=True):
            source.set_guess(row.choice, row.probability)

    def clear(self) -> None:
        self._clear()

    def forget(self) -> None:
        """Let go of all weights, when an adapter has left; the next draft takes what it needs."""
        self._clear()
        self._heads = {}
