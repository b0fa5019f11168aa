"""Launches that round as they are written: the compiler joins a product and a sum only where a kernel says `tl.fma`.

Left alone it joins what lies in one thread, so that two kernels of the same arithmetic in other layouts have other
bits: a row's squares were added by `fma(a, a, b * b)` where a program norms it before a product, and by
`a * a + b * b` where a launch of its own does. Of kernels that take each other's place all have these options, for
another last bit there shows in one of millions of values once they are rounded to 16 bits: no check finds it.
"""

from __future__ import annotations

WRITTEN_ROUNDING = {"enable_fp_fusion": False}
