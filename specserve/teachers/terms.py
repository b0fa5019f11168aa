"""The note on what a hosted teacher's provider may forbid, which a user agrees to once for each endpoint and model."""

from __future__ import annotations

from .answer_cache import AnswerCache
from .errors import TeacherError
from .spec import TeacherSpec


def note_on(spec: TeacherSpec) -> str:
    return (
        f"The answers of {spec.name} are made by a service of others. Its provider's terms, and the licence of its "
        "model, may forbid training other models on its answers, or ask that this is said. Read them before you go on: "
        "that they allow what you do is yours to know."
    )


def is_agreed(spec: TeacherSpec, cache: AnswerCache) -> bool:
    """Whether nothing need be asked: a local teacher, or one whose note was agreed to before."""
    return spec.url is None or cache.has_terms(spec.name)


def check_terms(spec: TeacherSpec, cache: AnswerCache) -> None:
    """Remember that the user agrees, or raise `TeacherError` with the note."""
    if is_agreed(spec, cache):
        return
    if not spec.accept_terms:
        raise TeacherError(f"{note_on(spec)} If you agree, give --accept-teacher-terms once.", ends_run=True)
    cache.agree(spec.name)
