"""Compiles the heads' loop for Hopper (sm_90), which needs no GPU; run by test_under_triton.py as a process.

A kernel that the compiler refuses, or that spills registers, fails.
"""

from __future__ import annotations

from triton_forward_compile import compile_kernel, report

from specserve.kernels import head_loop_triton as k
from specserve.kernels.head_loop import _BLOCK_K, _BLOCK_N, _CELL_BLOCK_K, _CHUNK, TILE_ROWS

FLOATS = (
    "partials", "squares", "state", "new_state", "x", "queries", "entry_scores", "scores", "copy_queries",
    "probabilities",
)  # fmt: skip
INTS = (
    "input_tokens", "moves", "draft_positions", "positions", "prompt_tokens", "prompt_local", "prompt_lens",
    "seats", "head_ids", "first_rows", "num_accepted", "last_row", "tiles", "sizes", "guesses",
)  # fmt: skip
POINTERS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTS, "*i32") | {"sampled": "*i64", "addresses": "*i64"}
TILE = {"TILE_ROWS": TILE_ROWS, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K}


if __name__ == "__main__":
    for kernel, hidden, constants in (
        (k.walk_pointers, "bf16", {"WIDTH": 16}),
        (k.begin_states, "bf16", TILE | {"IS_BF16": True, "CHUNK": _CHUNK}),
        (k.begin_states, "fp32", TILE | {"IS_BF16": False, "CHUNK": _CHUNK}),
        (k.finish_states, "bf16", {"BLOCK_N": _BLOCK_N}),
        (k.feed, "bf16", TILE),
        (k.step_cells, "bf16", TILE | {"BLOCK_K": _CELL_BLOCK_K}),
        (k.make_queries, "bf16", TILE),
        (k.score_tokens, "bf16", TILE),
        (k.choose, "bf16", {"WIDTH": 16, "BLOCK_U": 1024, "BLOCK_K": _BLOCK_K}),
        (k.choose, "bf16", {"WIDTH": 64, "BLOCK_U": 1024, "BLOCK_K": _BLOCK_K}),
    ):
        pointers = POINTERS | dict.fromkeys(("hidden", "tapped"), f"*{hidden}")
        pointers = {name: pointer for name, pointer in pointers.items() if name in kernel.arg_names}
        report(f"{kernel.__name__} {hidden}", compile_kernel(kernel, pointers, constants))
