"""Does choosing among the sources position by position reach the best of them, and would a tree of branches pay?

The adapter answers held-out prompts; its hidden states are stored once, and each answer is walked verification by
verification with the engine's own sources and chooser. Ways: each source alone; the oracle that knows which single
source will last longest; the chooser without a price of rows, which must reach 90% of that oracle; chain and tree at
the row price of this machine's cost table. The tree opens a branch wherever another guess's survival pays for its rows
and drafts on behind it. Tokens a second are tokens over the cost table's seconds for all rows of all verifications,
prompts and drafting itself left out.

    python -m bench.sources ADAPTER_DIR ... --data FILE ... [--rows 24] [--max-drafts 16]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from specserve.adapters.lookahead import Lookahead
from specserve.drafters.acceptance import Acceptance, SharedAcceptance
from specserve.drafters.chooser import DraftChooser
from specserve.drafters.head_source import HeadRunner, HeadSource
from specserve.drafters.history_source import HistorySource
from specserve.drafters.ngram import NgramSource
from specserve.drafters.protocol import DraftSource
from specserve.drafting.cost_model import CostModel, StepShape
from specserve.training.data.dataset import Example
from specserve.training.evaluation.answers import make_engine

from . import common, options
from .own_answers import hidden_states, lookahead_of, own_answers, row_price
from .tasks import BaseModel

SINGLE = ("ngram", "history", "head")


@dataclass(slots=True)
class Walk:
    """What one way came to over all answers."""

    tokens: int = 0
    verifications: int = 0
    seconds: float = 0.0
    branches: int = 0
    branch_hits: int = 0

    def add(self, num_tokens: int, num_rows: int, cost: CostModel) -> None:
        self.tokens += num_tokens
        self.verifications += 1
        self.seconds += cost.seconds(num_rows)


@dataclass(slots=True)
class Drafted:
    tokens: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)  # before each token
    others: list[list[tuple[int, float]]] = field(default_factory=list)  # (token, rate) of what was not proposed
    expected: float = 1.0  # tokens that the verification gives
    num_rows: int = 1  # of the verification


class Answer:
    """One answer with the hidden state before each of its tokens, and the sources of one way."""

    def __init__(
        self, example: Example, last: torch.Tensor, tapped: torch.Tensor, lookahead: Lookahead, max_drafts: int
    ):
        self.tokens, self.prompt_len = example.tokens, len(example.prompt)
        self._last, self._tapped, self._lookahead, self._max_drafts = last, tapped, lookahead, max_drafts

    def sources(self, names: Sequence[str]) -> list[DraftSource]:
        prompt, lookahead = self.tokens[: self.prompt_len], self._lookahead
        made: list[DraftSource] = []
        if "ngram" in names:
            made.append(NgramSource())
        if "history" in names and lookahead.history is not None:
            made.append(HistorySource(lookahead.history, self.prompt_len))
        if "head" in names and lookahead.head is not None:
            made.append(HeadSource(lookahead.head, prompt))
        return made

    def draft(
        self,
        chooser: DraftChooser,
        rates: Acceptance,
        position: int,
        forced: Sequence[int],
        survival: float,
        cost: CostModel | None,
        trunk: Drafted | None = None,
    ) -> Drafted:
        """Draft behind `position` known tokens, the first of it being `forced`; verified together with `trunk`."""
        runner, drafted = HeadRunner(), Drafted()
        if trunk is not None:  # a branch: its first token is a row as well
            drafted.expected, drafted.num_rows = trunk.expected + survival, trunk.num_rows + 1
        heads = [source for source in chooser.sources if isinstance(source, HeadSource)]
        for head in heads:
            head.set_hidden(self._last, self._tapped, position - 1 - self.prompt_len, position)
        chooser.begin(self.tokens[:position])
        if heads:
            runner.begin(heads)
            runner.step(heads)
        for token in forced:
            for source in chooser.sources:
                source.follow(token)
            runner.step(heads)
        chooser.survival = survival
        while len(forced) + len(drafted.tokens) < self._max_drafts:
            before = chooser.survival
            if not chooser.extend(_price(cost, drafted)):
                break
            drafted.expected, drafted.num_rows = drafted.expected + chooser.survival, drafted.num_rows + 1
            token = chooser.tokens[-1]
            others: dict[int, float] = {}
            for source, guess in chooser.guesses[-1]:
                if guess.token != token:
                    others[guess.token] = max(others.get(guess.token, 0.0), rates.rate(source, guess))
            drafted.tokens.append(token)
            drafted.survival.append(before)
            drafted.others.append(list(others.items()))
            runner.step(heads)
        return drafted

    def num_right(self, tokens: Sequence[int], position: int) -> int:
        truth = self.tokens[position:]
        for idx, (token, wanted) in enumerate(zip(tokens, truth, strict=False)):
            if token != wanted:
                return idx
        return min(len(tokens), len(truth))

    def rest(self, position: int) -> int:
        return len(self.tokens) - position


def _price(cost: CostModel | None, drafted: Drafted) -> float:
    if cost is None:
        return 0.0
    return row_price(cost.curve(StepShape()), drafted.expected, drafted.num_rows)


def walk_chain(made: Answer, names: Sequence[str], shared: SharedAcceptance, cost: CostModel, priced: bool,
               tree: bool, walk: Walk) -> None:  # fmt: skip
    chooser, rates = DraftChooser(made.sources(names), shared), Acceptance(shared)
    payer = cost if priced else None
    position = made.prompt_len + 1
    while made.rest(position) > 0:
        drafted = made.draft(chooser, rates, position, [], 1.0, payer)
        right = made.num_right(drafted.tokens, position)
        trunk, best = drafted, right
        if tree:
            branch_chooser = DraftChooser(made.sources(names), shared)
            for idx, others in enumerate(drafted.others):
                for token, rate in others:
                    own = drafted.survival[idx + 1] if idx + 1 < len(drafted.survival) else 0.0
                    survival = max(0.0, drafted.survival[idx] - own) * rate
                    if survival < _price(cost, trunk):
                        continue
                    forced = [*drafted.tokens[:idx], token]
                    branch = made.draft(branch_chooser, rates, position, forced, survival, payer, trunk)
                    trunk = branch
                    walk.branches += 1
                    total = made.num_right([*forced, *branch.tokens], position)
                    walk.branch_hits += total > max(idx, right)
                    best = max(best, total)
        num_tokens = min(best + 1, made.rest(position))
        walk.add(num_tokens, trunk.num_rows, cost)
        chooser.observe(made.tokens[position : position + right + 1])
        position += num_tokens


def walk_oracle(made: Answer, shared: SharedAcceptance, cost: CostModel, walk: Walk) -> None:
    """At every verification the single source that lasts longest, known beforehand; only right drafts are rows."""
    choosers = [DraftChooser(made.sources([name]), SharedAcceptance()) for name in SINGLE]
    rates = Acceptance(shared)
    position = made.prompt_len + 1
    while made.rest(position) > 0:
        right = max(
            made.num_right(made.draft(chooser, rates, position, [], 1.0, None).tokens, position) for chooser in choosers
        )
        num_tokens = min(right + 1, made.rest(position))
        walk.add(num_tokens, 1 + right, cost)
        position += num_tokens


@click.command(help=__doc__.partition("\n")[0])
@options.adapters
@options.for_each_adapter("--data")
@options.model
@options.at_least(1, "--rows", 24, "Held-out rows of each adapter.")
@options.at_least(1, "--max-drafts", 16)
@options.save("sources")
def main(
    adapters: tuple[Path, ...], data: tuple[Path, ...], model: str, rows: int, max_drafts: int, save: bool
) -> None:
    options.check_one_each(adapters, data=data)
    run = common.start("sources", "torch")
    base = BaseModel.load(model)
    click.echo(f"limit: {max_drafts + 1} tokens a verification; of single sources the oracle's line")
    figures: dict[str, Any] = {}
    for path, file in zip(adapters, data, strict=True):
        engine = make_engine(base.path, batch=16, max_len=2048)
        key = engine.load_adapter(path.name, path).content_hash
        lookahead, head = lookahead_of(engine, key, path)
        answers = own_answers(engine, key, base.examples(file, rows), 450)
        examples = [example for example in answers if len(example.completion) > 2]
        cost = engine.proposer.cost_model
        del engine
        last, tapped, starts = hidden_states(base.path, path, head.config.tap_layer, examples)
        walks = {name: Walk() for name in (*SINGLE, "oracle of the three", "chooser, no price", "chain", "tree")}
        shared = {name: SharedAcceptance(head.config.acceptance) for name in walks}
        for example, start in zip(examples, starts, strict=True):
            made = Answer(example, last[start:].float(), tapped[start:].float(), lookahead, max_drafts)
            for name in SINGLE:
                walk_chain(made, [name], shared[name], cost, False, False, walks[name])
            walk_oracle(made, shared["oracle of the three"], cost, walks["oracle of the three"])
            walk_chain(made, SINGLE, shared["chooser, no price"], cost, False, False, walks["chooser, no price"])
            walk_chain(made, SINGLE, shared["chain"], cost, True, False, walks["chain"])
            walk_chain(made, SINGLE, shared["tree"], cost, True, True, walks["tree"])
        figures[path.name] = {}
        for name, walk in walks.items():
            figures[path.name][name] = {
                "mean_accepted_length": round(walk.tokens / walk.verifications, 3),
                "tokens_per_model_second": round(walk.tokens / walk.seconds, 1),
            }
            if walk.branches:
                figures[path.name][name] |= {"branches": walk.branches, "branch_hits": walk.branch_hits}
            click.echo(f"{path.name}, {name}: {figures[path.name][name]}")
    run.finish({"rows": rows, "max_drafts": max_drafts, "figures": figures}, save)


if __name__ == "__main__":
    main()
