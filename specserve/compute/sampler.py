"""Turns logit rows into tokens, row by row as if there were no drafts.

Exactness rests on two things. Each row is processed with the history it would have if all drafts before it were
accepted (penalties, minimum length), so a kept row is sampled from the same distribution as without drafts. And its
random number is a hash of (seed, sample index, position), not the next draw of a stream, so it is the same number
either way.

Order of processing, as in vLLM: penalties, logit bias, forbidden stop tokens, the grammar's mask, temperature, top-k,
top-p, min-p.
Sampling inverts the cumulative distribution in vocabulary order, in float64.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..messages import SamplingParams, TokenLogprobs
from ..schedule.row_group import RowGroup
from ..schedule.sequence import Sequence
from ..schedule.verifier import Verification, accepted_tokens
from .grammar_masks import MaskMaker, allowed_tokens

LOGPROB_ROWS = 128  # that log-probabilities are made of at a time
FEW_ROWS = 4
TOP_P_CANDIDATES = 1024  # a full sort of the vocabulary is the exception: most top-p sets are smaller than this


def uniform(seed: int, sample_idx: int, position: int) -> float:
    """The random number in [0, 1) of one position of one sample; a pure function, equal on every platform."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed & (2**64 - 1), sample_idx, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def edits_logits(seq: Sequence) -> bool:
    """Whether rows of this sequence differ from the raw logits before temperature is applied."""
    return seq.has_edits or seq.output_len < seq.sampling.min_tokens


def best_of_rows(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value and its index of each row of logits [L, V]; NaN where a row holds one.

    By blocks of 64 where they fit: on a CPU `max` with indices of 64 rows takes 1.5 ms, `amax` 0.13. Not of a few rows:
    behind a step each operation comes from memory and takes some 40 us, so that one of 1 to 4 rows is the quicker way.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size % 64 or num_rows <= FEW_ROWS:
        return logits.max(dim=-1)
    blocks = logits.unflatten(-1, (vocab_size // 64, 64))  # [L, V / 64, 64]
    values, block = blocks.amax(dim=-1).max(dim=-1)  # [L]
    rows = blocks[torch.arange(num_rows, device=logits.device), block]  # [L, 64]
    return values, rows.argmax(dim=-1) + 64 * block


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn from each row, [L]."""

    tokens: np.ndarray  # int64
    bad: Seq[int] = ()  # whether the row holds NaN; empty where none does
    dead: Seq[int] = ()  # whether nothing is allowed there; empty where something is everywhere


class HotRow(NamedTuple):
    """A row whose token is drawn: which one it is, its logits [V] with all edits, and its random number."""

    idx: int
    logits: torch.Tensor
    params: SamplingParams
    number: float


@dataclass(frozen=True, slots=True)
class PendingSample:
    """Rows that are being sampled; `drawn` waits for them."""

    logits: torch.Tensor
    groups: Seq[RowGroup]
    drawn: Callable[[], Drawn]
    verification: Verification


class Sampler:
    """Samples the target's token for every row of every group."""

    def __init__(self, eos_token_ids: Seq[int], masks: MaskMaker | None = None):
        self._eos_token_ids = tuple(eos_token_ids)
        self._masks = masks or MaskMaker(0)

    def launch(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> PendingSample:
        """Begin to sample; a device that runs by itself goes on meanwhile, elsewhere all is done by `collect`.

        `logits` is [L, V] float32 on any device and is not modified.
        """
        return PendingSample(logits, groups, self._queue(logits, groups), Verification(groups, logits.shape[0]))

    def collect(self, pending: PendingSample) -> list[list[int]]:
        """The tokens that each group keeps: its right drafts and the one behind them.

        A group with a NaN in a row it needs gets an empty list: its logits are not a distribution and nothing may be
        made of them. Under a grammar the list ends early where nothing may come; an empty list's reason is the group's
        `failure`.
        """
        groups, drawn = pending.groups, pending.drawn()
        kept = pending.verification.kept(drawn.tokens)
        special = range(len(groups)) if drawn.bad else pending.verification.constrained
        tokens = drawn.tokens.tolist() if special else []
        for idx in special:
            kept[idx] = accepted_tokens(groups[idx].drafts, self._rows_of(pending.logits, groups[idx], drawn, tokens))
        return kept

    def _rows_of(self, logits: torch.Tensor, group: RowGroup, drawn: Drawn, tokens: list[int]) -> list[int]:
        """The tokens of one group's rows; `tokens` are those of all rows."""
        own = slice(group.first_row, group.first_row + group.num_rows)
        if any(drawn.bad[own]):
            group.failure = "nan"
            return []
        if group.seq.grammar is not None:
            return self._constrain(logits, group, tokens[own], drawn.dead[own])
        return tokens[own]

    def _queue(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> Callable[[], Drawn]:
        return lambda: self._draw(logits, groups)

    def _draw(self, logits: torch.Tensor, groups: Seq[RowGroup]) -> Drawn:
        """By row: its token, whether it holds NaN, and whether the grammar's mask leaves nothing of it.

        Greedy rows of a group under a grammar get the most likely token of all; `_constrain` sees to the grammar.
        """
        best_values, tokens = best_of_rows(logits)  # [L], [L]; NaN propagates into the maximum
        is_dead: list[torch.Tensor] = []  # [L] nothing may be sampled there; none where there are no masks
        best, drawn = self._other_rows(logits, groups)
        for row, row_logits in best:
            tokens[row] = row_logits.argmax()
        if drawn:
            stacked = torch.stack([row.logits for row in drawn])  # [M, V]
            if (masks := self._masks.masks(groups)) is not None:
                place = {row.idx: idx for idx, row in enumerate(drawn)}
                masked = torch.tensor([place[row] for row in masks.rows], device=logits.device)
                allowed = allowed_tokens(masks.bits, logits.shape[1], logits.device)  # [R, V]
                rows = stacked[masked].masked_fill_(~allowed, -torch.inf)
                is_dead = [torch.zeros_like(tokens)]
                is_dead[0][masks.rows] = (rows.amax(dim=-1) == -torch.inf).long()
                stacked[masked] = rows
            picked = sample_rows(stacked, [(row.params, row.number) for row in drawn])
            tokens[[row.idx for row in drawn]] = picked
        # sync: the step's one copy back; everything after it needs the tokens on the host.
        flat, bad, *dead = torch.stack([tokens, best_values.isnan().long(), *is_dead]).cpu().numpy()
        return Drawn(flat, bad.tolist() if bad.any() else (), dead[0].tolist() if dead and dead[0].any() else ())

    def _other_rows(
        self, logits: torch.Tensor, groups: Seq[RowGroup]
    ) -> tuple[list[tuple[int, torch.Tensor]], list[HotRow]]:
        """Rows whose token is not the most likely of the raw logits, grammars aside: with the logits that count [V],
        those of which the most likely is taken; and those that are drawn."""
        best: list[tuple[int, torch.Tensor]] = []
        drawn: list[HotRow] = []
        for group in groups:
            if group.seq.takes_best:
                continue
            params = group.seq.sampling
            edited = edits_logits(group.seq)
            if group.is_greedy and not edited:
                continue
            for idx in range(group.num_rows):
                row = group.first_row + idx
                row_logits = logits[row]
                if edited:
                    row_logits = self._edit(row_logits.clone(), group, idx)
                if group.is_greedy:
                    best.append((row, row_logits))
                else:
                    number = uniform(params.seed, group.seq.sample_idx, len(group.seq.tokens) + idx)
                    drawn.append(HotRow(row, row_logits, params, number))
        return best, drawn

    def _constrain(self, logits: torch.Tensor, group: RowGroup, sampled: list[int], dead: Seq[int]) -> list[int]:
        """The tokens of a group under a grammar, up to the first row where there is none."""

        def masked_best(idx: int, bits: np.ndarray) -> int | None:
            row = logits[group.first_row + idx].clone()
            if edits_logits(group.seq):
                row = self._edit(row, group, idx)
            row.masked_fill_(~allowed_tokens(bits, row.shape[0], row.device)[0], -torch.inf)
            best = int(row.argmax())  # sync: only where the most likely token of all is forbidden
            return None if row[best] == -torch.inf else best

        if group.is_greedy:
            return up_to_dead_end(group, self._masks.constrain_greedy(group, sampled, masked_best), ())
        return up_to_dead_end(group, sampled, dead)

    def _edit(self, row: torch.Tensor, group: RowGroup, idx: int) -> torch.Tensor:
        """Apply penalties, bias and minimum length to one row [V], in place."""
        seq, params = group.seq, group.seq.sampling
        history = group.drafts[:idx]
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*seq.tokens, *history}), device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = dict(seq.output_counts)
            for token in history:
                counts[token] = counts.get(token, 0) + 1
            if counts:
                ids = torch.tensor(list(counts), device=row.device)
                amounts = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
                row[ids] -= params.frequency_penalty * amounts + params.presence_penalty
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if seq.output_len + idx < params.min_tokens:
            row[[*self._eos_token_ids, *params.stop_token_ids]] = -torch.inf
        return row


def up_to_dead_end(group: RowGroup, sampled: list[int], dead: Seq[int]) -> list[int]:
    """`sampled` up to the first row where the grammar leaves nothing; a group that has none fails."""
    if 1 in dead:
        sampled = sampled[: dead.index(1)]
    if not sampled:
        group.failure = "grammar"
    return sampled


def sample_rows(logits: torch.Tensor, params: Seq[tuple[SamplingParams, float]]) -> torch.Tensor:
    """Sample one token per row [M] from logits [M, V] with each row's parameters and uniform number."""
    device = logits.device
    temperature = torch.tensor([[p.temperature] for p, _ in params], device=device)
    logits = logits / temperature  # [M, V]
    for row, (p, _) in enumerate(params):
        if p.top_k and p.top_k < logits.shape[1]:
            kth = logits[row].topk(p.top_k).values[-1]
            logits[row].masked_fill_(logits[row] < kth, -torch.inf)
        if p.top_p < 1.0:
            _keep_top_p(logits[row], p.top_p)
    probs = logits.double().softmax(dim=-1)  # [M, V]
    min_p = torch.tensor([[p.min_p] for p, _ in params], dtype=torch.float64, device=device)
    probs.masked_fill_(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    cumulative = probs.cumsum(dim=-1)
    drawn = torch.tensor([[u] for _, u in params], dtype=torch.float64, device=device)
    picked = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)  # [M, 1]
    # u * total may round to total: then the last token that has a probability, which a grammar allows too.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())  # [M, 1]
    return torch.minimum(picked, last).clamp_(max=logits.shape[1] - 1).squeeze(1)


def _keep_top_p(row: torch.Tensor, top_p: float) -> None:
    """Forbid, in place, all but the smallest set of most likely tokens of row [V] whose mass reaches `top_p`."""
    probs = row.softmax(dim=-1)
    num = min(TOP_P_CANDIDATES, row.shape[0])
    values = probs.topk(num).values.double()
    mass = values.cumsum(0)
    if mass[-1] < top_p and num < row.shape[0]:  # sync: flat distributions only, decided per row
        values = probs.sort(descending=True).values.double()
        mass = values.cumsum(0)
    # The token that crosses the threshold stays in; equal probabilities stay or go together.
    idx = torch.searchsorted(mass, torch.tensor(top_p, dtype=torch.float64, device=row.device))
    row.masked_fill_(probs < values[idx.clamp_(max=values.shape[0] - 1)], -torch.inf)


def token_logprobs(logits: torch.Tensor, rows: Seq[int], tokens: Seq[int], num_top: int) -> list[TokenLogprobs]:
    """Raw log-probabilities of `tokens` under `rows` of logits [L, V], one each, and the `num_top` most likely.

    Some rows at a time: what is made of them is as large as their logits, of which a long prompt has a gigabyte.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(rows), LOGPROB_ROWS):
        piece = slice(start, start + LOGPROB_ROWS)
        found += _logprobs(logits[list(rows[piece])], tokens[piece], num_top)
    return found


def _logprobs(logits: torch.Tensor, tokens: Seq[int], num_top: int) -> list[TokenLogprobs]:
    logprobs = logits.float().log_softmax(dim=-1)  # [M, V]
    ids = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, ids)  # [M, 1]
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top = logprobs.topk(num_top, dim=-1) if num_top else None
    # sync: only for requests that ask for log-probabilities.
    values = zip(chosen[:, 0].tolist(), ranks.tolist(), strict=True)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else (((), ()) for _ in tokens)
    return [
        TokenLogprobs(value, list(zip(top_ids, top_values, strict=True)), rank)
        for (value, rank), (top_ids, top_values) in zip(values, tops, strict=True)
    ]
