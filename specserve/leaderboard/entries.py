"""What a leaderboard holds, as values: tasks and their rows, models, answers and scores, alone and as stored."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["generate", "embed", "rerank", "classify"]
What = Literal["task", "model"]
WHATS: tuple[What, ...] = ("task", "model")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Rows and how answers to them are judged. `floor` is a score that is worth nothing."""

    kind: Kind
    data: str
    metric: str
    rows: int | None = None  # the first so many; None: all
    max_tokens: int = 512
    system: str | None = None
    floor: float = 0.0


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A base model and a LoRA of it, or none; the hashes are of what was run last."""

    base: str
    adapter: str | None = None
    adapter_kind: Kind = "generate"


class TaskRow(msgspec.Struct, frozen=True):
    prompt_hash: str
    prompt: str  # as people read it
    gold: str


class KeptAnswer(msgspec.Struct, frozen=True):
    """`num_verified` are the tokens that verifications gave, the prompt's first token left out."""

    text: str
    finish_reason: str
    num_tokens: int
    num_verifications: int
    num_verified: int
    seconds: float  # of the engine, since the answer before
    hardware: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one model is worth at one task; `row_scores` are of its rows in order, where they have any."""

    score: float
    row_scores: tuple[float, ...] = ()
    metrics: dict[str, float]
    num_rows: int
    tokens_per_s: float | None = None
    tokens_per_verification: float | None = None
    hardware: str


class StoredTask(msgspec.Struct, frozen=True):
    number: int
    name: str
    data_hash: str
    task: Task


class StoredModel(msgspec.Struct, frozen=True):
    number: int
    name: str
    model: Model


class StoredCell(msgspec.Struct, frozen=True):
    """`is_current` is False where the task's rows have changed since."""

    cell: Cell
    config_hash: str
    is_current: bool
    made_at: float
