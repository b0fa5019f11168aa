"""What goes from a board by its name: a task or a model, and never one that a process is at work on."""

from __future__ import annotations

from ..errors import UserError
from .entries import WHATS
from .store import LeaderboardStore, model_locks


def removed(store: LeaderboardStore, name: str, what: str | None = None) -> tuple[str, int]:
    """Remove the task or model; returns which it was, and how many answers went.

    Raises `UserError` where there is none, where there are both and `what` does not say which, or where it is run now.
    """
    found = store.named(name)
    if not found or what not in (None, *found):
        raise UserError(f"{store.path} has no {what or 'task or model'} {name!r}", param="name")
    if what is None and len(found) > 1:
        raise UserError(f"{name!r} is a task and a model; say which one with --task or --model", param="name")
    (gone,) = [one for one in WHATS if one in found and what in (None, one)]
    locks = model_locks(store.path)
    try:
        for model in store.models():
            if (gone == "task" or model.name == name) and not locks.take(model.number):
                raise UserError(f"another process runs {model.name} now; end that first", param="name")
        return gone, store.remove(gone, name)
    finally:
        locks.close()
