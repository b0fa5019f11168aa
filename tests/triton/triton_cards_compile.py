"""Compiles what the CUDA path launches for other cards than Hopper's, which needs no GPU; run by test_under_triton.py.

A binary whose shared memory a card does not have ends the engine at its start. A100, RTX 40 and L4, B200, RTX 50, each
with the sizes that the launches choose there; the cards with least memory for a few launches, with --all each for all.
What is for Hopper and newer alone (linear_rows.py, linear_fused.py) is compiled for the B200, too.
"""

from __future__ import annotations

import sys

from triton_forward_compile import attention_figures, compile_kernel, report
from triton_fused_compile import KERNELS, fused_figures
from triton_head_compile import BEGIN, CELL, POINTERS, SCORE
from triton_linear_compile import compile_tile
from triton_lora_compile import compile_lora

from specserve.kernels.device_limits import AMPLE_SHARED, MOST_SHARED
from specserve.kernels.head_loop import SIZES
from specserve.kernels.head_loop_cells_triton import begin_states, step_cells
from specserve.kernels.head_loop_scores_triton import score
from specserve.kernels.linear_rows import choose_tile
from specserve.kernels.ragged_attention import block_parameters, largest_tile_rows
from specserve.kernels.scaled_weights import choose_scaled_tile

SMALL = 99 << 10
CARDS = {80: AMPLE_SHARED, 89: SMALL, 100: MOST_SHARED, 120: SMALL}  # bytes of a program's shared memory
HEADS = ((9, 3, 64), (32, 8, 128), (8, 4, 256), (128, 1, 64))  # query heads, KV heads, head size
MOST_SPILLED = 320  # bytes, where 255 registers of a thread do not do
WITHOUT_PRODUCTS = 2048  # of fp32, which is for checks


def check_attention(capability: int, dtype: str, heads: tuple[int, int, int]) -> None:
    shared, itemsize = CARDS[capability], 4 if dtype == "fp32" else 2
    num_heads, num_kv_heads, head_dim = heads
    group = num_heads // num_kv_heads
    sizes = {largest_tile_rows(n, group, head_dim, num_kv_heads, 100, shared) for n in (1, 512, 1 << 16)}
    for tile_rows in sorted(sizes | {rows for rows in (1, 4, 16) if rows < max(sizes)}):
        blocks = block_parameters(tile_rows, group, head_dim, itemsize, shared)
        for window, num_programs, joins, is_capped in ((0, 1, False, False), (512, 8, True, True)):
            figures = attention_figures(dtype, heads, blocks, window, num_programs, joins, is_capped, capability)
            name = f"sm_{capability} attention {dtype} {heads} rows {tile_rows} programs {num_programs}"
            report(name, figures, MOST_SPILLED if itemsize == 2 else WITHOUT_PRODUCTS)
            assert figures["shared"] <= shared and (figures["memory_first"] or capability < 90), name
            if itemsize == 2:
                assert figures["mma"], f"{name}: no matrix instructions"
                assert figures["ahead"] >= 2 or group > 64, (
                    f"{name}: K and V are waited for as soon as they are asked for"
                )


def check_lora(capability: int, dtype: str, tile_rows: int, in_size: int) -> None:
    for name, compiled in compile_lora(dtype, tile_rows, in_size, capability).items():
        print(f"sm_{capability} {name}: {compiled.metadata.shared} bytes shared")
        assert compiled.metadata.shared <= CARDS[capability], name


def check_heads(capability: int) -> None:
    for kernel, warps, constants in (
        (begin_states, SIZES.warps, BEGIN | {"IS_BF16": True}),
        (step_cells, SIZES.warps, CELL),
        (score, 4, SCORE),
    ):
        pointers = POINTERS | dict.fromkeys(("hidden", "tapped"), "*bf16")
        pointers = {name: pointer for name, pointer in pointers.items() if name in kernel.arg_names}
        constants = constants | {"IS_DEPENDENT": capability >= 90}
        limit = {"maxnreg": SIZES.cell_registers} if kernel is step_cells else {}
        figures = compile_kernel(kernel, pointers, constants, (), capability, num_warps=warps, num_stages=1, **limit)
        report(f"sm_{capability} {kernel.__name__}", figures)
        assert figures["mma"] and figures["shared"] <= CARDS[capability], kernel.__name__


def check_products(capability: int) -> None:
    """Of cards from Hopper on with its shared memory. On a B200 a program takes tensor memory: before the next launch
    may begin, or two launches could wait for one another."""
    for num_rows, out_size in ((16, 576), (64, 9728), (16, 49152)):
        for held, tile in (("bf16", choose_tile(num_rows, out_size)), ("i8", choose_scaled_tile(num_rows, out_size))):
            compiled = compile_tile("bf16", held, tile, False, capability)
            ptx, name = compiled.asm["ptx"], f"sm_{capability} linear_rows by {held} {tile}"
            print(f"{name}: {compiled.metadata.shared} bytes shared")
            assert compiled.metadata.shared <= CARDS[capability] and "mma" in ptx, name
            assert ptx.find("tcgen05.alloc") < ptx.find("griddepcontrol.launch_dependents"), name
    for kernel in KERNELS:
        for held in ("bf16", "i8"):
            has_norm = kernel != "linear_add_kernel"
            figures = fused_figures(kernel, "bf16", held, 16, 1024, has_norm, 16, capability)
            report(f"sm_{capability} {kernel} by {held}", figures)
            assert figures["mma"] and figures["memory_first"] and figures["shared"] <= CARDS[capability], kernel


def main(is_all: bool) -> None:
    if not is_all:
        check_attention(89, "bf16", (8, 4, 256))
        check_lora(89, "fp32", 8, 14336)
        return
    for capability in CARDS:
        for dtype in ("bf16", "fp32"):
            for heads in HEADS[:3] if dtype == "fp32" else HEADS:
                check_attention(capability, dtype, heads)
            for tile_rows in (8, 16) if dtype == "bf16" else (8,):
                for in_size in (4096, 14336):
                    check_lora(capability, dtype, tile_rows, in_size)
        check_heads(capability)
    check_products(100)


if __name__ == "__main__":
    main("--all" in sys.argv)
