"""Drafts of many sequences in native code (drafters/cpu): loads the library and mirrors its structs.

`NativeChooser` is a sequence there, in the way of `DraftChooser`, which is the reference. Sources that the library
knows are its own, with what they have learned of the text; all others stay Python's and are asked from there.
Invariant: a native sequence lives as long as its `NativeChooser`, which holds whatever of Python's it points into.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from weakref import WeakKeyDictionary

from ..kernels.native_build import NativeSources
from .acceptance import SharedAcceptance
from .chains import ChainSource, ChainTable
from .grammar_source import Constraint
from .head_source import HeadSource
from .history_source import HistorySource
from .ngram import NgramSource
from .prediction import PredictionSource
from .protocol import DraftSource
from .task_history import TaskHistory

logger = logging.getLogger(__name__)

# No contraction: the same bits as Python's arithmetic. Nothing here gains from the CPU's newer instructions.
FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=off", "-w", "-shared", "-fPIC")

FOREIGN, NGRAM, PREDICTION, HISTORY, CHAIN = range(5)  # kinds of sources
FAILED, NOTHING, SOMETHING = -1, 0, 1  # what a source says
BEGIN, PEEK, FOLLOW = range(3)  # what it is asked
REWIND, ALLOWS, ADVANCE = range(3)  # and a constraint

Ask = CFUNCTYPE(c_int32, c_int32, c_int32, c_int32, c_int64, POINTER(c_int64))
Constrain = CFUNCTYPE(c_int32, c_int32, c_int32, c_int64)
StepHeads = CFUNCTYPE(c_int32, POINTER(c_int32), c_int32, c_int32)
Clock = CFUNCTYPE(c_double)


class HistoryStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("reversed", "sorted", "rank", "text", "ids", "bounds", "starts")),
        *((name, c_int32) for name in ("text_len", "num_ids", "num_starts", "token_bytes")),
    ]


class SourceSpec(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("prior", "shared", "data")),
        *((name, c_int64) for name in ("data_len", "prompt_len")),
        *((name, c_int32) for name in ("kind", "num_levels", "own", "is_head", "is_stepped", "name")),
    ]


class Chains(Structure):
    _fields_ = [*((name, c_void_p) for name in ("tokens", "probabilities", "lens", "wanted")), ("width", c_int64)]


class Growth(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("sequences", "num_new", "new_tokens", "limits", "is_fixed")),
        *((name, c_void_p) for name in ("node_rows", "node_seconds")),
        ("chains", Chains),
        ("ask", Ask),
        ("constrain", Constrain),
        ("step_heads", StepHeads),
        ("clock", Clock),
        *((name, c_void_p) for name in ("num_admitted", "tokens", "chosen", "chances")),
        *((name, c_int32) for name in ("num_seqs", "num_nodes", "num_decoding", "num_rows", "max_rows", "drafted")),
        *((name, c_double) for name in ("enter_gain", "draft_s", "row_price", "head_s", "ask_s")),
        *((name, c_int32) for name in ("num_seen", "unused")),
    ]


STRUCTS: dict[str, type[Structure]] = {
    "History": HistoryStruct, "SourceSpec": SourceSpec, "Chains": Chains, "Growth": Growth,
}  # fmt: skip


class NativeDrafts:
    """The library, and what sequences in it share. Raises `NativeError` where it cannot be had."""

    def __init__(self) -> None:
        sources = NativeSources("drafts", Path(__file__).parent / "cpu" / "drafts.cpp", FLAGS, "drafters/native.py")
        functions, self.build_s = sources.load(STRUCTS, holds_lock=True)
        self.create, self.destroy = functions.specserve_create, functions.specserve_destroy
        self.grow, self.learn = functions.specserve_grow, functions.specserve_learn
        self.num_sequences = functions.specserve_num_sequences
        self.create.restype = c_void_p
        self.create.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int32]
        self.destroy.argtypes, self.destroy.restype = [c_void_p], None
        self.grow.argtypes = [POINTER(Growth)]
        self.learn.argtypes, self.learn.restype = [c_void_p, c_int32, c_void_p, c_void_p], None
        self.names: list[str] = []  # of sources, by the number that stands for each over there
        self.chains: ChainTable | None = None  # all heads of an engine write into one table
        self.num_traced = 0  # sequences that want to know their drafts' chances
        self._histories: WeakKeyDictionary[TaskHistory, HistoryStruct] = WeakKeyDictionary()

    def name(self, source: str) -> int:
        if source not in self.names:
            self.names.append(source)
        return self.names.index(source)

    def history(self, history: TaskHistory) -> HistoryStruct:
        struct = self._histories.get(history)
        if struct is None:
            arrays = history.arrays
            struct = self._histories[history] = HistoryStruct(
                *(part.ctypes.data for part in arrays),
                len(arrays.text),
                len(arrays.ids),
                len(arrays.starts),
                arrays.text.itemsize,
            )
        return struct


class NativeChooser:
    """All sources of one sequence, and what a step took of its draft: `tokens`, and the source of each, `chosen`.

    `sources` are those that have not failed. `all_sources` has each at its number in native code. `chances` are those
    of `DraftChooser`.
    """

    def __init__(
        self,
        library: NativeDrafts,
        sources: Sequence[DraftSource],
        shared: SharedAcceptance | None = None,
        constraint: Constraint | None = None,
        is_traced: bool = False,
    ):
        self._library, self.constraint = library, constraint
        self._shared = shared or SharedAcceptance()
        self.all_sources, self.sources = tuple(sources), list(sources)
        self.num_levels = [len(source.prior) for source in sources]
        self.tokens: list[int] = []
        self.chosen: list[str] = []
        self.chances: list[float] = []
        self.num_known = 0  # tokens of the sequence that it has over there
        self._held: list[object] = [self._shared.positions]
        specs = (SourceSpec * len(sources))(*(self._spec(idx, source) for idx, source in enumerate(sources)))
        positions = self._shared.positions.buffer_info()[0]
        self.handle = library.create(specs, len(sources), constraint is not None, positions, is_traced)
        if not self.handle:
            raise MemoryError("a sequence to draft for")
        self.is_traced = is_traced
        library.num_traced += is_traced

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.destroy(self.handle)
            self._library.num_traced -= self.is_traced

    def remove_source(self, source: DraftSource) -> None:
        """Go on without a source that failed; called where its exception is handled."""
        logger.exception("draft source %r failed; this sequence goes on without it", source.source)
        self.sources = [other for other in self.sources if other is not source]

    def _spec(self, number: int, source: DraftSource) -> SourceSpec:
        prior, shared = array("d", source.prior), self._shared.of(source)
        spec = SourceSpec(
            prior=prior.buffer_info()[0], shared=shared.buffer_info()[0], kind=FOREIGN, num_levels=len(prior),
            own=next(i for i in range(number + 1) if self._shares_record(i, number)),
            is_head=source.source == "head", is_stepped=isinstance(source, HeadSource),
            name=self._library.name(source.source),
        )  # fmt: skip
        self._held += (prior, shared)
        # Of a class that is derived from one of these nobody knows what it says.
        if type(source) is NgramSource:
            spec.kind = NGRAM
        elif type(source) is PredictionSource:
            tokens = array("i", source.prediction)
            self._held.append(tokens)
            spec.kind, spec.data, spec.data_len = PREDICTION, tokens.buffer_info()[0], len(tokens)
            spec.prompt_len = source.prompt_len
        elif type(source) is HistorySource:
            table = self._library.history(source.history)
            self._held.append(table)
            spec.kind, spec.data, spec.prompt_len = HISTORY, ctypes.addressof(table), source.prompt_len
        elif type(source) is ChainSource:
            self._library.chains = self._library.chains or source.table
            assert source.table is self._library.chains
            spec.kind, spec.data_len = CHAIN, source.row
        return spec

    def _shares_record(self, number: int, other: int) -> bool:
        one, two = self.all_sources[number], self.all_sources[other]
        return one is two or (one.source == two.source and len(one.prior) == len(two.prior))
