"""What steps on CUDA take of the device's memory beside weights, KV and adapters, before any of it is taken.

The KV cache gets a share of what is free, so what comes after it has to be known then: buffers that live as long as the
engine, what the largest step holds at once (in the graphs' pool, and as much in the run before a capture), libraries'
working memory, and the graphs. An upper bound, but for what nobody meets: a test compares it with what is allocated.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ...drafters.head_device import MAX_STATE_SIZE, MAX_VOCAB, MAX_WINDOW
from ...kernels.head_loop_tables import HeadScratch, PromptPool
from ...kernels.lora_blocks import scratch_size
from ...kernels.lora_tables import BLOCK_R, LoraEntry
from ...kernels.sampling import SamplingScratch
from ...model.config import ModelConfig
from ..path import StepLimits
from .buckets import ROW_BUCKETS, most_logits, most_rows, padded
from .drafts import MAX_PROMPT_LEN
from .lora import EMBEDDING, lora_shapes

_META = torch.device("meta")
_ATTENTION_BYTES = 1 << 26  # that splits' partial results may take
_EDITS_BYTES = 1 << 24  # of penalties and biases
_LIBRARY_BYTES = 1 << 26  # of cuBLAS, on the steps' stream and on that of captures
_GRAPHS_BYTES = 80 << 24  # as many graphs are captured at start, of 16 MiB each


def step_bytes(config: ModelConfig, dtype: torch.dtype, limits: StepLimits, cuda_graphs: bool = True) -> int:
    """Of steps within `limits`, with activations of `dtype`."""
    num_rows = padded(min(limits.max_rows, most_rows()))  # more are refused
    num_logits = most_logits(num_rows, config.vocab_size)
    at_once = layer_bytes(config, dtype, num_rows) + num_logits * config.vocab_size * dtype.itemsize
    buffers = buffer_bytes(config, dtype, limits, num_rows, num_logits)
    return buffers + _LIBRARY_BYTES + at_once + (at_once + _GRAPHS_BYTES if cuda_graphs else 0)


def buffer_bytes(config: ModelConfig, dtype: torch.dtype, limits: StepLimits, num_rows: int, num_logits: int) -> int:
    """What is allocated once; parameters of sampling for every number of rows."""
    hidden, vocab = config.hidden_size, config.vocab_size
    rows = num_rows * (hidden * (4 + 2 * dtype.itemsize) + 256)  # residual, hidden states, a tapped layer; integers
    logits = num_logits * (4 * vocab + 2 * hidden * dtype.itemsize)
    masks = sum(num for num in ROW_BUCKETS if num <= num_logits) * (vocab // 8 + 64)
    num_seats, max_len = padded(limits.max_seqs), limits.max_model_len
    scratch = (
        SamplingScratch.allocate(num_logits, vocab, _META),
        HeadScratch.allocate(num_seats, hidden, MAX_STATE_SIZE, MAX_VOCAB, MAX_WINDOW, _META),
        PromptPool.allocate(num_seats, min(max_len, MAX_PROMPT_LEN), _META),
    )
    num_blocks, shapes = -(-limits.max_lora_rank // BLOCK_R), lora_shapes(config)
    nowhere = torch.empty(0, device=_META)
    lora = max(
        scratch_size(LoraEntry(nowhere, shape, num_blocks, dtype), num_rows, is_embedding=key == EMBEDDING)
        for key, shape in shapes.items()
    )
    records = limits.max_adapters * sum(len(shape.out_sizes) + 1 for shape in shapes.values()) * 32
    tables = num_seats * max_len // 4 + num_rows * num_blocks * 40 + records
    return rows + logits + masks + sum(map(_nbytes, scratch)) + 4 * lora + tables + _ATTENTION_BYTES + _EDITS_BYTES


def layer_bytes(config: ModelConfig, dtype: torch.dtype, num_rows: int) -> int:
    """What a layer's launches hold at once: at most what it reads, its outputs, and those of the layer before."""
    q = config.num_heads * config.head_dim
    values = 2 * q + 2 * config.num_kv_heads * config.head_dim + 3 * config.hidden_size + 4 * config.intermediate_size
    angles = 8 * config.head_dim * len(config.ropes)
    return num_rows * (values * dtype.itemsize + 2 * angles)


def _nbytes(value: Any) -> int:
    """Of the tensors in a dataclass, and of those within."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_nbytes(getattr(value, field.name)) for field in fields(value))
