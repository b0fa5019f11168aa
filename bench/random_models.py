"""Models of a shape that nobody trained, adapters for them, and sequences that stand still.

A step's time depends on sizes, not on values. Weights are made one by one where they are asked for, so that no more
than one stands beside what a path makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from specserve.adapters.lora import LayOut, LoraAdapter
from specserve.adapters.sizes import layout_bytes
from specserve.adapters.slab import Slab, as_in_peft
from specserve.compute.decoder_weights import GROUPS
from specserve.kernels.lora import LoraPair
from specserve.messages import GenerateRequest, SamplingParams
from specserve.model.config import ModelConfig
from specserve.model.shapes import module_shapes, tensor_shapes
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.scheduler import ScheduledSequence
from specserve.schedule.sequence import Sequence as RunningSequence

RANK = 16
MOST_NEW_ROWS = 64


class RandomWeights:
    """The weights of `config`, made on `device` in `dtype`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self._shapes = module_shapes(config)

    def _random(self, rows: int, columns: int) -> torch.Tensor:
        largest = (3 / columns) ** 0.5  # variance 1 / columns; normal values take twice the time
        return torch.empty(rows, columns, device=self.device, dtype=self.dtype).uniform_(-largest, largest)

    def final_norm(self) -> torch.Tensor:
        return torch.ones(self.config.hidden_size, device=self.device)

    def linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        in_size, out_size = self._shapes[name.rpartition(".")[2]]
        return self._random(out_size, in_size), None

    def layer_norms(self, idx: int) -> dict[str, torch.Tensor]:
        return {"input_norm": self.final_norm(), "mlp_norm": self.final_norm()}

    def embed(self) -> torch.Tensor:
        return self._random(self.config.vocab_size, self.config.hidden_size)

    def lm_head(self, embed: torch.Tensor) -> torch.Tensor:
        return embed if self.config.tie_word_embeddings else self.embed()

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of a model directory, by their names on the hub."""
        for name, shape in tensor_shapes(self.config).items():
            yield name, self._random(*shape) if len(shape) == 2 else torch.ones(shape, dtype=self.dtype)


def random_adapter(
    config: ModelConfig,
    idx: int,
    device: torch.device,
    dtype: torch.dtype,
    lay_out: LayOut = as_in_peft,
) -> LoraAdapter:
    """A LoRA of rank 16 on all linears, lying as served ones do; `lay_out` is its decoder's `lay_out_lora`."""
    shapes = {name: module_shapes(config)[name] for modules in GROUPS.values() for name in modules}
    sizes = (layout_bytes((RANK, size_in), (size_out, RANK), dtype.itemsize) for size_in, size_out in shapes.values())
    slab = Slab(config.num_layers * sum(sizes))
    layers = {}
    for layer in range(config.num_layers):
        for module, (size_in, size_out) in shapes.items():
            a = torch.randn(RANK, size_in, dtype=dtype).mul_(size_in**-0.5)
            b = torch.randn(size_out, RANK, dtype=dtype).mul_(0.01)
            layers[layer, module] = lay_out(LoraPair(a, b, 1.0), slab.empty)
    adapter = LoraAdapter(f"random-{idx}", f"random-{idx}", layers, None, None, RANK, None)
    return adapter if device.type == "cpu" else adapter.copied(lambda tensor: tensor.to(device))


def standing_sequences(
    blocks: BlockManager,
    num_seqs: int,
    num_rows: int,
    context: int,
    adapters: Sequence[LoraAdapter] = (),
    is_prompt: bool = False,
) -> list[ScheduledSequence]:
    """Sequences with `context` computed tokens and `num_rows` rows to come, adapter i for sequence i.

    The rows are drafts behind one token, or the rest of a prompt. Blocks are released again: what takes turns may lie
    in the same ones.
    """
    items = []
    for idx in range(num_seqs):
        key = adapters[idx].content_hash if adapters else None
        known = num_rows if is_prompt else 1
        sampling = SamplingParams(max_tokens=MOST_NEW_ROWS)
        seq = RunningSequence(idx, GenerateRequest(str(idx), [1] * (context + known), sampling, adapter_hash=key))
        seq.num_computed = context
        assert blocks.reserve(seq.block_table, context + num_rows)
        items.append(ScheduledSequence(seq, known, [2] * (num_rows - known)))
    for item in items:
        blocks.release(list(item.seq.block_table))
    return items
