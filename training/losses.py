"""The head's loss over several steps ahead: cross-entropy with the tokens that came, or closeness to the target's own
distribution (KL, or KL with total variation).

Every kind counts a token as named through the vocabulary and through every entry of the copy window that holds it.
The target's distribution is known over the task vocabulary only; for a token outside of it all kinds fall back to
cross-entropy, which is what teaches the head to copy rare names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..drafters.head import cell, initial_state, scores
from .head_module import Anchors, LookaheadHead

LossKind = Literal["ce", "kl", "lk"]
_LK_DECAY = 3.0
_KEPT = 64  # outcomes of the target at a row
_LEAST = 1e-9  # probability that is told from none


@dataclass(frozen=True, slots=True)
class TargetProbs:
    """The target's distribution at R rows over U outcomes: the head's vocabulary, and any other token.

    The likeliest K of them are kept, as what U would take for a million answers' tokens has no room; all others are one
    outcome more, so that nothing is made up of them.
    """

    ids: torch.Tensor  # [R, K] int64
    log_probs: torch.Tensor  # [R, K]

    @classmethod
    def of(cls, logits: torch.Tensor, vocab: torch.Tensor) -> TargetProbs:
        """From logits [R, V] and the vocabulary's token ids [U - 1]."""
        normal = torch.log_softmax(logits.float(), dim=-1)[:, vocab]  # [R, U - 1]
        other = (1.0 - normal.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-6).log()
        whole = torch.cat([normal, other], dim=-1)
        kept = whole.topk(min(_KEPT, whole.shape[-1]), dim=-1)
        return cls(kept.indices, kept.values)

    @classmethod
    def joined(cls, parts: Sequence[TargetProbs], device: torch.device) -> TargetProbs:
        """Rows behind rows, small: ids in 16 or 32 bits and probabilities in 16."""
        ids = torch.cat([part.ids.to(device) for part in parts])
        small = torch.int16 if not len(ids) or int(ids.max()) < 2**15 else torch.int32
        return cls(ids.to(small), torch.cat([part.log_probs.half().to(device) for part in parts]))

    def rows(self, idx: torch.Tensor, device: torch.device) -> TargetProbs:
        """Of the rows `idx`, on `device`."""
        idx = idx.to(self.ids.device)
        return TargetProbs(self.ids[idx].to(device, torch.int64), self.log_probs[idx].to(device, torch.float32))


def head_loss(
    head: LookaheadHead,
    last: torch.Tensor,
    tapped: torch.Tensor,
    anchors: Anchors,
    decay: float,
    kind: LossKind = "ce",
    teacher: TargetProbs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weighted loss over the steps ahead, and the greedy hit rate [K] of each step.

    last, tapped: [N, H] hidden states of the anchors' rows. teacher: the distributions of all rows that
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
        soft = _distance(logits, window, teacher.rows(rows, logits.device), kind)
        loss = torch.where(targets == other, loss, soft)
    weight = decay ** step_idx.to(loss.dtype)
    total_loss = (loss * weight).sum() / weight.sum()
    with torch.no_grad():
        right = found.gather(1, logits.argmax(dim=-1, keepdim=True))[:, 0] & (logits.argmax(dim=-1) != other)
        total = torch.bincount(step_idx, minlength=num_steps)
        rate = torch.bincount(step_idx, weights=right.to(loss.dtype), minlength=num_steps) / total.clamp(min=1)
    return total_loss, rate


def _distance(logits: torch.Tensor, window: torch.Tensor, wanted: TargetProbs, kind: LossKind) -> torch.Tensor:
    """[M] distances of the head's distribution, entries added to the tokens they hold, from the target's."""
    num_vocab = logits.shape[-1] - window.shape[-1]
    probs = torch.softmax(logits, dim=-1)
    merged = probs[:, :num_vocab].scatter_add(1, window.clamp(min=0), probs[:, num_vocab:])  # empty entries have none
    kept, target = merged.gather(1, wanted.ids), wanted.log_probs.exp()
    rest, target_rest = ((1.0 - part.sum(dim=-1)).clamp(min=_LEAST) for part in (kept, target))
    kl = (target * (wanted.log_probs - kept.clamp(min=_LEAST).log())).sum(dim=-1)
    kl = kl + target_rest * (target_rest / rest).log()
    if kind == "kl":
        return kl
    variation = 0.5 * ((target - kept).abs().sum(dim=-1) + (target_rest - rest).abs())
    share = torch.exp(-_LK_DECAY * (1.0 - variation.detach()))
    return share * kl + (1.0 - share) * variation
