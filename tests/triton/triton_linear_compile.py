"""Compiles linear layers with one order of sums for Hopper (sm_90), which needs no GPU; test_under_triton.py runs it.

Beyond that the compiler takes the kernel, a binary shows what its speed rests on: weights and rows by TMA, wgmma, no
spilled register. Weights of 8 bits become 16 in registers, from where wgmma reads them. A process of its own, without
TRITON_INTERPRET: bf16 and one tile of each width, with --all the other dtype, tiles and a bias too.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specserve.kernels.device_limits import MOST_SHARED
from specserve.kernels.linear_rows import BLOCK_K, Tile, choose_tile
from specserve.kernels.linear_rows_triton import linear_rows_kernel
from specserve.kernels.scaled_weights import choose_scaled_tile
from specserve.kernels.written_rounding import WRITTEN_ROUNDING

SPILL = re.compile(r"\b(STL|LDL)\b")


def compile_tile(dtype: str, held: str, tile: Tile, has_bias: bool, capability: int = 90) -> Any:
    constants = {
        "HAS_SCALES": held != dtype,
        "HAS_BIAS": has_bias,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_K": BLOCK_K,
        "IS_DEPENDENT": True,
    }
    names = linear_rows_kernel.arg_names
    types = dict.fromkeys(constants, "constexpr") | {"y": f"*{dtype}", "bias": f"*{dtype}", "scales": "*fp32"}
    types["x"] = f"tensordesc<{dtype}[{tile.rows}, {BLOCK_K}]>"
    types["weight"] = f"tensordesc<{held}[{tile.columns}, {BLOCK_K}]>"
    signature = {name: types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [names.index(name) for name in ("y", "scales", "bias", "out_size", "in_size")]
    attrs = {(idx,): [["tt.divisibility", 16]] for idx in aligned}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **WRITTEN_ROUNDING}
    source = ASTSource(linear_rows_kernel, signature, values, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(dtype: str, held: str, tile: Tile, has_bias: bool) -> None:
    compiled = compile_tile(dtype, held, tile, has_bias)
    ptx, sass, shared = compiled.asm["ptx"], compiled.asm["sass"], compiled.metadata.shared
    num_copies, num_wgmma = ptx.count("cp.async.bulk.tensor"), ptx.count("wgmma.mma_async")
    num_spills = len(SPILL.findall(sass))
    print(
        f"linear_rows {dtype} by {held} {tile} bias {has_bias}: {shared} bytes shared, {num_copies} TMA, "
        f"{num_wgmma} wgmma, {num_spills} spills"
    )
    assert shared <= MOST_SHARED and num_copies and num_wgmma and not num_spills, tile


def main(is_all: bool) -> None:
    for dtype in ("bf16", "fp16") if is_all else ("bf16",):
        for num_rows, out_size in [(rows, size) for rows in (16, 32, 64) for size in (576, 9728, 49152)]:
            if not is_all and (num_rows, out_size) not in ((16, 576), (64, 49152)):
                continue
            for has_bias in (False, True) if is_all else (False,):
                check(dtype, dtype, choose_tile(num_rows, out_size), has_bias)
        for held in ("i8", "fp8e4nv"):
            for num_rows in (16, 32, 64, 512) if is_all else (16, 512):
                for out_size in (576, 9728, 49152) if is_all else (4096,):
                    check(dtype, held, choose_scaled_tile(num_rows, out_size), has_bias=is_all)


if __name__ == "__main__":
    main("--all" in sys.argv)
