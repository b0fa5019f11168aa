"""The native library at every level of instructions that this machine has, and AMX's with emulated tiles."""

from __future__ import annotations

import dataclasses

import pytest

from specserve.kernels.native import Library, load_at, load_library
from specserve.kernels.native_levels import LEVELS, Level

# They differ from a level that this machine has as well in products of integers only; on x86 the generic one takes
# longer to build and run than all others, and nobody has it who can run these tests.
SIBLINGS = {"avx512": "avx512_vnni", "avx2": "avx2_vnni", "generic": "avx2"}
BY_NAME = {level.name: level for level in LEVELS}


def is_rare(level: Level) -> bool:
    return level.name in SIBLINGS and BY_NAME[SIBLINGS[level.name]].missing() is None


@pytest.fixture(scope="session")
def usual_levels():
    """Those that are built anyway."""
    return [level for level in LEVELS if not is_rare(level)]


@pytest.fixture(scope="session", params=[pytest.param(level, id=level.name, marks=[pytest.mark.slow] * is_rare(level))
                                        for level in LEVELS])  # fmt: skip
def library(request):
    level: Level = request.param
    if level.name == "amx" and level.missing():
        with pytest.MonkeyPatch.context() as patch:
            emulated = with_emulated_tiles(level)
            patch.setattr(
                "specserve.compute.native.choice.load_library",
                lambda name=None: emulated if name == "amx" else load_library(name),
            )
            yield emulated
        return
    if reason := level.missing():
        pytest.skip(reason)
    yield load_library(level.name)


def with_emulated_tiles(amx: Level) -> Library:
    """The text of level `amx`, all of it, its instructions on tiles replaced (kernels/cpu/tiles_emulated.h)."""
    vectors = BY_NAME["avx512_bf16"]
    if reason := vectors.missing():
        pytest.skip(f"tiles are emulated with AVX-512, and {reason}")
    return load_at(dataclasses.replace(amx, compiler_flags=(*vectors.compiler_flags, "-DEMULATE_TILES")))
