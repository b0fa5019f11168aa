"""Grows the drafts of a step in native code, in one call (drafters/cpu/growth.h): just what `growth.py` does.

Here are what crosses over, in arrays that stay where they are from step to step, and what the call asks of Python on
its way: sources that are not native, grammars, and heads that are stepped between positions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..drafters import native
from ..drafters.acceptance import MAX_POSITIONS, SharedAcceptance
from ..drafters.grammar_source import Constraint
from ..drafters.native import NativeChooser, NativeDrafts
from ..drafters.protocol import DraftSource, SteppedHeads
from .budget import ENTER_GAIN
from .drafts import Clock, GrowingDraft, StepPlan
from .stepped_heads import HeadSteps

# By field of the native struct: the dtype, and what there is one of: a draft, a token of one, a token where some are
# traced, a token that is new to the library, a node of the step's costs.
_ARRAYS = {
    "sequences": (np.int64, "drafts"), "num_new": (np.int32, "drafts"), "limits": (np.int32, "drafts"),
    "is_fixed": (np.uint8, "drafts"), "num_admitted": (np.int32, "drafts"), "tokens": (np.int64, "tokens"),
    "chosen": (np.int32, "tokens"), "chances": (np.float64, "chances"), "new_tokens": (np.int32, "new"),
    "node_rows": (np.int32, "nodes"), "node_seconds": (np.float64, "nodes"),
}  # fmt: skip


class NativeGrowth:
    """What `Growth` says; heads as in `DraftGrowth`. `clock` None is the machine's."""

    def __init__(self, library: NativeDrafts, heads: SteppedHeads | None, clock: Clock | None = None) -> None:
        self.library, self.heads = library, heads
        self._head_steps = HeadSteps(heads, clock or time.perf_counter)
        self._drafts: Sequence[GrowingDraft] = ()
        self._num_taken = 0  # tokens, by the latest step
        self._raised: BaseException | None = None  # by Python's part; it must not leave through native code
        self._struct = native.Growth(
            enter_gain=ENTER_GAIN,
            drafted=1,
            ask=native.Ask(self._ask),
            constrain=native.Constrain(self._constrain),
            step_heads=native.StepHeads(self._step_heads),
            **({"clock": native.Clock(clock)} if clock else {}),
        )
        self._arrays: dict[str, np.ndarray] = {}
        self._room = dict.fromkeys(("drafts", "tokens", "chances", "new", "nodes"), 0)
        self._chain_tokens: np.ndarray | None = None  # of the table that the struct points into

    @property
    def row_price(self) -> float:
        return self._struct.row_price

    def chooser(
        self,
        sources: Sequence[DraftSource],
        shared: SharedAcceptance,
        constraint: Constraint | None,
        is_traced: bool = False,
    ) -> NativeChooser:
        return NativeChooser(self.library, sources, shared, constraint, is_traced)

    def grow(self, drafts: Sequence[GrowingDraft], plan: StepPlan) -> None:
        struct, num = self._struct, len(drafts)
        choosers: list[NativeChooser] = [draft.chooser for draft in drafts]  # type: ignore[misc]
        num_new: list[int] = []
        new_tokens: list[int] = []
        for draft, chooser in zip(drafts, choosers, strict=True):
            tokens = draft.item.seq.tokens  # type: ignore[union-attr]
            num_tokens = len(tokens)
            num_new.append(num_tokens - chooser.num_known)
            if num_new[-1]:  # mostly it was told in `observe`
                new_tokens += tokens[chooser.num_known :]
                chooser.num_known = num_tokens
        rows, seconds = plan.curve.nodes
        self._make_room(drafts=num, tokens=num * MAX_POSITIONS, new=len(new_tokens), nodes=len(rows))
        arrays = self._arrays
        arrays["sequences"][:num] = [chooser.handle for chooser in choosers]
        arrays["num_new"][:num] = num_new
        arrays["limits"][:num] = [draft.limit for draft in drafts]
        arrays["is_fixed"][:num] = [draft.is_fixed for draft in drafts]
        arrays["new_tokens"][: len(new_tokens)] = new_tokens
        arrays["node_rows"][: len(rows)], arrays["node_seconds"][: len(rows)] = rows, seconds
        struct.num_seqs, struct.num_nodes = num, len(rows)
        struct.num_decoding, struct.num_rows, struct.max_rows = plan.num_decoding, plan.num_rows, plan.max_rows
        self._point_at_chains()
        struct.chances = None
        if self.library.num_traced:
            self._make_room(chances=num * MAX_POSITIONS)
            struct.chances = arrays["chances"].ctypes.data
        self._drafts = drafts
        is_done = self.library.grow(struct)
        self._drafts = ()
        self._head_steps.clear()
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        if not is_done:
            raise MemoryError("no memory to draft")
        plan.draft_s = struct.draft_s
        self._take(drafts, choosers)

    def has_beyond(self, vocab_size: int) -> bool:
        tokens = self._arrays["tokens"][: self._num_taken]
        return bool(len(tokens)) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size

    def observe(self, drafts: Sequence[GrowingDraft], committed: Sequence[Sequence[int]]) -> None:
        choosers: list[NativeChooser] = [draft.chooser for draft in drafts]  # type: ignore[misc]
        lens = [*map(len, committed)]
        for chooser, num_tokens in zip(choosers, lens, strict=True):
            chooser.num_known += num_tokens
        handles = np.array([chooser.handle for chooser in choosers], np.int64)
        num = np.array(lens, np.int32)
        flat = np.array([*itertools.chain.from_iterable(committed)], np.int32)
        self.library.learn(handles.ctypes.data, len(drafts), num.ctypes.data, flat.ctypes.data)

    def _take(self, drafts: Sequence[GrowingDraft], choosers: Sequence[NativeChooser]) -> None:
        """What was admitted."""
        admitted = self._arrays["num_admitted"][: len(drafts)].tolist()
        total, start = sum(admitted), 0
        self._num_taken = total
        tokens = self._arrays["tokens"][:total].tolist()
        chosen = [*map(self.library.names.__getitem__, self._arrays["chosen"][:total].tolist())]
        for draft, chooser, num in zip(drafts, choosers, admitted, strict=True):
            end = start + num
            draft.num_admitted, chooser.tokens, chooser.chosen = num, tokens[start:end], chosen[start:end]
            start = end
        if self._struct.chances:
            chances, start = self._arrays["chances"][:total].tolist(), 0
            for chooser, num in zip(choosers, admitted, strict=True):
                end = start + num
                if chooser.is_traced:
                    chooser.chances = chances[start:end]
                start = end

    def _make_room(self, **needed: int) -> None:
        for kind, num in needed.items():
            if num <= self._room[kind]:
                continue
            self._room[kind] = 2 * num
            for name, (dtype, of) in _ARRAYS.items():
                if of == kind:
                    array = self._arrays[name] = np.zeros(2 * num, dtype)
                    setattr(self._struct, name, array.ctypes.data)

    def _point_at_chains(self) -> None:
        table = self.library.chains
        if table is None or table.tokens is self._chain_tokens:
            return
        parts = (table.tokens, table.probabilities, table.lens, table.wanted)
        self._struct.chains = native.Chains(*(part.ctypes.data for part in parts), table.tokens.shape[1])
        self._chain_tokens = table.tokens

    # -- Python's part

    def _ask(self, what: int, draft: int, number: int, token: int, answer: Any) -> int:
        chooser, item = self._drafts[draft].chooser, self._drafts[draft].item
        assert isinstance(chooser, NativeChooser) and item is not None
        source = chooser.all_sources[number]
        try:
            if what == native.PEEK:
                guess = source.peek()
                if guess is None:
                    return native.NOTHING
                if not 0 <= guess.level < chooser.num_levels[number]:
                    raise IndexError(f"there is no level {guess.level}")
                answer[0], answer[1] = guess
                return native.SOMETHING
            if what == native.BEGIN:
                source.begin(item.seq.tokens)
            else:
                source.follow(token)
            return native.NOTHING
        except Exception:
            chooser.remove_source(source)
        except BaseException as error:
            self._raised = error
        return native.FAILED

    def _constrain(self, what: int, draft: int, token: int) -> int:
        chooser = self._drafts[draft].chooser
        assert isinstance(chooser, NativeChooser) and chooser.constraint is not None
        try:
            if what == native.ADVANCE:
                return chooser.constraint.advance((token,))
            if what == native.ALLOWS:
                return chooser.constraint.allows(token)
            chooser.constraint.rewind()
        except BaseException as error:
            self._raised = error
        return False

    def _step_heads(self, numbers: Any, num: int, starts: int) -> int:
        try:
            choosers = [self._drafts[number].chooser for number in numbers[:num]]
            is_done = self._head_steps.run([chooser for chooser in choosers if chooser is not None], bool(starts))
            self._struct.head_s = self._head_steps.seconds
            return is_done
        except BaseException as error:
            self._raised = error
        return False
