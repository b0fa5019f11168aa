"""The files of a shared store, at paths below its address: any file system of fsspec, a folder or a bucket alike.

Owns how they are read and written: a file is there whole or not at all, whichever writer is killed, and errors have
nothing of a library's text, which may hold secrets. What the files mean is the store's (store.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from ...adapter_files import MAX_CONFIG_BYTES
from ...errors import UserError
from ..sources.fetching import failed
from ..sources.other_sources import file_system, read_file

T = TypeVar("T")


class StoreFiles:
    """At an address of fsspec's, or in a local folder. Raises `UserError`."""

    def __init__(self, url: str):
        if "@" in url.partition("://")[2].partition("/")[0]:
            text = (
                "shared_store holds credentials; give them as the file system's package reads them, not in the address"
            )
            raise UserError(text, param="shared_store")
        self._url = url
        self._fs, self._root = file_system(url, "shared_store")
        self._is_local = "file" in _protocols(self._fs)
        self._unseen_bucket: str = self._fs.split_path(self._root)[0] if "s3" in _protocols(self._fs) else ""

    # -- reading

    def entries(self, folder: str) -> list[str]:
        """Names in it; none where it is not there."""
        with self.telling():
            try:
                return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._at(folder), False)]
            except FileNotFoundError:  # nobody has pushed yet
                self._check_bucket()
                return []

    def record(self, path: str, kind: type[T]) -> T | None:
        """A file as a value; None where it is not there. Raises where it is damaged."""
        with self.telling():
            try:
                if self._fs.info(self._at(path))["size"] > MAX_CONFIG_BYTES:
                    raise failed(
                        f"{self._at(path)} is no record of a shared store: it has more than {MAX_CONFIG_BYTES} bytes"
                    )
                return msgspec.json.decode(self._fs.cat_file(self._at(path)), type=kind)
            except FileNotFoundError:
                self._check_bucket()
                return None
            except msgspec.DecodeError:
                raise failed(f"{self._at(path)} is damaged; push the adapter again") from None

    def fetch(self, path: str, target: Path, max_bytes: int) -> None:
        """Copy a file to `target`."""
        read_file(self._fs, self._at(path), target, max_bytes)

    def size(self, path: str) -> int | None:
        """Bytes; None where it is not there."""
        with self.telling(), contextlib.suppress(FileNotFoundError):
            num_bytes: int = self._fs.info(self._at(path))["size"]
            return num_bytes
        return None

    def changed_at(self, folder: str) -> float:
        """When something in it was written last, in seconds since 1970; now where nobody knows."""
        with self.telling():
            try:
                paths = self._fs.ls(self._at(folder), False) or [self._at(folder)]
                times = [_time_of(self._fs.info(path)) for path in paths]
            except FileNotFoundError:
                times = []
        return max(times, default=time.time())

    # -- writing

    def write(self, path: str, record: Any) -> None:
        self.put_bytes(path, msgspec.json.encode(record))

    def put_bytes(self, path: str, body: bytes) -> None:
        self.put(path, lambda target: self._fs.pipe_file(target, body))

    def put_file(self, path: str, source: Path) -> None:
        self.put(path, partial(self._fs.put_file, str(source)))

    def put(self, path: str, write: Callable[[str], object]) -> None:
        """The file at once: object stores have it whole when they have it, a folder of files by renaming."""
        target = self._at(path)
        with self.telling():
            if not self._is_local:
                write(target)
                return
            unfinished = Path(self._root, "unfinished", uuid4().hex)
            try:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                write(str(unfinished))
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(unfinished, target)
            except BaseException as error:
                unfinished.unlink(missing_ok=True)
                if isinstance(error, FileNotFoundError):
                    raise failed(f"{target} could not be written: somebody removed it meanwhile; push again") from None
                raise

    # -- removing

    def remove(self, path: str) -> bool:
        """Whether it was there."""
        with self.telling():
            if not self._fs.exists(self._at(path)):
                return False
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))
        return True

    def take(self, path: str) -> bytes | None:
        """Remove the file; what was in it, None where it was not there."""
        with self.telling(), contextlib.suppress(FileNotFoundError):
            body: bytes = self._fs.cat_file(self._at(path))
            self._fs.rm_file(self._at(path))
            return body
        return None

    def remove_folder(self, folder: str) -> None:
        with self.telling(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(folder), recursive=True)

    def remove_unfinished(self, older_than_s: float) -> None:
        """What writers into a folder of files had begun when they were killed."""
        if not self._is_local:
            return
        with contextlib.suppress(FileNotFoundError):
            for path in Path(self._root, "unfinished").iterdir():
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Errors of libraries as ours; of their texts, which may hold secrets, only those of the system."""
        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            if not self._is_local and _is_refusal(error):
                said = "refuses the credentials of this process"
            else:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
                said = f"does not answer: {reason}"
            raise _unavailable(f"the shared store {self._url} {said}") from error

    def _check_bucket(self) -> None:
        """Raises `UserError` where it is missing: then nothing is in it, and nothing can be."""
        if not self._unseen_bucket:
            return
        try:
            self._fs.call_s3("head_bucket", Bucket=self._unseen_bucket)  # `exists` takes any error for its absence
        except FileNotFoundError:
            text = f"the shared store {self._url} has no bucket; create {self._unseen_bucket!r}, or correct the address"
            raise _unavailable(text) from None
        except PermissionError:
            pass  # who may see one prefix of it alone may not ask for it
        self._unseen_bucket = ""  # it is there: one look is enough

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


def _is_refusal(error: Exception) -> bool:
    """As s3fs says it, or gcsfs."""
    return isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden"))


def _unavailable(text: str) -> UserError:
    return UserError(text, param="shared_store", status=503, code="store_unavailable")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _time_of(info: dict[str, Any]) -> float:
    """When a file was written, by what the file systems call that; now where one does not say."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        found: Any = info.get(key)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
        with contextlib.suppress(TypeError, ValueError):
            return datetime.fromisoformat(found).timestamp()
    return time.time()
