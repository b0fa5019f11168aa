"""What a distillation is: teachers, prompts, how often each is asked, and how the best answer is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...teachers import TeacherSpec

BestBy = Literal["auto", "metric", "agreement", "judge", "first"]
DEFAULT_TEMPERATURE = 0.7  # of several samples
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillPlan:
    """`system` is told to the teachers and is in no row; scores and `min_score` are from 0 to 1."""

    teachers: tuple[TeacherSpec, ...]
    data: Path
    out: Path
    judge: TeacherSpec | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    held_out: tuple[Path, ...] = ()
    system: str | None = None
    schema: Mapping[str, Any] | None = None
    best_by: BestBy = "auto"
    min_score: float | None = None
    max_rows: int | None = None
    top_logprobs: int = 0
    student: str = ""
    max_cost: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # as they were given, for the summary

    @property
    def sampled_at(self) -> float:
        """The temperature."""
        if self.temperature is not None:
            return self.temperature
        return DEFAULT_TEMPERATURE if self.samples > 1 else 0.0

    @property
    def num_asked(self) -> int:
        """Answers to each prompt."""
        return self.samples * len(self.teachers)

    @property
    def num_local(self) -> int:
        """Models that run here: of more than one, each is in memory while it is asked."""
        specs = self.teachers if self.judge is None else (*self.teachers, self.judge)
        return sum(spec.url is None for spec in specs)

    @property
    def summary_file(self) -> Path:
        return self.out.with_suffix(".summary.json")

    def check(self) -> None:
        """Raise `UserError` for what cannot be done, before anybody is asked."""
        if self.out.is_dir():
            raise UserError(f"{self.out} is a folder; give a file for the rows", param="out")
        if self.out.exists():
            raise UserError(
                f"{self.out} exists; remove it, or give another file. Answers are kept apart from it: making it again "
                "asks nothing twice",
                param="out",
            )
        if not self.out.parent.is_dir():
            raise UserError(f"{self.out.parent} is no folder; make it, or give another file for the rows", param="out")
        if len({spec.name for spec in self.teachers}) < len(self.teachers):
            raise UserError(
                "a teacher is named twice, and would give the same answers twice; give --samples",
                param="teacher",
            )
        if self.samples > 1 and self.sampled_at == 0:
            raise UserError(
                f"--samples {self.samples} with --temperature 0 are all the same answer; give another",
                param="samples",
            )
        if self.best_by == "judge" and self.judge is None:
            raise UserError("--best-by judge needs a judge: give --judge SPEC", param="best_by")
        if self.judge is not None and self.best_by not in ("auto", "judge"):
            raise UserError(f"--judge is not asked with --best-by {self.best_by}; leave one out", param="judge")
        if self.top_logprobs and len({spec.url is None for spec in self.teachers}) > 1:
            raise UserError(
                "--top-logprobs of endpoints and of teachers that run here cannot be mixed: an endpoint tells those "
                "of its own answers alone; give teachers of one kind",
                param="top_logprobs",
            )
