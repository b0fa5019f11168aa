"""The way of an adapter from disk to where steps read it: room first, then the files; through host memory to a device.

Owns the order of these and that every byte reserved on the way is given back when it ends early. Which adapters stay is
`adapters/registry.py`'s, one for each memory; reading and copying are done by the functions that it is given. On a CPU
there is one memory, `registry`; beside a device `host` keeps copies, also of adapters that left it, as room allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from ..adapter_messages import LoadAdapter
from ..adapters.lora import LoraAdapter
from ..adapters.registry import AdapterRegistry, Reservation
from ..errors import OverloadedError
from ..messages import BACKGROUND_PRIORITY


@dataclass(frozen=True, slots=True)
class Brought:
    """An adapter that can be used once it is put into its room, which is reserved; `load_s` without waits for room."""

    adapter: LoraAdapter
    reservation: Reservation
    load_s: float


class AdapterMemory:
    """`read` takes (name, directory), `expected_bytes` a directory; `upload` copies one of `host` to the device."""

    def __init__(
        self,
        registry: AdapterRegistry,
        read: Callable[[str, Path], LoraAdapter],
        expected_bytes: Callable[[Path], int],
        host: AdapterRegistry | None = None,
        upload: Callable[[LoraAdapter], LoraAdapter] = lambda adapter: adapter,
    ):
        self.registry, self.host = registry, host
        self.num_reads = 0  # from disk, that succeeded
        self.num_stuck_reads = 0  # whose disk may be away
        self._reading: dict[int, tuple[AdapterRegistry, Reservation]] = {}  # by call id
        self._read, self._expected_bytes, self._upload = read, expected_bytes, upload

    def bring(self, load: LoadAdapter, priority: Callable[[], int]) -> Generator[Reservation, None, Brought]:
        """Yields reservations that are not granted yet, to go on when they are. On threads other than the engine's.

        `priority` is asked for the best of the requests that wait for it by then. Closing it gives back what it holds.
        Raises `UserError`.
        """
        host = self.host
        if host is None:
            return (yield from self._into(self.registry, load, priority, None))
        if self.registry.is_staying(load.content_hash):
            reservation = self.registry.ask(load.size_bytes, load.content_hash, is_patient=False)
            if (brought := self._held_by(self.registry, reservation)) is not None:
                return brought
            self.registry.give_back(reservation)
        content_hash, is_background = yield from self._on_host(host, load, priority)
        try:
            return (yield from self._into(self.registry, load, priority, host.adapters[content_hash]))
        finally:
            host.release(content_hash, is_background)
            host.take_left()  # it may have been unloaded meanwhile

    def _on_host(
        self, host: AdapterRegistry, load: LoadAdapter, priority: Callable[[], int]
    ) -> Generator[Reservation, None, tuple[str, bool]]:
        """Content hash of the adapter, whose copy in host memory is acquired; whether for rows of batches alone."""
        while True:
            brought = yield from self._into(host, load, priority, None)
            content_hash = brought.adapter.content_hash
            with host.lock:
                host.take_left()
                if not brought.reservation.is_held:
                    host.put(brought.adapter, brought.reservation, brought.load_s)
                if host.is_staying(content_hash):  # else it was unloaded since it was found
                    is_background = priority() >= BACKGROUND_PRIORITY
                    host.acquire(content_hash, is_background)
                    return content_hash, is_background

    def _into(
        self, registry: AdapterRegistry, load: LoadAdapter, priority: Callable[[], int], copy: LoraAdapter | None
    ) -> Generator[Reservation, None, Brought]:
        """Into one memory, from the `copy` of another one or from disk."""
        key = copy.content_hash if copy is not None else load.content_hash
        if copy is not None:
            num_bytes = copy.num_bytes
        elif load.size_bytes and registry.is_staying(key):
            num_bytes = load.size_bytes
        else:  # reading may take more than what is read
            num_bytes = max(load.size_bytes, self._expected_bytes(Path(load.path)))
        while True:
            reservation = registry.ask(num_bytes, key, is_patient=not load.is_prefetch, priority=priority())
            try:
                while not reservation.is_granted:
                    yield reservation
                if not reservation.is_held:
                    return self._moved(registry, load, copy, reservation)
            except BaseException:
                registry.give_back(reservation)
                raise
            if (brought := self._held_by(registry, reservation)) is not None:
                return brought
            # It was unloaded since it was found.

    def _moved(
        self, registry: AdapterRegistry, load: LoadAdapter, copy: LoraAdapter | None, reservation: Reservation
    ) -> Brought:
        if registry is self.host:
            registry.take_left()  # the copies that made room: no step reads them
        start = time.monotonic()
        if copy is not None:
            return Brought(self._upload(copy), reservation, time.monotonic() - start)
        self._reading[load.call_id] = registry, reservation
        try:
            adapter = self._read(load.name, Path(load.path))
        finally:
            del self._reading[load.call_id]
        with registry.lock:  # there are several readers
            self.num_reads += 1
        registry.resize(reservation, adapter.num_bytes)
        return Brought(adapter, reservation, time.monotonic() - start)

    def _held_by(self, registry: AdapterRegistry, reservation: Reservation) -> Brought | None:
        """What is there already, if it is."""
        adapter = registry.adapters.get(reservation.key) if reservation.is_held and reservation.key else None
        return Brought(adapter, reservation, 0.0) if adapter is not None else None

    def give_up(self, load: LoadAdapter) -> None:
        """Others may have the room of a load whose read hangs; should it end, it fails."""
        if (reading := self._reading.get(load.call_id)) is not None:
            registry, reservation = reading
            registry.give_back(reservation)

    def unload(self, content_hash: str, placement: int | None = None) -> None:
        """Forget an adapter as soon as no running request uses it, unless a load placed it after `placement`."""
        if self.registry.unload(content_hash, placement) and self.host is not None:
            self.host.unload(content_hash)
            self.host.take_left()

    def grant(self) -> None:
        """Give room to loads that wait for it."""
        for registry in (self.registry, self.host):
            if registry is not None:
                registry.grant()

    def prioritize(self, reservation: Reservation, priority: int) -> None:
        """That is the best of the requests that wait for it now."""
        for registry in (self.registry, self.host):
            if registry is not None and registry.is_waiting(reservation):
                registry.prioritize(reservation, priority)

    def no_room(self, reservation: Reservation, seconds: float) -> OverloadedError:
        """Why a load that waited for `reservation` for so long is refused."""
        if self.host is not None and self.host.is_waiting(reservation):
            return OverloadedError(
                f"the adapter found no room in main memory in {seconds:g} s: {self.host.size_bytes} of "
                f"{self.host.max_bytes} bytes are in use; retry later or raise {self.host.bytes_flag}",
                status=503,
            )
        registry = self.registry
        return OverloadedError(
            f"the adapter found no room in {seconds:g} s: {len(registry.held())} of {registry.max_adapters} places and "
            f"{registry.size_bytes} of {registry.max_bytes} bytes are in use, {registry.num_pinned} of "
            f"these adapters are pinned; retry later or raise --max-adapters or {registry.bytes_flag}",
            status=503,
        )
