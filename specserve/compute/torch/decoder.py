"""The forward pass of every supported architecture, over one ragged batch.

Architectures differ by `ModelConfig` only. Owns weights and arithmetic; knows nothing of requests, of which adapters
there are, or of where KV blocks come from. q, k, v are one linear, gate and up another.
Inference only: plain tensors, no modules, no autograd.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from ...kernels.attention import SequencePlan, paged_attention, plan_attention, store_kv
from ...kernels.softcap import softcap_
from ...model.rope import rotate
from ..batch import Batch
from ..decoder_weights import DecoderWeights, Layer
from ..kv_cache import KVCache
from .lora import AdapterSlots, LoraBatch


class Decoder(DecoderWeights):
    """The forward pass in torch."""

    def slots(self) -> AdapterSlots:
        """What keeps the adapters of steps for this decoder."""
        return AdapterSlots(self.config)

    @torch.inference_mode()
    def step(
        self, batch: Batch, kv: KVCache, taps: dict[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and `logits` of its first L rows, [L, V]."""
        states = self.forward(batch, kv, taps)
        if not batch.num_logits:
            return states, states.new_empty(0, self.config.vocab_size).float()
        return states, self.logits(states[: batch.num_logits], batch)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, taps: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """Normed hidden states [L + P, H] of the rows `batch.hidden_rows`; writes all rows' keys and values to `kv`.

        Each layer index that `taps` holds gets that layer's output for the same rows, [L + P, H].
        """
        config, lora = self.config, cast(LoraBatch | None, batch.lora)  # what `slots` makes
        x = self.embed[batch.tokens].to(self.compute_dtype)  # [T, H]
        if lora is not None:
            lora.add_embedding_(batch.tokens, x)  # before Gemma's scale, which PEFT applies to the LoRA as well
        if config.embed_scale != 1.0:
            x *= self._embed_scale
        plans = {window: self._plan(batch, window) for window in set(config.windows)}
        ropes = {kind: rope.cos_sin(batch.positions, self.compute_dtype) for kind, rope in self._ropes.items()}
        growth = None  # [T, 1, 1]
        if config.query_growth is not None:
            growth = config.query_growth.factors(batch.positions).to(self.compute_dtype)[:, None, None]
        for idx, layer in enumerate(self.layers):
            h = x if layer.input_norm is None else self._rms_norm(x, layer.input_norm)
            qkv = layer.qkv(h)
            if lora is not None:
                lora.add_(idx, "qkv", h, qkv)
            plan, (cos, sin) = plans[config.windows[idx]], ropes[config.rope_keys[idx]]
            attended = self._attend(idx, layer, qkv, cos, sin, growth, plan, batch.slot_mapping, kv)
            h = layer.o(attended)
            if lora is not None:
                lora.add_(idx, "o", attended, h)
            if layer.post_attention_norm is not None:
                h = self._rms_norm(h, layer.post_attention_norm)
            x += h
            h = x if layer.mlp_norm is None else self._rms_norm(x, layer.mlp_norm)
            gate_up = layer.gate_up(h)
            if lora is not None:
                lora.add_(idx, "gate_up", h, gate_up)
            gate, up = gate_up.chunk(2, dim=-1)  # [T, intermediate] each
            act = F.silu(gate) if config.activation == "silu" else F.gelu(gate, approximate="tanh")
            act *= up
            h = layer.down(act)
            if lora is not None:
                lora.add_(idx, "down", act, h)
            if layer.post_mlp_norm is not None:
                h = self._rms_norm(h, layer.post_mlp_norm)
            x += h
            if taps is not None and idx in taps:
                taps[idx] = x[batch.hidden_indices]
        return self._rms_norm(x[batch.hidden_indices], self.norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [L, V] float32 of hidden rows [L, H]."""
        logits = self.lm_head(hidden).float()
        if batch.lora is not None:
            batch.lora.add_lm_head_(hidden, logits)
        softcap_(logits, self.config.final_softcap)
        return logits

    def _attend(
        self,
        idx: int,
        layer: Layer,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        growth: torch.Tensor | None,
        plan: list[SequencePlan],
        slot_mapping: torch.Tensor,
        kv: KVCache,
    ) -> torch.Tensor:
        config = self.config
        num_q, num_kv = config.num_heads, config.num_kv_heads
        heads = qkv.view(qkv.shape[0], num_q + 2 * num_kv, config.head_dim)
        qk = heads[:, : num_q + num_kv]
        if config.qk_norm_turned:
            qk = rotate(qk, cos, sin)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[:, :num_q], qk[:, num_q:]
            if config.qk_norm_whole:
                q, k = q.flatten(1), k.flatten(1)
            qk = torch.cat([self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)], dim=1)
            qk = qk.view(-1, num_q + num_kv, config.head_dim)
        if not config.qk_norm_turned:
            qk = rotate(qk, cos, sin)
        store_kv(qk[:, num_q:], heads[:, num_q + num_kv :], kv.k[idx], kv.v[idx], slot_mapping)
        q = qk[:, :num_q] if growth is None else qk[:, :num_q] * growth
        return paged_attention(q, kv.k[idx], kv.v[idx], plan, config.attention_scale, config.attention_softcap)

    def _plan(self, batch: Batch, window: int | None) -> list[SequencePlan]:
        config, size = self.config, batch.block_size
        return plan_attention(
            batch.query_lens,
            batch.context_lens,
            [table[: -(-num // size)] for table, num in zip(batch.tables, batch.context_lens, strict=True)],
            size,
            window,
            config.num_heads // config.num_kv_heads,
            self.compute_dtype,
            self.device,
        )

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype != x.dtype:  # Gemma at 16 bits
            return F.rms_norm(x.float(), weight.shape, weight, self.config.rms_norm_eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
