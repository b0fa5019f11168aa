"""What this CPU reads and multiplies at most, measured: the limits that `bench.cpu_steps` holds steps against.

Owns the build of cpu_limits.cpp and the choice of what counts as the peak. Each measurement is short; a limit is the
fastest of all that were taken, since what is slower was held up by something else.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path

import torch

from specserve.compute.native.decoder import TorchThreads
from specserve.kernels.native import FLAGS
from specserve.kernels.native_build import NativeSources, find_compiler
from specserve.kernels.native_levels import LEVELS

KINDS = ("fp32", "avx512_bf16", "amx_bf16", "amx_int8", "vnni_int8")  # by their numbers in C++
INT8 = {"amx_int8", "vnni_int8"}
ONEDNN = "onednn_bf16"
MATMUL_SIZES = (1024, 2048)
BURST_S = 0.02


class CpuLimits:
    """Fastest rates so far: bytes and operations a second, by all `num_threads` threads together.

    Reads are of `num_bytes` of memory: as many as a step reads, for small ones come from a cache. Raises `NativeError`
    without a compiler.
    """

    def __init__(self, num_threads: int, num_bytes: int):
        sources = NativeSources("limits", Path(__file__).with_name("cpu_limits.cpp"), FLAGS, "bench/cpu_limits.py")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "limits.so"
            sources.build(find_compiler(), path)
            functions = ctypes.CDLL(str(path))
        functions.read_rate.restype = functions.multiply_rate.restype = ctypes.c_double
        functions.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        functions.multiply_rate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        self._functions, self._num_threads = functions, num_threads
        self._data = torch.ones(num_bytes // 8, dtype=torch.int64)
        # Without bf16 instructions oneDNN's product in bf16 is a plain loop, a hundredth of what it makes in fp32.
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        self._matrices = [torch.ones(size, size, dtype=dtype) for size in MATMUL_SIZES]
        self._kinds = [kind for kind in KINDS if not kind.startswith("amx") or LEVELS[0].missing() is None]
        self.bytes_per_s = 0.0
        self.operations_per_s: dict[str, float] = {}

    def measure(self, repeats: int = 1) -> None:
        for _ in range(repeats):
            rate = self._functions.read_rate(self._data.data_ptr(), self._data.nbytes, self._num_threads)
            self.bytes_per_s = max(self.bytes_per_s, rate)
            for kind in self._kinds:
                self._note(kind, self._functions.multiply_rate(KINDS.index(kind), self._num_threads, BURST_S))
            with TorchThreads(self._num_threads):
                for matrix in self._matrices:
                    start = time.perf_counter()
                    matrix @ matrix
                    self._note(ONEDNN, 2 * matrix.shape[0] ** 3 / (time.perf_counter() - start))

    def peak(self, is_int8: bool = False) -> tuple[str, float]:
        """The kind of multiplication that is fastest here, of int8 only where that is meant, and its rate."""
        usable = {kind: rate for kind, rate in self.operations_per_s.items() if is_int8 or kind not in INT8}
        kind = max(usable, key=usable.__getitem__)
        return kind, usable[kind]

    def _note(self, kind: str, rate: float) -> None:
        if rate:
            self.operations_per_s[kind] = max(self.operations_per_s.get(kind, 0.0), rate)
