"""Builds C++ sources of ours into a library at first use, keeps it, loads it, and compares its structs with Python's.

Compiled with the machine's own C++ compiler, once: the library is kept in the user's cache under a hash of all that it
depends on. Nothing is ever compiled while serving: who loads a library does so at start. Without a compiler there is a
`NativeError` that says so; the caller decides what serves instead, and logs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from ctypes import POINTER, Structure, c_char_p, c_int32
from dataclasses import dataclass
from pathlib import Path

BUILD_TIMEOUT_S = 600  # the largest takes 20 s of a core of today, which may be busy, or old
_NO_ROOM = "No space left on device"


class NativeError(Exception):
    """The library cannot be had here; the message says why."""


class CacheError(NativeError):
    """There is no folder to keep the library in, or no room there."""


class Place(Structure):
    """Where the library has a field of a struct, or with a null field the struct itself."""

    _fields_ = [("type", c_char_p), ("field", c_char_p), ("offset", c_int32), ("size", c_int32)]


@dataclass(frozen=True, slots=True)
class NativeSources:
    """`main` is compiled with `flags`; it may include what lies beside it. `mirror` is the file with its structs."""

    name: str
    main: Path
    flags: tuple[str, ...]
    mirror: str

    @property
    def folder(self) -> str:
        return f"{self.main.parent.parent.name}/{self.main.parent.name}"

    def build(self, compiler: str, path: Path) -> None:
        """Compile to `path`; who needs it at the same time waits for it. Raises `NativeError`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._build_in(path.parent, compiler, path)
        except OSError as error:  # no folder, no right to write there, or a full disk
            why = error.strerror or error
            raise CacheError(f"{self.folder} cannot be built into {path.parent}: {why}") from None

    def _build_in(self, folder: Path, compiler: str, path: Path) -> None:
        with _alone_in(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
            if path.is_file():
                return
            output = Path(temporary) / path.name
            command = [compiler, *self.flags, str(self.main), "-o", str(output)]
            env = {**os.environ, "TMPDIR": temporary, "LC_ALL": "C"}  # /tmp may be full, or read-only
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False, env=env
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NativeError(f"{compiler} did not build {self.folder}: {error}") from None
            if done.returncode and _NO_ROOM in done.stderr:
                raise OSError(errno.ENOSPC, _NO_ROOM)
            if done.returncode:
                raise NativeError(f"{compiler} failed on {self.folder}: {done.stderr[-500:].strip()}")
            os.replace(output, path)

    def load(self, structs: Mapping[str, type[Structure]], *, holds_lock: bool = False) -> tuple[ctypes.CDLL, float]:
        """The library, built if the cache lacks it, and the seconds that building took (0 from the cache).

        `structs` are its structs by their names in C++. `holds_lock`: its calls keep the interpreter's lock, as those
        should that take microseconds or call back. Raises `NativeError`.
        """
        if platform.system() not in ("Linux", "Darwin"):
            raise NativeError(f"native code is not built on {platform.system()}")
        compiler = find_compiler()
        path, build_s = self._place(compiler), 0.0
        if not os.path.isfile(path):
            start = time.perf_counter()
            self.build(compiler, path)
            build_s = time.perf_counter() - start
        try:
            functions = ctypes.PyDLL(str(path)) if holds_lock else ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"{path} does not load: {error}") from None
        self.check_layout(functions, structs)
        return functions, build_s

    def is_kept(self) -> bool:
        """Whether `load` would find the library built."""
        return os.path.isfile(self._place(find_compiler()))  # false, and no error, in a folder nobody may look into

    def check_layout(self, functions: ctypes.CDLL, structs: Mapping[str, type[Structure]]) -> None:
        """Raise `NativeError` unless the library has the structs, fields, offsets and sizes of `structs`.

        A field on one side only would be read from a wrong address.
        """
        theirs: dict[tuple[str, str], tuple[int, int]] = {}
        functions.specserve_layout.restype = POINTER(Place)
        for place in functions.specserve_layout():
            if place.type is None:  # the last one
                break
            theirs[place.type.decode(), (place.field or b"").decode()] = place.offset, place.size
        ours = {(name, ""): (0, ctypes.sizeof(struct)) for name, struct in structs.items()}
        for name, struct in structs.items():
            for field, *_ in struct._fields_:
                ours[name, field] = getattr(struct, field).offset, getattr(struct, field).size
        # The first field of a struct that differs says more than those behind it, or the struct's own size.
        first = {key: (key[0], not key[1], (theirs.get(key) or ours[key])[0]) for key in theirs | ours}
        for key in sorted(first, key=first.__getitem__):
            in_library, here = theirs.get(key), ours.get(key)
            if in_library != here:
                what = f"field {key[1]} of struct {key[0]}" if key[1] else f"struct {key[0]}"
                raise NativeError(
                    f"{what} is {_shown(in_library)} in {self.folder}, but {_shown(here)} in {self.mirror}; declare "
                    "it alike in both"
                )

    def _place(self, compiler: str) -> Path:
        return cache_dir() / f"{self.name}-{self._key(compiler)}.so"

    def _key(self, compiler: str) -> str:
        """A hash of everything that the library depends on."""
        digest = hashlib.sha256()
        for file in sorted(self.main.parent.iterdir()):
            if file.suffix in (".h", ".cpp"):
                digest.update(file.name.encode() + file.read_bytes())
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
        flags = " ".join((*self.flags, *sorted(cpu_flags())))
        digest.update(version + flags.encode() + platform.machine().encode() + platform.processor().encode())
        return digest.hexdigest()[:20]


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of g++, clang++ and c++ on the path. Raises `NativeError`."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NativeError("no C++ compiler was found (g++ or clang++; or name one in CXX)")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within: the only process that builds there. Where the file system knows no locks, all that need it build it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _shown(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"{place[1]} bytes at {place[0]}"


def cache_dir() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specserve" / "native"


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by Linux's names; empty where nothing says so."""
    found = _cpu_says(("flags", "Features"), ("machdep.cpu.features", "machdep.cpu.leaf7_features"))
    return frozenset(found.lower().split())


def cpu_name() -> str:
    """Its maker's name for it; empty where nothing says so."""
    return _cpu_says(("model name",), ("machdep.cpu.brand_string",)).strip()


def _cpu_says(linux: tuple[str, ...], macos: tuple[str, ...]) -> str:
    """What stands under the first of Linux's names that the CPU has; all of macOS's."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        line = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(linux)), "")
        return line.partition(":")[2]
    try:
        found = subprocess.run(["sysctl", "-n", *macos], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.replace("\n", " ")
