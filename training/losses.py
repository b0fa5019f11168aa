"""The head's loss over several steps ahead: cross-entropy with the tokens that came, or closeness to the target's own
distribution (KL, or KL with total variation).

Every kind counts a token as named through the vocabulary and through every entry of the copy window that holds it.
The target's distribution is known over the task vocabulary only; for a token outside of it all kinds fall back to
cross-entropy, which is what teaches the head to copy rare names.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..drafters.head import cell, initial_state, scores
from .head_module import Anchors, LookaheadHead

LossKind = Literal["ce", "kl", "lk"]
_LK_DECAY = 3.0


def teacher_log_probs(logits: torch.Tensor, vocab: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [R, U] of the task tokens `vocab` [U - 1] and of any other, from the logits [R, V]."""
    normal = torch.log_softmax(logits.float(), dim=-1)[:, vocab]  # [R, U - 1]
    other = (1.0 - normal.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([normal, other], dim=-1)


def head_loss(
    head: LookaheadHead,
    last: torch.Tensor,
    tapped: torch.Tensor,
    anchors: Anchors,
    decay: float,
    kind: LossKind = "ce",
    teacher: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weighted loss over the steps ahead, and the greedy hit rate [K] of each step.

    last, tapped: [N, H] hidden states of the anchors' rows. teacher: [R, U] log-probabilities of all rows that
    `anchors.rows` counts, needed for "kl" and "lk". "lk" is the hybrid of Samarin et al. 2026, "LK Losses": total
    variation, one minus the chance of acceptance, takes over from KL as acceptance rises.
    """
    weights = head.weights()
    anchors = anchors.to(weights.embed.device)
    state = initial_state(weights, last[None].float(), tapped[None].float())  # [1, N, d]
    num_steps, other = anchors.inputs.shape[1], len(head.vocab)
    states = []
    for step in range(num_steps):
        window = anchors.window[:, step]
        next_tokens = window[:, 0].clamp(min=0) if window.shape[1] else torch.full_like(anchors.inputs[:, step], other)
        state = cell(weights, state, anchors.inputs[None, :, step], anchors.moved[None, :, step], next_tokens[None])
        states.append(state[0])
    size = anchors.window.shape[2]
    keep = anchors.valid.t().reshape(-1)  # [K * N], step by step
    flat = torch.cat(states)[keep]
    window = anchors.window.transpose(0, 1).reshape(num_steps * len(anchors), size)[keep]
    hits = anchors.hits.transpose(0, 1).reshape(num_steps * len(anchors), size)[keep]
    targets = anchors.targets.t().reshape(-1)[keep]
    vocab, entries = scores(weights, flat[None], window[None])
    logits = torch.cat([vocab[0], entries[0]], dim=-1)  # [M, U + W]
    # "Another token" is a target only if no entry holds it: otherwise the entry is the answer.
    vocab_hit = torch.nn.functional.one_hot(targets, other + 1).bool()
    vocab_hit[:, other] &= ~hits.any(dim=1)
    found = torch.cat([vocab_hit, hits], dim=-1)
    loss = torch.logsumexp(logits, dim=-1) - torch.logsumexp(logits.masked_fill(~found, float("-inf")), dim=-1)
    step_idx = torch.arange(num_steps, device=loss.device).repeat_interleave(len(anchors))[keep]
    if kind != "ce":
        assert teacher is not None
        rows = anchors.rows.repeat(num_steps)[keep] + step_idx + 1
        soft = _distance(logits, window, teacher[rows.to(teacher.device)].float().to(logits.device), kind)
        loss = torch.where(targets == other, loss, soft)
    weight = decay ** step_idx.to(loss.dtype)
    total_loss = (loss * weight).sum() / weight.sum()
    with torch.no_grad():
        right = found.gather(1, logits.argmax(dim=-1, keepdim=True))[:, 0] & (logits.argmax(dim=-1) != other)
        total = torch.bincount(step_idx, minlength=num_steps)
        rate = torch.bincount(step_idx, weights=right.to(loss.dtype), minlength=num_steps) / total.clamp(min=1)
    return total_loss, rate


def _distance(logits: torch.Tensor, window: torch.Tensor, teacher: torch.Tensor, kind: LossKind) -> torch.Tensor:
    """[M] distances of the head's distribution, entries added to the tokens they hold, from the target's [M, U]."""
    num_vocab = teacher.shape[-1]
    probs = torch.softmax(logits, dim=-1)
    merged = probs[:, :num_vocab].scatter_add(1, window.clamp(min=0), probs[:, num_vocab:])  # empty entries have none
    target = teacher.exp()
    kl = (target * (teacher - merged.clamp(min=1e-9).log())).sum(dim=-1)
    if kind == "kl":
        return kl
    variation = 0.5 * (target - merged).abs().sum(dim=-1)
    share = torch.exp(-_LK_DECAY * (1.0 - variation.detach()))
    return share * kl + (1.0 - share) * variation
