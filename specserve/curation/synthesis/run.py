"""One `specserve synthesize`, from its options to rows, review file and report.

Owns the files and their names, and that only one process writes them. Everything that can be wrong is looked at before
the teacher is asked for anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...file_hash import input_hash
from ...teachers import Budget, Teacher, TeacherSpec, Usage, open_teacher
from ..answer_schema import read_schema
from ..held_output import check_writable, held
from .judge import Judge, Limits
from .prompts import DIRECTIONS
from .report import Embed, make_report
from .review import Candidate, Settings, check_same, put_lines, read_review, reviewed_rows
from .rounds import Outcome, Synthesis
from .seeds import Seeds, read_held_out, read_seeds

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `specserve synthesize` is told, but for its teacher. `model` counts tokens, and is under `embedder`."""

    seeds: Path
    task: str
    out: Path
    rows: int
    method: Literal["single", "refine"] = "single"
    inputs_only: bool = False
    include_seeds: bool = False
    schema: Path | None = None
    held_out: tuple[Path, ...] = ()
    examples: int = 4
    per_ask: int = 4
    vary: tuple[str, ...] = ()
    near: float = 0.7
    min_tokens: int | None = None
    max_tokens: int | None = None
    max_answer_tokens: int | None = None
    temperature: float = 1.0
    seed: int = 0
    model: str = ""
    embedder: Path | None = None


def review_of(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl") + ".review.jsonl")


def report_of(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl") + ".report.json")


def synthesize(options: Options, spec: TeacherSpec, budget: Budget, say: Say) -> dict[str, Any]:
    """Make the rows, or go on with them; returns the report. Raises `UserError`."""
    if not options.task.strip():
        raise UserError("--task is empty; say in a sentence or two what the rows are for", param="task")
    schema = read_schema(options.schema) if options.schema is not None else None
    seeds = read_seeds(options.seeds, schema, inputs_only=options.inputs_only)
    if len(seeds.pairs) == 1:
        say("there is one seed: what comes will be much like it; a few more that differ make better rows")
    judge = Judge(seeds, read_held_out(options.held_out), options.near, _limits(options))
    if options.embedder is not None:
        _check_embedder(options.embedder, options.model)
    settings = _settings(options, seeds, spec.name)
    review = review_of(options.out)
    _check_out(options)
    with held(review, review.with_suffix(".lock"), "out"):
        check_writable(options.out, [review, report_of(options.out)], options.seeds.stat().st_size, "out")
        candidates = _begun(review, settings)
        if candidates:
            num = sum(candidate.keep for candidate in candidates)
            say(f"{review} has {len(candidates)} candidates and {num} rows of an earlier run; it goes on from there")

        def begin(teacher: Teacher) -> Synthesis:
            return Synthesis(settings, seeds, judge, teacher, review, candidates, say)

        outcome, usage = Outcome(candidates), asdict(Usage())
        if len(outcome.rows) < options.rows:
            outcome, usage = asyncio.run(_run(begin, options.rows, spec, budget))
        if not outcome.rows:
            raise UserError(f"no row came of {len(outcome.candidates)} candidates: {outcome.ended}")
        rows = outcome.rows[: options.rows]
        put_lines(options.out, [*(seeds.rows if options.include_seeds else ()), *(row.row for row in rows)])
        embed = _embedder(options.embedder, options.model) if options.embedder is not None else None
        report = make_report(settings, seeds, judge, outcome, rows, usage, embed)
        put_lines(report_of(options.out), [report])
    return report


def apply_review(review: Path, out: Path, seeds: Path | None) -> int:
    """Write the rows that a review file keeps, behind those of `seeds` if given; returns their number.

    Raises `UserError`.
    """
    if out.resolve() in {path.resolve() for path in (review, seeds) if path is not None}:
        raise UserError(f"--output {out} is read, too; give another file for the rows", param="out")
    rows = reviewed_rows(review)
    first = read_seeds(seeds, None, inputs_only=True).rows if seeds is not None else []
    put_lines(out, [*first, *rows])
    return len(first) + len(rows)


async def _run(
    begin: Callable[[Teacher], Synthesis], num_rows: int, spec: TeacherSpec, budget: Budget
) -> tuple[Outcome, dict[str, Any]]:
    async with open_teacher(spec, budget) as teacher:
        return await begin(teacher).run(num_rows), asdict(teacher.usage)


def _settings(options: Options, seeds: Seeds, teacher: str) -> Settings:
    counts = options.min_tokens is not None or options.max_tokens is not None
    return Settings(
        kind=seeds.kind,
        task=options.task,
        teacher=teacher,
        seeds=seeds.sha256,
        schema=None if options.schema is None else input_hash(options.schema),
        held_out=tuple(sorted(input_hash(path) for path in options.held_out)),
        method=options.method,
        inputs_only=options.inputs_only,
        examples=options.examples,
        per_ask=options.per_ask,
        vary=options.vary or DIRECTIONS,
        near=options.near,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        max_answer_tokens=options.max_answer_tokens,
        model=options.model if counts else None,
        temperature=options.temperature,
        seed=options.seed,
    )


def _begun(review: Path, settings: Settings) -> list[Candidate]:
    if not review.exists():
        return []
    begun, candidates = read_review(review)
    check_same(review, begun, settings)
    return candidates


def _check_out(options: Options) -> None:
    """Nothing is written over that a synthesis did not write. Raises `UserError`."""
    out = options.out
    if out.resolve() in {path.resolve() for path in (options.seeds, *options.held_out)}:
        raise UserError(f"--output {out} is read, too; give another file for the rows", param="out")
    if out.is_dir() or (out.exists() and not review_of(out).exists()):
        raise UserError(
            f"--output {out} is there already, and {review_of(out).name} is not beside it: it is not of a synthesis; "
            "give another file",
            param="out",
        )


def _limits(options: Options) -> Limits:
    if options.min_tokens is None and options.max_tokens is None:
        return Limits()
    if options.max_tokens is not None and options.max_tokens < (options.min_tokens or 0):
        raise UserError(
            f"--max-row-tokens is {options.max_tokens} and --min-row-tokens {options.min_tokens}: no row has so many",
            param="max_tokens",
        )
    from ...model.store import resolve_model
    from ...text.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(resolve_model(options.model))
    return Limits(options.min_tokens, options.max_tokens, lambda text: len(tokenizer.encode_literal(text)))


def _check_embedder(adapter: Path, model: str) -> None:
    """Raises `UserError` for what the report could not be made with at the end."""
    from ...adapters.kind import adapter_type_at
    from ...model.store import resolve_model

    if not adapter.is_dir():
        raise UserError(f"--embedder {adapter} is no folder of an adapter", param="embedder")
    if (kind := adapter_type_at(adapter)) != "embed":
        raise UserError(
            f"--embedder {adapter} is for {kind!r} (adapter_type); the spread of topics is measured by one that embeds",
            param="embedder",
        )
    resolve_model(model)


def _embedder(adapter: Path, model: str) -> Embed:
    from ...llm.llm import LLM

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        with LLM(model or None) as llm:
            llm.load_adapter("embedder", adapter)
            return np.array([each.outputs.embedding for each in llm.embed(list(texts), adapter="embedder")])

    return embed
