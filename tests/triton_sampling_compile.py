"""Compiles the sampling and verification kernels for Hopper (sm_90), which needs no GPU; run as a process.

The interpreter accepts programs that the compiler refuses. A process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specserve.kernels import sampling_triton, verify_triton
from specserve.kernels.sampling import BLOCK

POINTERS = (
    dict.fromkeys(("block_best", "row_top", "logits", "temperatures"), "*fp32")
    | dict.fromkeys(
        ("block_mass", "partials", "old_partials", "goals", "top_ps", "min_ps", "uniforms"), "*fp64"
    )
    | dict.fromkeys(
        ("block_token", "block_nan", "masks", "mask_rows", "bad", "thresholds", "bounds", "old_bounds", "top_ks")
        + ("num_accepted", "last_row", "first_rows", "num_drafts"),
        "*i32",
    )
    | dict.fromkeys(("sampled", "tokens"), "*i64")
)  # fmt: skip


def compile_kernel(kernel: Any, **constants: Any) -> int:
    """Size in bytes of the kernel's binary."""
    names = kernel.arg_names
    types = POINTERS | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
    return len(compiled.asm["cubin"])


if __name__ == "__main__":
    k = sampling_triton
    for blocks in (1, 64):
        for kernel, constants in (
            (k.best_of_blocks, {"BLOCK": BLOCK}),
            (k.best_of_rows, {"BLOCKS": blocks}),
            (k.narrow, {"COUNTS": True, "BLOCK": BLOCK, "PART": 128, "BLOCKS": blocks}),
            (k.narrow, {"COUNTS": False, "BLOCK": BLOCK, "PART": 128, "BLOCKS": blocks}),
            (k.settle, {"COUNTS": True, "BLOCKS": blocks}),
            (k.settle, {"COUNTS": False, "BLOCKS": blocks}),
            (k.weigh_blocks, {"BLOCK": BLOCK}),
            (k.draw, {"BLOCK": BLOCK, "BLOCKS": blocks}),
            (verify_triton.verify_drafts, {"MAX_DRAFTS": 64}),
        ):
            print(kernel.__name__, constants, compile_kernel(kernel, **constants), "bytes")
