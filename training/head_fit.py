"""Fits the head to what the finished adapter itself writes (self-distillation): hidden states once, then many epochs.

The LoRA no longer changes here, so the costly forward is done once for all anchors and the head alone is trained on the
stored states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import torch
from tqdm import tqdm

from ..drafters.copy_pointer import CopyPointer
from .data.batching import plan_epoch
from .data.dataset import Example
from .head_module import Anchors, LookaheadHead, build_anchors
from .lora_model import CausalModel
from .losses import TargetProbs, head_loss
from .run_config import HeadConfig

_BATCH_ANCHORS = 256
_TEACHER_ROWS = 256  # logits over the whole vocabulary at a time
_JUDGED_ROWS = 200  # answers that tell whether copies jump
_JUMPS_FIND_MORE = 0.05  # of all tokens; what does not gain as much copies in order, which a jump disturbs


def with_jumps(config: HeadConfig, examples: Sequence[Example], copy_start: int) -> HeadConfig:
    """`config` with `copy_jumps` decided where it is not: by how often the answers go on at the pointer."""
    if config.copy_jumps is not None:
        return config
    found = [0, 0]
    num_tokens = 0
    for example in examples[:_JUDGED_ROWS]:
        pointers = [CopyPointer(example.prompt, copy_start, config.copy_window, jumps) for jumps in (False, True)]
        for token, following in pairwise(example.completion):
            num_tokens += 1
            for idx, pointer in enumerate(pointers):
                pointer.follow(token)
                found[idx] += pointer.window()[:1] == [following]
    return msgspec.structs.replace(config, copy_jumps=found[1] - found[0] > _JUMPS_FIND_MORE * num_tokens)


def new_head(model: CausalModel, config: HeadConfig, vocab: Sequence[int]) -> LookaheadHead:
    """An untrained head for `model`, on its device."""
    words = model.words(vocab) if config.base_words else None
    return LookaheadHead(model.hidden_size, config.hidden_size, vocab, config.copy_window, words).to(model.device)


@torch.no_grad()
def collect_states(
    model: CausalModel, examples: Sequence[Example], batch_tokens: int, *, progress: bool = True
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Last and tapped hidden states [N, H] of all rows with loss, and each example's row of its last prompt token.

    The tapped ones are normalised, as the head does with them first of all: between the layers of some models (Gemma)
    they are beyond the range of fp16, in which both are kept.
    """
    model.train(False)
    starts = [0] * len(examples)
    last, tapped, num_rows = [], [], 0
    plan = plan_epoch([len(example.tokens) for example in examples], batch_tokens, 0)
    for batch in tqdm(plan, unit="batch", desc="hidden states", dynamic_ncols=True, disable=not progress):
        hidden = model.hidden([examples[idx] for idx in batch])
        for idx in batch:
            num_loss = sum(examples[idx].loss_mask[1:])
            starts[idx] = num_rows + num_loss - len(examples[idx].completion)
            num_rows += num_loss
        last.append(hidden.last.half().cpu())
        tapped.append(torch.nn.functional.rms_norm(hidden.tapped.float(), hidden.tapped.shape[-1:]).half().cpu())
    model.train()
    return torch.cat(last), torch.cat(tapped), starts


@torch.no_grad()
def collect_teacher(model: CausalModel, head: LookaheadHead, last: torch.Tensor) -> TargetProbs:
    """The target's distributions over the head's vocabulary for stored states [N, H], on the CPU."""
    model.train(False)
    vocab = torch.tensor(head.vocab, device=model.device)
    parts = [
        TargetProbs.of(model.logits(part.to(model.device, model.dtype)), vocab) for part in last.split(_TEACHER_ROWS)
    ]
    model.train()
    return TargetProbs.joined(parts, torch.device("cpu"))


def fit_head(
    head: LookaheadHead,
    config: HeadConfig,
    last: torch.Tensor,
    tapped: torch.Tensor,
    anchors: Anchors,
    epochs: int,
    seed: int = 0,
    teacher: TargetProbs | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `head` on stored states; returns loss and hit rate of the first and third step ahead, epoch by epoch.

    teacher: what `collect_teacher` returned; needed unless `config.loss` is "ce".
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=0.0, betas=(0.9, 0.98))
    device = next(head.parameters()).device
    num_steps = epochs * math.ceil(len(anchors) / _BATCH_ANCHORS)
    step, log = 0, []
    bar = tqdm(total=num_steps, unit="step", desc="head", dynamic_ncols=True, disable=not progress)
    for _ in range(epochs):
        losses, rates = [], []
        for idx in torch.randperm(len(anchors), generator=generator).split(_BATCH_ANCHORS):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 - step / num_steps))
            batch = anchors.select(idx)
            states = [tensor[batch.rows].to(device).float() for tensor in (last, tapped)]
            loss, rate = head_loss(head, states[0], states[1], batch, config.step_decay, config.loss, teacher)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            rates.append(rate.cpu())
            step += 1
            bar.update()
        mean = torch.stack(rates).mean(dim=0)
        log.append(
            {"loss": sum(losses) / len(losses), "hit_1": float(mean[0]), "hit_3": float(mean[min(2, len(mean) - 1)])}
        )
        bar.set_postfix({name: f"{value:.3f}" for name, value in log[-1].items()})
    bar.close()
    return log


@torch.no_grad()
def expected_tokens(head: LookaheadHead, last: torch.Tensor, tapped: torch.Tensor, anchors: Anchors) -> float:
    """Tokens that a forward gives where the head alone drafts: one, and each step ahead with the steps before it right.

    From how often each step is right after the true tokens, so it is a mean over all positions, without a budget.
    """
    device = next(head.parameters()).device
    right = torch.zeros(anchors.inputs.shape[1], dtype=torch.float64)
    seen = torch.zeros_like(right)
    for idx in torch.arange(len(anchors)).split(_BATCH_ANCHORS):
        batch = anchors.select(idx)
        states = [tensor[batch.rows].to(device).float() for tensor in (last, tapped)]
        _, rate = head_loss(head, states[0], states[1], batch, 1.0)
        num = batch.valid.sum(dim=0).double()
        right += rate.cpu().double() * num
        seen += num
    return 1.0 + float((right / seen.clamp(min=1)).cumprod(dim=0).sum())


def anchors_of(
    head: LookaheadHead, config: HeadConfig, examples: Sequence[Example], starts: Sequence[int], copy_start: int
) -> Anchors:
    window, jumps = config.copy_window, bool(config.copy_jumps)
    return build_anchors(examples, starts, head.vocab, config.train_steps_ahead, copy_start, window, jumps)
