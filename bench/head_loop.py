"""What do K guesses of every sequence's lookahead head cost on a GPU, without the host in between?

The limit is reading what the loop reads of the heads that are in use, once for the first state and once a position, at
the measured copy bandwidth; what stays in the cache may beat it. `weights_us` is the same of all of a head's weights,
some of which the loop has multiplied into tables. The comparison is the loop that the host drives (HeadRunner: batched
products in torch, one synchronisation a position). Tables are as large as an engine's. Cases are left out once --budget
seconds are over, and said to be.

    python -m bench.head_loop [--budget 25] [--dry-run]
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from specserve.drafters.head import HeadWeights, head_shapes
from specserve.drafters.head_device import DeviceHeads, SeatedSequence
from specserve.drafters.head_files import LookaheadConfig, LookaheadHeadFile, pad_vocab
from specserve.drafters.head_source import HeadRunner, HeadSource
from specserve.kernels.head_loop_tables import HeadTensors, LoopRows

from .gpu_cases import Case, case_command
from .gpu_timing import seconds_per_call
from .shapes import LLAMA8B, SMOLLM2, TINY, ModelShape

PROMPT_LEN = 200


@dataclass(frozen=True, slots=True)
class HeadShape:
    model: ModelShape
    state_size: int
    num_tokens: int  # of the task vocabulary
    window: int


SHAPES = (HeadShape(SMOLLM2, 192, 2048, 8), HeadShape(LLAMA8B, 256, 4096, 8))
TINY_HEAD = HeadShape(TINY, 16, 40, 4)


def make_head(shape: HeadShape, draft_len: int, device: torch.device) -> LookaheadHeadFile:
    """A random head, as read from a file."""
    config = LookaheadConfig(
        format_version=1, base_hash="", tokenizer_hash="", lora_hash="", hidden_size=shape.model.hidden_size,
        state_size=shape.state_size, tap_layer=0, draft_len=draft_len, copy_window=shape.window, copy_start=0,
        vocab=list(range(shape.num_tokens)),
    )  # fmt: skip
    shapes = head_shapes(shape.model.hidden_size, shape.state_size, shape.num_tokens, shape.window)
    tensors = {
        name: torch.empty(1, *size, device=device).normal_(std=size[0] ** -0.5).bfloat16().float()
        for name, size in shapes.items()
    }
    return LookaheadHeadFile(config, HeadWeights(**pad_vocab(tensors)))


def loop(
    shape: HeadShape, num_seqs: int, num_heads: int, num_guesses: int, limit: float, device: torch.device
) -> dict[str, Any]:
    heads = [make_head(shape, num_guesses, device) for _ in range(num_heads)]
    head_of = [heads[idx * num_heads // num_seqs] for idx in range(num_seqs)]
    on_device = DeviceHeads(
        hidden_size=shape.model.hidden_size, vocab_size=shape.model.vocab_size, tap_layers=[0], max_heads=num_heads,
        max_num_seqs=num_seqs, max_prompt_len=PROMPT_LEN, max_draft_len=num_guesses, device=device,
        **({"max_state_size": shape.state_size, "max_vocab": shape.num_tokens} if device.type != "cuda" else {}),
    )  # fmt: skip
    prompt = torch.randint(shape.model.vocab_size, (PROMPT_LEN,)).tolist()
    head_ids = [on_device.add_head(head) for head in head_of]
    on_device.add_sequences([SeatedSequence(seq, prompt, head) for seq, head in enumerate(head_of)])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter has no bf16 products
    hidden = torch.empty(num_seqs, shape.model.hidden_size, dtype=dtype, device=device).normal_()
    tapped = hidden.clone()[None]
    rows = torch.arange(num_seqs, dtype=torch.int32, device=device)
    sampled = torch.randint(shape.num_tokens, (num_seqs,), device=device)
    table = LoopRows(
        rows, torch.tensor(head_ids, dtype=torch.int32, device=device), rows, torch.zeros_like(rows), rows,
        torch.full_like(rows, num_guesses), sampled,
    )  # fmt: skip
    seconds = seconds_per_call([lambda: on_device.launch(table, hidden, tapped, num_guesses)], device)
    num_bytes = num_heads * bytes_read(on_device.tensors(heads[0]), num_seqs // num_heads, num_guesses)
    host_s = host_loop_seconds(head_of, prompt, sampled.tolist(), hidden, num_guesses)
    return {
        "shape": shape.model.name, "sequences": num_seqs, "heads": num_heads, "guesses": num_guesses,
        "us": round(seconds * 1e6, 1), "bytes": num_bytes, "limit_us": round(num_bytes / limit * 1e6, 1),
        "ratio": round(seconds * limit / num_bytes, 2),
        "weights_us": round(num_heads * weight_bytes(shape, num_guesses) / limit * 1e6, 1),
        "host_us": round(host_s * 1e6, 1),
    }  # fmt: skip


def bytes_read(head: HeadTensors, num_seqs: int, num_guesses: int) -> int:
    """By `num_seqs` sequences of one head: weights once a position, three rows of tables for each sequence."""
    first = head.init_weight.nbytes + head.init_bias.nbytes
    names = ("embed", "out_bias", "state_gates", "candidate_bias", "query_weight", "slot_weight", "slot_bias")
    weights = sum(getattr(head, name).nbytes for name in names)
    return first + num_guesses * (weights + num_seqs * 3 * head.token_gates[0].nbytes)


def weight_bytes(shape: HeadShape, num_guesses: int) -> int:
    """Of a head's weights in bf16: the first state's once, all others once a position."""
    shapes = head_shapes(shape.model.hidden_size, shape.state_size, shape.num_tokens, shape.window)
    sizes = {name: 2 * math.prod(size) for name, size in shapes.items()}
    first = sizes["init_weight"] + sizes["init_bias"]
    return first + num_guesses * (sum(sizes.values()) - first)


def host_loop_seconds(
    head_of: list[LookaheadHeadFile], prompt: list[int], sampled: list[int], hidden: torch.Tensor, num_guesses: int
) -> float:
    sources = [HeadSource(head, prompt) for head in head_of]
    runner, times = HeadRunner(), []
    for _ in range(5):
        start = time.perf_counter()
        for row, source in enumerate(sources):
            source.set_hidden(hidden, hidden, row, len(prompt) + 1)
            source.begin([*prompt, sampled[row]])
        runner.begin(sources)
        for _ in range(num_guesses):
            runner.step(sources)
            for source in sources:
                guess = source.peek()
                if guess is not None:
                    source.follow(guess.token)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plan(is_dry: bool, limit: float, device: torch.device) -> list[Case]:
    """Cases, most telling first."""
    if is_dry:
        return [lambda: loop(TINY_HEAD, 3, 2, 2, limit, device)]
    # sequences, heads, guesses
    counts = ((8, 8, 8), (64, 64, 8), (8, 8, 4), (64, 64, 4), (1, 1, 8), (64, 1, 8), (64, 8, 8))
    return [lambda s=s, n=n, h=h, k=k: loop(s, n, h, k, limit, device) for n, h, k in counts for s in SHAPES]


main = case_command("head_loop", __doc__, plan, budget_s=25.0)


if __name__ == "__main__":
    main()
