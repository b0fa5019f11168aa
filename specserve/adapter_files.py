"""The files of an adapter directory, read as one state of it while anybody may be writing there.

A directory is read into private copies: nothing is mapped that another process can truncate under us, and hashes are
those of the bytes that were read. When its stamp differs after reading from before, it was read in the middle of a
change and is read again. What an adapter means is in these files alone; others in the folder are not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import AdapterError, OverloadedError, UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Its lookahead half.
HEAD_CONFIG_FILE = "lookahead_config.json"
HEAD_WEIGHTS_FILE = "lookahead.safetensors"
HISTORY_FILE = "lookahead_history.bin"
LOOKAHEAD_FILES = (HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, HISTORY_FILE)
# What it is for, if not to generate.
POOLING_FILE = "pooling_config.json"
# Where the chat template or a tokenizer may stand: they shape a request before the engine sees it.
TEXT_FILES = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Prompts to try it with, for people: no part of what it is.
EXAMPLES_FILE = "examples.json"
MAX_EXAMPLES = 8
MAX_EXAMPLES_BYTES = 64 << 10
MAX_TITLE_LEN = 200
ExampleRole = Literal["system", "user", "assistant"]
ALL_FILES = (CONFIG_FILE, WEIGHTS_FILE, POOLING_FILE, *LOOKAHEAD_FILES, *TEXT_FILES)
MAX_CONFIG_BYTES = 4 << 20
MAX_FILE_BYTES = dict.fromkeys((*LOOKAHEAD_FILES, *TEXT_FILES), 256 << 20) | dict.fromkeys(
    (CONFIG_FILE, POOLING_FILE, HEAD_CONFIG_FILE), MAX_CONFIG_BYTES
)

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # handles or memory are out
_HASH_VERSION = b"adapter files 2\0"
NUM_ATTEMPTS = 4
PAUSE_S = 0.25  # between attempts
_CHUNK = 256 << 10  # what is read is hashed and written while it is in the cache

Stamp = tuple[tuple[str, int, int, int, int, int], ...]


class ChangingError(AdapterError):
    """The directory changed whenever it was read; the same request succeeds once the change is complete."""

    code = "adapter_changing"
    status = 409


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Private copies of what was there, by file name, and their SHA-256."""

    paths: Mapping[str, Path]  # good until the `open_adapter` that made them is left; what maps them may stay
    digests: Mapping[str, bytes]

    @property
    def content_hash(self) -> str:
        """SHA-256 over configurations, weights and lookahead files as stored; the adapter's name is no part of it."""
        return self._hash_of((CONFIG_FILE, WEIGHTS_FILE, POOLING_FILE, *LOOKAHEAD_FILES))

    def _hash_of(self, names: Sequence[str]) -> str:
        """SHA-256 over which of `names` there are and what is in them: a file's content under another name is another
        adapter. The version changes with the form, so that no hash is taken for one of another form."""
        found = [name.encode() + b"\0" + self.digests[name] for name in names if name in self.digests]
        return hashlib.sha256(b"".join((_HASH_VERSION, *found))).hexdigest()

    @property
    def text_hash(self) -> str | None:
        """SHA-256 over the chat template and tokenizer files; None for an adapter that is served with the base's."""
        if not {"tokenizer_config.json", "chat_template.jinja"} & self.digests.keys():
            return None
        return self._hash_of(TEXT_FILES)


def stamp_of(directory: Path) -> Stamp:
    """What changes whenever the adapter does: name, device, inode, size, modification and change time of its files.

    The change time cannot be set by programs that unpack or copy. Raises `AdapterError`.
    """
    found = []
    for name in ALL_FILES:
        try:
            status = os.stat(directory / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(directory.name, name, error) from None
        found.append((name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def age_s(stamp: Stamp) -> float:
    """Seconds since the newest change that the stamp knows of."""
    newest_ns = max((max(mtime, ctime) for *_, mtime, ctime in stamp), default=0)
    return time.time() - newest_ns / 1e9


@contextlib.contextmanager
def open_adapter(
    directory: Path,
    name: str,
    *,
    names: Sequence[str] = ALL_FILES,
    max_weights_bytes: int = 64 << 30,
    roots: Sequence[Path] = (),
) -> Iterator[AdapterFiles]:
    """Read those of `names` that are in `directory` into private copies, as they stood together at one time.

    Nothing is read of a file that lay outside all `roots`, which are resolved paths, when it was opened; none:
    anywhere. Raises `AdapterError` for what cannot be read, and `ChangingError` when the directory never held still.
    """
    limits = {**MAX_FILE_BYTES, WEIGHTS_FILE: max_weights_bytes}
    for attempt in range(NUM_ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        with contextlib.ExitStack() as stack:
            before = stamp_of(directory)
            paths: dict[str, Path] = {}
            digests: dict[str, bytes] = {}
            try:
                present = {found for found, *_ in before}
                for file in [wanted for wanted in names if wanted in present]:
                    copy = _private_copy(directory / file, limits[file], roots)
                    if copy is not None:
                        fd, digests[file] = copy
                        stack.callback(os.close, fd)
                        paths[file] = Path(f"/dev/fd/{fd}")
            except OSError as error:
                if stamp_of(directory) == before:
                    raise _unreadable(name, file, error) from None
                continue
            except AdapterError as error:
                if stamp_of(directory) == before:
                    raise AdapterError(f"adapter {name!r}: {error}", status=error.status) from None
                continue
            if stamp_of(directory) == before:
                yield AdapterFiles(paths, digests)
                return
    raise changing(name)


def read_texts(directory: Path, name: str, roots: Sequence[Path] = ()) -> tuple[str | None, dict[str, bytes]]:
    """(hash, contents by name) of the chat template and tokenizer files in `directory`. Raises as `open_adapter`."""
    with open_adapter(directory, name, names=TEXT_FILES, roots=roots) as files:
        return files.text_hash, {file: path.read_bytes() for file, path in files.paths.items()}


def read_extra(directory: Path, name: str, file: str, max_bytes: int, roots: Sequence[Path] = ()) -> bytes | None:
    """The file of that name in `directory`, which is no part of the adapter; None where there is none.

    Raises `AdapterError` for a link that leaves `roots`, for what is no file or cannot be read, and for a larger one.
    """
    try:
        copy = _private_copy(directory / file, max_bytes, roots)
    except OSError as error:
        raise _unreadable(name, file, error) from None
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}", status=error.status) from None
    if copy is None:
        return None
    with open(copy[0], "rb") as stream:
        stream.seek(0)
        return stream.read()


def changing(name: str) -> ChangingError:
    return ChangingError(f"adapter {name!r} changes while it is read; ask again when its files are complete")


def content_hash(directory: Path) -> str:
    """The identity of the adapter in `directory`. Raises `AdapterError`."""
    with open_adapter(directory, directory.name) as files:
        check_complete(files, directory, directory.name)
        return files.content_hash


def check_complete(files: AdapterFiles, directory: Path, name: str) -> None:
    """Raise `AdapterError` when `files`, read from `directory`, are no adapter."""
    if CONFIG_FILE not in files.paths:
        raise AdapterError(f"adapter {name!r}: {directory} has no {CONFIG_FILE}; a PEFT LoRA directory is expected")
    if WEIGHTS_FILE not in files.paths:
        raise AdapterError(f"adapter {name!r} has no {WEIGHTS_FILE}{_other_weights(directory)}")


def _other_weights(directory: Path) -> str:
    """What stands in the place of the weights file, for the error message."""
    found = sorted(entry.name for entry in directory.glob("adapter_model*"))
    if any(".safetensors" in file for file in found):
        return f"; {found[0]} is one part of a weights file that was split; join the parts into one {WEIGHTS_FILE}"
    if found:
        return f"; {found[0]} is not read: .bin and .pt files are pickles; save with safe_serialization=True"
    return ""


def _private_copy(path: Path, max_bytes: int, roots: Sequence[Path]) -> tuple[int, bytes] | None:
    """(descriptor of a copy that nobody else can open, SHA-256); None when there is no such file."""
    try:
        stream = open(path, "rb", buffering=0, opener=_open_now)
    except FileNotFoundError:
        return None
    with stream:
        if roots and not any(_place_of(stream.fileno()).is_relative_to(root) for root in roots):
            raise AdapterError(f"{path.name} is a link that leaves the folders of adapters", status=403)
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{path.name} is {_kind(status.st_mode)}, not a file")
        if status.st_size > max_bytes:
            raise AdapterError(f"{path.name} has {status.st_size} bytes; at most {max_bytes} are read")
        target = _anonymous_file(path.name)
        try:
            digest = hashlib.sha256()
            buffer = memoryview(bytearray(min(_CHUNK, status.st_size + 1)))
            num_bytes = 0
            while num_read := stream.readinto(buffer):
                chunk = buffer[:num_read]
                num_bytes += num_read
                if num_bytes > max_bytes:  # it grows
                    raise AdapterError(f"{path.name} has more than {max_bytes} bytes; at most so many are read")
                digest.update(chunk)
                written = 0
                while written < len(chunk):
                    written += os.write(target, chunk[written:])
        except BaseException:
            os.close(target)
            raise
    return target, digest.digest()


def _place_of(fd: int) -> Path:
    """Where an open file lies, which no link that is changed now can alter."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return Path(os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for a writer


def _anonymous_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _kind(mode: int) -> str:
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device"


def exhausted(adapter: str, error: OSError) -> OverloadedError:
    """What is wrong with this process and not with the adapter."""
    return OverloadedError(f"adapter {adapter!r} cannot be read now: {error.strerror}; retry shortly", status=503)


def _unreadable(adapter: str, file: str, error: OSError) -> UserError:
    if error.errno in EXHAUSTED:
        return exhausted(adapter, error)
    is_loop = error.errno == errno.ELOOP
    reason = "is a link that leads back to itself" if is_loop else f"is not readable: {error.strerror}"
    return AdapterError(f"adapter {adapter!r}: {file} {reason}")
