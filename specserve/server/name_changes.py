"""Names that are given to directories at run time, and taken away.

A name keeps its old meaning until the load of what it will mean is done, and when that fails. Of two loads for one name
the one that began last has it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..adapter_messages import AdapterInfo
from ..errors import UserError
from .adapter_loader import AdapterLoader
from .adapter_names import AdapterNames
from .adapter_paths import is_one_directory
from .adapter_pins import AdapterPins
from .disk import Disk
from .loaded_names import LoadedNames
from .name_claims import Claim
from .name_loads import start


class NameChanges:
    """Those of one store."""

    def __init__(self, names: AdapterNames, disk: Disk, loader: AdapterLoader, loaded: LoadedNames, pins: AdapterPins):
        self._names, self._disk, self._loader, self._loaded, self._pins = names, disk, loader, loaded, pins

    async def register(self, name: str, path: str, replace: bool) -> AdapterInfo:
        """As `AdapterStore.register`."""
        self._names.check_name(name)
        directory = await self._disk.look(name, self._names.paths.given, name, path)
        if not replace:
            await self._check_free(name, directory)
        claim = self._names.claims.begin(name, directory)
        # A client that leaves does not stop it: the engine would hold an adapter that no name means.
        return await asyncio.shield(start(self._load(claim)))

    async def give(self, name: str, directory: Path) -> None:
        """Whatever it means now."""
        await self._load(self._names.claims.begin(name, directory))

    async def take(self, name: str) -> None:
        """Away at once, also from a load that has not ended; requests that run with it finish."""
        is_folder = await self._disk.look(name, self._names.paths.has_folder, name)
        self._names.take(name, is_folder)
        self._pins.unpin(name)
        loaded = self._loaded.forget(name)
        if loaded is not None:
            await self._loader.release(loaded)

    async def _check_free(self, name: str, directory: Path) -> None:
        """Raises 409 unless `name` means nothing, or `directory` already."""
        folder = await self._disk.look(name, self._names.folder, name)
        checked: Path | None = None
        while True:
            known = self._names.holder(name, folder)
            if known is None or known == checked:
                return
            if not await self._disk.look(name, is_one_directory, known, directory):
                raise UserError(
                    f"the name {name!r} is taken by another adapter; unload it first, or replace it with "
                    "load_inplace=true",
                    param="lora_name",
                    status=409,
                )
            checked = known

    async def _load(self, claim: Claim) -> AdapterInfo:
        try:
            loaded = await self._loader.load(claim.name, claim.directory, reads=True)
            if not self._names.give(claim):
                await self._loader.release(loaded)
                message = f"the name {claim.name!r} was unloaded or given away while the adapter loaded"
                raise UserError(message, param="lora_name", status=409)
            await self._loader.keep(claim.name, loaded)
            return loaded.info
        finally:
            self._names.claims.end(claim)
