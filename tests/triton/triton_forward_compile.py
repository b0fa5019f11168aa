"""Compiles the forward pass's kernels for Hopper (sm_90), which needs no GPU, and looks at what came out.

The interpreter accepts programs that the compiler refuses. Each line says registers, spilled bytes, shared memory and
the widest global loads; a kernel that spills, or a fast case that lost its 16-byte loads, its matrix instructions or
their overlap with one another and with the loads of later blocks, fails. Run by test_under_triton.py as a process of
its own, without TRITON_INTERPRET: each kernel as a large model in bf16 launches it, with --all in the variants of other
models and dtypes too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from specserve.kernels import (
    add_norm_triton,
    gated_activation_triton,
    pooled_rows_triton,
    ragged_attention_triton,
    rope_kv_triton,
)
from specserve.kernels.pooled_rows import MAX_BLOCK, UNROLL
from specserve.kernels.ragged_attention import block_parameters
from specserve.kernels.written_rounding import WRITTEN_ROUNDING


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    floats: tuple[str, ...] = (),
    capability: int = 90,
    **options: int,
) -> dict[str, int]:
    """Figures of the PTX and of the binary. Pointers and the other integers are multiples of 16, as at a launch."""
    names = kernel.arg_names
    types = dict.fromkeys(constants, "constexpr") | pointers | dict.fromkeys(floats, "fp32")
    signature = {name: types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (idx,): [["tt.divisibility", 16]]
        for idx, name in enumerate(names)
        if name not in constants and name not in floats
    }
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, waits = compiled.asm["ptx"], re.findall(r"ttg\.async_wait .*num = (\d+)", compiled.asm["ttgir"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK"))
    assert registers and stack, usage
    vectors = re.findall(r"ld\.global[\w.:]*\.v(\d)\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag][\w.:]* *\[[^]]*\], *\[[^]]*\], *(0x\w+|\d+)", ptx)
    return {
        "registers": int(registers[1]),
        "spilled": int(stack[1]),  # no kernel has another use for a stack
        "shared": compiled.metadata.shared,
        "load_bytes": max([int(n) * int(bits) // 8 for n, bits in vectors], default=4),
        "copy_bytes": max([int(size, 0) for size in copies], default=0),
        "mma": len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),  # the latter of a B200
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "joined": len(re.findall(r"\bfma\.", ptx)),  # products and sums that are rounded once
        "memory_first": int(ptx.find("tcgen05.alloc") < ptx.find("griddepcontrol.launch_dependents")),
        "barriers": len(
            re.findall(r"\b(?:ttg|gpu)\.barrier\b", compiled.asm["ttgir"])
        ),  # that a kernel itself asks for
        "serialized": int("wgmma" in ptx and is_serialized(ptx)),
        "ahead": max(map(int, waits), default=0),  # copies that may be under way when a block's own are waited for
    }


def is_serialized(kernel_ptx: str) -> bool:
    """Whether the assembler makes each of the matrix instructions wait for the one before, which it only remarks."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(kernel_ptx.encode())
        file.flush()
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        remarks = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in remarks


def report(name: str, figures: dict[str, int], may_spill: int = 0) -> None:
    print(f"{name:44}", "  ".join(f"{key} {value}" for key, value in figures.items()))
    assert figures["spilled"] <= may_spill, f"{name} spills {figures['spilled']} bytes of registers"


IS_ALL = "--all" in sys.argv


NORM_BLOCKS = ((1024, 4, 1), (4096, 16, 1), (16384, 16, 2))  # (block, warps, blocks a row)
ROPE_HEADS = ((9, 3, 64, False), (32, 8, 128, True), (4, 1, 256, True))  # (query heads, KV heads, head size, norms)
# (query heads, KV heads, head size, rows a tile): decodes, verifications and prefill of several models.
ATTENTION = (
    (9, 3, 64, 1), (9, 3, 64, 16), (9, 3, 64, 42), (32, 8, 128, 1), (32, 8, 128, 32), (32, 8, 128, 8), (32, 8, 128, 16),
    (8, 4, 256, 8), (8, 4, 256, 32), (4, 1, 256, 16), (12, 2, 80, 8), (32, 32, 96, 64),
)  # fmt: skip


def compile_elementwise(dtype: str) -> None:
    pointer = f"*{dtype}"
    for residual in {pointer, "*fp32"} if IS_ALL else {pointer}:
        for has_weight, has_post in ((True, False), (True, True), (False, True)):
            pointers = {"out": pointer, "residual": residual, "h": pointer, "weight": "*fp32", "post_weight": "*fp32"}
            flags = {"HAS_H": True, "HAS_WEIGHT": has_weight, "HAS_POST": has_post}
            for block, warps, num_blocks in NORM_BLOCKS if IS_ALL else NORM_BLOCKS[1:2]:
                sizes = {"BLOCK": block, "NUM_BLOCKS": num_blocks, "IS_DEPENDENT": True}
                figures = compile_kernel(
                    add_norm_triton.add_rms_norm_kernel, pointers, flags | sizes, ("eps",), num_warps=warps,
                    **WRITTEN_ROUNDING,
                )  # fmt: skip
                norms = " ".join(name for name, has in (("norm", has_weight), ("post", has_post)) if has)
                report(f"add_rms_norm {dtype} {residual} {norms} {block} x {num_blocks}", figures)
                assert figures["load_bytes"] == 16 and not figures["joined"]
    names = ("qkv", "k_cache", "v_cache")
    pointers = dict.fromkeys(names, pointer) | dict.fromkeys(("cos", "sin", "q_norm", "k_norm"), "*fp32")
    pointers["slot_mapping"] = "*i64"
    variants = [(*heads, False) for heads in (ROPE_HEADS if IS_ALL else ROPE_HEADS[1:2])]
    variants += [(*heads, True) for heads in ROPE_HEADS if IS_ALL and heads[3]]
    for num_heads, num_kv_heads, head_dim, has_norm, norms_turned in variants:
        constants = {
            "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "HAS_NORM": has_norm,
            "NORMS_TURNED": norms_turned,
            "BLOCK_HEADS": 2048 // head_dim, "BLOCK_HALF": head_dim // 2, "IS_DEPENDENT": True,
        }  # fmt: skip
        figures = compile_kernel(
            rope_kv_triton.rope_store_kernel, pointers, constants, ("eps",), num_warps=4, **WRITTEN_ROUNDING
        )
        report(f"rope_store {dtype} {num_heads}/{num_kv_heads}/{head_dim}", figures)
        assert figures["load_bytes"] == 16
    for gelu in (False, True):
        figures = compile_kernel(
            gated_activation_triton.gated_activation_kernel,
            {"out": pointer, "gate_up": pointer},
            {"GELU": gelu, "BLOCK": 1024, "IS_DEPENDENT": True},
            num_warps=4,
            **WRITTEN_ROUNDING,
        )
        report(f"gated_activation {dtype} {'gelu' if gelu else 'silu'}", figures)
        assert figures["load_bytes"] == 16 and bool(figures["joined"]) == gelu  # gelu has one that is written


def compile_pooling(dtype: str) -> None:
    pointers = {"out": "*fp32", "sums": "*fp64", "hidden": f"*{dtype}", "spans": "*i32", "totals": "*fp64"}
    sizes = {"BLOCK": MAX_BLOCK, "UNROLL": UNROLL}
    report(f"pool_rows {dtype}", compile_kernel(pooled_rows_triton.pool_rows, pointers, sizes, num_warps=4))


def attention_figures(
    dtype: str,
    heads: tuple[int, int, int],
    blocks: dict[str, int],
    window: int,
    num_programs: int,
    joins: bool = False,
    is_capped: bool = False,
    capability: int = 90,
) -> dict[str, int]:
    """Of attention with the `block_parameters` of query heads, KV heads and head size."""
    num_heads, num_kv_heads, head_dim = heads
    pointers = dict.fromkeys(("out", "q", "k_cache", "v_cache"), f"*{dtype}")
    pointers |= dict.fromkeys(("partial", "stats"), "*fp32") | {"positions": "*i64"}
    pointers |= dict.fromkeys(("tiles", "block_tables", "arrived"), "*i32")
    constants: dict[str, Any] = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "WINDOW": window, "SPLIT_LEN": 256}
    constants |= {name: size for name, size in blocks.items() if name.startswith("BLOCK")}
    constants |= {"GROUP": num_heads // num_kv_heads, "BLOCK_SIZE": 16, "HAS_CAP": is_capped, "IEEE": dtype == "fp32"}
    constants |= {"IS_WIDE": False, "IS_SHARED": num_programs > 1, "JOINS": joins, "IS_DEPENDENT": capability >= 90}
    options = {name: blocks[name] for name in ("num_warps", "num_stages")}
    kernel = ragged_attention_triton.ragged_attention_kernel
    return compile_kernel(kernel, pointers, constants, ("scale_log2", "cap_exponent"), capability, **options)


def compile_attention(dtype: str) -> None:
    itemsize = 2 if dtype == "bf16" else 4
    cases = (ATTENTION if itemsize == 2 else ATTENTION[:4:3]) if IS_ALL else ATTENTION[3:5]
    for num_heads, num_kv_heads, head_dim, tile_rows in cases:
        blocks = block_parameters(tile_rows, num_heads // num_kv_heads, head_dim, itemsize)
        kinds = [(0, 1, False, False), (512, 8, False, False), (0, 8, True, False)]
        kinds += [(0, 1, False, True)] if IS_ALL or tile_rows > 1 else []
        for window, num_programs, joins, is_capped in kinds:
            heads = (num_heads, num_kv_heads, head_dim)
            figures = attention_figures(dtype, heads, blocks, window, num_programs, joins, is_capped)
            name = f"attention {dtype} {num_heads}/{num_kv_heads}/{head_dim} rows {tile_rows} programs {num_programs}"
            name += " joining" if joins else " capped" if is_capped else ""
            if itemsize == 4:
                may_spill = 1 << 10  # without matrix instructions, and only for checks
            else:  # what a split's end needs in large tiles lies outside of the loop: a few bytes
                may_spill = 64 if num_programs > 1 and blocks["BLOCK_M"] >= 64 else 0
            report(name, figures, may_spill)
            if itemsize == 2:
                assert figures["mma"] or figures["wgmma"], "no matrix instructions"
                assert max(figures["copy_bytes"], figures["load_bytes"]) == 16, "K and V are not read by 16 bytes"
                assert figures["ahead"] >= 2, "K and V are waited for as soon as they are asked for"
                assert not figures["serialized"], "products wait for one another"
        pointers = {"out": f"*{dtype}", "positions": "*i64", "tiles": "*i32"}
        pointers |= dict.fromkeys(("partial", "stats"), "*fp32")
        shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "WINDOW": 0, "SPLIT_LEN": 256}
        constants = shape | {"BLOCK_D": blocks["BLOCK_D"], "IS_DEPENDENT": True}
        figures = compile_kernel(ragged_attention_triton.join_splits_kernel, pointers, constants, num_warps=1)
        report(f"join_splits {dtype} {head_dim}", figures)


if __name__ == "__main__":
    for element in ("bf16", "fp32") if IS_ALL else ("bf16",):
        compile_elementwise(element)
        compile_pooling(element)
        compile_attention(element)
