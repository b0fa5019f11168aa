"""Compiles the heads' loop for Hopper (sm_90), which needs no GPU; run by test_under_triton.py as a process.

A kernel that the compiler refuses, that spills registers, that has more of them than its programs an SM allow, or that
lost its tensor cores or its 16-byte loads fails.
"""

from __future__ import annotations

from triton_forward_compile import compile_kernel, report

from specserve.kernels import head_loop_choice_triton as of_sequences
from specserve.kernels.head_loop import SIZES, TILE_ROWS, list_warps
from specserve.kernels.head_loop_cells_triton import begin_states, step_cells
from specserve.kernels.head_loop_scores_triton import score
from specserve.kernels.head_loop_tables import CELL_BLOCK, CHUNK, TOKEN_BLOCK

FLOATS = (
    "partials", "squares", "state", "states", "new_states", "queries", "slots", "scores", "block_stats",
    "entry_scores", "probabilities",
)  # fmt: skip
INTS = (
    "input_tokens", "moves", "next_tokens", "draft_positions", "positions", "prompt_tokens", "prompt_local",
    "prompt_lens", "seats", "head_ids", "first_rows", "num_accepted", "last_row", "num_guesses", "cells", "blocks",
    "sizes", "guesses", "block_tokens", "entry_tokens",
)  # fmt: skip
POINTERS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTS, "*i32") | {"sampled": "*i64", "addresses": "*i64"}
TILE = {"TILE_ROWS": TILE_ROWS, "CELL_BLOCK": CELL_BLOCK}
OVERLAPS = {"IS_DEPENDENT": True}
CELL = TILE | OVERLAPS | {"BLOCK_D": SIZES.block_d, "PARTS": SIZES.warps, "BLOCK_Q": SIZES.block_q, "WIDTH": 16}
SCORE = TILE | OVERLAPS | {"TOKEN_BLOCK": TOKEN_BLOCK, "BLOCK_D": SIZES.block_d, "WIDTH": 16}
CHOOSE = OVERLAPS | {"MOST_BLOCKS": 256, "TOKEN_BLOCK": TOKEN_BLOCK}
LIST = TILE | {"TOKEN_BLOCK": TOKEN_BLOCK, "MOST_CELLS": 32, "MOST_BLOCKS": 256}
BEGIN = TILE | OVERLAPS | {"CHUNK": CHUNK, "PARTS": SIZES.warps}

if __name__ == "__main__":
    for kernel, hidden, warps, most_registers, constants in (
        (of_sequences.list_work, "bf16", 4, 255, LIST | {"BLOCK_S": 64}),
        (of_sequences.list_work, "bf16", list_warps(512), 255, LIST | {"BLOCK_S": 512}),
        (of_sequences.list_work, "bf16", list_warps(4096), 128, LIST | {"BLOCK_S": 4096}),
        (begin_states, "bf16", SIZES.warps, 128, BEGIN | {"IS_BF16": True}),
        (begin_states, "fp32", SIZES.warps, 255, BEGIN | {"IS_BF16": False}),
        (of_sequences.start_sequences, "bf16", 4, 128, OVERLAPS | {"BLOCK_D": 512, "WIDTH": 16}),
        (step_cells, "bf16", SIZES.warps, 128, CELL),
        (score, "bf16", 4, 255, SCORE),
        (of_sequences.choose, "bf16", 1, 255, CHOOSE | {"WIDTH": 16}),
        (of_sequences.choose, "bf16", 1, 255, CHOOSE | {"WIDTH": 64}),
    ):
        pointers = POINTERS | dict.fromkeys(("hidden", "tapped"), f"*{hidden}")
        pointers = {name: pointer for name, pointer in pointers.items() if name in kernel.arg_names}
        limit = {"maxnreg": SIZES.cell_registers} if kernel is step_cells else {}
        figures = compile_kernel(kernel, pointers, constants, num_warps=warps, num_stages=1, **limit)
        report(f"{kernel.__name__} {hidden}", figures)
        assert figures["registers"] <= most_registers, "fewer programs fit an SM than there are"
        if kernel is of_sequences.start_sequences:
            assert figures["barriers"] == 1, "a warp may read a copy pointer that another one has moved"
        if kernel in (begin_states, step_cells, score):
            assert hidden != "bf16" or figures["mma"] or figures["wgmma"], "no matrix instructions"
            assert figures["load_bytes"] == 16, "weights are not read by 16 bytes"
