"""Compiles the LoRA kernels for Hopper (sm_90), which needs no GPU; run by test_lora_kernels.py as a process.

The interpreter accepts programs that the compiler refuses. A process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specserve.kernels import lora_triton

DTYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
POINTERS = {"h": "*fp32", "scales": "*fp32", "weights": "*i64"} | dict.fromkeys(
    ("ranks", "columns", "tiles", "row_slots"), "*i32"
)


def compile_kernel(kernel: Any, dtype: str) -> int:
    """Size in bytes of the kernel's binary for q/k/v with rank-16 adapters."""
    constants = {
        "NUM_MODULES": 3, "ALIGNED": True, "TILE_ROWS": 16, "BLOCK_R": 16, "BLOCK_K": lora_triton.BLOCK_K,
        "BLOCK_N": lora_triton.BLOCK_N, "DTYPE": DTYPES[dtype],
    }  # fmt: skip
    names = kernel.arg_names
    types = POINTERS | {"x": f"*{dtype}", "y": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    compiled = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
    return len(compiled.asm["cubin"])


if __name__ == "__main__":
    for dtype in DTYPES:
        for name in ("sgmv_shrink", "sgmv_expand", "bgmv_shrink", "bgmv_expand"):
            print(name, dtype, compile_kernel(getattr(lora_triton, name), dtype), "bytes")
