"""Native growth makes the drafts that the reference makes, whatever the sources, and frees what it held."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from specserve.drafters.acceptance import SharedAcceptance
from specserve.drafters.chains import ChainTable
from specserve.drafters.grammar_source import GrammarSource
from specserve.drafters.head_source import HeadSource
from specserve.drafters.history_source import HistorySource
from specserve.drafters.native import NativeDrafts
from specserve.drafters.ngram import NgramSource
from specserve.drafters.prediction import PredictionSource
from specserve.drafters.protocol import Guess
from specserve.drafters.task_history import TaskHistory
from specserve.drafting.cost_model import CostModel, StepShape
from specserve.drafting.drafts import GrowingDraft, Growth, StepPlan
from specserve.drafting.growth import DraftGrowth
from specserve.drafting.native_growth import NativeGrowth
from specserve.drafting.proposer import make_growth
from specserve.drafting.switch import DraftSwitch
from specserve.kernels.native_build import NativeError
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.scheduler import ScheduledSequence
from specserve.schedule.sequence import Sequence as EngineSequence

VOCAB = 12  # so small that everything has been seen before
LOADED = {"ngram": [(3.0, 9.0)] * 5, "head": [(float(i), 12.0) for i in range(12)], "history": [(1.0, 2.0)] * 3}


class Moody:
    """Guesses what its own dice say, and raises when they say so."""

    def __init__(self, seed: int, source: str = "moody", num_levels: int = 3, rate: float = 0.003):
        self.source, self.prior = source, tuple((i + 0.5) / num_levels for i in range(num_levels))
        self._rng, self._rate = random.Random(seed), rate

    def _may_raise(self) -> None:
        if self._rng.random() < self._rate:
            raise RuntimeError("a source's own fault")

    def begin(self, tokens: Sequence[int]) -> None:
        self._may_raise()

    def peek(self) -> Guess | None:
        self._may_raise()
        level = self._rng.randrange(len(self.prior) + (self._rng.random() < self._rate))  # one too many, now and then
        return Guess(self._rng.randrange(VOCAB), level) if self._rng.random() < 0.8 else None

    def follow(self, token: int) -> None:
        self._may_raise()


class SteppedHead(HeadSource):
    """Says what `SteppedDice` gave it."""

    def __init__(self) -> None:
        self.guess: Guess | None = None

    def begin(self, tokens: Sequence[int]) -> None:
        self.guess = None

    def peek(self) -> Guess | None:
        return self.guess

    def follow(self, token: int) -> None:
        self.guess = None


class SteppedDice:
    """Heads that are stepped between positions; a step fails now and then."""

    def __init__(self, seed: int):
        self._rng, self.num_begun, self.num_cleared = random.Random(seed), 0, 0

    def begin(self, sources: Sequence[SteppedHead]) -> None:
        self.num_begun += 1

    def step(self, sources: Sequence[SteppedHead]) -> None:
        for source in sources:
            source.guess = Guess(self._rng.randrange(VOCAB), self._rng.randrange(12))
        if self._rng.random() < 0.01:
            raise RuntimeError("no heads")

    def clear(self) -> None:
        self.num_cleared += 1


class Grammar:
    """Forbids some tokens at some places, and forces others."""

    def __init__(self, seed: int):
        self._seed, self._ahead = seed, 0
        self.calls: list[object] = []

    def rewind(self) -> None:
        self._ahead = 0

    def allows(self, token: int) -> bool:
        self.calls.append(token)
        return (token * 7 + self._ahead * 3 + self._seed) % 5 > 0

    def advance(self, tokens: Sequence[int]) -> bool:
        is_allowed = self.allows(tokens[0])
        self._ahead += is_allowed
        return is_allowed

    def forced_tokens(self) -> list[int]:
        return [self._ahead % VOCAB, 1] if (self._ahead + self._seed) % 3 == 0 else []


class World:
    """One way to grow, with everything that a scenario needs beside it; two of one seed see the same."""

    def __init__(self, seed: int, make: Callable[[SteppedDice, Callable[[], float]], Growth]):
        dice = random.Random(seed)
        self.now = 0.0

        def clock() -> float:
            self.now += dice.random() * 1e-5
            return self.now

        self.heads = SteppedDice(seed)
        self.growth = make(self.heads, clock)
        self.table = ChainTable(5)
        self.shared = [SharedAcceptance(), SharedAcceptance(LOADED)]
        self.history = [history(random.Random(seed + i)) for i in range(2)]
        self.drafts: dict[int, GrowingDraft] = {}
        self.grammars: dict[int, Grammar] = {}

    def add(self, number: int, rng: random.Random) -> None:
        prompt = text(rng, rng.choice([1, 2, 5, 40, 300]))
        adapter = rng.randrange(2)
        offered = {
            "ngram": lambda: NgramSource(),
            "prediction": lambda: PredictionSource(text(rng, rng.choice([0, 3, 40])), len(prompt)),
            "history": lambda: HistorySource(self.history[adapter], len(prompt)),
            "chain": lambda: self.table.source(str(number), None),
            "stepped": SteppedHead,
            "moody": lambda: Moody(number),
            "twins": lambda: Moody(number, "ngram", 5),  # shares the record of another
        }  # fmt: skip
        sources = [offered[name]() for name in offered if rng.random() < 0.5]
        rng.shuffle(sources)
        grammar = None
        if rng.random() < 0.3:
            grammar = self.grammars[number] = Grammar(number)
            sources.insert(0, GrammarSource(grammar))
        seq = EngineSequence(number, GenerateRequest(str(number), prompt, SamplingParams(max_tokens=500)))
        self.drafts[number] = GrowingDraft(
            self.growth.chooser(sources, self.shared[adapter], grammar, rng.random() < 0.5),
            16,
            rng.random() < 0.2,
            DraftSwitch(),
            item=ScheduledSequence(seq, 1),
        )

    def end(self, number: int) -> None:
        del self.drafts[number]

    def step(self, asked: Sequence[int], rng: random.Random) -> list[object]:
        """Grow, verify and observe one step; everything that came of it."""
        drafts = [self.drafts[number] for number in asked]
        for draft in drafts:
            draft.limit = rng.choice([1, 4, 16])
        rows = {1: 1.0, 4: 1.0 + rng.random(), 16: 2.0 + rng.random() * 3, 128: 9.0}
        scale, extra = rng.choice([1e-3, 1e-4]), rng.choice([0, 0, 30])
        plan = StepPlan(
            CostModel({num: seconds * scale for num, seconds in rows.items()}),
            StepShape(len(asked)), len(asked), len(asked) + extra, rng.choice([500, len(asked) + extra + 5]),
        )  # fmt: skip
        self.growth.grow(drafts, plan)
        found: list[object] = [plan.draft_s, self.growth.row_price, self.now, self.heads.num_cleared]
        committed = []
        for draft in drafts:
            num = draft.num_admitted
            tokens = draft.chooser.tokens[:num]
            chances = draft.chooser.chances[:num]
            assert len(chances) == (num if draft.chooser.is_traced else 0)
            found.append((num, tokens, draft.chooser.chosen[:num], [s.source for s in draft.chooser.sources], chances))
            kept = tokens[: rng.randint(0, num)] if rng.random() < 0.5 else tokens
            committed.append([*kept, rng.randrange(VOCAB)][: rng.choice([1, 20])])
        for draft, tokens in zip(drafts, committed, strict=True):
            draft.item.seq.tokens += tokens
        if rng.random() < 0.9:  # else the step has failed
            self.growth.observe(drafts, committed)
        for number in asked:
            if (row := self.table.row_of.get(str(number))) is not None and rng.random() < 0.8:
                chain = np.array([[rng.randrange(-1, VOCAB) for _ in range(4)]])
                chances = np.array([[rng.choice([rng.random(), 1.0, float("nan")]) for _ in range(4)]])
                self.table.set(np.array([row]), chain, chances, np.array([len(self.drafts[number].item.seq.tokens)]))
        found += [self.table.wanted.tolist(), [grammar.calls for grammar in self.grammars.values()]]
        return found

    def learned(self) -> list[object]:
        """The adapters' records, but for levels at the end that nobody has seen."""
        return [
            ({name: counts.tobytes().rstrip(b"\0") for name, counts in shared.counts.items() if any(counts)},
             shared.positions)
            for shared in self.shared
        ]  # fmt: skip


def text(rng: random.Random, num: int) -> list[int]:
    kinds = rng.choice([3, VOCAB])  # the few stand in many places, more than are looked at
    return [rng.randrange(kinds) for _ in range(num)]


def history(rng: random.Random) -> TaskHistory:
    return TaskHistory.build([text(rng, rng.randrange(1, 60)) for _ in range(40)], 2000)


@pytest.fixture(scope="module")
def library() -> NativeDrafts:
    return NativeDrafts()


@pytest.mark.parametrize("seed", range(10))
def test_native_drafts_equal_the_references(library, seed, caplog):
    caplog.set_level(logging.CRITICAL)  # a captured traceback would hold sequences
    gc.collect()
    num_others = library.num_sequences()  # of engines that other tests still hold
    worlds = [World(seed, DraftGrowth), World(seed, lambda heads, clock: NativeGrowth(library, heads, clock))]
    library.chains = None  # each world has a table of its own
    alive, next_number, rng = [], 0, random.Random(seed)
    drafted = 0
    for _ in range(60):
        while len(alive) < 14:
            dice = rng.random()
            for world in worlds:
                world.add(next_number, random.Random(dice))
            alive.append(next_number)
            next_number += 1
        asked = sorted(rng.sample(alive, rng.randint(1, len(alive))))
        dice = rng.random()
        want, got = (world.step(asked, random.Random(dice)) for world in worlds)
        assert got == want
        drafted += sum(item[0] for item in want[4:-2])
        assert worlds[1].learned() == worlds[0].learned()
        if rng.random() < 0.2:
            ended = alive.pop(rng.randrange(len(alive)))
            for world in worlds:
                world.end(ended)
        if rng.random() < 0.1:  # a table that was learned anew; running sequences keep theirs
            dice = rng.randrange(1000)
            for world in worlds:
                world.history[0] = history(random.Random(dice))
    assert drafted > 200
    assert library.num_sequences() == num_others + len(alive)
    del worlds, world
    gc.collect()
    assert library.num_sequences() == num_others


@pytest.mark.parametrize(("vocab_size", "num_tokens"), [(3, 1000), (40, 170_000), (66_000, 100_000)])
def test_histories_are_searched_alike(library, vocab_size, num_tokens):
    """Token ids of both widths; contexts that occur more often than are looked at, and than are sorted."""
    rng = random.Random(vocab_size)
    parts = [[rng.randrange(vocab_size) for _ in range(30)] for _ in range(num_tokens // 30)]
    if vocab_size > 65_535:
        parts.append(list(range(vocab_size)))
    table, tokens, shared = TaskHistory.build(parts, 200_000), [1], SharedAcceptance()
    growths = [DraftGrowth(None), NativeGrowth(library, None)]
    choosers = [growth.chooser([HistorySource(table, 1)], shared, None) for growth in growths]
    for _ in range(30):
        tokens += rng.choice(parts)[: rng.randint(1, 20)]
        seq = EngineSequence(0, GenerateRequest("a", list(tokens), SamplingParams(max_tokens=500)))
        found = []
        for growth, chooser in zip(growths, choosers, strict=True):
            draft = GrowingDraft(chooser, 16, True, DraftSwitch(), item=ScheduledSequence(seq, 1), limit=16)
            growth.grow([draft], StepPlan(CostModel({1: 1.0}), StepShape(), 1, 1, 500))
            found.append(chooser.tokens)
        assert found[0] == found[1] and found[0]


def test_what_python_raises_within_a_call_comes_out_of_it(library):
    class Interrupted(Grammar):
        def advance(self, tokens):
            raise KeyboardInterrupt

    growth = NativeGrowth(library, None)
    seq = EngineSequence(0, GenerateRequest("a", [1, 2, 1, 2, 1], SamplingParams(max_tokens=500)))
    chooser = growth.chooser([NgramSource()], SharedAcceptance(), Interrupted(1))
    draft = GrowingDraft(chooser, 4, True, DraftSwitch(), item=ScheduledSequence(seq, 1), limit=4)
    with pytest.raises(KeyboardInterrupt):
        growth.grow([draft], StepPlan(CostModel({1: 1.0}), StepShape(), 1, 1, 500))


def test_without_a_compiler_drafts_grow_in_python_and_the_log_says_so(monkeypatch, caplog):
    def none():
        raise NativeError("no C++ compiler was found")

    monkeypatch.setattr("specserve.drafting.proposer.NativeDrafts", none)
    assert isinstance(make_growth(None), DraftGrowth)
    assert "drafts grow in Python, slower: no C++ compiler was found" in caplog.text
