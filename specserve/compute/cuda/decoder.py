"""The decoder on CUDA: the layers of one ragged batch as a fixed sequence of kernel launches, ready for a CUDA graph.

Takes the place of `Decoder` where Triton runs. Matrices are cuBLAS's or, where a row's bits shall not follow the step's
size, those of `one_order.py`; norms, RoPE with the KV write, attention, gated activations and LoRA are our kernels
(kernels/). Nothing here looks at the step's contents: everything that differs between steps is read from device buffers
(`RowInputs`), the launches depend on the bucket alone. The residual stream is fp32, everything that matrices read is in
`compute_dtype`. Under Triton's interpreter the same code runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...kernels.add_norm import add_rms_norm_
from ...kernels.gated_activation import gated_activation
from ...kernels.ragged_attention import ragged_attention_
from ...kernels.rope_kv import rope_store_
from ...model.rope import Rope
from ..decoder_weights import AnyLinear, DecoderWeights, Layer
from ..kv_cache import KVCache
from ..softcap import softcap_
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
    lora: DeviceLoraBatch | None  # None: no row has an adapter


class TritonDecoder(DecoderWeights):
    """The forward pass through Triton kernels; `norm` and the layers' norms are fp32."""

    kernels = "triton"

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
        config, lora, eps = self.config, rows.lora, self.config.rms_norm_eps
        residual.copy_(self.embed.index_select(0, rows.tokens))
        if lora is not None:
            lora.add_embedding_(rows.tokens, residual)  # before Gemma's scale, which PEFT applies to the LoRA as well
        if config.embed_scale != 1.0:
            residual.mul_(self._embed_scale)
        ropes = {kind: _tables(rope, rows.positions) for kind, rope in self._ropes.items()}
        h = add_rms_norm_(residual, None, self.layers[0].input_norm, eps, out=torch.empty_like(hidden))
        for idx, layer in enumerate(self.layers):
            cos, sin = ropes[config.rope_keys[idx]]
            attended = self._attend(idx, layer, h, rows, cos, sin, kv)
            h = self._linear(idx, "o", layer.o, attended, lora)
            h = add_rms_norm_(residual, h, layer.mlp_norm, eps, post_weight=layer.post_attention_norm)
            gate_up = self._linear(idx, "gate_up", layer.gate_up, h, lora)
            act = gated_activation(gate_up, "silu" if config.activation == "silu" else "gelu_tanh")
            h = self._linear(idx, "down", layer.down, act, lora)
            is_last = idx + 1 == len(self.layers)
            next_norm = self.norm if is_last else self.layers[idx + 1].input_norm
            h = add_rms_norm_(
                residual, h, next_norm, eps, post_weight=layer.post_mlp_norm, out=hidden if is_last else None
            )
            if idx in taps:
                taps[idx].copy_(residual)

    def logits_into(self, hidden: torch.Tensor, out: torch.Tensor, lora: DeviceLoraBatch | None) -> None:
        """Logits of hidden rows [L, H] into `out` [L, V] float32."""
        out.copy_(self.lm_head(hidden))
        if lora is not None:
            lora.add_lm_head_(hidden, out)
        softcap_(out, self.config.final_softcap)

    def _attend(
        self,
        idx: int,
        layer: Layer,
        h: torch.Tensor,
        rows: RowInputs,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: KVCache,
    ) -> torch.Tensor:
        config = self.config
        num_q, num_kv, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self._linear(idx, "qkv", layer.qkv, h, rows.lora)  # [T, (Hq + 2 Hkv) * D]
        k_cache, v_cache = kv.k[idx], kv.v[idx]
        rope_store_(
            qkv,
            cos,
            sin,
            rows.slot_mapping,
            k_cache,
            v_cache,
            num_q,
            num_kv,
            layer.q_norm,
            layer.k_norm,
            config.rms_norm_eps,
        )
        q = qkv.view(qkv.shape[0], num_q + 2 * num_kv, head_dim)[:, :num_q]
        out = qkv.new_empty(qkv.shape[0], num_q * head_dim)
        ragged_attention_(
            out,
            q,
            k_cache,
            v_cache,
            rows.tiles,
            rows.positions,
            rows.block_tables,
            rows.scratch,
            block_size=rows.block_size,
            scale=config.attention_scale,
            window=config.windows[idx],
            split_len=rows.split_len,
            num_programs=rows.num_programs,
            tile_rows=rows.tile_rows,
        )
        return out

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
