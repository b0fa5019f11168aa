"""What goes wrong with a teacher, and whether asking again or asking anything else may help."""

from __future__ import annotations

from ..errors import UserError


class TeacherError(UserError):
    """One ask that has no answer. `retryable`: another attempt may help; `ends_run`: no other ask would be answered.

    `may_be_billed`: a provider may charge for the attempt all the same; `tokens` are the prompt's and the answer's that
    it charges for, where it says so.
    """

    code = "teacher_error"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        ends_run: bool = False,
        retry_after_s: float | None = None,
        status: int = 400,
        may_be_billed: bool = False,
        tokens: tuple[int, int] | None = None,
    ):
        super().__init__(message, status=status, retry_after_s=retry_after_s)
        self.retryable = retryable
        self.ends_run = ends_run
        self.may_be_billed = may_be_billed
        self.tokens = tokens


class NoAnswerError(TeacherError):
    """The teacher was asked and refused, or said nothing: that is its answer, kept so that nobody pays for it again."""


class NotAskedError(TeacherError):
    """Nobody was asked, as only what was asked before was wanted."""
