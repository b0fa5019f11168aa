"""Files that are given to a command in place of each other: rows, run files of training, label files.

Owns how one is told from the other at a look, and the sentence that says which command takes it. What is in a file of
the right kind is its reader's matter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from .errors import UserError

_LOOKED_AT = 1 << 16  # bytes
_ROW = re.compile(rb'\s*\{[^\n]*?"(messages|conversations|prompt|instruction|query|text)"\s*:')
_KEY = re.compile(r"^(\w+):(.*)$", re.MULTILINE)
_RUN_KEYS = {"task", "lora", "head", "joint", "optimizer", "history", "distill", "checkpoint", "pooling", "classify"}


def check_given(path: Path, wanted: Literal["run", "label"]) -> None:
    """Raises `UserError` where `path` is evidently a file of another kind; one that cannot be read passes."""
    try:
        with open(path, "rb") as file:
            start = file.read(_LOOKED_AT)
    except OSError:
        return
    keys = {key: value.strip() for key, value in _KEY.findall(start.decode(errors="replace"))}
    if _ROW.match(start):
        use = (
            f"name it as data.train in one, or run `specserve train --data {path} --output DIR`"
            if wanted == "run"
            else "name it as data in one (docs/weak_labels.md)"
        )
        what = "run file of training" if wanted == "run" else "label file"
        raise UserError(f"{path} holds rows, one JSON object a line, and is no {what}: {use}", param="file")
    if wanted == "run" and "questions" in keys:
        raise UserError(
            f"{path} is a label file, no run file of training: run `specserve label {path}`, and train on what that "
            "writes",
            param="file",
        )
    if wanted == "label" and "questions" not in keys and (keys.keys() & _RUN_KEYS or keys.get("data") == ""):
        raise UserError(
            f"{path} is a run file of training, no label file, which has questions: run `specserve train {path}`",
            param="file",
        )
