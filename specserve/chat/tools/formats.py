"""How models write tool calls: the frame around each call, by model family.

Owns the literal text of each format and the choice of one for a chat template. The grammar, the parser and the prompt
read it from here, so what is forced is what is parsed. A call is one JSON object {"name": ..., ARGUMENTS_KEY: {...}},
written as Python's json.dumps writes it; the frame is what stands before, between and after calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
import string
from dataclasses import dataclass

_ALPHANUMERIC = string.ascii_letters + string.digits
_RENDERS_TOOLS = re.compile(r"\btools\b")
# The beginning of a call as a template spells it, in one literal or in several: words alone are in other families' too.
# Nothing is tried twice ("*+"), as an adapter's template may be made to be slow to read.
_HERMES_CALL = re.compile(r'<tool_call>(?:\\n|[^\w<])*+(?:name\\?"|[\w.]++\s*+\|\s*+tojson)')
_READS_DESCRIPTION = re.compile(r"\b(?:tool|function)(?:\.description\b|\[['\"]description['\"]\])")
_READS_THOUGHTS = re.compile(r"\bmessage(?:\.(thinking|reasoning)\b|\[\\?['\"](thinking|reasoning)\\?['\"]\])")
_RAISED = re.compile(r"raise_exception\(([^)]*+)")
_SYSTEM = re.compile(r"\b[Ss]ystem\b")
_LLAMA_CALL = re.compile(r'\\?"parameters\\?":')


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family's frame. `marker` opens the first call and may be one token; "" means the message starts with it."""

    name: str
    marker: str
    opening: str  # between the marker and the first call
    between: tuple[str, ...]  # between two calls, markers as parts of their own; empty: one call a message
    closing: tuple[str, ...]  # after the last call
    arguments_key: str
    has_ids: bool = False  # a call may say its id behind its arguments, nine letters and digits; it is not read

    def head(self, tool: str) -> str:
        """A call's text up to its arguments, without the space before them."""
        return f'{{"name": "{tool}", "{self.arguments_key}":'

    def call_id(self) -> str:
        """A fresh id; Mistral's templates refuse all but nine letters and digits."""
        if self.name == "mistral":
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def template_id(self, call_id: str) -> str:
        """A client's id as the template takes it; equal ids stay equal."""
        if self.name != "mistral" or re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


HERMES_END = "</tool_call>"
HERMES = ToolFormat(
    "hermes", "<tool_call>", "\n", ("\n", HERMES_END, "\n", "<tool_call>", "\n"), ("\n", HERMES_END), "arguments"
)
LLAMA3 = ToolFormat("llama3", "", "", (), (), "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", " [", (", ",), ("]",), "arguments", has_ids=True)
FORMATS = {item.name: item for item in (HERMES, LLAMA3, MISTRAL)}
PYTHON_TAG = "<|python_tag|>"  # Llama may write it before a call


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """A format for one template. `native`: the template itself renders tools, calls and results in it.

    `if_offered`: only where tools are offered, as a model with several templates has one of its own for them.
    `describes`: the template reads a tool's description by itself, and may fail without one (Hermes 3's does).
    `has_system`: it takes a system message, as far as its text tells. `thoughts`: how it calls what an assistant's
    message thought.
    """

    format: ToolFormat
    native: bool
    reason: str
    if_offered: bool = False
    describes: bool = False
    has_system: bool = True
    thoughts: str = "reasoning_content"


def choose_format(template: object, setting: str = "auto") -> ChosenFormat:
    """The format of a chat template's text, or of several by name; `setting` is --tool-format."""
    chosen = _choose(template, setting)
    text = str(template)
    if "reasoning_content" not in text and (read := _READS_THOUGHTS.search(text)):  # gpt-oss' and LFM's say "thinking"
        return dataclasses.replace(chosen, thoughts=read[1] or read[2])
    return chosen


def _choose(template: object, setting: str) -> ChosenFormat:
    several = template if isinstance(template, dict) else {}
    text = template if isinstance(template, str) else str(several.get("tool_use") or several.get("default") or "")
    if_offered = bool(several.get("tool_use"))
    renders = bool(_RENDERS_TOOLS.search(text))
    describes = bool(_READS_DESCRIPTION.search(text))
    if setting != "auto":
        return ChosenFormat(FORMATS[setting], renders, "--tool-format", if_offered, describes)
    if renders and "[TOOL_CALLS]" in text and "[ARGS]" not in text:
        opening = "[" if "[TOOL_CALLS][" in text else MISTRAL.opening
        format = dataclasses.replace(MISTRAL, opening=opening)
        return ChosenFormat(format, True, "the chat template writes [TOOL_CALLS]", if_offered, describes)
    if renders and "<function=" not in text and _HERMES_CALL.search(text):
        return ChosenFormat(HERMES, True, "the chat template writes <tool_call>", if_offered, describes)
    if renders and (PYTHON_TAG in text or "ipython" in text) and _LLAMA_CALL.search(text):
        return ChosenFormat(LLAMA3, True, "the chat template has Llama's tool role", if_offered, describes)
    reason = "the chat template's own tool format is not known" if renders else "the chat template renders no tools"
    return ChosenFormat(HERMES, False, reason, has_system=not _refuses_system(text))


def _refuses_system(template: str) -> bool:
    """Gemma's says so; the first Mistral's knows no such role, as it wants two to take turns."""
    if "raise_exception" in template and not re.search(r"\bsystem\b", template):
        return True
    told = (_SYSTEM.split(message[1], maxsplit=1) for message in _RAISED.finditer(template))
    return any("not" in behind for _, *rest in told for behind in rest)
