"""The Triton kernel of dependent_launch.py's trial: each launch reads what the one before it wrote elsewhere."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pass_on(target, source, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    """Grid (blocks,): target's block is source's next one, plus 1."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.arange(0, BLOCK)
    following = (tl.program_id(0) + 1) % tl.num_programs(0)
    tl.store(target + tl.program_id(0) * BLOCK + place, tl.load(source + following * BLOCK + place) + 1)
