"""The lookahead head: a small recurrent drafter that was trained together with one LoRA.

Its state starts from the target's last and one middle hidden state at the newest position and is fed one token a step
through a GRU cell (Cho et al. 2014); it scores a task vocabulary of a few thousand tokens plus the entries of a copy
window on the prompt (a pointer in the sense of See et al. 2017, over a window that moves instead of attention, so that
there is nothing to prefill). Recurrent drafting from the target's hidden state follows Zhang et al. 2024, "Recurrent
Drafter"; theirs is one for all adapters and has no copy window.

Owns the arithmetic for any number of heads at once; the trainer calls the same functions. Letters beside batch.py's:
A heads stacked, n rows of each, d state size, U task vocabulary plus one ("another token"), W window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

NUM_MOVES = 3


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Weights of A heads of one shape, each tensor with a leading A (1 in the trainer)."""

    init_weight: torch.Tensor  # [A, 2H, d], rows: last hidden state, then the tapped one
    init_bias: torch.Tensor  # [A, 1, d]
    embed: torch.Tensor  # [A, U, d], input and output embedding; the last row stands for every other token
    out_bias: torch.Tensor  # [A, 1, U]
    moves: torch.Tensor  # [A, 3, d], what the copy pointer did
    next_weight: torch.Tensor  # [A, d, d], embedding of the token at the copy pointer -> input
    gates_x: torch.Tensor  # [A, d, 3d], reset, update, candidate
    gates_s: torch.Tensor  # [A, d, 3d]
    gates_bias: torch.Tensor  # [A, 1, 3d]
    candidate_bias: torch.Tensor  # [A, 1, d], inside the reset
    out_weight: torch.Tensor  # [A, d, d]
    copy_weight: torch.Tensor  # [A, d, d], state -> query on the window's embeddings
    slot_weight: torch.Tensor  # [A, d, W]
    slot_bias: torch.Tensor  # [A, 1, W]

    @property
    def window(self) -> int:
        return self.slot_bias.shape[-1]

    @property
    def num_stacked(self) -> int:
        """A: the heads whose weights these are."""
        return self.embed.shape[0]


WEIGHT_NAMES = tuple(field.name for field in fields(HeadWeights))


def head_shapes(hidden_size: int, state_size: int, vocab_size: int, window: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one head, without the leading A; `vocab_size` counts task tokens only."""
    d, u = state_size, vocab_size + 1
    return {
        "init_weight": (2 * hidden_size, d),
        "init_bias": (1, d),
        "embed": (u, d),
        "out_bias": (1, u),
        "moves": (NUM_MOVES, d),
        "next_weight": (d, d),
        "gates_x": (d, 3 * d),
        "gates_s": (d, 3 * d),
        "gates_bias": (1, 3 * d),
        "candidate_bias": (1, d),
        "out_weight": (d, d),
        "copy_weight": (d, d),
        "slot_weight": (d, window),
        "slot_bias": (1, window),
    }


def initial_state(weights: HeadWeights, last: torch.Tensor, tapped: torch.Tensor) -> torch.Tensor:
    """State [A, n, d] from hidden states [A, n, H] each; both are normalised here, so their scale does not matter."""
    size = (last.shape[-1],)
    x = torch.cat([F.rms_norm(last, size, eps=1e-6), F.rms_norm(tapped, size, eps=1e-6)], dim=-1)
    return torch.tanh(torch.baddbmm(weights.init_bias, x, weights.init_weight))


def cell(
    weights: HeadWeights, state: torch.Tensor, tokens: torch.Tensor, moved: torch.Tensor, next_tokens: torch.Tensor
) -> torch.Tensor:
    """Feed one token a row: state [A, n, d]; tokens and next_tokens [A, n] in [0, U), moved [A, n] in [0, 3)."""
    d = state.shape[-1]
    x = _rows(weights.embed, tokens) + _rows(weights.moves, moved)
    x = x + torch.bmm(_rows(weights.embed, next_tokens), weights.next_weight)
    from_x = torch.baddbmm(weights.gates_bias, x, weights.gates_x)  # [A, n, 3d]
    from_s = torch.bmm(state, weights.gates_s)
    reset, update = torch.sigmoid(from_x[..., : 2 * d] + from_s[..., : 2 * d]).chunk(2, dim=-1)
    candidate = torch.tanh(from_x[..., 2 * d :] + reset * (from_s[..., 2 * d :] + weights.candidate_bias))
    return candidate + update * (state - candidate)


def scores(weights: HeadWeights, state: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [A, n, U] of the task vocabulary, [A, n, W] of the window's entries; window [A, n, W], -1 where empty."""
    vocab = torch.baddbmm(
        weights.out_bias, torch.bmm(state, weights.out_weight), weights.embed.transpose(1, 2)
    )  # [A, n, U]
    entries = torch.baddbmm(weights.slot_bias, state, weights.slot_weight)  # [A, n, W]
    a, n, w = window.shape
    if w:
        query = torch.bmm(state, weights.copy_weight)  # [A, n, d]
        keys = _rows(weights.embed, window.clamp(min=0).reshape(a, n * w)).view(a, n, w, -1)
        entries = entries + torch.einsum("and,anwd->anw", query, keys) * keys.shape[-1] ** -0.5
    return vocab, entries.masked_fill(window < 0, float("-inf"))


def best_token(vocab: torch.Tensor, entries: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely choice [A, n] and its probability [A, n]: below U a task token, U + w the token of entry w.

    A task token that also stands in the window gets both probabilities. "Another token" (U - 1) is never chosen by
    itself: the head then has nothing to say, and the probability that is left tells so.
    """
    num_vocab = vocab.shape[-1]
    probs = torch.softmax(torch.cat([vocab, entries], dim=-1), dim=-1)
    of_entries = probs[..., num_vocab:]
    known = (window >= 0) & (window < num_vocab - 1)
    merged = probs[..., :num_vocab].scatter_add(
        -1, window.clamp(min=0), of_entries.masked_fill(~known, 0.0)
    )  # [A, n, U]
    vocab_prob, vocab_choice = merged[..., : num_vocab - 1].max(dim=-1)
    if not window.shape[-1]:
        return vocab_choice, vocab_prob
    entry_prob, entry = of_entries.masked_fill(known, 0.0).max(dim=-1)
    use_entry = entry_prob > vocab_prob
    return torch.where(use_entry, entry + num_vocab, vocab_choice), torch.where(use_entry, entry_prob, vocab_prob)


def _rows(table: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """table [A, r, d] at idx [A, n] -> [A, n, d], head by head."""
    if table.shape[0] == 1:
        return F.embedding(idx, table[0])
    return table.gather(1, idx.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
