"""Steps that serve nobody, timed between those that do.

Owns when there is room for one, and whom it makes wait: while nobody is served it ends for whoever comes. Beside
requests it takes the place of one of their steps, which whoever comes waits for as well.
"""

from __future__ import annotations

from collections.abc import Callable

from ..compute.interrupt import StepInterruptedError
from ..compute.path import ComputePath
from ..drafting.cost_model import TimedStep
from ..schedule.block_manager import BlockManager


class SpareSteps:
    """Steps of `timed_step`, which runs them by `path` over `blocks`; `has_work` says whether others are served."""

    def __init__(self, path: ComputePath, blocks: BlockManager, timed_step: TimedStep, has_work: Callable[[], bool]):
        self._path, self._blocks, self._timed_step, self._has_work = path, blocks, timed_step, has_work

    def __call__(self, num_rows: int, num_seqs: int = 1, context_len: int = 0) -> float | None:
        """Its seconds; None if it was ended for a request, or blocks are few."""
        blocks = self._blocks
        if blocks.num_free < -(-(num_rows + num_seqs * context_len) // blocks.block_size) + num_seqs:
            return None
        self._path.interrupt.is_heeded = not self._has_work()
        try:
            return self._timed_step(num_rows, num_seqs, context_len)
        except StepInterruptedError:
            return None
        finally:
            self._path.interrupt.is_heeded = False
