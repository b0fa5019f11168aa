"""Rows that are near a held-out one, on which nothing should be trained that is measured there.

A text is contaminated if it is nearly the same as a held-out one, or repeats so many of its runs of 13 words
("Language Models are Few-Shot Learners", Brown et al. 2020, appendix C, drops at the first such run). Tasks repeat
themselves: instructions, headings and names stand in many rows. So runs that several known texts share say nothing, and
one run of a long text is not enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..training.data.near_duplicates import DEFAULT_THRESHOLD, NearDuplicates
from ..training.data.text_identity import common_shingles, shingles, text_key, words

RUN_LEN = 13  # words
LEAST_WORDS = 5  # a held-out text of fewer is only looked for as a whole
LEAST_SHARE = 0.3  # of a held-out text's runs
Run = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The held-out text that a text repeats, by its key, and how that shows, in words."""

    key: str
    how: str


class HeldOut:
    """Held-out texts by their keys; `known` are texts of the task that may be trained on, such as seeds."""

    def __init__(self, texts: Mapping[str, str], known: Sequence[str] = (), threshold: float = DEFAULT_THRESHOLD):
        self._near = NearDuplicates(threshold, common_shingles([shingles(text) for text in known]))
        self._equal: dict[str, str] = {}
        runs = {key: _runs(text) for key, text in texts.items()}
        in_known = Counter(run for text in known for run in _runs(text))
        in_held_out = Counter(run for found in runs.values() for run in found)
        of_task = {run for run, num in in_known.items() if num > 1 or in_held_out[run] > 1}
        self._num_runs: dict[str, int] = {}
        self._keys: dict[Run, list[str]] = {}
        for key, text in texts.items():
            self._near.add(key, text)
            self._equal.setdefault(text_key(text), key)
            for run in (own := runs[key] - of_task):
                self._keys.setdefault(run, []).append(key)
            self._num_runs[key] = len(own)
        self._lens = sorted({len(run) for run in self._keys})

    def match(self, text: str) -> Match | None:
        """The held-out text that `text` repeats."""
        if (key := self._equal.get(text_key(text))) is not None:
            return Match(key, "the same text")
        if (near := self._near.nearest(text)) is not None:
            return Match(near.key, f"similarity {near.similarity:.2f}")
        found = words(text)
        repeated = {run for length in self._lens for run in _runs_of(found, length) if run in self._keys}
        counts = Counter(key for run in repeated for key in self._keys[run])
        for key, num in counts.most_common():
            if num >= LEAST_SHARE * self._num_runs[key]:
                return Match(key, f"{num} of its {self._num_runs[key]} runs of words")
        return None


def _runs(text: str) -> set[Run]:
    found = words(text)
    return _runs_of(found, min(RUN_LEN, len(found))) if len(found) >= LEAST_WORDS else set()


def _runs_of(found: Sequence[str], length: int) -> set[Run]:
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}
