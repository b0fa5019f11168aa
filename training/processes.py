"""What the processes of one run do together, beside the sums of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")


def first_process(action: Callable[[], T]) -> T:
    """What `action` returns in the first process, in all of them; what it refuses there, all refuse."""
    if not dist.is_initialized():
        return action()
    said: list[tuple[T | None, UserError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            said = [(action(), None)]
        except UserError as error:
            said = [(None, error)]
    dist.broadcast_object_list(said, 0)
    result, refusal = said[0]
    if refusal is not None:
        raise refusal
    return cast(T, result)
