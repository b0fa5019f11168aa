"""The rows of a task: what is asked, what is wanted, and hashes of both.

A row of a task that generates is a conversation that ends with the wanted answer. Rows of other tasks are measured
together; of them only the file's content counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from ..errors import UserError
from ..training.data.rows import Row, read_rows
from ..training.evaluation.task_metrics import task_metrics
from .entries import Kind, Task, TaskRow

_MAIN = {"embed": "recall@10", "rerank": "mrr", "classify": "micro_f1"}
_POOLED_METRICS = {
    "embed": ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"),
    "rerank": ("first_is_best", "mrr", "ndcg@10"),
    "classify": ("micro_f1", "macro_f1", "accuracy"),
}


def named_task(data: Path, metric: str | None, **fields: Any) -> tuple[Task, str, list[TaskRow]]:
    """The task of a command's flags, the hash of what it is, and its rows. Raises `UserError`."""
    task = Task(data=str(data.resolve()), metric="", **fields)
    _, rows = read_task(task)
    task = msgspec.structs.replace(task, metric=metric_of(task.kind, metric, rows))
    return task, *read_task(task)  # of one reading, should the file change


def read_task(task: Task) -> tuple[str, list[TaskRow]]:
    """The hash of all rows and the metric, and the rows of a task that generates. Raises `UserError`."""
    if task.kind != "generate":
        from ..training.pooling.rows import PoolingTask, read_pooling_rows

        pooled = read_pooling_rows(task.data, cast(PoolingTask, task.kind), task.rows)
        return _hash([task.metric, *map(str, pooled)]), []
    rows = [task_row(row, task.system) for row in conversations(task)]
    return _hash([task.metric, *((row.prompt_hash, row.gold) for row in rows)]), rows


def conversations(task: Task) -> list[Row]:
    return read_rows(task.data, task.rows)


def task_row(row: Row, system: str | None) -> TaskRow:
    """Raises `UserError` where there is no wanted text at the end."""
    conversation = row.conversation if system is None else row.conversation.with_system(system)
    *asked, wanted = conversation.messages
    is_text = isinstance(wanted.get("content"), str) and not wanted.get("tool_calls")
    if wanted["role"] != "assistant" or not is_text:
        raise UserError(
            f"{row.where} does not end with an answer in text, which a leaderboard compares; leave it out", param="data"
        )
    prompt_hash = _hash([asked, msgspec.to_builtins(conversation.tools), str(conversation.reasoning)])
    shown = "\n\n".join(f"{message['role']}: {_text(message)}" for message in asked)
    return TaskRow(prompt_hash, shown, wanted["content"])


def metric_of(kind: Kind, metric: str | None, rows: Sequence[TaskRow]) -> str:
    """The name of the metric that is asked for; None: the one by which the trainer compares runs.

    Raises `UserError` for one that the task does not have.
    """
    if kind == "generate":
        gold = [row.gold for row in rows]
        known = tuple(name for name in task_metrics(gold, gold) if name != "main")
        main: str = next(name for name in ("field_match", "rouge_l") if name in known)
    else:
        known = _POOLED_METRICS[kind]
        main = _MAIN[kind]
    if metric is None:
        return main
    if metric not in known:
        raise UserError(f"--metric {metric!r} is none of this task's: give one of {', '.join(known)}", param="metric")
    return metric


def check_name(name: str, what: str) -> None:
    """Names stand in addresses of the page and in names of files."""
    allowed = all(character.isalnum() or character in "-_." for character in name)
    if not name or len(name) > 64 or not name.isascii() or not allowed or name.startswith("."):
        raise UserError(
            f"{what} {name!r}: give a name of at most 64 letters, digits, '-', '_' and '.', not beginning with a dot",
            param=what,
        )


def check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--data: there is no file {path}", param="data")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else msgspec.json.encode(content or message).decode()


def _hash(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
