"""From functions' votes to one distribution a text: majority, Dawid-Skene or MACE, as crowd-kit has them.

Dawid and Skene 1979 learn each function's confusions, MACE (Hovy et al. 2013) how often it guesses; both assume that
functions err independently. With `several`, each label is a question of its own: it holds or not. A text on which
nobody voted has no answer, and where fewer than three functions vote, the majority decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from .label_file import LabelModel, QuestionSpec
from .votes import Vote

MIN_FUNCTIONS = 3  # of two that disagree, no model can tell which is right
Answer = dict[str, float] | None  # each label's probability; without `several`, they sum to 1

_ITERATIONS = 100
_TOLERANCE = 1e-5
_RESTARTS = 5
_SEED = 0
_HOLDS, _ABSENT = "holds", "absent"


def combined(votes: Mapping[str, Sequence[Vote]], question: QuestionSpec, model: LabelModel) -> list[Answer]:
    """Of each text, by the votes of each function, all in the texts' order. Raises `UserError` without crowd-kit."""
    num_texts = len(next(iter(votes.values())))
    if not question.several:
        said = [
            (place, name, vote)
            for name, given in votes.items()
            for place, vote in enumerate(given)
            if isinstance(vote, str)
        ]
        chances = _distributions(said, model)
        return [
            {label: found.get(label, 0.0) for label in question.labels}
            if (found := chances.get(place)) is not None
            else None
            for place in range(num_texts)
        ]
    answers: list[dict[str, float]] = [{} for _ in range(num_texts)]
    for label in question.labels:
        said = [
            (place, name, _HOLDS if vote[label] else _ABSENT)
            for name, given in votes.items()
            for place, vote in enumerate(given)
            if isinstance(vote, dict) and label in vote
        ]
        for place, found in _distributions(said, model).items():
            answers[place][label] = found.get(_HOLDS, 0.0)
    return [answer or None for answer in answers]


def too_few(votes: Mapping[str, Sequence[Vote]], question: QuestionSpec) -> list[str]:
    """The labels on which fewer functions vote than a model can learn from; without `several`, all or none of them."""
    voting = [[vote for vote in given if vote is not None] for given in votes.values()]
    if not question.several:
        return list(question.labels) if 0 < sum(map(bool, voting)) < MIN_FUNCTIONS else []
    speaking = [{label for vote in given if isinstance(vote, dict) for label in vote} for given in voting]
    return [label for label in question.labels if 0 < sum(label in said for said in speaking) < MIN_FUNCTIONS]


def _distributions(said: Sequence[tuple[int, str, str]], model: LabelModel) -> dict[int, dict[str, float]]:
    """Of the texts on which anybody voted; `said` is (text, function, label)."""
    if not said:
        return {}
    if len({label for _, _, label in said}) == 1:  # nothing to learn, and crowd-kit's MACE divides by nothing
        return {place: {label: 1.0} for place, _, label in said}
    if len({name for _, name, _ in said}) < MIN_FUNCTIONS:
        model = "majority"
    try:
        import pandas as pd
        from crowdkit.aggregation.classification import MACE, DawidSkene, MajorityVote
    except ImportError as error:
        raise UserError(
            f"specserve label needs crowd-kit ({error}): pip install 'specserve[label]'", param="label_model"
        ) from None
    frame = pd.DataFrame(said, columns=["task", "worker", "label"])
    aggregator: Any
    if model == "dawid_skene":
        aggregator = DawidSkene(n_iter=_ITERATIONS, tol=_TOLERANCE)
    elif model == "mace":
        aggregator = MACE(n_restarts=_RESTARTS, random_state=_SEED)
    else:
        aggregator = MajorityVote()
    found = aggregator.fit_predict_proba(frame)
    return {int(place): {str(label): float(chance) for label, chance in row.items()} for place, row in
            found.to_dict("index").items()}  # fmt: skip
