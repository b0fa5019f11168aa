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

from ..adapters.lora import LoraAdapter
from ..adapters.registry import AdapterRegistry, Reservation
from ..errors import OverloadedError
from ..messages import LoadAdapter


@dataclass(frozen=True, slots=True)
class Brought:
    """An adapter that can be used once it is put into its room, which is reserved; `load_s` without waits for room."""

    adapter: LoraAdapter
    reservation: Reservation
    load_s: float


class AdapterMemory:
    """`read` and `expected_bytes` take (name, path); `upload` copies an adapter of `host` to the device."""

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
        self._read, self._expected_bytes, self._upload = read, expected_bytes, upload

    def bring(self, load: LoadAdapter) -> Generator[Reservation, None, Brought]:
        """Yields reservations that are not granted yet, to go on when they are. On threads other than the engine's.

        Closing it gives back what it holds. Raises `UserError`.
        """
        if self.host is None:
            return (yield from self._into(self.registry, load, None))
        content_hash = yield from self._on_host(self.host, load)
        try:
            return (yield from self._into(self.registry, load, self.host.adapters[content_hash]))
        finally:
            self.host.release(content_hash)

    def _on_host(self, host: AdapterRegistry, load: LoadAdapter) -> Generator[Reservation, None, str]:
        """Content hash of the adapter, whose copy in host memory is acquired."""
        brought = yield from self._into(host, load, None)
        with host.lock:
            host.take_left()
            host.put(brought.adapter, brought.reservation, brought.load_s)
            host.acquire(brought.adapter.content_hash)
        return brought.adapter.content_hash

    def _into(
        self, registry: AdapterRegistry, load: LoadAdapter, copy: LoraAdapter | None
    ) -> Generator[Reservation, None, Brought]:
        """Into one memory, from the `copy` of another one or from disk."""
        key = copy.content_hash if copy is not None else load.content_hash
        num_bytes = copy.num_bytes if copy is not None else load.size_bytes
        reservation = registry.ask(
            num_bytes or self._expected_bytes(Path(load.path)), key, is_patient=not load.is_prefetch
        )
        try:
            while not reservation.is_granted:
                yield reservation
            if reservation.is_held:
                assert key is not None
                return Brought(registry.adapters[key], reservation, 0.0)
            start = time.monotonic()
            if copy is None:
                adapter = self._read(load.name, Path(load.path))
                self.num_reads += 1
                registry.resize(reservation, adapter.num_bytes)
            else:
                adapter = self._upload(copy)
            return Brought(adapter, reservation, time.monotonic() - start)
        except BaseException:
            registry.give_back(reservation)
            raise

    def unload(self, content_hash: str) -> None:
        """Forget an adapter as soon as no running request uses it."""
        for registry in (self.registry, self.host):
            if registry is not None:
                registry.unload(content_hash)

    def grant(self) -> None:
        """Give room to loads that wait for it."""
        for registry in (self.registry, self.host):
            if registry is not None:
                registry.grant()

    def no_room(self, seconds: float) -> OverloadedError:
        """Why a load that waited for so long is refused."""
        registry = self.registry
        held = registry.held().values()
        return OverloadedError(
            f"the adapter found no room in {seconds:g} s: {len(held)} of {registry.max_adapters} places and "
            f"{registry.size_bytes} of {registry.max_bytes} bytes are in use, {sum(one.is_pinned for one in held)} of "
            f"these adapters are pinned; retry later or raise --max-adapters or {registry.bytes_flag}",
            status=503,
        )
