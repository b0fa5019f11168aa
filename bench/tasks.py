"""What the benches ask: rows of files as a model's tokens, the demo adapters' held-out rows, bench/data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.dataset import Example, read_rows, tokenize

from .common import ROOT

EXAMPLES = ROOT / "examples"
DEMO_TASKS = ("control2json", "debtags", "summary")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's directory, and how it reads text; `name` tells nothing of this machine."""

    name: str
    path: Path
    tokenizer: TextTokenizer
    eos: frozenset[int]

    @classmethod
    def load(cls, model: str = "") -> BaseModel:
        path = resolve_model(model)
        name = Path(model).name if model and Path(model).is_dir() else model or path.name
        return cls(name, path, TextTokenizer(path), eos_token_ids(path))

    def examples(self, file: Path, num: int | None = None, *, skip: int = 0) -> list[Example]:
        """`num` rows of `file` (None: all) after the first `skip`."""
        rows = read_rows(file)[skip:]
        return tokenize(rows[:num], self.tokenizer, self.eos)

    def prompts(self, file: Path, num: int | None = None) -> list[list[int]]:
        return [example.prompt for example in self.examples(file, num)]


def demo_adapter(task: str) -> Path:
    return EXAMPLES / "adapters" / task


def demo_rows(task: str) -> Path:
    """Held-out rows of a demo adapter's task."""
    return EXAMPLES / "data" / f"{task}.dev.jsonl"


def demo_schema(task: str) -> Path:
    """The JSON Schema of a demo adapter's answers; tasks of free text have none."""
    return EXAMPLES / "data" / f"{task}.schema.json"


def in_turn(tasks: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Item]]:
    """(task, its next item) without end: the tasks take turns, and each begins again after its last item."""
    cycles = [itertools.cycle(items) for items in tasks]
    return ((idx, next(cycle)) for _ in itertools.count() for idx, cycle in enumerate(cycles))


def read_prompts(task: str | None = None) -> list[dict[str, str]]:
    """Rows of bench/data with task, prompt and completion; the tasks take turns."""
    file = ROOT / "bench" / "data" / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if task in (None, row["task"])]


def chat_token_ids(tokenizer: Any, text: str) -> list[int]:
    """`text` as the user's turn of the model's chat template, with the assistant's turn opened."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]
