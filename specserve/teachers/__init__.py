"""Who answers prompts for making data: an endpoint of others, or a model and an adapter in process.

Names are found on first use, and nothing heavy is imported before a teacher is opened.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
