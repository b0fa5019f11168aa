"""The adapters of one engine: how they are read, and where steps find them from when to when.

Owns their memories (`adapter_memory`) and what is told of those that left. Reading, uploading and placing touch nothing
that a step uses, so any thread may do them; all else is the engine's thread's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..adapter_messages import AdapterInfo
from ..adapters.lookahead import Lookahead, read_base_lookahead
from ..adapters.lora import LoraAdapter, read_adapter
from ..adapters.registry import AdapterRegistry
from ..adapters.residency import NO_LIMIT
from ..adapters.served_base import ServedBase
from ..adapters.sizes import expected_bytes
from ..compute.device_choice import adapter_budgets
from ..compute.loader import AnyDecoder
from ..compute.uploads import Uploads
from ..config import EngineConfig
from .adapter_memory import AdapterMemory, Brought

MAX_READING = 2  # adapters that are checked and laid out at the same time: beside steps, on the same cores


class EngineAdapters:
    """`forget` frees what was built of an adapter that has left, by content hash; `later_bytes`: `adapter_budgets`."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        decoder: AnyDecoder,
        later_bytes: int,
        forget: Callable[[str], None],
    ):
        assert config.max_adapters
        self._max_rank, self._lay_out, self._forget = config.max_lora_rank, decoder.lay_out_lora, forget
        self._roots = [Path(root) for root in config.adapter_roots]
        self._base = ServedBase.of(model_dir, decoder.config, decoder.embed.dtype, decoder.compute_dtype)
        assert self._base.identity is not None
        self.base_hash = self._base.identity.model_hash
        self.model_hash = f"{self.base_hash}-{self._base.identity.tokenizer_hash}"
        self._uploads = Uploads(decoder.device) if decoder.device.type != "cpu" else None
        self._reading = threading.Semaphore(MAX_READING)
        self.base_lookahead = self._read_base_lookahead(config.base_head)
        budgets = adapter_budgets(config, decoder.device, later_bytes)
        self.registry = AdapterRegistry(config.max_adapters, max_bytes=budgets.step_bytes, bytes_flag=budgets.step_flag)
        host = AdapterRegistry(NO_LIMIT, max_bytes=budgets.host_bytes) if budgets.host_bytes is not None else None
        self.memory = AdapterMemory(self.registry, self.read, self._expected_bytes, host, self._upload)
        self.left: dict[str, int] = {}  # with placements, since somebody last took note of it and emptied it

    def _read_base_lookahead(self, directory: str | None) -> Lookahead | None:
        if directory is None:
            return None
        assert self._base.identity is not None
        found = read_base_lookahead(Path(directory), self._base.config, self._base.identity)
        return found.copied(self._uploads.copy) if self._uploads is not None else found

    def read(self, name: str, path: str | Path) -> LoraAdapter:
        """Read and check a PEFT directory into main memory. Raises `AdapterError`."""
        return read_adapter(
            path,
            self._base,
            name=name,
            max_rank=self._max_rank,
            lay_out=self._lay_out,
            turn=self._reading,
            roots=self._roots,
        )

    def _expected_bytes(self, path: Path) -> int:
        return expected_bytes(path, self._base.lora_dtype.itemsize)

    def _upload(self, adapter: LoraAdapter) -> LoraAdapter:
        """Itself where steps read main memory."""
        return adapter.copied(self._uploads.copy) if self._uploads is not None else adapter

    def register(self, adapter: LoraAdapter) -> AdapterInfo:
        """Hold an adapter at once. Raises `OverloadedError` where there is no room."""
        if adapter.content_hash not in self.registry.adapters:
            adapter = self._upload(adapter)
        self.forget_left()
        self.registry.add(adapter, adapter.num_bytes)
        self.forget_left()
        return adapter.info()

    def place(self, brought: Brought, is_pinned: bool = False) -> int | None:
        """Hold an adapter in the room that it was brought to, as `AdapterRegistry.place`.

        None while the engine's thread must forget an earlier copy first (`forget_left`), or where the one that was
        found has left.
        """
        return self.registry.place(brought.adapter, brought.reservation, brought.load_s, is_pinned=is_pinned)

    def unload(self, content_hash: str, placement: int | None = None) -> None:
        """Forget an adapter as soon as no running request uses it, unless a load placed it after `placement`."""
        self.memory.unload(content_hash, placement)
        self.forget_left()

    def forget_left(self) -> None:
        """Free what was built of adapters that have left the registry, whoever made them leave."""
        for content_hash, placement in self.registry.take_left().items():
            self._forget(content_hash)
            self.left[content_hash] = placement
