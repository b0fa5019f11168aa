"""All Triton kernels under its interpreter, and compiled for Hopper without a GPU.

What is quick of all files of tests/triton runs in one process, as each takes seconds to start; a whole sweep has its
own.
"""

from __future__ import annotations

import pytest
from triton_process import CASES, compile_for_hopper, needs_triton, run_cases

INTERPRETED = sorted(file.name for file in CASES.glob("*_cases.py") if file.name != "triton_engine_cases.py")
COMPILED = sorted(file.name for file in CASES.glob("*_compile.py"))


def together_or_whole(names: list[str]) -> pytest.MarkDecorator:
    whole = [pytest.param([name], True, marks=pytest.mark.slow, id=name) for name in names]
    return pytest.mark.parametrize(("names", "all_of_them"), [pytest.param(names, False, id="quick"), *whole])


@pytest.mark.long
@needs_triton
@together_or_whole(INTERPRETED)
def test_kernels_under_the_interpreter(names, all_of_them):
    run_cases(*names, all_of_them=all_of_them)


@pytest.mark.long
@needs_triton
@together_or_whole(COMPILED)
def test_kernels_compile_for_hopper(names, all_of_them, tmp_path):
    compile_for_hopper(*names, all_of_them=all_of_them, cache_dir=tmp_path)
