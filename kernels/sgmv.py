"""SGMV in torch on the CPU: segmented gather matrix-vector products, for segments of one or of several rows.

Semantics, for segment i of rows s_i..s_{i+1} with adapter slot a(i) and every module m of a fused linear:
    y[s_i:s_{i+1}, columns(m)] += scale_{a(i),m} * (x[s_i:s_{i+1}] @ A_{a(i),m}^T) @ B_{a(i),m}^T
The name and the two-step form are punica's (arXiv:2310.18547); unlike it, ranks may differ between adapters and modules
and nothing is padded to the largest. Invariant: fp32 sums, rows of slot -1 not touched. On a GPU: lora_tiles.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .segments import Segments

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
    """SGMV on the CPU: adapters of equal ranks go through two batched products, in fp32."""
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
