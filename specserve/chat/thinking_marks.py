"""The marks that model families put around what they think, and how a text with them is written.

Owns the table of families, and which of them a model may use: those whose marks its chat template spells, or that are
tokens of its own. A model's name says nothing. reasoning.py reads answers by it, training writes them by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """One family's block. Marks begin and end with no white space; what stands around them belongs to neither side."""

    start: str
    end: str
    inner: str = "\n"  # what its models write behind `start` and before `end`
    behind: str = "\n\n"  # and behind `end`
    answer_start: str = ""  # what may open the answer behind the block, or without one
    answer_end: str = ""  # and end it
    next_message: str = ""  # what may stand between the block and a further one, or the answer

    @property
    def texts(self) -> tuple[str, ...]:
        marks = (self.start, self.end, self.answer_start, self.answer_end, self.next_message)
        return tuple(mark for mark in marks if mark)

    def closing(self, reasoning: str, opening: str) -> str:
        """The rest of the block, `reasoning` in it, behind a prompt that ends with `opening`: `start`, or nothing."""
        has_lines = opening[len(self.start) :].endswith("\n") or opening == ""
        inner, behind = (self.inner, self.behind) if has_lines else ("", "")
        start = "" if opening else self.start + inner
        before_end = "" if opening.endswith("\n\n") and not reasoning else inner
        return f"{start}{reasoning}{before_end}{self.end}{behind}{self.next_message}"

    def split(self, text: str) -> tuple[str, str] | None:
        """(reasoning, content) of a whole answer that begins with a block, whose start may be the prompt's."""
        before, end, content = text.partition(self.end)
        reasoning = before.lstrip().removeprefix(self.start)
        return (reasoning.strip(), content.lstrip()) if end and self.start not in reasoning else None


# DeepSeek-R1 and its distills, Qwen 3, QwQ, SmolLM3, Phi 4, GLM, Nemotron, Hermes 4, ...
THINK = ThinkingMarks("<think>", "</think>")
_FAMILIES = (
    ThinkingMarks("<think>", "</think>", answer_start="<response>", answer_end="</response>"),  # Granite 3.3, ERNIE 4.5
    ThinkingMarks("<think>", "</think>", answer_start="<answer>", answer_end="</answer>"),  # HunYuan
    THINK,
    ThinkingMarks("[THINK]", "[/THINK]", "", ""),  # Magistral, Ministral 3
    ThinkingMarks("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThinkingMarks("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-Dev, Kimi-VL
    ThinkingMarks("<thought>", "</thought>"),  # EXAONE Deep
    ThinkingMarks("<thinking>", "</thinking>"),
    ThinkingMarks("<reasoning>", "</reasoning>"),
    ThinkingMarks(  # OpenThinker, Sky-T1
        *("<|begin_of_thought|>", "<|end_of_thought|>"),
        answer_start="<|begin_of_solution|>",
        answer_end="<|end_of_solution|>",
    ),
    ThinkingMarks(  # Command A, R7B
        *("<|START_THINKING|>", "<|END_THINKING|>", "", ""),
        answer_start="<|START_RESPONSE|>",
        answer_end="<|END_RESPONSE|>",
    ),
    ThinkingMarks(  # Apriel
        *("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
        answer_end="[END FINAL RESPONSE]",
    ),
    ThinkingMarks("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    ThinkingMarks(  # gpt-oss
        *("<|channel|>analysis<|message|>", "<|end|>", "", ""),
        answer_start="<|channel|>final<|message|>",
        next_message="<|start|>assistant",
    ),
)  # fmt: skip
MARK_TOKENS = frozenset(mark for marks in _FAMILIES for mark in (marks.start, marks.end))


def known_marks(template: object, added_tokens: Collection[str]) -> tuple[ThinkingMarks, ...]:
    """The families whose marks the template writes, or whose marks are tokens each; none: the model does not think.

    That answers have marks of their own is only told by a template.
    """
    text = str(template)
    added = set(added_tokens)
    return tuple(
        marks
        for marks in _FAMILIES
        if all(mark in text for mark in (marks.start, marks.end, marks.answer_start))
        or ({marks.start, marks.end} <= added and not marks.answer_start)
    )


def thoughtless(prompt: str, known: Sequence[ThinkingMarks]) -> str:
    """What stands between `prompt` and an answer without thoughts: the close of a block, or an answer's mark."""
    opened = opened_marks(prompt, known)
    if opened is not None:
        return opened.closing("", prompt[prompt.rindex(opened.start) :])
    messages = (marks for marks in known if marks.next_message and prompt.endswith(marks.next_message))
    return next((marks.answer_start for marks in messages), "")


def opened_marks(prompt: str, known: Sequence[ThinkingMarks]) -> ThinkingMarks | None:
    """Whose block `prompt` has opened at its end, if any."""
    end = prompt.rstrip()
    return next((marks for marks in known if end.endswith(marks.start)), None)


def closed_marks(prompt: str, known: Sequence[ThinkingMarks]) -> ThinkingMarks | None:
    """Whose block without thoughts `prompt` ends with, if any: the answer is not to think."""
    for marks in known:
        before, start, block = prompt.rpartition(marks.start)
        if start and block.strip() == marks.end:
            return marks
    return None
