"""What goes wrong with a teacher, and whether asking again or asking anything else may help."""

from __future__ import annotations

from ..errors import UserError


class TeacherError(UserError):
    """One ask that has no answer. `retryable`: another attempt may help; `ends_run`: no other ask would be answered."""

    code = "teacher_error"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        ends_run: bool = False,
        retry_after_s: float | None = None,
        status: int = 400,
    ):
        super().__init__(message, status=status, retry_after_s=retry_after_s)
        self.retryable = retryable
        self.ends_run = ends_run


class NotAskedError(TeacherError):
    """Nobody was asked, as only what was asked before was wanted."""
