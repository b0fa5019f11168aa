"""What the LoRA learns of an answer's tokens: cross-entropy with the token that came, KL to a teacher, or both.

Forward KL, from the teacher to the student, as in Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
Of a teacher whose most likely tokens alone are known, all others are one more outcome, so that nothing is invented of
them and a student that gives each outcome the teacher's probability has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from .data.dataset import Example

AnswerLossKind = Literal["ce", "kl", "mixed"]


def token_losses(
    kind: AnswerLossKind, logits: torch.Tensor, targets: torch.Tensor, kl: torch.Tensor | None, weight: float
) -> torch.Tensor:
    """Losses [R] of tokens: `weight` is the share of KL in "mixed"; a token whose `kl` is NaN has no teacher.

    logits: [R, V]; targets: [R] int64; kl: [R].
    """
    if kind == "kl":
        assert kl is not None
        return kl
    entropy = F.cross_entropy(logits, targets, reduction="none")
    if kind == "ce":
        return entropy
    assert kl is not None
    return torch.where(kl.isnan(), entropy, torch.lerp(entropy, kl, weight))


def whole_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL [R] from the teacher's distribution to the student's, of their logits [R, V] and [R, V'], times temperature^2.

    Models of a family pad their vocabularies to different sizes; what is beyond the smaller one is no token.
    """
    size = min(student.shape[1], teacher.shape[1])
    wanted = torch.log_softmax(teacher[:, :size].to(student.dtype) / temperature, dim=-1)
    found = torch.log_softmax(student[:, :size] / temperature, dim=-1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def top_kl(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, temperature: float) -> torch.Tensor:
    """The same over K + 1 outcomes: the tokens `ids` [R, K], of the teacher's log-probabilities [R, K], and any other.

    An id of -1 is none. A temperature is applied to the outcomes of both, since it is unknown how the teacher's rest
    would spread. NaN where no token is known.
    """
    ids = ids.long()
    is_known = ids >= 0
    vocab_size = student.shape[1]
    probs = torch.where(is_known, logprobs.to(student.dtype).exp(), 0.0)
    rest = (1.0 - probs.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    wanted = torch.cat([probs, rest], dim=-1)  # [R, K + 1]
    wanted = torch.log_softmax((wanted / wanted.sum(dim=-1, keepdim=True)).log() / temperature, dim=-1)

    taken = torch.zeros(student.shape[0], vocab_size + 1, dtype=torch.bool, device=student.device)
    taken.scatter_(1, ids.where(is_known, vocab_size), True)
    others = student.masked_fill(taken[:, :vocab_size], float("-inf")).logsumexp(dim=-1, keepdim=True)
    named = student.gather(1, ids.clamp(min=0)).masked_fill(~is_known, float("-inf"))
    found = torch.log_softmax(torch.cat([named, others], dim=-1), dim=-1)
    found = torch.log_softmax(found / temperature, dim=-1)

    terms = torch.where(wanted == float("-inf"), 0.0, wanted.exp() * (wanted - found))
    kl = terms.sum(dim=-1) * temperature**2
    return torch.where(is_known.any(dim=-1), kl, float("nan"))


def known_tops(batch: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is known of the teacher at each token with loss of `batch`: ids [R, K] and log-probabilities [R, K]."""
    num_top = max((example.teacher.ids.shape[1] for example in batch if example.teacher is not None), default=1)
    ids, logprobs = [], []
    for example in batch:
        top = example.teacher
        shape = (sum(example.loss_mask[1:]), num_top)
        ids.append(np.full(shape, -1, np.int32) if top is None else top.ids)
        logprobs.append(np.zeros(shape, np.float16) if top is None else top.logprobs)
    return torch.from_numpy(np.concatenate(ids)).to(device), torch.from_numpy(np.concatenate(logprobs)).to(device)
