"""Compiles the sampling and verification kernels for Hopper (sm_90), which needs no GPU; run as a process.

The interpreter accepts programs that the compiler refuses; one that spills registers fails too. A process of its
own, without TRITON_INTERPRET. With --all for vocabularies of one block too.
"""

from __future__ import annotations

from triton_forward_compile import IS_ALL, compile_kernel, report

from specserve.kernels import logit_edits_triton, sampling_list_triton, sampling_triton, verify_triton
from specserve.kernels.logit_edits import _BLOCK, ENTRY_INTS, ROW_INTS
from specserve.kernels.sampling import BLOCK, LIST_PLACES

POINTERS = (
    dict.fromkeys(("block_best", "row_top", "logits", "temperatures", "list_x", "saved"), "*fp32")
    | dict.fromkeys(
        ("block_mass", "partials", "old_partials", "goals", "top_ps", "min_ps", "uniforms", "masses", "row_mass"),
        "*fp64",
    )
    | dict.fromkeys(
        ("block_token", "block_nan", "masks", "mask_rows", "bad", "thresholds", "bounds", "old_bounds", "top_ks")
        + ("is_done", "counts", "list_token", "list_size", "num_accepted", "last_row", "first_rows", "num_drafts")
        + ("rows", "entries"),
        "*i32",
    )
    | dict.fromkeys(("sampled", "tokens"), "*i64")
)  # fmt: skip
EDITS = {"ROW_INTS": ROW_INTS, "ENTRY_INTS": ENTRY_INTS, "BLOCK": _BLOCK}
WARPS = {"gather": 8, "choose": 8}


if __name__ == "__main__":
    k, lists = sampling_triton, sampling_list_triton
    for blocks in (1, 64) if IS_ALL else (64,):
        for kernel, constants in (
            (k.best_of_blocks, {"BLOCK": BLOCK}),
            (k.best_of_rows, {"BLOCKS": blocks}),
            (k.narrow, {"COUNTS": True, "BLOCK": BLOCK, "PART": 128, "BLOCKS": blocks}),
            (k.narrow, {"COUNTS": False, "BLOCK": BLOCK, "PART": 128, "BLOCKS": blocks}),
            (k.settle, {"COUNTS": True, "BLOCKS": blocks}),
            (k.settle, {"COUNTS": False, "BLOCKS": blocks}),
            (k.weigh_blocks, {"BLOCK": BLOCK}),
            (k.draw, {"BLOCK": BLOCK, "BLOCKS": blocks}),
            (lists.tally, {"BLOCK": BLOCK, "PART": 1024}),
            (lists.gather, {"BLOCK": BLOCK, "BLOCKS": blocks}),
            (lists.choose, {"PLACES": LIST_PLACES}),
            (logit_edits_triton.edit_rows, EDITS),
            (logit_edits_triton.restore_rows, EDITS),
            (verify_triton.verify_drafts, {"MAX_DRAFTS": 64}),
        ):
            pointers = {name: pointer for name, pointer in POINTERS.items() if name in kernel.arg_names}
            report(
                f"{kernel.__name__} {blocks} blocks",
                compile_kernel(kernel, pointers, constants, num_warps=WARPS.get(kernel.__name__, 4)),
            )
