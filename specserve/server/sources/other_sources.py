"""Adapters in repositories of the hub, and in whatever else fsspec has a file system for.

Credentials are the libraries' own matter: environment, instance, files of their configuration. Of their errors only
the kind is told, as their texts may hold them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ...errors import UserError
from .fetching import CHUNK_BYTES, FileState, failed, too_large
from .locations import Location


def file_system(url: str, param: str = "lora_path") -> tuple[Any, str]:
    """(fsspec's file system for `url`, the path in it). Raises `UserError` where its package is not installed."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)  # type: ignore[no-any-return]
    except (ImportError, ValueError):
        raise UserError(
            f"there is no file system for {scheme[:40]}:// here; install its fsspec package (s3fs, gcsfs)", param=param
        ) from None
    except Exception as error:  # of any library
        message = f"what {param} names on {scheme[:40]}:// cannot be opened: {type(error).__name__}"
        raise UserError(message, param=param, code="fetch_failed", status=502) from None


class FsspecSource:
    """The folder at `location`. Raises `UserError` where the package for its scheme is not installed."""

    def __init__(self, location: Location):
        self._fs, self._root = file_system(location.url)

    def states(self, names: tuple[str, ...]) -> dict[str, FileState]:
        states = {name: self._state(name) for name in names}
        return {name: state for name, state in states.items() if state is not None}

    def _state(self, name: str) -> FileState | None:
        try:
            info = self._fs.info(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:  # of any library
            raise failed(f"{name}: {type(error).__name__}") from None
        if info.get("type") != "file":
            raise failed(f"{name} is a {info.get('type')}, not a file")
        return FileState(info.get("size"), _tag(info))

    def read(self, name: str, target: Path, max_bytes: int) -> None:
        read_file(self._fs, f"{self._root}/{name}", target, max_bytes)


def read_file(fs: Any, path: str, target: Path, max_bytes: int) -> None:
    """Copy a file of fsspec's `fs` to `target`, in bounded memory. Raises `UserError`."""
    num_bytes, name = 0, path.rpartition("/")[2]
    try:
        with fs.open(path, "rb", cache_type="readahead") as stream, target.open("wb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large(name, max_bytes)
                file.write(chunk)
    except UserError:
        raise
    except Exception as error:
        raise failed(f"{name}: {type(error).__name__}") from None


def _tag(info: dict[str, Any]) -> str | None:
    """What the file systems call a version of a file."""
    for key in ("ETag", "etag", "generation", "md5Hash", "VersionId", "LastModified", "mtime", "updated", "created"):
        if info.get(key):
            return f"{key} {info[key]}"
    return None


class HubSource:
    """A repository at one of its revisions, the default branch's without one; all of a fetch is of one commit."""

    def __init__(self, location: Location):
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # read at import; it keeps a cache of its own beside ours
        self._id = location.place
        self._revision = location.path or None
        self._commit = ""

    def states(self, names: tuple[str, ...]) -> dict[str, FileState]:
        from huggingface_hub import HfApi

        revision = self._commit or self._revision  # a commit stays as it is, whatever is pushed meanwhile
        try:
            info = HfApi().model_info(self._id, revision=revision, files_metadata=True, timeout=30)
        except Exception as error:
            raise self._failed(error) from None
        self._commit = info.sha or ""
        found = {}
        for file in info.siblings or ():
            if file.rfilename in names:
                sha256 = file.lfs.sha256 if file.lfs is not None else None
                found[file.rfilename] = FileState(file.size, self._commit, sha256)
        return found

    def read(self, name: str, target: Path, max_bytes: int) -> None:
        from huggingface_hub import hf_hub_download

        try:
            with tempfile.TemporaryDirectory(dir=target.parent.parent) as scratch:
                os.replace(hf_hub_download(self._id, name, revision=self._commit, local_dir=scratch), target)
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> UserError:
        """What the hub's answer says; never its text, which may hold a signed address."""
        kind = type(error).__name__
        hints = {
            "RepositoryNotFoundError": "there is no such repository, or HF_TOKEN may not see it",
            "GatedRepoError": "its terms must be accepted on the hub, and HF_TOKEN set",
            "RevisionNotFoundError": f"there is no revision {self._revision!r}",
        }
        return failed(f"{self._id}: {hints.get(kind, kind)}")
