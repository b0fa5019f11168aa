"""Where adapters may be: names of folders in `adapters_dir`, and paths that are given at run time.

Owns what a name may look like and what a directory may be; what a name means is the store's. Links are followed each
time, so that what they lead to may be switched, and never out of `adapters_dir`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..adapter_files import CONFIG_FILE, EXHAUSTED, exhausted
from ..errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")
HUB_NAME = re.compile(rf"{NAME.pattern}(/{NAME.pattern})+")

MAX_WARNINGS = 1024  # folder names that are remembered as warned of

logger = logging.getLogger(__name__)


class AdapterPaths:
    """The file system's side of adapter names; `base_name` is the base model's and no adapter's.

    All adapters must lie in one of `roots`, which are resolved; in `adapters_dir` without any, without that anywhere.
    """

    def __init__(self, adapters_dir: str | None, base_name: str, roots: Sequence[Path] = ()):
        self._root = Path(adapters_dir).resolve() if adapters_dir else None
        self.roots = roots or ([self._root] if self._root is not None else [])
        self._base_name = base_name
        self._warned: set[str] = set()

    def folders(self) -> list[str]:
        """Names of `adapters_dir`; those that cannot be used are warned of, once."""
        if self._root is None:
            return []
        try:
            entries = list(self._root.iterdir())
        except OSError:  # it has gone
            return []
        names = []
        for entry in entries:
            name = entry.name
            if name.startswith(".") or not _has_config(entry):
                continue
            if problem := self._problem(name):
                if name not in self._warned and len(self._warned) < MAX_WARNINGS:
                    self._warned.add(name)
                    logger.warning("the folder %r in %s is not served: %s", name, self._root, problem)
            else:
                names.append(name)
        return names

    def has_folder(self, name: str) -> bool:
        """Whether `folders` lists it."""
        return self._root is not None and self._problem(name) is None and _has_config(self._root / name)

    def folder(self, name: str) -> Path | None:
        """The folder of that name, if there is one."""
        if self._root is None or name == self._base_name:
            return None
        entry = self._root / name
        return entry if self.is_usable(entry, name) else None

    def is_usable(self, directory: Path, name: str, param: str = "model") -> bool:
        """Whether `directory` is there; refuses it when it or its files are links that leave the folders of adapters.

        That is for an error in time: whoever reads the files looks again where what was opened lies.
        """
        try:
            if not directory.is_dir():
                return False
            self._check_inside(directory, name, param)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's word for a link that leads back to itself
            raise _unusable(name, error, param) from None
        return True

    def _check_inside(self, directory: Path, name: str, param: str) -> None:
        for path in (directory, *directory.iterdir()):
            if not self._is_inside(path.resolve()):
                raise UserError(
                    f"adapter {name!r}: {path.name} is a link that leaves the adapters folder",
                    param=param,
                    status=403,
                )

    def _is_inside(self, target: Path) -> bool:
        return not self.roots or any(target.is_relative_to(root) for root in self.roots)

    def given(self, name: str, path: str) -> Path:
        """The directory that `path` means, as a path that may go through links: those may be switched later."""
        if "\0" in path or "://" in path or len(path) > 4096:
            raise UserError("lora_path is no path of a local directory", param="lora_path")
        directory = Path(path)
        if not directory.is_absolute() and self._root is not None:
            directory = self._root / directory
        directory = Path(os.path.abspath(directory))
        try:
            target = directory.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"lora_path {path!r} is not readable: {error}", param="lora_path") from None
        if not self._is_inside(target):
            raise UserError(
                f"lora_path {path!r} lies outside the adapters folder (--adapters-dir, --adapter-roots); move it there",
                param="lora_path",
                status=403,
            )
        if not self.is_usable(directory, name, "lora_path"):
            raise UserError(f"lora_path {path!r} is not a directory on the server", param="lora_path")
        return directory

    def _problem(self, name: str) -> str | None:
        if name == self._base_name:
            return "that is the base model's name; rename the folder"
        if not _is_name(name):
            return "a name has letters, digits, '.', '-' and '_' only (at most 128); rename the folder"
        return None


def _unusable(name: str, error: Exception, param: str) -> UserError:
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return exhausted(name, error)
    return UserError(f"adapter {name!r} is not readable: {error}", param=param, code="invalid_adapter")


def _has_config(entry: Path) -> bool:
    try:
        return (entry / CONFIG_FILE).exists()
    except OSError:  # not ours to look into, which whoever asks for it is told
        return True


def is_one_directory(one: Path, other: Path) -> bool:
    """Whether two paths lead to one directory now."""
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):
        return False


def unknown(name: str) -> UserError:
    return _not_found(name, "does not exist; GET /v1/models lists the base model and its adapters")


def unloaded(name: str) -> UserError:
    """Of a folder that is there, or may be there again."""
    return _not_found(name, "was unloaded, and its folder is not served; POST /v1/load_lora_adapter loads it again")


def _not_found(name: str, reason: str) -> UserError:
    return UserError(f"model {name[:128]!r} {reason}", param="model", code="model_not_found", status=404)


def _is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str, param: str) -> None:
    """Names reach the file system, logs and metrics: letters, digits, dot, dash and underscore only."""
    if not _is_name(name):
        shown = name[:64].encode("unicode_escape").decode()
        raise UserError(
            f"{param} '{shown}' is not a valid name; use letters, digits, '.', '-' and '_' (at most 128)",
            param=param,
            code="invalid_model_name",
        )
