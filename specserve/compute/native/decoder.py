"""The decoder on the CPU through the native forward (kernels/cpu): one call a step for all layers.

Takes the place of `Decoder` behind the same methods: `forward` gives hidden rows, `logits` turns them into logits. Owns
the packed weights and their C structs. Activations and KV are bf16 where the CPU multiplies bf16 natively and weights
are 16 bits or fewer, else fp32; the residual stream and all sums are fp32. Unlike the torch path, a row's result does
not depend on the other rows of its step, to the bit.
"""

from __future__ import annotations

import contextlib
import ctypes
from array import array
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels.native import MAX_TAPS, NORMS, PANEL, PHASES, LayerStruct, Library, Model, Step, Team
from ...kernels.packed import PackedMatrix
from ...kernels.softcap import softcap_
from ...model.config import ModelConfig
from ...model.rope import inverse_frequencies
from ...model.shapes import LINEARS
from ..batch import Batch
from ..interrupt import StepInterrupt, StepInterruptedError
from ..kv_cache import KVCache
from .best_rows import BestRows
from .lora import NativeLoraBatch, NativeSlots, to_native


def one_torch_thread() -> contextlib.AbstractContextManager[None]:
    """Torch's small operations on one thread: after each parallel one its OpenMP threads spin for milliseconds, on the
    cores that the native team needs next (a decoding step took 15 ms instead of 8 on two cores)."""
    return TorchThreads(1)


class TorchThreads(contextlib.AbstractContextManager[None]):
    """Torch's operations on `num` threads. No generator: as one it took 40 us around each step."""

    __slots__ = ("_before", "_num")

    def __init__(self, num: int):
        self._num = num

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._num:
            torch.set_num_threads(self._num)

    def __exit__(self, *_: object) -> None:
        if self._before != self._num:
            torch.set_num_threads(self._before)


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """Packed weights of one layer, by module, and its norms in fp32, by the names of `NORMS`."""

    modules: dict[str, PackedMatrix]
    norms: dict[str, torch.Tensor]


class NativeDecoder:
    """A loaded model. `compute_dtype` is the dtype of KV and of what the matrices multiply."""

    is_exact = True  # a row's bits are the same in every step

    def __init__(
        self,
        library: Library,
        num_threads: int,
        config: ModelConfig,
        embed: torch.Tensor,
        layers: list[NativeLayer],
        norm: torch.Tensor,
        lm_head: PackedMatrix,
        weight_dtype: torch.dtype,
    ):
        self.config = config
        self.embed = embed  # [V, H] in the weights' dtype
        self.device = embed.device
        self.num_builds = int(library.build_s > 0)
        self.level = self.kernels = library.level
        self.is_bf16 = library.uses_bf16 and lm_head.format != "f32"
        self.compute_dtype = torch.bfloat16 if self.is_bf16 else torch.float32
        self.weight_dtype_name = str(weight_dtype).removeprefix("torch.")
        form = layers[0].modules["q_proj"].format
        if form in ("int8", "int4"):
            self.weight_dtype_name = form
        self.costs_key = f"{library.name}, {num_threads} threads, {form}"
        self.phase_seconds = (ctypes.c_double * len(PHASES))()
        self._embed_scale = config.embed_scale_of(weight_dtype)
        self._kinds = list(config.ropes)
        self._frequencies = [inverse_frequencies(rope) for rope in config.ropes.values()]  # [D / 2] each
        self._norm, self._layers, self._lm_head = norm, layers, lm_head
        self.team = Team(library, num_threads)
        self._structs = (LayerStruct * len(layers))(*(self._layer_struct(idx) for idx in range(len(layers))))
        self._lm_head_struct = lm_head.struct()
        self._model = Model(
            ctypes.cast(self._structs, ctypes.POINTER(LayerStruct)),
            norm.data_ptr(),
            len(layers),
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            int(config.activation != "silu"),
            int(self.is_bf16),
            len(self._kinds),
            config.rms_norm_eps,
            config.attention_scale,
            config.attention_softcap or 0.0,
            embed=embed.data_ptr(),
            embed_scale=self._embed_scale,
            embed_is_bf16=int(embed.dtype == torch.bfloat16),
            norms_whole_qk=int(config.qk_norm_whole),
            norms_turned_qk=int(config.qk_norm_turned),
        )
        if config.query_growth is not None:
            self._model.query_length, self._model.query_beta = config.query_growth.length, config.query_growth.beta
        for idx, (frequencies, rope) in enumerate(zip(self._frequencies, config.ropes.values(), strict=True)):
            self._model.frequencies[idx] = frequencies.data_ptr()
            self._model.rope_scales[idx] = rope.attention_factor
        self._step = Step(
            seconds=self.phase_seconds, lm_head=ctypes.addressof(self._lm_head_struct), vocab_size=config.vocab_size
        )
        self.best = BestRows(self.team)
        self._kv: KVCache | None = None
        self.interrupt = StepInterrupt()

    lay_out_lora = staticmethod(to_native)

    def slots(self) -> NativeSlots:
        """What keeps the adapters of steps for this decoder."""
        return NativeSlots(self.config, self.compute_dtype)

    def step(
        self, batch: Batch, kv: KVCache, taps: dict[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and `logits` of its first L rows, [L, V] float32, in one call; `best` knows their best tokens."""
        padded = torch.empty(batch.num_logits, self._lm_head.num_panels * PANEL)
        if not batch.num_logits:
            return self.forward(batch, kv, taps), padded[:, : self.config.vocab_size]
        self._bind(kv)
        states = self._run(batch, taps, padded)
        logits = self._finished(padded, states, batch)
        if not self._edits_logits(batch):
            self.best.know(logits, self._step.num_bad)
        return states, logits

    def forward(self, batch: Batch, kv: KVCache, taps: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
        """Normed hidden states [L + P, H] fp32 of the rows `batch.hidden_rows`; writes all rows' KV to `kv`.

        Each layer index that `taps` holds gets that layer's output for the same rows, [L + P, H] fp32. Raises
        `StepInterruptedError`.
        """
        self._bind(kv)
        return self._run(batch, taps, None)

    def _run(self, batch: Batch, taps: dict[int, torch.Tensor] | None, logits: torch.Tensor | None) -> torch.Tensor:
        """`forward`, with the raw logits of its first rows, [L, padded V]."""
        lora = batch.lora
        assert lora is None or isinstance(lora, NativeLoraBatch)
        x = self._embedded(batch, lora)
        num_rows, num_seqs, num_hidden = len(batch.token_ids), len(batch.starts), len(batch.hidden_rows)
        hidden = torch.empty(num_hidden, self.config.hidden_size)
        blocks: list[int] = []
        for table in batch.tables:
            blocks += table
        table_lens = [len(table) for table in batch.tables]
        # Held until the kernels are done.
        integers = array("q", [*batch.token_ids, *batch.starts, *batch.query_lens, *table_lens, *batch.hidden_rows])
        short_integers = array("i", blocks)
        address = integers.buffer_info()[0]
        step = self._step
        step.num_rows, step.num_seqs, step.num_hidden = num_rows, num_seqs, num_hidden
        step.block_size = batch.block_size
        step.x = None if x is None else x.data_ptr()
        step.tokens, step.starts = address, address + 8 * num_rows
        step.query_lens = address + 8 * (num_rows + num_seqs)
        step.table_lens = address + 8 * (num_rows + 2 * num_seqs)
        step.hidden_indices = address + 8 * (num_rows + 3 * num_seqs)
        step.blocks = short_integers.buffer_info()[0]
        step.hidden, step.stop = hidden.data_ptr(), self.interrupt.address
        if lora is None:
            step.row_slots, step.lora, step.max_rank = None, None, 0
        else:
            step.row_slots, step.lora = lora.row_slots.buffer_info()[0], lora.table_address
            step.max_rank = lora.max_rank
        wanted = sorted(taps or ())
        assert len(wanted) <= MAX_TAPS
        for idx, layer in enumerate(wanted):
            assert taps is not None
            taps[layer] = torch.empty(num_hidden, self.config.hidden_size)
            step.tap_layers[idx], step.taps[idx] = layer, taps[layer].data_ptr()
        step.num_taps = len(wanted)
        step.num_logits = 0 if logits is None else logits.shape[0]
        if logits is not None:
            step.logits = logits.data_ptr()
            self.best.ask(step, logits.shape[0])
        if not self.team.forward(self._model, step):
            raise StepInterruptedError
        return hidden

    def _embedded(self, batch: Batch, lora: NativeLoraBatch | None) -> torch.Tensor | None:
        """Embeddings [T, H] fp32 of the rows; None where they are the model's own, in a form that the kernels read."""
        adds = lora is not None and lora.has_embedding
        if not adds and self.embed.dtype in (torch.bfloat16, torch.float32):
            return None
        x = F.embedding(batch.tokens, self.embed).float()
        if lora is not None:
            lora.add_embedding_(batch.tokens, x)  # before Gemma's scale, which PEFT applies to the LoRA as well
        if self.config.embed_scale != 1.0:
            x *= self._embed_scale
        return x

    def clocks(self) -> dict[str, float]:
        """Seconds that the kernels have spent so far, by phase."""
        return dict(zip(PHASES, self.phase_seconds, strict=True))

    def logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [L, V] float32 of hidden rows [L, H]."""
        num_rows = hidden.shape[0]
        padded = torch.empty(num_rows, self._lm_head.num_panels * PANEL)
        self.team.linear(self._lm_head_struct, self.is_bf16, hidden.data_ptr(), num_rows, padded.data_ptr())
        return self._finished(padded, hidden, batch)

    def _finished(self, padded: torch.Tensor, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [L, V] of what the lm_head gave for hidden rows [L.., H], in the same memory."""
        logits = padded[:, : self.config.vocab_size] if padded.shape[1] > self.config.vocab_size else padded
        if self._edits_logits(batch):
            if batch.lora is not None:
                batch.lora.add_lm_head_(hidden, logits)
            softcap_(logits, self.config.final_softcap)
        return logits

    def _edits_logits(self, batch: Batch) -> bool:
        """Whether logits are more than products of the base's lm_head."""
        lora = batch.lora
        return bool(self.config.final_softcap) or (isinstance(lora, NativeLoraBatch) and lora.has_lm_head)

    def _layer_struct(self, idx: int) -> LayerStruct:
        layer, config = self._layers[idx], self.config
        struct = LayerStruct()
        for place, module in enumerate(LINEARS):
            struct.modules[place] = layer.modules[module].struct()
        for name in NORMS:
            if name in layer.norms:
                setattr(struct, name, layer.norms[name].data_ptr())
        struct.window = config.windows[idx] or 0
        struct.rope = self._kinds.index(config.rope_keys[idx])
        return struct

    def _bind(self, kv: KVCache) -> None:
        """Point the layers at the cache's tensors, whose memory kernels/cpu/attention.h lays out in tiles."""
        if self._kv is kv:
            return
        for idx, struct in enumerate(self._structs):
            assert kv.k[idx].dtype == self.compute_dtype and kv.k[idx].shape[0] % 16 == 0
            struct.k_cache, struct.v_cache = kv.k[idx].data_ptr(), kv.v[idx].data_ptr()
        self._kv = kv
