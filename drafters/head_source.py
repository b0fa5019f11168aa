"""Lookahead heads of many adapters drafting together: one batched step for all sequences, one source for each.

`HeadRunner` owns the stacked weights and the states; a `HeadSource` is one sequence's view: what it feeds next and what
came out. Heads of one shape run as one batched product, whatever adapters they belong to; there is no loop over
adapters within a step. Invariant: a head's state follows what is proposed, also when another source proposed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .copy_pointer import CopyPointer
from .head import WEIGHT_NAMES, HeadWeights, best_token, cell, initial_state, scores
from .head_files import LookaheadHeadFile
from .protocol import Guess

NUM_LEVELS = 12
KEEP_DRAFTS = 64  # a head that no draft used for so long leaves its stack when that is built next


class HeadSource:
    """One sequence's head. `hidden` is set by the engine whenever it has computed new rows."""

    source = "head"
    prior = tuple((level + 0.5) / NUM_LEVELS for level in range(NUM_LEVELS))

    def __init__(self, head: LookaheadHeadFile, prompt: Sequence[int]):
        config = head.config
        self.head = head
        self._other = head.weights.embed.shape[1] - 1  # behind the vocabulary and its padding
        self._prompt = prompt
        self._prompt_idx = [head.index_of.get(token, self._other) for token in prompt]
        self._committed = CopyPointer(prompt, config.copy_start, config.copy_window, config.copy_jumps)
        self._num_seen = len(prompt)
        self._pointer = self._committed
        self._num_drafted = 0
        self._guess: Guess | None = None
        self._hidden: tuple[torch.Tensor, torch.Tensor, int] | None = None
        self._hidden_len = -1  # tokens of the sequence when `_hidden` was set
        self.is_ready = False
        self.input: tuple[int, int, list[int]] = (0, 0, [])  # token, move and window, tokens by their index

    def set_hidden(self, last: torch.Tensor, tapped: torch.Tensor, row: int, num_tokens: int) -> None:
        """Row `row` of [L, H] each belongs to the last token but one of `num_tokens`."""
        self._hidden, self._hidden_len = (last, tapped, row), num_tokens

    @property
    def hidden(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._hidden is not None
        last, tapped, row = self._hidden
        return last[row], tapped[row]

    def begin(self, tokens: Sequence[int]) -> None:
        for idx in range(self._num_seen, len(tokens)):
            self._committed.follow(tokens[idx])
        self._num_seen = len(tokens)
        self._pointer = self._committed.copy()
        self._num_drafted, self._guess = 0, None
        self.is_ready = self._hidden is not None and self._hidden_len == len(tokens)
        if self.is_ready:
            self._set_input(tokens[-1])

    def peek(self) -> Guess | None:
        return self._guess if self._num_drafted < self.head.config.draft_len else None

    def follow(self, token: int) -> None:
        self._num_drafted += 1
        self._guess = None
        self._pointer.follow(token)
        self._set_input(token)

    def set_guess(self, choice: int, probability: float) -> None:
        if not 0.0 <= probability <= 1.0:  # NaN: the head has nothing to say
            self._guess = None
            return
        if choice > self._other:
            token = self._prompt[self._pointer.position + choice - self._other - 1]
        else:
            token = self.head.config.vocab[choice]
        self._guess = Guess(token, min(NUM_LEVELS - 1, int(probability * NUM_LEVELS)))

    def _set_input(self, token: int) -> None:
        start, width = self._pointer.position, self.head.config.copy_window
        window = self._prompt_idx[start : start + width]
        self.input = (
            self.head.index_of.get(token, self._other),
            self._pointer.moved,
            window + [-1] * (width - len(window)),
        )


class _Stack:
    """Weights of the heads of one shape that recent drafts used: place i of every tensor is `heads[i]`."""

    def __init__(self, heads: list[LookaheadHeadFile]):
        self.heads = heads
        self.place_of = {id(head): place for place, head in enumerate(heads)}
        if len(heads) == 1:
            self.weights = heads[0].weights
        else:
            self.weights = HeadWeights(
                **{name: torch.cat([getattr(head.weights, name) for head in heads]) for name in WEIGHT_NAMES}
            )


class _Group:
    """The sequences of one draft whose heads have one shape, in a grid [A, n]; None is an empty place."""

    def __init__(self, stack: _Stack, sources: Sequence[HeadSource]):
        self._weights = stack.weights
        rows: list[list[HeadSource | None]] = [[] for _ in stack.heads]
        for source in sources:
            rows[stack.place_of[id(source.head)]].append(source)
        self._width = max(len(row) for row in rows)
        self._places = [source for row in rows for source in row + [None] * (self._width - len(row))]
        first = sources[0].hidden
        hidden = [first if source is None else source.hidden for source in self._places]
        shape = (len(rows), self._width, -1)
        last = torch.stack([pair[0] for pair in hidden]).float().view(shape)
        tapped = torch.stack([pair[1] for pair in hidden]).float().view(shape)
        self._state = initial_state(self._weights, last, tapped)

    def step(self) -> None:
        weights, device = self._weights, self._state.device
        empty = (0, 0, [-1] * weights.window)
        inputs = [empty if source is None else source.input for source in self._places]
        shape = (weights.num_stacked, self._width)
        tokens = torch.tensor([token for token, _, _ in inputs], device=device).view(shape)
        moved = torch.tensor([move for _, move, _ in inputs], device=device).view(shape)
        entries = torch.tensor([window for _, _, window in inputs], dtype=torch.int64, device=device)
        window = entries.view(*shape, weights.window)
        if weights.window:
            next_tokens = window[..., 0].clamp(min=0)
        else:
            next_tokens = torch.full_like(tokens, weights.embed.shape[1] - 1)
        self._state = cell(weights, self._state, tokens, moved, next_tokens)
        choice, probability = best_token(*scores(weights, self._state, window), window)
        # sync: the host combines the head's guess with the other sources' before the next step
        chosen, chances = choice.flatten().tolist(), probability.flatten().tolist()
        for source, token, chance in zip(self._places, chosen, chances, strict=True):
            if source is not None:
                source.set_guess(token, chance)


class HeadRunner:
    """Runs the heads of a step's sequences, position by position."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], _Stack] = {}
        self._last_used: dict[int, int] = {}  # id of a head -> number of the draft
        self._num_drafts = 0
        self._groups: list[_Group] = []

    def source(self, request_id: str, head: LookaheadHeadFile, prompt: Sequence[int]) -> HeadSource:
        """The head's voice for a sequence."""
        return HeadSource(head, prompt)

    @torch.inference_mode()
    def begin(self, sources: Sequence[HeadSource]) -> None:
        """Start the drafts of those sources that are ready."""
        self._num_drafts += 1
        by_shape: dict[tuple[int, ...], list[HeadSource]] = {}
        for source in sources:
            if source.is_ready:
                weights = source.head.weights
                by_shape.setdefault((*weights.embed.shape, weights.window), []).append(source)
        self._groups = [_Group(self._stack(shape, rows), rows) for shape, rows in by_shape.items()]

    @torch.inference_mode()
    def step(self, sources: Sequence[HeadSource]) -> None:
        """Feed what each source was told to follow, and give each its next guess; `sources` are those still drafting.

        All places of a group are computed, the others' guesses are not looked at.
        """
        for group in self._groups:
            group.step()

    def clear(self) -> None:
        self._groups = []

    def release_weights(self) -> None:
        """Let go of all stacked weights, when an adapter has left; the next draft stacks what it needs."""
        self._groups, self._stacks, self._last_used = [], {}, {}

    def _stack(self, shape: tuple[int, ...], sources: Sequence[HeadSource]) -> _Stack:
        """The stack for these sources, built anew when a head is missing or most of it is long idle."""
        active = {id(source.head): source.head for source in sources}
        self._last_used.update((key, self._num_drafts) for key in active)
        stack = self._stacks.get(shape)
        old = stack.heads if stack is not None else []
        recent = [head for head in old if self._num_drafts - self._last_used[id(head)] < KEEP_DRAFTS]
        missing = [head for key, head in active.items() if stack is None or key not in stack.place_of]
        if stack is None or missing or len(old) > 2 * len(recent):
            stack = self._stacks[shape] = _Stack([*recent, *missing])
        return stack
