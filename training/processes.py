"""What the processes of one run do together; a run of one process does it alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Within: the group of the processes that one launcher has started, if it has, and if there is none yet.

    It ends with its threads. One that lives on when the interpreter ends can abort the process, as it then asks for
    the interpreter's lock to free a tensor.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    # Loading a model imports this, whose functions have the group of that moment as a default, and keep it for good.
    import torch.distributed.nn.functional  # noqa: F401

    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Losses are summed from the CPU, gradients on the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
    try:
        yield
    except BaseException:
        if not is_cuda:  # NCCL would wait for what the others will never send
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


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
