"""Adapter names: which directory a name means, and which loaded weights a directory means.

Names are the folders of `adapters_dir`, looked up when asked for, and those registered at run time. A name is resolved
to the content hash of what is in its directory now: when files change, the name means another adapter from the next
request on. First uses of one adapter load it once; a slow or failing load holds up nobody else.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from .engine_client import EngineClient
from .errors import UserError
from .messages import AdapterInfo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")
HUB_NAME = re.compile(rf"{NAME.pattern}(/{NAME.pattern})+")

Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True)
class _Loaded:
    fingerprint: Fingerprint
    generation: int  # of the engine process that holds it
    info: AdapterInfo


class AdapterStore:
    """Resolves adapter names for one engine."""

    def __init__(self, engine: EngineClient, adapters_dir: str | None):
        self._engine = engine
        self._root = Path(adapters_dir).resolve() if adapters_dir else None
        self._registered: dict[str, Path] = {}
        self._unloaded: set[str] = set()  # folders of adapters_dir that were unloaded by name
        self._loaded: dict[str, _Loaded] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def names(self) -> list[str]:
        """Every name that can be asked for now."""
        return sorted({*self._folders(), *self._registered})

    def has(self, name: str) -> bool:
        return self._directory(name) is not None

    def path(self, name: str) -> Path:
        """The directory of a known name; raises 404 otherwise."""
        directory = self._directory(name)
        if directory is None:
            raise _unknown(name)
        return directory

    async def resolve(self, name: str) -> AdapterInfo:
        """The loaded adapter that `name` means now; loads it if needed. Raises `UserError`."""
        directory = self.path(name)
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            fingerprint = await asyncio.to_thread(_fingerprint, directory)
            loaded = self._loaded.get(name)
            current = loaded is not None and loaded.generation == self._engine.generation
            if loaded is not None and current and loaded.fingerprint == fingerprint:
                return loaded.info
            info = await self._engine.load_adapter(name, str(directory))
            self._loaded[name] = _Loaded(fingerprint, self._engine.generation, info)
            if loaded is not None and current:
                await self._release(loaded.info.content_hash)
            return info

    def forget(self, name: str) -> None:
        """The engine no longer holds what `name` meant; the next request loads it again."""
        self._loaded.pop(name, None)

    async def register(self, name: str, path: str) -> AdapterInfo:
        """Give `name` to the directory `path` and load it; a name that is taken is refused."""
        check_name(name, "lora_name")
        directory = self._local_directory(path)
        known = self._directory(name)
        if known is not None and known != directory:
            raise UserError(
                f"the name {name!r} is taken by another adapter; unload it first", param="lora_name", status=409
            )
        before = self._registered.get(name)
        self._registered[name] = directory
        try:
            info = await self.resolve(name)
        except BaseException:
            if before is None:
                self._registered.pop(name, None)
            raise
        self._unloaded.discard(name)
        return info

    async def unregister(self, name: str) -> None:
        """Take the name away at once; requests that run with it finish."""
        self.path(name)
        self._registered.pop(name, None)
        if name in self._folders():
            self._unloaded.add(name)
        loaded = self._loaded.pop(name, None)
        if loaded is not None and loaded.generation == self._engine.generation:
            await self._release(loaded.info.content_hash)

    async def _release(self, content_hash: str) -> None:
        if all(other.info.content_hash != content_hash for other in self._loaded.values()):
            await self._engine.unload_adapter(content_hash)

    def _folders(self) -> list[str]:
        if self._root is None or not self._root.is_dir():
            return []
        found = (entry for entry in self._root.iterdir() if (entry / "adapter_config.json").exists())
        return [entry.name for entry in found if NAME.fullmatch(entry.name) and entry.name not in self._unloaded]

    def _directory(self, name: str) -> Path | None:
        if len(name) <= 256 and HUB_NAME.fullmatch(name) and ".." not in name:
            raise _unknown(name)  # a hub id is a good name of something that is not here; it is no path either
        check_name(name, "model")
        if name in self._registered:
            return self._registered[name]
        if self._root is None or name in self._unloaded:
            return None
        entry = self._root / name
        if not entry.is_dir():
            return None
        self._check_inside(entry, name)
        return entry

    def _check_inside(self, directory: Path, name: str) -> None:
        """Refuse an adapter whose folder or files are links that leave the adapters folder."""
        assert self._root is not None
        for path in (directory, *directory.iterdir()):
            if not path.resolve().is_relative_to(self._root):
                raise UserError(
                    f"adapter {name!r}: {path.name} is a link that leaves the adapters folder",
                    param="model",
                    status=403,
                )

    def _local_directory(self, path: str) -> Path:
        if "\0" in path or "://" in path or len(path) > 4096:
            raise UserError("lora_path must be a local directory, not an address", param="lora_path")
        directory = Path(path)
        if not directory.is_absolute() and self._root is not None:
            directory = self._root / directory
        directory = directory.resolve()
        if self._root is not None and not directory.is_relative_to(self._root):
            raise UserError(
                f"lora_path {path!r} lies outside the adapters folder; move it there", param="lora_path", status=403
            )
        if not directory.is_dir():
            raise UserError(f"lora_path {path!r} is not a directory on the server", param="lora_path")
        return directory


def _unknown(name: str) -> UserError:
    return UserError(
        f"model {name[:128]!r} does not exist; GET /v1/models lists the base model and its adapters",
        param="model",
        code="model_not_found",
        status=404,
    )


def check_name(name: str, param: str) -> None:
    """Names reach the file system, logs and metrics: letters, digits, dot, dash and underscore only."""
    if not NAME.fullmatch(name) or ".." in name:
        shown = name[:64].encode("unicode_escape").decode()
        raise UserError(
            f"{param} '{shown}' is not a valid name; use letters, digits, '.', '-' and '_' (at most 128)",
            param=param,
            code="invalid_model_name",
        )


def _fingerprint(directory: Path) -> Fingerprint:
    """Changes whenever the adapter's files do: name, size, modification time and inode of each."""
    try:
        entries = sorted(directory.iterdir())
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError as error:
        raise UserError(f"adapter {directory.name!r} is not readable: {error.strerror}", status=400) from None
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
