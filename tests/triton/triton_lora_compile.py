"""Compiles the kernels of LoRA and tiles for Hopper (sm_90), which needs no GPU; test_under_triton.py runs it.

The interpreter accepts programs that the compiler refuses. Beyond that it checks what speed rests on and a binary
shows: weights come in pieces of 16 bytes, tensor cores at 16 bits, no spilled registers. A process of its own, without
TRITON_INTERPRET: bf16, with --all the other dtypes and sizes too. A folder as argument gets the PTX and SASS.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specserve.kernels import lora_blocks, lora_blocks_triton, tiles_triton
from specserve.kernels.device_limits import MOST_SHARED
from specserve.kernels.lora_tables import BLOCK_R
from specserve.kernels.tiles import BLOCKS_T

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MULTIPLES_OF_16 = ("in_size", "x_stride", "y_stride", "slot_stride", "out_0", "out_1", "out_2", "h_ranks")  # H 4096
COPY_16_BYTES = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x10|ld\.global\S*\.v4\.b32")
MOST_SPILLS = 48  # instructions of an expand: registers are limited, for more programs an SM
SPILL = re.compile(r"\b(STL|LDL)\b")


def compile_kernel(
    kernel: Any,
    dtype: str,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
    capability: int = 90,
    **constants: Any,
) -> Any:
    """The kernel for q/k/v of a model with H 4096, specialised as Triton's launcher does."""
    constants = {"NUM_MODULES": 3, "BLOCK_R": BLOCK_R, "DTYPE": DTYPES[dtype]} | constants
    names = kernel.arg_names
    types = {"h": "*fp32", "records": "*i64", "tokens": "*i64"}
    types |= dict.fromkeys(("tiles", "row_ids", "blocks", "row_slots"), "*i32")
    types |= {"x": f"*{dtype}", "y": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in MULTIPLES_OF_16]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, signature, values, attrs), target=target, options=options)


def compile_lora(dtype: str, tile_rows: int, in_size: int, capability: int = 90) -> dict[str, Any]:
    """Shrink and expand of lora_blocks.py for tiles of so many rows."""
    splits, chunk = lora_blocks.split_k(in_size, TORCH_DTYPES[dtype])
    sizes: dict[str, Any] = {"capability": capability, "IS_DEPENDENT": capability >= 90}
    sizes |= {"SPLITS": splits, "BLOCK_SPLITS": triton.next_power_of_2(splits), "TILE_ROWS": tile_rows}
    sizes |= {"CHUNK": chunk, "WIDE_R": lora_blocks.WIDE_R, "PARTS": lora_blocks.parts_of(chunk)}
    registers = lora_blocks.SIZES.expand_registers if tile_rows == 8 else None
    name, kernels = f"{dtype}-{tile_rows}-{in_size}", lora_blocks_triton
    return {
        f"shrink-{name}": compile_kernel(kernels.lora_shrink, dtype, sizes["PARTS"], **sizes),
        f"expand-{name}": compile_kernel(kernels.lora_expand, dtype, 2, 1, registers, **sizes),
        f"gather-{name}": compile_kernel(kernels.lora_gather, dtype, 2, **sizes),
    }


def main(folder: Path | None, is_all: bool) -> None:
    binaries = {}
    for dtype in DTYPES if is_all else ("bf16",):
        for rows in (8, 16) if is_all and dtype != "fp32" else (8,):
            for in_size in (4096, 14336) if is_all else (4096,):
                binaries |= compile_lora(dtype, rows, in_size)
    for block in BLOCKS_T if is_all else (512,):
        binaries[f"build_tiles-{block}"] = compile_kernel(
            tiles_triton.build_tiles, "fp32", 4 if block <= 1024 else 16, BLOCK_T=block, BLOCK_TILES=min(block, 1024)
        )
        binaries[f"list_blocks-{block}"] = compile_kernel(
            lora_blocks_triton.list_blocks, "fp32", 4 if block <= 1024 else 16, BLOCK_T=block
        )
    for name, compiled in binaries.items():
        ptx, sass = compiled.asm["ptx"], compiled.asm["sass"]
        num_copies, num_mma = len(COPY_16_BYTES.findall(ptx)), len(re.findall(r"mma\.sync|wgmma\.mma", ptx))
        num_spills, shared = len(SPILL.findall(sass)), compiled.metadata.shared
        print(f"{name}: {shared} bytes shared, {num_copies} 16-byte loads, {num_mma} mma, {num_spills} spills")
        assert shared <= MOST_SHARED, name
        if folder is not None:
            (folder / f"{name}.ptx").write_text(ptx)
            (folder / f"{name}.sass").write_text(sass)
        most = MOST_SPILLS if name.startswith("expand") else 0
        assert "fp32" in name or "list_blocks" in name or num_spills <= most, f"{name} spills registers"
        if name.startswith(("shrink", "expand")):
            assert num_copies, f"{name} reads weights in small pieces"
            assert num_mma or "fp32" in name, f"{name} does not use tensor cores"


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--all"]
    main(Path(arguments[0]) if arguments else None, "--all" in sys.argv)
