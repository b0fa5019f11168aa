"""SGMV: segmented gather matrix-vector products, the LoRA of prefill chunks and of verifications with several rows.

Semantics, for segment i of rows s_i..s_{i+1} with adapter slot a(i) and every module m of a fused linear:
    y[s_i:s_{i+1}, columns(m)] += scale_{a(i),m} * (x[s_i:s_{i+1}] @ A_{a(i),m}^T) @ B_{a(i),m}^T
The name and the two-step form are punica's (arXiv:2310.18547); unlike it, ranks may differ between adapters and modules
and nothing is padded to the largest. Invariant: fp32 sums in a fixed order, no atomics, rows of slot -1 not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .segments import TILE_ROWS, Segments, row_tables

if TYPE_CHECKING:
    from .lora_stack import LoraStack


def sgmv_reference(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> torch.Tensor:
    """The definition, written to be read: returns y [T, sum(out_sizes)] in fp32 with the LoRA added."""
    y = y.float().clone()
    for start, end, slot in zip(segments.starts, segments.starts[1:], segments.slots, strict=False):
        if slot == -1:
            continue
        column = 0
        for pair, out_size in zip(stack.slots[slot], stack.out_sizes, strict=True):
            if pair is not None:
                h = x[start:end].float() @ pair.a.float().t()  # [rows, R]
                y[start:end, column : column + out_size] += pair.scale * (h @ pair.b.float().t())
            column += out_size
    return y


def sgmv_torch_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    """SGMV and BGMV on the CPU: adapters of equal ranks go through two batched products, in fp32."""
    x = x.float()
    for group in stack.groups:
        for launch in segments.plan(group.members, group.launch_rows):
            n, rows = launch.hi - launch.lo, launch.rows
            xs = x[rows] if launch.gather is None else x.index_select(0, launch.gather)
            h = torch.bmm(xs.view(n, launch.width, -1), group.a[launch.lo : launch.hi])  # [n, width, R]
            for ranks, columns, b in group.b:
                if rows is not None and n == 1 and y.dtype == torch.float32:
                    y[rows, columns].addmm_(h[0, :, ranks], b[launch.lo])  # spares a prefill chunk its delta
                    continue
                # bmm and an addition: 16 ms a step where baddbmm_ into the strided y takes 19.
                delta = torch.bmm(h[:, :, ranks], b[launch.lo : launch.hi]).view(n * launch.width, -1)
                if launch.valid is not None:
                    delta = delta.index_select(0, launch.valid)
                if rows is not None:
                    y[rows, columns] += delta  # [rows, out]
                else:
                    assert launch.scatter is not None
                    # index_add_ would round delta to a 16-bit y before it adds.
                    y[launch.scatter, columns] = (y[launch.scatter, columns] + delta).to(y.dtype)


def sgmv_triton_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    """SGMV on CUDA: one shrink and one expand launch over tiles of rows of one adapter, all modules in each.

    Rows of x and y are contiguous, weights have x's dtype. CPU tensors work under Triton's interpreter, for tests.
    """
    assert x.shape[0] == y.shape[0] == segments.num_rows, (x.shape, y.shape, segments.num_rows)  # else writes astray
    tiles = segments.tiles
    if tiles is None:
        _, tiles = row_tables(segments.starts, segments.slots, x.device)
    from .lora_triton import sgmv_expand, sgmv_shrink

    launch_triton_(y, x, stack, sgmv_shrink, sgmv_expand, tiles)


def launch_triton_(
    y: torch.Tensor, x: torch.Tensor, stack: LoraStack, shrink: Any, expand: Any, row_table: torch.Tensor
) -> None:
    """Launch `shrink` and `expand` over `row_table`: tiles [num_tiles, 3] of SGMV or row_slots [T] of BGMV."""
    import triton
    import triton.language as tl

    from .lora_triton import BLOCK_K, BLOCK_N

    tables = stack.pointer_tables()
    assert x.stride(1) == y.stride(1) == 1 and x.dtype == stack.dtype, (x.stride(), y.stride(), x.dtype, stack.dtype)
    num_programs, num_modules = row_table.shape[0], len(stack.out_sizes)
    block_r = min(64, max(16, triton.next_power_of_2(tables.max_rank)))
    h = torch.empty(x.shape[0], tables.h_size, dtype=torch.float32, device=x.device)  # [T, summed largest ranks]
    shared = {"NUM_MODULES": num_modules, "ALIGNED": tables.is_aligned, "TILE_ROWS": TILE_ROWS, "BLOCK_R": block_r}
    shrink[(num_programs, num_modules, triton.cdiv(tables.max_rank, block_r))](
        h, x, tables.weights, tables.ranks, tables.columns, row_table, x.shape[1], x.stride(0), h.stride(0),
        BLOCK_K=BLOCK_K, **shared,
    )  # fmt: skip
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
    expand[(num_programs, num_modules, triton.cdiv(max(stack.out_sizes), BLOCK_N))](
        y, h, tables.weights, tables.ranks, tables.scales, tables.columns, row_table, y.stride(0), h.stride(0),
        BLOCK_N=BLOCK_N, DTYPE=dtype, **shared,
    )  # fmt: skip
