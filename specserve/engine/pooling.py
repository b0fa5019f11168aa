"""Texts that are pooled, once their hidden states are there: each is answered, and leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..compute.step_output import PooledOutput
from ..errors import ErrorInfo
from ..messages import RequestFailed
from ..pooling_messages import Pooled
from ..schedule.sequence import Sequence
from .reports import Event, Reports
from .running import RunningRequest


class PooledAnswers:
    """Ends pooled texts; `remove` lets go of a request that has ended, `scale` gives hidden states their size."""

    def __init__(self, reports: Reports, remove: Callable[[RunningRequest], None], scale: float):
        self._reports, self._remove, self._scale = reports, remove, np.float32(scale)

    def commit(self, output: PooledOutput, events: list[Event]) -> None:
        """Answer the texts that ended with a step whose rows are counted."""
        for item, hidden in zip(output.items, output.values(), strict=True):
            state = item.seq.owner
            if state is None:  # aborted since the step was queued
                continue
            assert state.pooling is not None
            with np.errstate(over="ignore", invalid="ignore"):
                values = state.pooling.values(hidden * self._scale)
            is_finite = bool(np.isfinite(values).all())
            seq: Sequence = item.seq
            self._reports.publish(seq)
            self._reports.count_pooled(seq)
            self._remove(state)
            self._reports.count_end("pooled" if is_finite else "error")
            events.append(_answer(seq, values) if is_finite else _failed(seq))


def _answer(seq: Sequence, values: np.ndarray) -> Pooled:
    return Pooled(
        seq.request_id,
        values.astype("<f4").tobytes(),
        len(values),
        prompt_tokens=seq.prompt_len,
        cached_tokens=seq.num_cached,
        queue_s=seq.queue_s,
    )


def _failed(seq: Sequence) -> RequestFailed:
    text = "the model gave values that are not finite for this text; its adapter or the dtype is unfit"
    return RequestFailed(seq.request_id, ErrorInfo(text, 500, "server_error", None, "model_failure"))
