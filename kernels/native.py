"""Loads the CPU's native forward pass (kernels/cpu/*.cpp) and mirrors its structs.

The sources are compiled for the very CPU (`native_build`), at the best level of instructions that machine and compiler
have (`native_levels`). Nothing is specialised to shapes, so nothing is ever compiled while serving. Without a compiler
the torch path serves; the caller decides and logs. Owns no arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from .native_build import CacheError, NativeError, NativeSources, find_compiler
from .native_levels import LEVELS, Level

# No -ffast-math and no contraction: NaN must stay NaN, and a sum is the same sum in every kernel.
FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-w",
    "-shared",
    "-fPIC",
    "-pthread",
)
NUM_MODULES = 7  # a layer's linears: query, key, value, output, gate, up, down
# "norm" quantizes what it norms; "quantize" is what o and down read.
PHASES = (
    "inputs",
    "norm",
    "quantize",
    "lora_shrink",
    "qkv",
    "rope_kv",
    "attention",
    "o",
    "gate_up",
    "down",
    "lm_head",
    "best",
)
MAX_TAPS = 128  # layers; heads in one step may each read another
MAX_HEAD_DIM = 256
KEYS_PER_TILE = 16  # a KV block must be a multiple
PANEL = 64


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("groups", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("kp", c_int32),
        ("format", c_int32),
    ]


NORMS = ("input_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm")


class LayerStruct(Structure):
    _fields_ = [
        ("modules", Matrix * NUM_MODULES),
        *((name, c_void_p) for name in NORMS),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("window", c_int32),
        ("rope", c_int32),
    ]


class Model(Structure):
    _fields_ = [
        ("layers", POINTER(LayerStruct)),
        ("norm", c_void_p),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("is_gelu", c_int32),
        ("is_bf16", c_int32),
        ("num_ropes", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("attention_softcap", c_float),
        ("embed", c_void_p),
        ("frequencies", c_void_p * 2),
        ("rope_scales", c_float * 2),
        ("embed_scale", c_float),
        ("embed_is_bf16", c_int32),
        ("norms_whole_qk", c_int32),
        ("norms_turned_qk", c_int32),
        ("query_length", c_int32),
        ("query_beta", c_float),
    ]


class Step(Structure):
    _fields_ = [
        ("num_rows", c_int32),
        ("num_seqs", c_int32),
        ("num_hidden", c_int32),
        ("block_size", c_int32),
        ("max_rank", c_int32),
        ("num_taps", c_int32),
        *(
            (name, c_void_p)
            for name in ("x", "tokens", "starts", "query_lens", "table_lens", "blocks", "hidden_indices")
        ),
        ("row_slots", c_void_p),
        ("lora", c_void_p),
        ("hidden", c_void_p),
        ("tap_layers", c_int32 * MAX_TAPS),
        ("taps", c_void_p * MAX_TAPS),
        ("seconds", POINTER(c_double)),
        ("stop", c_void_p),
        *((name, c_void_p) for name in ("lm_head", "logits", "best", "bad")),
        ("num_logits", c_int32),
        ("vocab_size", c_int32),
        ("num_bad", c_int32),
        ("unused", c_int32),
    ]


HEAD_MATRICES = (
    "init_weight", "embed", "moves", "next_weight", "gates_x", "gates_s", "out_weight", "copy_weight", "slot_weight",
)  # fmt: skip
HEAD_BIASES = ("init_bias", "out_bias", "gates_bias", "candidate_bias", "slot_bias")


class Head(Structure):
    _fields_ = [
        *((name, c_void_p) for name in (*HEAD_MATRICES, *HEAD_BIASES)),
        ("hidden_size", c_int32),
        ("d", c_int32),
        ("window", c_int32),
        ("num_tokens", c_int32),
        ("num_vocab", c_int32),
        ("unused", c_int32),
    ]


class HeadRow(Structure):
    _fields_ = [
        ("head", POINTER(Head)),
        ("state", c_void_p),
        ("last", c_void_p),
        ("tapped", c_void_p),
        ("window", c_void_p),
        ("token", c_int32),
        ("moved", c_int32),
        ("choice", c_int32),
        ("probability", c_float),
    ]


class DrawRow(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("mask", c_void_p),
        ("number", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("token", c_int32),
        ("is_dead", c_int32),
    ]


class Lora(Structure):
    _fields_ = [("a", c_void_p), ("b", c_void_p), ("rank", c_int32), ("scale", c_float)]


# By their names in C++.
STRUCTS: dict[str, type[Structure]] = {
    "Matrix": Matrix, "Layer": LayerStruct, "Model": Model, "Step": Step, "Lora": Lora, "Head": Head,
    "HeadRow": HeadRow, "DrawRow": DrawRow,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library. `uses_bf16`: 16-bit activations and KV, with the CPU's bf16 instructions."""

    functions: ctypes.CDLL
    level: str
    not_higher: str  # the level above and why not that one; empty for the best
    uses_bf16: bool
    int8_products: str  # what multiplies whole numbers, in words
    build_s: float  # 0 when it came from the cache

    @property
    def name(self) -> str:
        """Its file's, which stands for sources, compiler and CPU flags."""
        return Path(self.functions._name).name


class Team:
    """The threads and scratch memory that forwards run on; used from one thread at a time."""

    def __init__(self, library: Library, num_threads: int):
        self._functions = library.functions
        self._handle = self._functions.specserve_create(num_threads)

    @property
    def num_active(self) -> int:
        """How many threads take part in the next call: fewer where other processes take the cores."""
        return self._functions.specserve_num_active(self._handle)

    def forward(self, model: Model, step: Step) -> bool:
        """Run a step; False where it was stopped, and gave nothing."""
        return not self._functions.specserve_forward(self._handle, ctypes.byref(model), ctypes.byref(step))

    def linear(self, matrix: Matrix, is_bf16: bool, x: int, num_rows: int, y: int) -> None:
        """y [rows, panels * 64] = x [rows, k] @ matrix; x and y are addresses of fp32."""
        self._functions.specserve_linear(self._handle, ctypes.byref(matrix), int(is_bf16), x, num_rows, y)

    def best_of_rows(self, logits: int, stride: int, num_rows: int, num: int, tokens: int, bad: int) -> int:
        """Write the first of the largest of each row's `num` logits to tokens [rows] int64, and whether it holds NaN to
        bad [rows] bytes; gives how many do. All are addresses; a row begins `stride` floats behind the one before."""
        return self._functions.specserve_best_of_rows(self._handle, logits, stride, num_rows, num, tokens, bad)

    def draw_rows(self, rows: ctypes.Array[DrawRow], num: int) -> None:
        """Draw a token of each row's `num` logits; see kernels/cpu/sampling.h."""
        self._functions.specserve_draw_rows(self._handle, rows, len(rows), num)

    def begin_heads(self, rows: ctypes.Array, num_rows: int) -> None:
        """Set the states of lookahead heads from their hidden rows; see kernels/cpu/heads.h."""
        self._functions.specserve_begin_heads(self._handle, rows, num_rows)

    def step_heads(self, rows: ctypes.Array, num_rows: int) -> None:
        """Feed each head its token and get its next choice and the probability of that."""
        self._functions.specserve_step_heads(self._handle, rows, num_rows)

    def __del__(self) -> None:
        self._functions.specserve_destroy(self._handle)


def sources(level: Level) -> NativeSources:
    flags = (*FLAGS, *level.compiler_flags, f"-DSPECSERVE_LEVEL={level.number}")
    return NativeSources(
        f"decoder-{level.name}", Path(__file__).parent / "cpu" / "decoder.cpp", flags, "kernels/native.py"
    )


@functools.cache
def load_library(level_name: str | None = None) -> Library:
    """The library of the best level that can be had here, or of that one; built if the cache lacks it.

    Raises `NativeError` with what is missing.
    """
    find_compiler()
    reasons: list[str] = []
    kind: type[NativeError] = NativeError
    for level in LEVELS:
        if level_name != level.name and (level_name is not None or level.is_foreign):
            continue
        reason = level.missing()
        if reason is None and kind is CacheError and not sources(level).is_kept():
            continue  # no level has room then, and to find that out takes a compilation
        if reason is None:
            try:
                return load_at(level, reasons[-1] if reasons else "")
            except NativeError as error:
                kind, reason = type(error), str(error)
        reasons.append(f"{level.name}: {reason}")
    raise kind(reasons[-1])


def load_at(level: Level, not_higher: str = "") -> Library:
    """The library of `level`, built if the cache lacks it, whether this machine has the level or not."""
    functions, build_s = sources(level).load(STRUCTS)
    functions.specserve_create.restype = c_void_p
    functions.specserve_create.argtypes = [c_int32]
    functions.specserve_destroy.argtypes = functions.specserve_num_active.argtypes = [c_void_p]
    functions.specserve_forward.argtypes = [c_void_p, c_void_p, c_void_p]
    functions.specserve_int8_products.restype = ctypes.c_char_p
    functions.specserve_linear.argtypes = [c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_void_p]
    functions.specserve_best_of_rows.argtypes = [c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p]
    functions.specserve_draw_rows.argtypes = [c_void_p, c_void_p, c_int32, c_int32]
    functions.specserve_begin_heads.argtypes = functions.specserve_step_heads.argtypes = [c_void_p, c_void_p, c_int32]
    return Library(
        functions,
        level.name,
        not_higher,
        bool(functions.specserve_uses_bf16()),
        functions.specserve_int8_products().decode(),
        build_s,
    )
