"""What the processes of one run do together; a run of one process does it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
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


class Processes:
    """The processes that train one LoRA, each on its part of every batch."""

    def __init__(self) -> None:
        self.num = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part_of(self, batch: Sequence[T]) -> Sequence[T]:
        """This process's items; none where there are fewer than processes."""
        return batch[self.rank :: self.num]

    def sum(self, value: float) -> float:
        if self.num == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor)

    def share_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The first process's, in all: gradients are summed, so weights must be the same everywhere."""
        if self.num > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Of all processes, in all; one without a part of the batch adds zeros."""
        if self.num == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
