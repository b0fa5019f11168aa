"""Copies to a device while steps run there, whichever path runs them."""

from __future__ import annotations

import threading

import torch

_STAGE_BYTES = 8 << 20


class Uploads:
    """Copies what lies in ordinary memory to `device`, piece by piece through memory that it locks once, at the start.

    To lock each adapter's own memory instead would wait for the device each time, and round sizes up to powers of two.
    One at a time, on a stream of their own: what is freed there is used again by the next one. Freed is what no step
    needs any more, to which a queued step sees by holding its adapters.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._lock = threading.Lock()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stages = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in self._stages]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, contiguous and on the CPU, on the device, so that any stream may read it."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        with self._lock, torch.cuda.stream(self._stream):
            target = torch.empty_like(tensor, device=self._device)
            source, bytes_there = tensor.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
            for idx, start in enumerate(range(0, source.shape[0], _STAGE_BYTES)):
                piece = source[start : start + _STAGE_BYTES]
                stage, event = self._stages[idx % 2][: piece.shape[0]], self._events[idx % 2]
                event.synchronize()  # the copy before the last has left this stage
                stage.copy_(piece)
                bytes_there[start : start + piece.shape[0]].copy_(stage, non_blocking=True)
                event.record()
            self._stream.synchronize()
        return target
