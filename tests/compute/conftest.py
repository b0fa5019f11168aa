"""The native library at every level of instructions that this machine has."""

from __future__ import annotations

import pytest

from specserve.kernels.native import load_library
from specserve.kernels.native_levels import LEVELS

# On x86 the generic level takes longer to build and run than all others, and nobody has it who can run these tests.
RARE = {"generic": [pytest.mark.slow] if LEVELS[-2].missing() is None else []}


@pytest.fixture(scope="session", params=[pytest.param(level, id=level.name, marks=RARE.get(level.name, []))
                                        for level in LEVELS])  # fmt: skip
def library(request):
    reason = request.param.missing()
    if reason:
        pytest.skip(reason)
    return load_library(request.param.name)
