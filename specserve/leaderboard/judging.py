"""Asks a judge about the pairs that it has not seen; each verdict is kept as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from ..teachers import Budget, TeacherError, TeacherSpec, open_teacher
from .pairs import AnsweredRow, open_asks, verdict_of
from .standings import answered_of
from .store import LeaderboardStore

Judged = tuple[int, int]


async def judge_pairs(
    store: LeaderboardStore,
    spec: TeacherSpec,
    budget: Budget,
    max_rows: int,
    tasks: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Judged:
    """Over the first `max_rows` rows of each task that generates, of pairs with one of `models` or of all; returns how
    many verdicts came, and how many did not.

    Raises `UserError` where the judge cannot be asked; verdicts that came are kept.
    """
    todo = []
    with store.snapshot():
        known = store.judgments(spec.name)
        known_models = [model.name for model in store.models()]
        for task in store.tasks():
            if task.task.kind == "generate" and (not tasks or task.name in tasks):
                answered: list[AnsweredRow] = answered_of(store, task)[:max_rows]
                todo += list(open_asks(answered, known_models, known, models))
    num, failed = 0, 0
    if not todo:  # a judge that runs here would be loaded for nothing
        return num, failed
    async with open_teacher(spec, budget) as judge:
        async with aclosing(judge.answers(ask for _, ask in todo)) as answers:
            async for idx, result in answers:
                verdict = None if isinstance(result, TeacherError) else verdict_of(result[0].text)
                if verdict is None:
                    failed += 1
                    continue
                num += 1
                store.put_judgment(spec.name, todo[idx][0], verdict)
    return num, failed
