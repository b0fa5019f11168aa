"""Who answers prompts for making data: an endpoint of others, or a model and an adapter in process.

Names are found on first use, and nothing heavy is imported before a teacher is opened.
"""

from typing import TYPE_CHECKING, Any

_HOMES = {
    "Answer": "asks",
    "Ask": "asks",
    "Budget": "usage",
    "NoAnswerError": "errors",
    "NotAskedError": "errors",
    "Price": "spec",
    "READ_ONLY": "marked_texts",
    "Reading": "asks",
    "Teacher": "teacher",
    "TeacherError": "errors",
    "TeacherSpec": "spec",
    "TokenLogprob": "asks",
    "TopTokens": "asks",
    "Usage": "usage",
    "open_teacher": "teacher",
    "parse_spec": "spec",
    "quoted": "marked_texts",
}
__all__ = [
    "READ_ONLY",
    "Answer",
    "Ask",
    "Budget",
    "NoAnswerError",
    "NotAskedError",
    "Price",
    "Reading",
    "Teacher",
    "TeacherError",
    "TeacherSpec",
    "TokenLogprob",
    "TopTokens",
    "Usage",
    "open_teacher",
    "parse_spec",
    "quoted",
]

if TYPE_CHECKING:
    from .asks import Answer, Ask, Reading, TokenLogprob, TopTokens
    from .errors import NoAnswerError, NotAskedError, TeacherError
    from .marked_texts import READ_ONLY, quoted
    from .spec import Price, TeacherSpec, parse_spec
    from .teacher import Teacher, open_teacher
    from .usage import Budget, Usage


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
