"""Prompts that repeat a held-out row: nobody is asked about them, as no row of theirs may be trained on.

What is near is `contamination`'s to say; instructions and headings that prompts share say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from ..contamination import HeldOut
from ..synthesis.diversity import MAX_TEXTS, sampled
from ..synthesis.seeds import read_held_out
from .choosing import Chosen
from .prompts import Prompt


def without_held_out(prompts: Sequence[Prompt], files: Sequence[Path]) -> tuple[list[Prompt], list[Chosen]]:
    """The prompts that are like no row of `files`, and the others as dropped. Raises `UserError`."""
    if not files:
        return list(prompts), []
    of_task = sampled([prompt.text for prompt in prompts], MAX_TEXTS)
    held_out = HeldOut(read_held_out(files), of_task)
    left, dropped = list[Prompt](), list[Chosen]()
    for prompt in prompts:
        if (match := held_out.match(prompt.text)) is None:
            left.append(prompt)
        else:
            dropped.append(Chosen(prompt, None, dropped=("held out", f"{match.how} as {match.key}")))
    if not left and dropped[0].dropped is not None:
        raise UserError(
            f"all {len(prompts)} prompts are like held-out rows, the first is {dropped[0].dropped[1]}; give others",
            param="held_out",
        )
    return left, dropped
