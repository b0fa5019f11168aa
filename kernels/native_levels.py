"""Which instructions the native forward may use: levels, best first, each a library of its own from one text.

A level is taken if the CPU has its instructions and the operating system lets a process use them; whether the compiler
knows them shows when it builds. Says in words why a level cannot be; owns no library and no choice.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass

from .native_build import cpu_flags

_SYS_ARCH_PRCTL = 158  # x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18
_MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@dataclass(frozen=True, slots=True)
class Level:
    """`cpu_flags` are those that Linux shows; `number` is SPECSERVE_LEVEL in kernels/cpu/vec.h."""

    name: str
    number: int
    cpu_flags: tuple[str, ...] = ()
    compiler_flags: tuple[str, ...] = ()
    asks_for_tiles: bool = False
    machine: str = "x86_64"  # as Python names the kind of CPU; empty: any

    @property
    def is_foreign(self) -> bool:
        """Whether it is for another kind of CPU than this."""
        return self.machine not in ("", _MACHINE)

    def missing(self) -> str | None:
        """Why this machine cannot run the level, whatever compiler it has; None if it can."""
        if self.is_foreign:
            return f"it is for {self.machine}, this is {_MACHINE}"
        present = cpu_flags()
        lacking = [flag for flag in self.cpu_flags if flag not in present]
        if lacking:
            return f"the CPU lacks {', '.join(lacking)}"
        return refusal_of_tiles() if self.asks_for_tiles else None


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mno-avx512f")
LEVELS = (
    Level(
        "amx",
        4,
        ("amx_tile", "amx_bf16", "amx_int8", *_AVX512, "avx512_bf16", "avx512_vnni"),
        ("-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512vnni"),
        asks_for_tiles=True,
    ),
    Level("avx512_bf16", 3, (*_AVX512, "avx512_bf16", "avx512_vnni"), ("-mavx512bf16", "-mavx512vnni")),
    Level("neon_bf16", 3, ("asimd", "bf16", "asimddp"), ("-march=armv8.2-a+bf16+dotprod",), machine="aarch64"),
    Level("avx512_vnni", 2, (*_AVX512, "avx512_vnni"), (*_AVX512_FLAGS, "-mavx512vnni")),
    Level("avx512", 2, _AVX512, (*_AVX512_FLAGS, "-mno-avx512vnni")),
    Level("avx2_vnni", 1, ("avx2", "fma", "avx_vnni"), (*_AVX2_FLAGS, "-mavxvnni")),
    Level("avx2", 1, ("avx2", "fma"), (*_AVX2_FLAGS, "-mno-avxvnni")),
    Level("generic", 0, (), ("-mno-avx2", "-mno-fma") if _MACHINE == "x86_64" else (), machine=""),
)
LEVEL_NAMES = tuple(level.name for level in LEVELS)


def refusal_of_tiles() -> str | None:
    """Ask the operating system for AMX's tiles, for this process and those that it forks; None if it grants them.

    Their 8 KiB of state are not saved for a process that did not ask: the first tile instruction would kill it.
    """
    if platform.system() != "Linux":
        return f"{platform.system()} has no way to ask for AMX tiles"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return None
    return f"the operating system refuses AMX tiles ({os.strerror(ctypes.get_errno())})"
