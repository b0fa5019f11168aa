"""Copies to a device while steps run there, whichever path runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Uploads of another thread on a stream of their own; on return they are done, so that any stream may read them.

    What is uploaded is freed when no step needs it any more, which makes it safe to be used up by a later upload.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
