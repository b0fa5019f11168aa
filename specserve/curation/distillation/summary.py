"""What a distillation came to: rows, what was dropped and why, and what each teacher was asked and cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ... import __version__
from ...teachers import Usage
from .choosing import Chosen
from .plan import DistillPlan
from .scores import metric_score
from .top_logits import LogitsCounts


class Dropped(msgspec.Struct, frozen=True):
    """A row of the prompts' file that became none: its line, the kind of reason, and what it is."""

    line: int
    reason: str
    what: str


class TeacherSummary(msgspec.Struct, frozen=True):
    """`chosen` are answers that became rows; costs are in the price's currency, `cached_cost` was paid before.

    Of `lost` requests, which may have been charged, no answer came; `lost_cost` is part of `cost`, and an upper bound.
    """

    teacher: str
    chosen: int
    requests: int
    cached: int
    retries: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    cached_cost: float
    lost: int
    lost_cost: float


class Summary(msgspec.Struct, frozen=True):
    """The file beside the rows. `mean_score` is of what found the best; `mean_metric` compares them to the rows' own
    answers, where every row has one.
    """

    version: str
    settings: dict[str, Any]
    best_by: str
    prompts: int
    rows: int
    dropped: dict[str, int]
    asks_failed: int
    mean_score: float | None
    mean_metric: float | None
    teachers: list[TeacherSummary]
    logits: dict[str, int] | None
    seconds: float
    dropped_rows: list[Dropped]

    @property
    def cost(self) -> float:
        return sum(teacher.cost for teacher in self.teachers)

    def lines(self) -> Iterator[str]:
        """What the command says of it."""
        means = (("score", self.mean_score), ("metric against the rows' answers", self.mean_metric))
        told = "".join(f", mean {name} {value:.3f}" for name, value in means if value is not None)
        yield f"{self.rows} rows of {self.prompts} prompts, best by {self.best_by}{told}"
        if self.dropped:
            yield "dropped: " + ", ".join(f"{num} {reason}" for reason, num in self.dropped.items())
        for teacher in self.teachers:
            tokens = f"{teacher.prompt_tokens} + {teacher.completion_tokens} tokens"
            cost = f", cost {teacher.cost:.4f}" if teacher.cost or teacher.cached_cost else ""
            lost = f", {teacher.lost} requests without an answer that may be charged" if teacher.lost else ""
            lost += f" (up to {teacher.lost_cost:.4f} of it)" if teacher.lost_cost else ""
            yield (
                f"{teacher.teacher}: {teacher.chosen} chosen; {teacher.requests} requests, {teacher.cached} cached, "
                f"{tokens}{cost}{lost}"
            )
        if self.logits is not None:
            yield "logits: " + ", ".join(f"{num} {name.replace('_', ' ')}" for name, num in self.logits.items())


def summary_of(
    plan: DistillPlan,
    best_by: str,
    chosen: Sequence[Chosen],
    usages: Mapping[str, Usage],
    counts: LogitsCounts | None,
    seconds: float,
) -> Summary:
    dropped = [Dropped(one.prompt.line, one.dropped[0], one.dropped[1]) for one in chosen if one.dropped is not None]
    taken = Counter(one.candidate.teacher for one in chosen if one.candidate is not None)
    scores = [one.score for one in chosen if one.candidate is not None and one.score is not None]
    metrics = [
        metric_score(one.candidate.text, one.prompt.reference)
        for one in chosen
        if one.candidate is not None and one.prompt.reference is not None
    ]
    return Summary(
        version=__version__,
        settings=dict(plan.settings),
        best_by=best_by,
        prompts=len(chosen),
        rows=len(chosen) - len(dropped),
        dropped=dict(Counter(one.reason for one in dropped).most_common()),
        asks_failed=sum(usage.failed for usage in usages.values()),
        mean_score=sum(scores) / len(scores) if scores else None,
        mean_metric=sum(metrics) / len(metrics) if metrics and len(metrics) == len(chosen) - len(dropped) else None,
        teachers=[
            TeacherSummary(
                name,
                taken[name],
                usage.requests,
                usage.cached,
                usage.retries,
                usage.failed,
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cost,
                usage.cached_cost,
                usage.lost,
                usage.lost_cost,
            )  # fmt: skip
            for name, usage in usages.items()
        ],
        logits=None
        if counts is None
        else {
            "rows": counts.rows,
            "tokens": counts.tokens,
            "rows_without": counts.rows_without,
            "likely_tokens_unmapped": counts.unmapped,
        },
        seconds=seconds,
        dropped_rows=dropped,
    )
