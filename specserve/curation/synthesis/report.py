"""What a synthesis made: counts by reason and by round, how different the rows are, and what it cost.

The seeds' own figures stand beside those of the rows, in samples of equal size: alone, a figure says little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .diversity import MAX_TEXTS, distinct, nearest_similarity, sampled, spread
from .judge import Judge
from .review import Candidate, Settings
from .rounds import Outcome
from .row_shapes import input_text
from .seeds import Seeds

Embed = Callable[[Sequence[str]], npt.NDArray[np.float64]]
_REPEATS = ("duplicate", "near_duplicate")


def make_report(
    settings: Settings,
    seeds: Seeds,
    judge: Judge,
    outcome: Outcome,
    rows: Sequence[Candidate],
    usage: dict[str, Any],
    embed: Embed | None = None,
) -> dict[str, Any]:
    """`rows` are those that are written, `usage` the teacher's of this run; `embed` makes vectors [N, D] of texts."""
    texts = [input_text(row.input) for row in rows if row.input is not None]
    own = [pair.text for pair in seeds.pairs]
    verdicts = Counter(candidate.verdict for candidate in outcome.candidates)
    return {
        "rows": len(rows),
        "candidates": len(outcome.candidates),
        "ended": outcome.ended,
        "verdicts": dict(verdicts.most_common()),
        "rounds": [_of_round(number, outcome.candidates) for number in _rounds(outcome.candidates)],
        "held_out": {
            "files": len(settings.held_out),
            "dropped": verdicts["held_out"],
            "seeds": [{"line": line, "how": match.how, "row": match.key} for line, match in judge.seeds_held_out],
        },
        "diversity": _diversity(own, texts, embed),
        "teacher": {"name": settings.teacher, "failed_requests": outcome.num_failed, **usage},
        "seeds": len(own),
        "method": settings.method,
        "task": settings.task,
    }


def summary_of(report: dict[str, Any]) -> list[str]:
    """The report in lines."""
    dropped = {name: num for name, num in report["verdicts"].items() if name not in ("kept", "surplus")}
    why = ", ".join(f"{num} {name.replace('_', ' ')}" for name, num in dropped.items()) or "none"
    lines = [f"{report['rows']} rows of {report['candidates']} candidates; dropped: {why}"]
    if report["held_out"]["seeds"]:
        found = report["held_out"]["seeds"]
        lines.append(
            f"warning: {len(found)} of the seeds are like held-out rows, the first in line {found[0]['line']} "
            f"({found[0]['row']}: {found[0]['how']}); what is measured there will look better than it is"
        )
    names = {
        "distinct_1": "distinct words",
        "distinct_2": "distinct pairs of words",
        "nearest_similarity": "similarity with the nearest",
        "topic_spread": "spread of topics",
    }
    seeds, rows = report["diversity"]["seeds"], report["diversity"]["rows"]
    figures = [f"{names[name]} {rows[name]:.2f} (seeds {seeds[name]:.2f})" for name in names if name in rows]
    if figures:
        lines.append(f"diversity of {report['diversity']['texts']} rows: {', '.join(figures)}")
    if report["ended"]:
        lines.append(f"warning: {report['ended']}")
    return lines


def _rounds(candidates: Sequence[Candidate]) -> list[int]:
    return sorted({candidate.round for candidate in candidates})


def _of_round(number: int, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Of the candidates that were proposed in it."""
    own = [candidate for candidate in candidates if candidate.round == number]
    num_repeated = sum(candidate.verdict in _REPEATS for candidate in own)
    return {
        "round": number,
        "candidates": len(own),
        "rows": sum(candidate.keep for candidate in own),
        "share_repeated": round(num_repeated / len(own), 4),
    }


def _diversity(seeds: Sequence[str], rows: Sequence[str], embed: Embed | None) -> dict[str, Any]:
    num = min(len(seeds), len(rows), MAX_TEXTS)
    found: dict[str, Any] = {"texts": num, "seeds": {}, "rows": {}}
    for name, texts in (("seeds", sampled(seeds, num)), ("rows", sampled(rows, num))):
        if num:
            found[name] = {
                "distinct_1": round(distinct(texts, 1), 4),
                "distinct_2": round(distinct(texts, 2), 4),
                "nearest_similarity": round(nearest_similarity(texts), 4),
            }
            if embed is not None:
                found[name]["topic_spread"] = round(spread(embed(texts)), 4)
    return found
