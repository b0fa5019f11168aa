"""Who answers prompts for making data: an endpoint of others, or a model and an adapter in process.

Nothing that is heavy is imported before a teacher is opened.
"""

from .asks import Answer, Ask, Reading, TokenLogprob, TopTokens
from .errors import TeacherError
from .spec import Price, TeacherSpec, parse_spec
from .teacher import Teacher, open_teacher
from .usage import Budget, Usage

__all__ = [
    "Answer",
    "Ask",
    "Budget",
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
]
