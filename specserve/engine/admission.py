"""Refuses requests that can never run and settings that do not fit the model, with the numbers that say why.

The server checks the same limits earlier, field by field; this is the engine's own guard, so that no frame can hurt it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch

from ..config import EngineConfig
from ..errors import DeadlineError, ErrorInfo, OverloadedError, UserError, from_info
from ..messages import EngineInfo, GenerateRequest
from ..model.config import ModelConfig
from ..pooling_messages import AnyRequest, PoolRequest
from ..schedule.scheduler import Scheduler
from .wait_estimate import WaitEstimate

# A request is refused for its deadline only where its answer would begin late by this factor: estimates are rough.
_DEADLINE_MARGIN = 1.25
# One in so many places to wait is for adapters of which none of the caller's waits: it cannot fill all with one.
_RESERVED = 8
_MAX_ANSWERS = 1024
T = TypeVar("T")


def check_request(request: AnyRequest, info: EngineInfo) -> None:
    """Raise `UserError` for a request that can never run on the engine described by `info`."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    field, limited = ("prompt", "max_tokens") if isinstance(request, GenerateRequest) else ("input", "input")
    if not prompt:
        raise UserError(f"the {field} is empty; send at least one token", param=field)
    if sampling.stop and not sampling.detokenize:
        raise UserError("stop strings are found in text: they need detokenize", param="stop")
    for name, ids in (
        (field, prompt),
        ("logit_bias", list(sampling.logit_bias)),
        ("stop_token_ids", list(sampling.stop_token_ids)),
    ):
        bad = next((token for token in ids if not 0 <= token < info.vocab_size), None)
        if bad is not None:
            raise UserError(f"{name}: token id {bad} is outside 0..{info.vocab_size - 1}", param=name)
    capacity = info.num_kv_blocks * info.block_size
    for limit, what in (
        (info.max_model_len, f"context of {info.max_model_len} tokens"),
        (capacity, f"KV cache of {capacity} tokens; raise --kv-cache-gib"),
    ):
        if len(prompt) + sampling.max_tokens > limit:
            tokens = f"prompt ({len(prompt)} tokens) plus max_tokens ({sampling.max_tokens})"
            if isinstance(request, PoolRequest):
                tokens = f"the {len(prompt)} tokens of the input"
            raise UserError(f"{tokens} exceed the {what}", param=limited, code="context_length_exceeded")


class Admission:
    """Refuses what has no room to wait, or no time: each answer once, whatever of it comes first, and all of it.

    Knows the answers of several sequences of which some are still to come, at most `_MAX_ANSWERS`.
    """

    def __init__(self, config: EngineConfig, scheduler: Scheduler, waits: WaitEstimate):
        self._config, self._scheduler, self._waits = config, scheduler, waits
        self._num_to_come: OrderedDict[str, int] = OrderedDict()  # of those that were admitted
        self._refusals: OrderedDict[str, ErrorInfo] = OrderedDict()

    def check(self, request: AnyRequest) -> None:
        """Raises as `refuse_overload`, and so for all sequences of an answer of which one was refused."""
        answer_id = request.together.answer_id if request.together is not None else ""
        if answer_id in self._num_to_come:
            return
        if answer_id in self._refusals:
            raise from_info(self._refusals[answer_id])
        try:
            refuse_overload(request, self._config, self._scheduler, self._waits)
        except UserError as error:
            if answer_id:
                _remember(self._refusals, answer_id, error.info())
            raise

    def admitted(self, request: AnyRequest) -> None:
        """It waits now: the rest of its answer will, too."""
        if request.together is None:
            return
        answer_id = request.together.answer_id
        num_left = self._num_to_come.pop(answer_id, request.together.num) - 1
        if num_left:
            _remember(self._num_to_come, answer_id, num_left)


def _remember(answers: OrderedDict[str, T], answer_id: str, value: T) -> None:
    answers[answer_id] = value
    if len(answers) > _MAX_ANSWERS:  # clients have left since, or the rest has long been refused
        answers.popitem(last=False)


def refuse_overload(request: AnyRequest, config: EngineConfig, scheduler: Scheduler, waits: WaitEstimate) -> None:
    """Refuse a request that has no room to wait, or no time, and with it all sequences that are admitted with it.

    Where nothing waits there is room for any: what was refused then could never come. Of its own sequences and tokens
    at most half of a limit counts: else one larger than that would be refused whenever anything waits. Background
    sequences take nothing from others, neither room nor time. Raises `OverloadedError` with when to try again, and
    `DeadlineError` when its deadline has passed already.
    """
    if not request.num_together:
        return
    (num, num_tokens), what = scheduler.waiting.minded_by(request.priority), ""
    prompt_tokens = len(request.prompt_token_ids) if request.together is None else request.together.prompt_tokens
    own_tokens = prompt_tokens + request.num_together * waits.expected_output(request)
    num_counted = min(request.num_together, max(1, config.max_waiting // 2))
    tokens_counted = min(own_tokens, config.max_waiting_tokens / 2)
    num_places = config.max_waiting + scheduler.max_num_seqs + 1 - num_counted  # for the first of them
    num_own = scheduler.waiting.num_of(request.caller, request.adapter_hash, request.priority)
    if num and (num >= num_places or (num_own and num >= num_places - config.max_waiting // _RESERVED)):
        own = f"{num_own} of them this key's for this adapter"
        what = f"{num} requests, {own}, are waiting (--max-waiting {config.max_waiting})"
    elif num and num_tokens + tokens_counted > config.max_waiting_tokens:
        what = f"{num_tokens} tokens are waiting (--max-waiting-tokens {config.max_waiting_tokens})"
    if what:
        if request.num_together > 1:
            what += f" and this one has {request.num_together} sequences"
        wait_s = waits.wait_s(request)
        shown_s = max(wait_s, 1.0)  # as Retry-After says it
        raise OverloadedError(f"{what}; they are served in about {shown_s:.0f} s: retry then", retry_after_s=wait_s)
    if request.deadline is None:
        return
    left_s, first_s = request.deadline - scheduler.clock(), waits.first_token_s(request)
    if left_s <= 0:
        raise DeadlineError("the deadline passed before the request came to the engine", param="deadline_ms")
    if first_s > left_s * _DEADLINE_MARGIN:
        raise OverloadedError(
            f"the answer would begin in about {first_s:.1f} s and deadline_ms leaves {left_s:.1f} s; retry later or "
            "leave it more time",
            param="deadline_ms",
            code="deadline_unreachable",
            retry_after_s=max(0.0, first_s - left_s),
        )


def size_kv(
    config: EngineConfig, kv_gib: float, model: ModelConfig, dtype: torch.dtype, memory_bytes: int | None = None
) -> tuple[int, int]:
    """(number of KV blocks, longest sequence in tokens) for `kv_gib` GiB of KV of `dtype`.

    `memory_bytes` is all that the device has, where that is known. Raises `UserError` for what does not fit.
    """
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    num_blocks = int(kv_gib * 2**30) // (token_bytes * config.block_size)
    if num_blocks < 1:
        raise UserError(
            f"kv_cache_gib={kv_gib:g} holds no block of {config.block_size} tokens "
            f"({token_bytes * config.block_size} bytes); raise it",
            param="kv_cache_gib",
        )
    if memory_bytes is not None and kv_gib * 2**30 > memory_bytes:
        raise UserError(
            f"kv_cache_gib={kv_gib:g} is more than the memory of the device ({memory_bytes / 2**30:.1f} GiB); lower it "
            "(--kv-cache-gib)",
            param="kv_cache_gib",
        )
    capacity = num_blocks * config.block_size
    longest = config.max_model_len
    if longest is None:
        return num_blocks, min(model.max_position_embeddings, capacity)
    if longest > model.max_position_embeddings:
        raise UserError(
            f"max_model_len={longest} exceeds the model's {model.max_position_embeddings} positions",
            param="max_model_len",
        )
    if longest > capacity:
        raise UserError(
            f"max_model_len={longest} does not fit the KV cache of {capacity} tokens; raise kv_cache_gib",
            param="max_model_len",
        )
    return num_blocks, longest
