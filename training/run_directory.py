"""The output directory of a run: what may be written where, and one run at a time in it.

A directory is empty, interrupted (a run.yaml of ours, and a lock file or a checkpoint), finished (neither of these), or
somebody else's, which is never written into. The lock is the kernel's, on `run.lock`: it ends with the process that
holds it, however that ends. The file itself stays until the run is finished; it holds the process id of the holder.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors

from ..adapter_files import HEAD_CONFIG_FILE, WEIGHTS_FILE
from ..errors import UserError
from ..file_lock import FileLock
from ..whole_files import replace_file
from .checkpoint import CHECKPOINT_FILE
from .run_config import RunConfig
from .run_file import RUN_FILE, load_run, save_resolved

LOCK_FILE = "run.lock"
_LEAST_FREE_BYTES = 200 << 20
_DISK_ERRORS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "too large a file"}

State = Literal["empty", "interrupted", "finished"]


@dataclass(slots=True)
class RunDirectory:
    """One output directory, held by this process."""

    path: Path
    began: bool = False

    def begin(self, config: RunConfig) -> None:
        """From here on the directory is this run's: writes run.yaml, or leaves the old one."""
        replace_file(self.path / RUN_FILE, lambda path: save_resolved(config, path))
        self.began = True


def state_of(path: Path) -> State:
    """Look at an output directory without touching it. Raises `UserError` for one that is not ours."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"output is {path}, which is a file; give a directory (--output DIR)", param="output")
        if not path.is_dir():
            return "empty"
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:  # too long a name, no permission
        raise UserError(f"cannot read the output directory {path}: {error.strerror}", param="output") from None
    if not names - {LOCK_FILE}:
        return "empty"
    if RUN_FILE not in names:
        shown = ", ".join(sorted(names)[:3])
        raise UserError(
            f"the output directory {path} is not empty and holds no run of ours ({shown}); give another --output or "
            "empty it",
            param="output",
        )
    has_result = names & {WEIGHTS_FILE, HEAD_CONFIG_FILE} and not names & {LOCK_FILE, CHECKPOINT_FILE}
    return "finished" if has_result else "interrupted"


def started_as(path: Path) -> RunConfig:
    """The configuration in the directory's run.yaml. Raises `UserError`."""
    try:
        return load_run(path / RUN_FILE, [], {})
    except UserError as error:
        raise UserError(
            f"the output directory {path} holds a {RUN_FILE} that is no run of ours ({error}); give another --output",
            param="output",
        ) from None


@contextmanager
def held_directory(path: Path, resume: bool) -> Iterator[RunDirectory]:
    """Hold `path` for one run, made if need be; what was made is removed again if the run never `begin`s.

    Raises `UserError` if the directory is not fit for it, or another run is in it.
    """
    _check_state(path, resume)  # before a lock file is laid into somebody else's directory
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock_path = path / LOCK_FILE
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_new = not lock_path.exists()
        lock = FileLock(lock_path)
    except OSError as error:
        raise UserError(f"cannot write to the output directory {path}: {error.strerror}", param="output") from None
    directory = None
    try:
        _take(lock, lock_path)
        directory = RunDirectory(path)
        _check_state(path, resume)
        if shutil.disk_usage(path).free < _LEAST_FREE_BYTES:
            raise UserError(f"less than {_LEAST_FREE_BYTES >> 20} MiB are free at {path}", param="output")
        lock.sign()
        yield directory
        lock_path.unlink()
    except BaseException:
        if directory is not None:
            if is_new and not directory.began:
                lock_path.unlink()
            else:
                lock.unsign()
            for folder in made if not directory.began else ():
                with suppress(OSError):  # not empty: others write there too
                    folder.rmdir()
        raise
    finally:
        lock.close()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within: a full disk is a `UserError`, whichever library met it."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        reason = next((text for number, text in _DISK_ERRORS.items() if code == number or _says(error, number)), None)
        if reason is None:
            raise
        raise UserError(
            f"cannot write to {path}: {reason}; free some space and go on with --resume", param="output"
        ) from error


def _check_state(path: Path, resume: bool) -> None:
    state = state_of(path)
    if state == "empty":
        if resume:
            raise UserError(f"there is no run in {path} to resume; leave --resume out, or name its --output")
        return
    started_as(path)
    if not resume or state == "finished":
        fix = "go on with --resume" if state == "interrupted" else "give another --output or remove it"
        raise UserError(f"the output directory {path} is not empty: it holds a run ({state}); {fix}", param="output")


def _take(lock: FileLock, path: Path) -> None:
    if not lock.take():
        raise UserError(
            f"another run is writing to {path.parent} (process {lock.holder}); wait for it, or give another --output",
            param="output",
        )
    if not lock.is_in_place:
        raise UserError(f"another run has just finished in {path.parent}; give another --output", param="output")


def _says(error: Exception, number: int) -> bool:
    """safetensors has no errno, only text."""
    return f"os error {number}" in str(error)
