"""Drives a `Decoder` without an engine: builds `Batch` objects for sequences whose blocks lie shuffled in the cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from specserve.batch import Batch
from specserve.kernels.native import KEYS_PER_TILE, load_library
from specserve.kv_cache import KVCache
from specserve.model.decoder import Decoder
from specserve.model.native_decoder import NativeDecoder
from specserve.native_choice import NativeChoice


def native_choice(num_threads: int = 2, quantization: str = "none") -> NativeChoice:
    """The native CPU path, which tests need a C++ compiler for."""
    return NativeChoice(load_library(), num_threads, KEYS_PER_TILE, quantization, is_required=True)


@dataclass
class Driven:
    """One sequence: the tokens whose keys are cached, and the blocks that hold them."""

    tokens: list[int]
    blocks: list[int]


class Driver:
    """Feeds rows of several sequences to one forward; `shuffle` scatters their blocks, otherwise each is one run."""

    def __init__(
        self,
        decoder: Decoder | NativeDecoder,
        *,
        num_blocks: int = 64,
        block_size: int | None = None,
        shuffle: bool = True,
    ):
        config = decoder.config
        block_size = block_size or (KEYS_PER_TILE if isinstance(decoder, NativeDecoder) else 4)
        self.decoder = decoder
        self.block_size = block_size
        self.kv = KVCache(
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
            decoder.compute_dtype,
            decoder.device,
        )
        self._free = list(range(num_blocks))[::-1]
        if shuffle:
            random.Random(0).shuffle(self._free)

    def sequence(self) -> Driven:
        return Driven([], [])

    def truncate(self, seq: Driven, num_tokens: int) -> None:
        """Forget the tokens from `num_tokens` on, as a rejected draft is; their slots are overwritten."""
        del seq.tokens[num_tokens:]

    def batch(self, items: list[tuple[Driven, list[int]]], lora=None) -> Batch:
        """The batch that appends `rows` to each sequence; logits of every row."""
        size, tables, tokens, positions, slots, cu = self.block_size, [], [], [], [], [0]
        for seq, rows in items:
            start = len(seq.tokens)
            seq.tokens += rows
            while len(seq.blocks) * size < len(seq.tokens):
                seq.blocks.append(self._free.pop())
            tokens += rows
            positions += range(start, len(seq.tokens))
            slots += [seq.blocks[p // size] * size + p % size for p in range(start, len(seq.tokens))]
            cu.append(cu[-1] + len(rows))
            tables.append(seq.blocks[: -(-len(seq.tokens) // size)])
        width = max(map(len, tables))
        context_lens = [len(seq.tokens) for seq, _ in items]
        device = self.decoder.device
        return Batch(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
            cu_query_lens=torch.tensor(cu, dtype=torch.int32, device=device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            logits_indices=torch.arange(len(tokens), device=device),
            block_size=size,
            query_lens_list=[len(rows) for _, rows in items],
            context_lens_list=context_lens,
            block_tables_list=tables,
            lora=lora,
        )

    @torch.inference_mode()
    def step(self, items: list[tuple[Driven, list[int]]], lora=None) -> list[torch.Tensor]:
        """Logits [rows, V] of each sequence's rows."""
        batch = self.batch(items, lora)
        hidden = self.decoder.forward(batch, self.kv)
        return list(self.decoder.logits(hidden, batch).split([len(rows) for _, rows in items]))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """`num_tokens` tokens after `prompt`, one row a step."""
        seq, rows, out = self.sequence(), prompt, []
        for _ in range(num_tokens):
            (logits,) = self.step([(seq, rows)])
            out.append(int(logits[-1].argmax()))
            rows = [out[-1]]
        return out
