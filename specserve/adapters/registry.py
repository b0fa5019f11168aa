"""The adapters that one memory holds, by content hash, and who uses them.

Owns which are there; who gets room and who leaves is `residency`. Nothing here reads, copies or imports torch. Names
live in the server; a changed directory is simply another adapter. Any thread may ask and put; what has left goes from
`adapters` with `take_left`, which is the engine's thread's to call for the memory that steps read, so that nothing goes
while one is queued, and any thread's for copies beside a device. Each answer to a load has a number, by which what is
asked for later tells whether it knew of that load.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import OverloadedError, UserError
from .held import ARRIVAL_S, Held, Reservation
from .residency import NO_LIMIT, Residency

if TYPE_CHECKING:
    from .lora import LoraAdapter


class AdapterRegistry(Residency):
    """At most `max_adapters` adapters of at most `max_bytes` together."""

    def __init__(
        self,
        max_adapters: int,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = NO_LIMIT,
        bytes_flag: str = "--adapter-memory-gib",
    ):
        super().__init__(max_adapters, clock, max_bytes, bytes_flag)
        self.adapters: dict[str, LoraAdapter] = {}
        self._placements = itertools.count(time.monotonic_ns())  # all processes of a machine share that clock

    def put(self, adapter: LoraAdapter, reservation: Reservation, load_s: float = 0.0) -> bool:
        """Fill `reservation` with an adapter of its size; one that is held already stays instead, and is asked no more.

        False, and nothing is done, while an earlier one of the same content has left and `take_left` was not called.
        """
        with self.lock:
            held = self._held.get(adapter.content_hash)
            if held is not None:
                self.give_back(reservation)
                held.stay(self._clock(), reservation.is_background)
                return True
            assert reservation.is_granted
            if adapter.content_hash in self.adapters:
                return False
            self._num_reserved -= 1
            reservation.is_granted = False
            key, now = adapter.content_hash, self._clock()
            values = self._values(key, load_s, reservation.num_bytes)
            wanted_at = -math.inf if reservation.is_background else now
            self._held[key] = Held(reservation.num_bytes, load_s, *values, now, now + ARRIVAL_S, now, wanted_at)
            self.adapters[key] = adapter
            self.counts.num_loads += 1
            return True

    def place(
        self, adapter: LoraAdapter, reservation: Reservation, load_s: float = 0.0, *, is_pinned: bool = False
    ) -> int | None:
        """As `put`, for a load that is answered now, also one that found its adapter here: the number of this answer.

        None, and nothing is done, where `put` does nothing, and where what was found has left since.
        """
        with self.lock:
            if not reservation.is_held and not self.put(adapter, reservation, load_s):
                return None
            held = self._held.get(adapter.content_hash)
            if held is None:
                return None
            if held.is_unloaded:  # since it was found
                held.stay(self._clock(), reservation.is_background)
            held.placement = next(self._placements)
            if is_pinned:
                self.pin(adapter.content_hash, True, held.placement)
            return held.placement

    def add(self, adapter: LoraAdapter, num_bytes: int = 0) -> None:
        """As `ask` and `put`, for those who cannot wait and whose request need not come at once.

        Raises `OverloadedError` if there is no room.
        """
        reservation = self.ask(num_bytes, is_patient=False)
        if not reservation.is_granted:
            raise OverloadedError(
                f"all {self.max_adapters} adapter places, or {self.max_bytes} bytes, are in use by running requests; "
                f"retry later or raise --max-adapters or {self.bytes_flag}",
                status=503,
            )
        is_put = self.put(adapter, reservation)
        assert is_put
        self._held[adapter.content_hash].awaited_until = 0.0

    def take_left(self) -> dict[str, int]:
        """What has left since the last call, with its placement; from now on `adapters` is without it."""
        with self.lock:
            left, self._left = self._left, {}
            for key in left:
                del self.adapters[key]
            return left

    def of(self, content_hash: str | None) -> LoraAdapter | None:
        """The adapter of a request, None for the bare base; raises as `acquire` where its weights are not here."""
        if content_hash is None:
            return None
        adapter = self.adapters.get(content_hash)
        if adapter is None:
            raise _not_resident(content_hash)
        return adapter

    def acquire(self, content_hash: str, is_background: bool = False) -> None:
        """Count one more running request; an unknown hash tells the server to load the adapter again.

        Rows of batches, which are `is_background`, add nothing to what it is worth to others.
        """
        with self.lock:
            held = self._held.get(content_hash)
            if held is None or not held.is_staying:
                raise _not_resident(content_hash)
            held.num_refs += 1
            held.num_background += is_background
            held.last_used, held.awaited_until = self._clock(), 0.0
            if not is_background:
                held.wanted_at = held.last_used
            (self.background_scores if is_background else self.scores).use(content_hash)
            held.value, held.background_value = self._values(content_hash, held.load_s, held.num_bytes)

    def release(self, content_hash: str, is_background: bool = False) -> None:
        """Count one less; one that was waiting to leave goes with the last."""
        with self.lock:
            held = self._held[content_hash]
            held.num_refs -= 1
            held.num_background -= is_background
            held.last_used = self._clock()
            if not is_background:
                held.wanted_at = held.last_used
            if not held.num_refs and not held.is_staying:
                self._drop(content_hash)

    def unload(self, content_hash: str, placement: int | None = None) -> bool:
        """Let the adapter go once nobody uses it, pinned or not.

        Where it was placed after `placement` it stays, and is False; of pins only those from then on stay, too.
        """
        with self.lock:
            held = self._held.get(content_hash)
            if held is None:
                return True
            if placement is not None and held.placement > placement:
                self.pin(content_hash, False, placement)
                return False
            held.is_unloaded, held.is_pinned, held.asked_at = True, False, self._clock()
            if not held.num_refs:
                self._drop(content_hash)
            return True

    def pin(self, content_hash: str, is_pinned: bool = True, placement: int | None = None) -> None:
        """Keep the adapter whatever others need, or do so no more where no load pinned it after `placement`.

        Raises as `acquire`.
        """
        with self.lock:
            held = self._held.get(content_hash)
            if held is None:
                if is_pinned:
                    raise _not_resident(content_hash)
                return
            if is_pinned:
                held.is_pinned, held.asked_at, held.is_displaced = True, None, False
                held.pin_placement = max(held.pin_placement, placement or 0)
            elif placement is None or placement >= held.pin_placement:
                held.is_pinned = False

    def held(self) -> dict[str, Held]:
        """Copies of what is known of all that are held."""
        with self.lock:
            return {key: replace(held) for key, held in self._held.items()}

    @property
    def num_refs(self) -> int:
        with self.lock:
            return sum(held.num_refs for held in self._held.values())

    @property
    def num_pinned(self) -> int:
        with self.lock:
            return sum(held.is_pinned for held in self._held.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """Held and reserved."""
        return self._used_bytes


def _not_resident(content_hash: str) -> UserError:
    return UserError(f"adapter {content_hash[:12]} is not loaded", code="adapter_not_resident", status=409)
