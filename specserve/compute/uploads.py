"""Copies to a device while steps run there, whichever path runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Uploads of another thread on a stream of their own; on return they are done, so that any stream may read them.

    What is uploaded is freed when no step needs it any more, to which a queued step sees by holding its adapters; so a
    later upload may use its memory.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
