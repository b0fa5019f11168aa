"""The steps of `bench.cpu_steps`: how many sequences and rows, and what bytes and operations they ask for at least.

Bytes are the weights at their bits (of the lm_head 8 at least), without outputs' scales and padding, and KV;
operations are multiplications and additions. Knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from specserve.compute.decoder_weights import GROUPS
from specserve.model.config import ModelConfig
from specserve.model.shapes import module_shapes

from .random_models import RANK
from .shapes import LLAMA1B, LLAMA3B, SMOLLM2, TINY

SHAPES = {shape.name: shape for shape in (SMOLLM2, LLAMA1B, LLAMA3B, TINY)}
BITS = {"none": 16, "int8": 8, "int4": 5}  # 4 and a share of the 16 that a group of 16 inputs has for step and offset
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `num_seqs` sequences with `context` tokens before their `num_rows` rows each."""

    num_seqs: int
    num_rows: int
    context: int
    is_prompt: bool = False
    num_loras: int = 0  # different ones; sequence i has the i-th, then they begin again

    @property
    def name(self) -> str:
        rows = self.num_seqs * self.num_rows
        kind = f"prompt of {rows}" if self.is_prompt else f"{rows} row{'s' * (rows > 1)}"
        kind += f" of {self.num_seqs}" * (not self.is_prompt and self.num_rows > 1) + ", LoRAs" * bool(self.num_loras)
        return f"{kind} at {self.context}"

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * -(-(self.context + self.num_rows) // BLOCK_SIZE)

    def num_bytes(self, config: ModelConfig, bits: float, kv_bytes: int) -> float:
        """Weights and KV that the step reads."""
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * kv_bytes
        loras = self.num_loras * RANK * sum(map(sum, linears(config))) * config.num_layers * 2
        head = config.vocab_size * config.hidden_size
        weights = (layer_parameters(config) * bits + head * max(8, bits)) / 8
        return weights + self.num_seqs * self.context * kv + loras

    def num_operations(self, config: ModelConfig) -> float:
        """Multiplications and additions: all linears, the lm_head where logits are needed, attention's two products."""
        rows, logits = self.num_seqs * self.num_rows, self.num_seqs * (1 if self.is_prompt else self.num_rows)
        keys = self.num_seqs * self.num_rows * (self.context + (self.num_rows + 1) / 2)  # all rows' keys together
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys
        products = 2 * rows * layer_parameters(config) + 2 * logits * config.vocab_size * config.hidden_size
        loras = 2 * rows * RANK * sum(map(sum, linears(config))) * config.num_layers
        return products + attention + loras * bool(self.num_loras)


def linears(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of a layer's."""
    shapes = module_shapes(config)
    return [shapes[module] for modules in GROUPS.values() for module in modules]


def layer_parameters(config: ModelConfig) -> int:
    return config.num_layers * sum(a * b for a, b in linears(config))


def cases_of(rows: list[int], contexts: list[int], prompt: int, adapters: int) -> list[Case]:
    cases = []
    for context in contexts:
        cases += [Case(num, 1, context) for num in rows] + [Case(8, 8, context), Case(1, prompt, context, True)]
        if adapters:
            cases += [Case(num, 1, context, num_loras=min(num, adapters)) for num in rows]
            cases += [Case(1, prompt, context, True, 1)]
    return cases
