"""Compiles a layer's fused linears for Hopper (sm_90), which needs no GPU; test_under_triton.py runs it.

What their speed rests on can be seen in a binary: weights by 16 bytes, wgmma, no spilled register. A process of its
own, without TRITON_INTERPRET: the default model's sizes in bf16, with --all more rows, larger models and 8 bits.
"""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from triton_forward_compile import compile_kernel, report

from specserve.kernels import linear_fused, linear_fused_triton
from specserve.kernels.device_limits import MOST_SHARED
from specserve.kernels.linear_fused import ahead_of_wait
from specserve.kernels.linear_rows import BLOCK_K
from specserve.kernels.written_rounding import WRITTEN_ROUNDING

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
KERNELS = ("linear_add_kernel", "linear_gated_kernel", "linear_rope_kernel")


def fused_figures(
    name: str, dtype: str, held: str, num_rows: int, in_size: int, has_norm: bool, used: int, capability: int = 90
) -> dict[str, int]:
    rows = "*fp32" if has_norm else f"*{dtype}"
    pointers = dict.fromkeys(("residual", "scales", "norm", "cos", "sin"), "*fp32") | {"slot_mapping": "*i64"}
    pointers |= dict.fromkeys(("out", "q", "bias", "k_cache", "v_cache"), f"*{dtype}") | {
        "x": rows,
        "weight": f"*{held}",
    }
    constants: dict[str, Any] = {
        "HAS_SCALES": held != dtype, "HAS_BIAS": False, "DTYPE": DTYPES[dtype], "ROWS": 16, "USED": used,
        "BLOCK_K": BLOCK_K, "IS_DEPENDENT": True,
    }  # fmt: skip
    constants |= ahead_of_wait(in_size, 2 if held == dtype else 1)
    if name != "linear_add_kernel":
        norm = linear_fused.norm_sizes(num_rows, in_size) if has_norm else linear_fused.NO_NORM
        constants |= norm
    constants |= {"GELU": False} if name == "linear_gated_kernel" else {}
    constants |= {"NUM_HEADS": 9, "NUM_KV_HEADS": 3, "HEAD_DIM": 64} if name == "linear_rope_kernel" else {}
    kernel = getattr(linear_fused_triton, name)
    pointers = {key: kind for key, kind in pointers.items() if key in kernel.arg_names}
    options = {"num_warps": 4, "num_stages": linear_fused.NUM_STAGES, **WRITTEN_ROUNDING}
    return compile_kernel(kernel, pointers, constants, ("eps",), capability, **options)


def compile_fused(name: str, dtype: str, held: str, num_rows: int, in_size: int, has_norm: bool, used: int) -> None:
    figures = fused_figures(name, dtype, held, num_rows, in_size, has_norm, used)
    report(f"{name} {dtype} by {held} rows {num_rows} K {in_size} used {used}", figures)
    assert figures["wgmma"] and figures["load_bytes"] == 16 and figures["shared"] < MOST_SHARED, (name, figures)
    assert figures["copy_bytes"] == (16 if ahead_of_wait(in_size, 2 if held == dtype else 1)["HAS_REST"] else 0), (
        name,
        figures,
    )
    assert bool(figures["joined"]) == (name == "linear_rope_kernel"), (name, figures)  # by tl.fma, in rotations alone


def main(is_all: bool) -> None:
    sizes = ((576, 1), (576, 3), (576, 16), (1024, 16), (2048, 3), (4096, 3))
    if not is_all:
        compile_fused("linear_add_kernel", "bf16", "bf16", 16, 1536, False, 16)
        compile_fused("linear_gated_kernel", "bf16", "bf16", 1, 576, True, 32)
        compile_fused("linear_rope_kernel", "bf16", "bf16", 16, 576, True, 16)
        return
    for dtype in DTYPES:
        for held in (dtype, "i8", "fp8e4nv"):
            for used in (16, 64):
                compile_fused("linear_add_kernel", dtype, held, 16, 1536, False, used)
                for name in KERNELS[1:]:
                    for in_size, num_rows in sizes:
                        compile_fused(name, dtype, held, num_rows, in_size, True, used)
                    compile_fused(name, dtype, held, 16, 2048, False, used)


if __name__ == "__main__":
    main("--all" in sys.argv)
