"""Attention of a training step in bf16 on a CPU, of texts without a mask but the causal one.

torch's own (flash) attention on CPUs takes 37% of a step of SmolLM2-135M at 340 tokens a row, though it is 4% of the
arithmetic; two plain products with a softmax between them take 15%. They hold weights [B, H, L, L], so long rows, and
all that has another mask, dropout or type, go on to torch's.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "specserve_causal"
_MOST_TOKENS = 1024  # of a row: its weights are as large as its other activations by then


def attention_for(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """What transformers should call the attention of a model of `config` that trains here."""
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"  # the others know no cap on scores
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # none where the causal one alone would do
    return NAME


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """query: [B, Hq, L, D]; key, value: [B, Hkv, L, D]. Returns [B, L, Hq, D]."""
    is_plain = attention_mask is None and not dropout and settings.get("is_causal") is not False
    num_tokens = query.shape[2]
    if not is_plain or query.dtype != torch.bfloat16 or not num_tokens == key.shape[2] <= _MOST_TOKENS:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings
        )
        return found
    return causal_attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The same; query heads that share a key head are rows of one product."""
    num_rows, num_heads, num_tokens, head_dim = query.shape
    num_groups = num_rows * key.shape[1]
    share = num_heads // key.shape[1]
    later = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    mask = torch.zeros(num_tokens, num_tokens, dtype=query.dtype).masked_fill(later, float("-inf")).repeat(share, 1)
    grouped = query.reshape(num_groups, share * num_tokens, head_dim)
    keys, values = (x.reshape(num_groups, num_tokens, head_dim) for x in (key, value))
    scores = torch.baddbmm(mask.expand(num_groups, *mask.shape), grouped, keys.transpose(1, 2), alpha=scale)
    mixed = torch.softmax(scores, dim=-1) @ values  # [B * Hkv, Hq / Hkv * L, D]
    return mixed.view(num_rows, num_heads, num_tokens, head_dim).transpose(1, 2).contiguous()
