"""Asks a judge about the pairs that it has not seen; each verdict is kept as it comes.

Verdicts are a judge's as it is: one that runs here and was trained again is another one, to whom its name then leads.
Of an endpoint nobody knows what is behind a name. One on an answer that was removed meanwhile is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from ..teachers import Budget, TeacherError, TeacherSpec, open_teacher
from .pairs import AnsweredRow, open_asks, verdict_of
from .standings import answered_of
from .store import LeaderboardStore

Judged = tuple[int, int, int]


async def judge_pairs(
    store: LeaderboardStore,
    spec: TeacherSpec,
    budget: Budget,
    max_rows: int,
    tasks: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Judged:
    """Over the first `max_rows` rows of each task that generates, of pairs with one of `models` or of all; returns how
    many verdicts were kept, how many did not come, and how many were on answers that are there no more.

    Raises `UserError` where the judge cannot be asked; verdicts that came are kept.
    """
    num, failed, gone = 0, 0, 0
    async with open_teacher(spec, budget) as judge:
        identity = spec.name if spec.url is not None else judge.backend.identity
        todo = []
        with store.snapshot():
            known = store.judgments(identity)
            known_models = [model.name for model in store.models()]
            for task in store.tasks():
                if task.task.kind == "generate" and (not tasks or task.name in tasks):
                    answered: list[AnsweredRow] = answered_of(store, task)[:max_rows]
                    todo += list(open_asks(answered, known_models, known, models))
        if known:
            store.put_judge(spec.name, identity)
        async with aclosing(judge.answers(one.ask for one in todo)) as answers:
            async for idx, result in answers:
                verdict = None if isinstance(result, TeacherError) else verdict_of(result[0].text)
                if verdict is None:
                    failed += 1
                    continue
                one = todo[idx]
                with store.transaction():
                    if not store.has_texts(one.row, one.texts):
                        gone += 1
                        continue
                    store.put_judge(spec.name, identity)
                    store.put_judgment(identity, one.digest, verdict)
                num += 1
    return num, failed, gone
