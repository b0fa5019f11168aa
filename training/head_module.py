"""The lookahead head as a torch module, and what it learns from: anchors.

Anchors are positions of a completion whose hidden states are known; from each the head is fed the true next tokens and
scored on the ones after them, several steps ahead. The arithmetic is that of `drafters/head.py`, the loss in losses.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..drafters.copy_pointer import CopyPointer
from ..drafters.head import WEIGHT_NAMES, HeadWeights, head_shapes
from .data.dataset import Example


class LookaheadHead(nn.Module):
    """One trainable head; `vocab` are the task's token ids, ascending.

    words: [U - 1, H], what the base model knows of them. The head's embedding is then one matrix of it, the same for
    all words, plus what it learns of each; so it tells words apart that it has hardly seen. None: the latter alone.
    """

    words: torch.Tensor | None
    word_weight: nn.Parameter  # [H, d], where there are words

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        vocab: Sequence[int],
        window: int,
        words: torch.Tensor | None = None,
    ):
        super().__init__()
        self.vocab = list(vocab)
        for name, shape in head_shapes(hidden_size, state_size, len(vocab), window).items():
            value = torch.zeros(1, *shape)
            if not name.endswith("bias"):
                nn.init.normal_(value, std=1.0 / math.sqrt(shape[0] if name != "embed" else shape[1]))
            setattr(self, name, nn.Parameter(value))
        self.register_buffer("words", words, persistent=False)
        if words is not None:
            self.word_weight = nn.Parameter(torch.randn(hidden_size, state_size) / math.sqrt(hidden_size * state_size))
            with torch.no_grad():
                self.get_parameter("embed")[:, :-1] = 0.0

    def weights(self) -> HeadWeights:
        named: dict[str, torch.Tensor] = {name: p for name, p in self.named_parameters() if name != "word_weight"}
        if self.words is not None:
            known = F.pad(self.words @ self.word_weight, (0, 0, 0, 1))  # [U, d], of "another token" nothing
            named["embed"] = named["embed"] + known
        return HeadWeights(**named)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights as they are saved, each [1, ...] on the CPU."""
        weights = self.weights()
        return {name: getattr(weights, name).detach().cpu() for name in WEIGHT_NAMES}


@dataclass(frozen=True, slots=True)
class Anchors:
    """N anchors of completions, K steps ahead. Tokens are indices into the head's vocabulary; U - 1 is any other."""

    rows: torch.Tensor  # [N] int64, row of the hidden states
    inputs: torch.Tensor  # [N, K] int64
    moved: torch.Tensor  # [N, K] int64
    window: torch.Tensor  # [N, K, W] int64, -1 where empty
    hits: torch.Tensor  # [N, K, W] bool, entries that hold the target
    targets: torch.Tensor  # [N, K] int64
    valid: torch.Tensor  # [N, K] bool

    def select(self, idx: torch.Tensor) -> Anchors:
        return Anchors(*(getattr(self, name)[idx] for name in Anchors.__slots__))

    def to(self, device: torch.device) -> Anchors:
        return Anchors(*(getattr(self, name).to(device) for name in Anchors.__slots__))

    def __len__(self) -> int:
        return self.rows.shape[0]


def task_vocab(examples: Sequence[Example], size: int) -> list[int]:
    """The most frequent tokens of answers, ascending ids."""
    counts = Counter(token for example in examples for answer in example.answers for token in answer)
    return sorted(token for token, _ in counts.most_common(size))


def common_prefix_len(examples: Sequence[Example]) -> int:
    """Tokens that every prompt starts with: the template and the task's fixed words; copying starts behind them."""
    first = min((example.prompt for example in examples), key=len)
    for idx, token in enumerate(first):
        if any(example.prompt[idx] != token for example in examples):
            return idx
    return len(first)


def build_anchors(
    examples: Sequence[Example],
    row_starts: Sequence[int],
    vocab: Sequence[int],
    steps: int,
    start: int,
    window: int,
    jumps: bool = False,
) -> Anchors:
    """All anchors of `examples`; `row_starts[i]` is the row of the hidden state of example i's last prompt token."""
    idx_of = {token: idx for idx, token in enumerate(vocab)}
    other = len(vocab)
    fields: list[list] = [[] for _ in range(6)]
    rows: list[int] = []
    for example, first_row in zip(examples, row_starts, strict=True):
        prompt, completion = example.prompt, example.completion
        pointer = CopyPointer(prompt, start, window, jumps)
        ids, moves, windows, hits = [], [], [], []
        for idx, token in enumerate(completion):
            pointer.follow(token)
            entries = pointer.window()
            target = completion[idx + 1] if idx + 1 < len(completion) else None
            ids.append(idx_of.get(token, other))
            moves.append(pointer.moved)
            windows.append([idx_of.get(entry, other) if entry >= 0 else -1 for entry in entries])
            hits.append([entry == target for entry in entries])
        for anchor in range(len(completion) - 1):
            rows.append(first_row + anchor)
            last = min(anchor + steps, len(completion) - 1)
            pad = steps - (last - anchor)
            fields[0].append(ids[anchor:last] + [0] * pad)
            fields[1].append(moves[anchor:last] + [0] * pad)
            fields[2].append(windows[anchor:last] + [[-1] * window] * pad)
            fields[3].append(hits[anchor:last] + [[False] * window] * pad)
            fields[4].append(ids[anchor + 1 : last + 1] + [0] * pad)
            fields[5].append([True] * (last - anchor) + [False] * pad)
    inputs, moved, windows_, hits_, targets, valid = (torch.tensor(values) for values in fields)
    shape = (len(rows), steps, window)
    return Anchors(
        torch.tensor(rows), inputs, moved, windows_.view(shape), hits_.view(shape).bool(), targets, valid.bool()
    )
