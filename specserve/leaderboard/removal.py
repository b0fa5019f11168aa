"""What goes from a board by its name: a task or a model, and never one that a process is at work on.

What a judge said goes with an answer, where no other model gave the same.
"""

from __future__ import annotations

from ..errors import UserError
from .entries import WHATS, What
from .pairs import asked_hash, asks_of
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
        with store.transaction():
            num = _removed(store, gone, name)
        store.give_room_back()
        return gone, num
    finally:
        locks.close()


def _removed(store: LeaderboardStore, what: What, name: str) -> int:
    if not store.judges():
        return store.remove(what, name)
    before = store.texts()
    num = store.remove(what, name)
    after = store.texts()
    store.drop_judgments(
        asked_hash(ask)
        for row, texts in before.items()
        for gone in texts - after.get(row, set())
        for other in texts - {gone}
        for ask in asks_of(row, gone, other)
    )
    return num
