"""The decoder on CUDA: the layers of one ragged batch as a fixed sequence of kernel launches, ready for a CUDA graph.

Takes the place of `Decoder` where Triton runs. Matrices are cuBLAS's or, where a row's bits shall not follow the step's
size, those of `one_order.py`; norms, RoPE with the KV write, attention, gated activations and LoRA are our kernels
(kernels/). In a step of few rows linears take the smaller of these along (`fused_linears.py`). Nothing here looks at
the step's contents: everything that differs between steps is read from device buffers (`RowInputs`), the launches
depend on the bucket alone. The residual stream is fp32, everything that matrices read is in `compute_dtype`. Under
Triton's interpreter the same code runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...kernels.add_norm import add_rms_norm_
from ...kernels.gated_activation import gated_activation
from ...kernels.linear_fused import MOST_FUSED_ROWS, Normed, can_norm, linear_add_, linear_gated, linear_rope_
from ...kernels.ragged_attention import ragged_attention_
from ...kernels.rope_kv import rope_store_
from ...kernels.softcap import softcap_
from ...model.rope import Rope
from ..decoder_weights import AnyLinear, DecoderWeights, Layer
from ..kv_cache import KVCache
from .fused_linears import activation_kind
from .lora import DeviceLoraBatch


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What the layers read of a step, all on the device. T rows, padded; a padded row has slot -1 and is in no tile."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64, -1 for padding
    tiles: torch.Tensor  # [tiles, 3] int32: first row, end row, row of block_tables
    tile_rows: int
    block_tables: torch.Tensor  # [seats, N] int32
    block_size: int
    split_len: int  # keys in a split of attention
    num_programs: int  # that share a tile's splits
    scratch: tuple[torch.Tensor, torch.Tensor]  # of these programs
    arrived: torch.Tensor | None  # counts of them, where the last one joins a tile's splits
    lora: DeviceLoraBatch | None  # None: no row has an adapter


class TritonDecoder(DecoderWeights):
    """The forward pass through Triton kernels; `norm` and the layers' norms are fp32."""

    kernels = "triton"
    fused: frozenset[str] = frozenset()  # groups of linears that take along what stands around them, of few rows

    def forward_rows(
        self,
        rows: RowInputs,
        kv: KVCache,
        residual: torch.Tensor,
        hidden: torch.Tensor,
        taps: Mapping[int, torch.Tensor],
    ) -> None:
        """Normed hidden states of all rows into `hidden` [T, H]; writes their keys and values to `kv`.

        `residual` [T, H] fp32 is working space. Each layer index in `taps` gets that layer's output [T, H].
        """
        config, lora = self.config, rows.lora
        residual.copy_(self.embed.index_select(0, rows.tokens))
        if lora is not None:
            lora.add_embedding_(rows.tokens, residual)  # before Gemma's scale, which PEFT applies to the LoRA as well
        if config.embed_scale != 1.0:
            residual.mul_(self._embed_scale)
        ropes = {kind: _tables(rope, rows.positions) for kind, rope in self._ropes.items()}
        growth = None  # [T, 1, 1]
        if config.query_growth is not None:
            growth = config.query_growth.factors(rows.positions)[:, None, None]
        fused = self._fused(rows)
        x = self._normed(residual, None, self.layers[0].input_norm, None, "qkv" in fused)
        for idx, layer in enumerate(self.layers):
            cos, sin = ropes[config.rope_keys[idx]]
            attended = self._attend(idx, layer, x, rows, cos, sin, growth, kv, "qkv" in fused)
            h = self._added(idx, "o", layer.o, attended, residual, lora, fused)
            x = self._normed(residual, h, layer.mlp_norm, layer.post_attention_norm, "gate_up" in fused)
            act = self._activated(idx, layer, x, lora, fused)
            h = self._added(idx, "down", layer.down, act, residual, lora, fused)
            if idx + 1 == len(self.layers):
                self._normed(residual, h, self.norm, layer.post_mlp_norm, False, out=hidden)
            else:
                x = self._normed(residual, h, self.layers[idx + 1].input_norm, layer.post_mlp_norm, "qkv" in fused)
            if idx in taps:
                taps[idx].copy_(residual)

    def logits_into(self, hidden: torch.Tensor, out: torch.Tensor, lora: DeviceLoraBatch | None) -> None:
        """Logits of hidden rows [L, H] into `out` [L, V] float32."""
        out.copy_(self.lm_head(hidden))
        if lora is not None:
            lora.add_lm_head_(hidden, out)
        softcap_(out, self.config.final_softcap)

    def _fused(self, rows: RowInputs) -> frozenset[str]:
        """The groups whose linears are fused in a step of `rows`: those that no LoRA adds to."""
        if rows.tokens.shape[0] > MOST_FUSED_ROWS:
            return frozenset()
        return self.fused if rows.lora is None else self.fused - rows.lora.groups

    def _normed(
        self,
        residual: torch.Tensor,
        h: torch.Tensor | None,
        weight: torch.Tensor | None,
        post_weight: torch.Tensor | None,
        is_fused: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor | Normed:
        """What the next linear reads, with `h` added to the residual before if it is not yet.

        Where that linear `is_fused` it norms the rows itself, if nothing else has to be done here.
        """
        eps = self.config.rms_norm_eps
        if is_fused and h is None and weight is not None and can_norm(*residual.shape):
            return Normed(residual, weight, eps)
        if h is None and out is None:
            out = torch.empty_like(residual, dtype=self.compute_dtype)
        return add_rms_norm_(residual, h, weight, eps, post_weight=post_weight if h is not None else None, out=out)

    def _attend(
        self,
        idx: int,
        layer: Layer,
        x: torch.Tensor | Normed,
        rows: RowInputs,
        cos: torch.Tensor,
        sin: torch.Tensor,
        growth: torch.Tensor | None,
        kv: KVCache,
        is_fused: bool,
    ) -> torch.Tensor:
        config = self.config
        num_q, num_kv, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        k_cache, v_cache = kv.k[idx], kv.v[idx]
        if is_fused:
            weights, bias = layer.qkv.parts()
            q = linear_rope_(x, weights, bias, cos, sin, rows.slot_mapping, k_cache, v_cache, num_q)
            q = q.view(-1, num_q, head_dim)
        else:
            assert isinstance(x, torch.Tensor)
            qkv = self._linear(idx, "qkv", layer.qkv, x, rows.lora)  # [T, (Hq + 2 Hkv) * D]
            q_norm, k_norm = layer.q_norm, layer.k_norm
            if config.qk_norm_whole and q_norm is not None and k_norm is not None:
                q, k, _ = qkv.split([num_q * head_dim, num_kv * head_dim, num_kv * head_dim], dim=1)
                add_rms_norm_(q, None, q_norm, config.rms_norm_eps, out=q)
                add_rms_norm_(k, None, k_norm, config.rms_norm_eps, out=k)
                q_norm = k_norm = None
            rope_store_(
                qkv,
                cos,
                sin,
                rows.slot_mapping,
                k_cache,
                v_cache,
                num_q,
                num_kv,
                q_norm,
                k_norm,
                config.rms_norm_eps,
                config.qk_norm_turned,
            )
            q = qkv.view(-1, num_q + 2 * num_kv, head_dim)[:, :num_q]
        if growth is not None:
            q *= growth
        out = q.new_empty(q.shape[0], num_q * head_dim)
        ragged_attention_(
            out,
            q,
            k_cache,
            v_cache,
            rows.tiles,
            rows.positions,
            rows.block_tables,
            rows.scratch,
            rows.arrived,
            block_size=rows.block_size,
            scale=config.attention_scale,
            window=config.windows[idx],
            split_len=rows.split_len,
            num_programs=rows.num_programs,
            tile_rows=rows.tile_rows,
            softcap=config.attention_softcap,
        )
        return out

    def _activated(
        self, idx: int, layer: Layer, x: torch.Tensor | Normed, lora: DeviceLoraBatch | None, fused: frozenset[str]
    ) -> torch.Tensor:
        """[T, I] that the MLP's last linear reads."""
        kind = activation_kind(self.config)
        if "gate_up" in fused:
            weights, bias = layer.gate_up.parts()
            return linear_gated(x, weights, bias, kind, self.compute_dtype)
        assert isinstance(x, torch.Tensor)
        return gated_activation(self._linear(idx, "gate_up", layer.gate_up, x, lora), kind)

    def _added(
        self,
        idx: int,
        group: str,
        linear: AnyLinear,
        x: torch.Tensor,
        residual: torch.Tensor,
        lora: DeviceLoraBatch | None,
        fused: frozenset[str],
    ) -> torch.Tensor | None:
        """The linear's outputs, or None if it added them to the residual."""
        if group not in fused:
            return self._linear(idx, group, linear, x, lora)
        weights, bias = linear.parts()
        linear_add_(residual, x, weights, bias)
        return None

    def _linear(
        self, idx: int, group: str, linear: AnyLinear, x: torch.Tensor, lora: DeviceLoraBatch | None
    ) -> torch.Tensor:
        y = linear(x)
        if lora is not None:
            lora.add_(idx, group, x, y)
        return y


def _tables(rope: Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D] fp32 at `positions`."""
    cos, sin = rope.cos_sin(positions, torch.float32)
    return cos.squeeze(1), sin.squeeze(1)
