"""Which directory an adapter name means: a folder of `adapters_dir`, looked up when asked for, or what it was given to.

Owns names that were given and taken away at run time, and those that a load which runs will give; what is loaded is the
store's. Methods that look at the disk say so: the store calls them on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..adapter_files import Stamp, stamp_of
from ..errors import UserError
from .adapter_paths import HUB_NAME, AdapterPaths, check_name, unknown, unloaded
from .name_claims import Claim, NameClaims


class AdapterNames:
    """Of one store; `base_name` is the base model's and no adapter's."""

    def __init__(
        self,
        adapters_dir: str | None,
        base_name: str,
        roots: Sequence[Path] = (),
        fixed_stamp: Callable[[Path], Stamp | None] = lambda directory: None,
    ):
        """`fixed_stamp` is that of a directory that never changes, whether or not it is there now."""
        self.paths = AdapterPaths(adapters_dir, base_name, roots)
        self._fixed_stamp = fixed_stamp
        self.claims = NameClaims()
        self._base_name = base_name
        self._registered: dict[str, Path] = {}
        self._unloaded: set[str] = set()  # folders of adapters_dir that were unloaded by name

    def all(self) -> list[str]:
        """Every name that can be asked for now. Looks at the disk."""
        return sorted({*(name for name in self.paths.folders() if name not in self._unloaded), *self._registered})

    def given(self) -> set[str]:
        """The names that were given at run time."""
        return set(self._registered)

    def given_directory(self, name: str) -> Path | None:
        """What the name was given to at run time."""
        return self._registered.get(name)

    def given_directories(self) -> set[Path]:
        """Those that names were given to at run time, or are about to be."""
        return {*self._registered.values(), *self.claims.directories()}

    def path(self, name: str) -> Path:
        """The directory of a known name; raises 404 otherwise. Looks at the disk."""
        if len(name) <= 256 and HUB_NAME.fullmatch(name) and ".." not in name:
            raise unknown(name)  # a hub id is a good name of something that is not here; it is no path either
        check_name(name, "model")
        directory = self._registered.get(name) or self.folder(name)  # one look: others change it meanwhile
        if directory is None:
            raise unloaded(name) if name in self._unloaded else unknown(name)
        return directory

    def look_up(self, name: str) -> tuple[Path, Stamp]:
        """The same, and what is in it now. Looks at the disk."""
        directory = self.path(name)
        if (fixed := self._fixed_stamp(directory)) is not None:
            return directory, fixed
        if name in self._registered and not self.paths.is_usable(directory, name):
            raise unknown(name)
        stamp = stamp_of(directory)
        if not stamp and not directory.is_dir():
            raise unknown(name)
        return directory, stamp

    def stamp(self, directory: Path) -> Stamp:
        """What is in it now. Looks at the disk."""
        return self._fixed_stamp(directory) or stamp_of(directory)

    def folder(self, name: str) -> Path | None:
        """The folder of `adapters_dir` that serves under its name. Looks at the disk."""
        return None if name in self._unloaded else self.paths.folder(name)

    def means(self, name: str, directory: Path, folder: Path | None) -> bool:
        """Whether the name means `directory` now, where `folder` is its folder."""
        return self._registered.get(name, None if name in self._unloaded else folder) == directory

    def check_name(self, name: str) -> None:
        """Raises `UserError` for a name that no adapter may have."""
        check_name(name, "lora_name")
        if name == self._base_name:
            raise UserError(f"{name!r} is the base model's name; choose another", param="lora_name", status=409)

    def holder(self, name: str, folder: Path | None) -> Path | None:
        """The directory that has the name, or will have it, where `folder` is its folder; None: it is free."""
        return self._registered.get(name) or folder or self.claims.directory(name)

    def give(self, claim: Claim) -> bool:
        """Give a name to what was loaded for it; False where it was taken away, or given to another, meanwhile."""
        # Another load of the same directory under this name may have ended first, and given up the claim.
        if (self.claims.directory(claim.name) or self._registered.get(claim.name)) != claim.directory:
            return False
        self._registered[claim.name] = claim.directory
        self.claims.end(claim, with_older=True)
        self._unloaded.discard(claim.name)
        return True

    def take(self, name: str, is_folder: bool) -> None:
        """It means nothing from now on, also where its folder is there."""
        self.claims.end_all(name)
        self._registered.pop(name, None)
        if is_folder:
            self._unloaded.add(name)
