"""What `specserve doctor` looks at on the machine: versions, compiler, CPU, GPU, pages, file handles, caches, clock."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from ..config import ServeConfig, engine_part
from ..errors import UserError
from .doctor import Check, Finding, Status

NAMED_PACKAGES = ("torch", "triton", "transformers")  # a line each; the others share one
ENOUGH_HANDLES = 1024
ENOUGH_DISK_BYTES = 1 << 30
_OTHER = "set XDG_CACHE_HOME to another folder"
_CACHE_FIX = f"the line of cache: native code says more; or {_OTHER}"
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def python_and_packages(config: ServeConfig) -> Iterator[Finding]:
    """Versions against those that the package asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata("specserve")
        requirements = [Requirement(line) for line in metadata.requires("specserve") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("python", "warning", f"{platform.python_version()}; specserve is not installed", "pip install .")
        return
    wanted = SpecifierSet(about["Requires-Python"] if "Requires-Python" in about else "")
    is_good = platform.python_version() in wanted
    fix = "" if is_good else f"make an environment with a Python {wanted}"
    yield Finding("python", "ok" if is_good else "missing", platform.python_version(), fix)
    others = []
    for need in requirements:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        problem = _problem(need.name, need.specifier)
        if need.name in NAMED_PACKAGES:
            found = problem or metadata.version(need.name)
            yield Finding(need.name, "missing" if problem else "ok", found, f"pip install '{need}'" if problem else "")
        elif problem:
            others.append((f"{need.name}: {problem}", f"'{need}'"))
    if others:
        found, needs = ("; ".join(texts) for texts in zip(*others, strict=True))
        yield Finding("packages", "missing", found, f"pip install {needs.replace('; ', ' ')}")
    else:
        yield Finding("packages", "ok", "all others that are needed, in versions that fit")


def _problem(name: str, specifier: object) -> str | None:
    from packaging.specifiers import SpecifierSet

    assert isinstance(specifier, SpecifierSet)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    return None if specifier.contains(version, prereleases=True) else f"{version}, where {specifier} is needed"


def cpu(config: ServeConfig) -> Iterator[Finding]:
    """Cores that this process may use, and the best instructions that the native kernels know."""
    from ..kernels.native_levels import LEVELS

    num = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = next(level for level in LEVELS if level.missing() is None)
    better = [level for level in LEVELS[: LEVELS.index(best)] if not level.is_foreign]
    why = f"; not {better[-1].name}: {better[-1].missing()}" if better else ""
    found = f"{platform.machine()}, {num} cores, instructions up to {best.name}{why}"
    if config.num_threads is not None and config.num_threads > num:
        yield Finding(
            "cpu", "warning", f"{found}; num_threads is {config.num_threads}", f"--num-threads {num}, or less"
        )
    else:
        yield Finding("cpu", "ok", found)


def native_kernels(config: ServeConfig) -> Iterator[Finding]:
    """The compiler, and the libraries as a server would build and load them."""
    from ..drafters.native import NativeDrafts
    from ..kernels.native import load_library
    from ..kernels.native_build import CacheError, NativeError, find_compiler
    from ..kernels.native_levels import LEVEL_NAMES

    level = config.kernels if config.kernels in LEVEL_NAMES else None
    quantized = config.quantization != "none" and config.device != "cuda"  # there it is Triton's
    is_needed = level is not None or config.kernels == "native" or quantized
    lacking: Status = "missing" if is_needed else "warning"
    install = "install g++ or clang++ (Debian and Ubuntu: apt install g++), or name one in CXX"
    try:
        compiler = find_compiler()
    except NativeError as error:
        yield Finding("compiler", lacking, f"{error}; torch serves instead, slower", install)
        return
    yield Finding("compiler", "ok", f"{compiler}, {_first_line(compiler, '--version')}")
    try:
        library = load_library(level)
    except NativeError as error:
        fix = _CACHE_FIX if isinstance(error, CacheError) else "a newer compiler, or --kernels auto"
        yield Finding("kernels", lacking, f"{error}; torch serves instead, slower", fix)
    else:
        how = f"built in {library.build_s:.1f} s" if library.build_s else "built before"
        yield Finding("kernels", "ok", f"{library.level}, {how}")
    try:
        NativeDrafts()
    except NativeError as error:
        fix = _CACHE_FIX if isinstance(error, CacheError) else install
        yield Finding("drafts", "warning", f"{error}; drafts grow in Python, slower", fix)
    else:
        yield Finding("drafts", "ok", "native")


def quantization(config: ServeConfig) -> Iterator[Finding]:
    """Whether the device that would serve has it; nothing without one."""
    from ..compute.device_choice import choose_device
    from ..compute.loader import choose_paths

    if config.quantization == "none":
        return
    try:
        device = choose_device(config)
        choose_paths(engine_part(config), device)
    except UserError as error:
        yield Finding("quantization", "missing", str(error), "another --quantization, or none")
    else:
        yield Finding("quantization", "ok", f"{config.quantization} on {device.type}")


def gpu(config: ServeConfig) -> Iterator[Finding]:
    """What torch sees, and the driver's own word where there is one."""
    import torch

    driver = _first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        yield Finding("gpu", "ok", f"{driver or torch.cuda.get_device_name()}; torch has CUDA {torch.version.cuda}")
    elif driver:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        fix = "install a torch for this driver (pytorch.org), or a newer driver"
        status: Status = "missing" if config.device == "cuda" else "warning"
        yield Finding("gpu", status, f"{driver}, but torch cannot use it: {built}", fix)
    elif config.device == "cuda":
        yield Finding("gpu", "missing", "device is cuda and there is no GPU that torch can use", "--device auto or cpu")
    else:
        yield Finding("gpu", "ok", "none; the CPU serves")


def pages(config: ServeConfig) -> Iterator[Finding]:
    """Large pages, which the weights lie in."""
    try:
        mode = re.search(r"\[(\w+)\]", _TRANSPARENT.read_text())
    except OSError:
        yield Finding("huge pages", "ok", "the system does not say")
        return
    if mode is not None and mode[1] == "never":
        fix = f"echo madvise | sudo tee {_TRANSPARENT}"
        yield Finding("huge pages", "warning", "switched off, which makes steps on a CPU slower", fix)
    else:
        yield Finding("huge pages", "ok", mode[1] if mode is not None else "unknown")


def handles(config: ServeConfig) -> Iterator[Finding]:
    """How many files and connections a process may open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_HANDLES:
        found = f"{hard} at most, which leaves room for few connections"
        yield Finding("file handles", "warning", found, "ulimit -Hn 65536 as root, or LimitNOFILE=65536 in a unit")
    else:
        yield Finding("file handles", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"{hard} at most")


def caches(config: ServeConfig) -> Iterator[Finding]:
    """Whether the folders that are written to can be, and have room."""
    from ..kernels.native_build import cache_dir
    from ..model.store import cache_root
    from ..server.sources.cache import default_root

    folders = {"models": cache_root(), "native code": cache_dir()}
    if config.allowed_adapter_urls or config.allowed_hub_repos:
        folders["adapters"] = Path(config.adapter_cache_dir or default_root())
    if config.history_dir is not None:
        folders["history"] = Path(config.history_dir).expanduser()
    if config.serving_log is not None:
        folders["served"] = Path(config.serving_log).expanduser()
    for what, folder in folders.items():
        name, there = f"cache: {what}"[:14], next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not there.is_dir():
            yield Finding(name, "missing", f"{there} is a file, where a folder is needed", f"move it away; or {_OTHER}")
            continue
        if not os.access(there, os.W_OK | os.X_OK):
            fix = f"chown it to this user ({os.getuid()}), or {_OTHER}"
            yield Finding(name, "missing", f"{folder} cannot be written", fix)
            continue
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / 2**30:.1f} GiB free"
        is_full = free < ENOUGH_DISK_BYTES
        yield Finding(name, "warning" if is_full else "ok", found, "free space there; 1 GiB does" if is_full else "")


def clock(config: ServeConfig) -> Iterator[Finding]:
    """A clock behind this very code is wrong, and with it certificates and whether files have just changed."""
    now, newest = time.time(), Path(__file__).stat().st_mtime
    text = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if now < newest - 60:
        yield Finding("clock", "warning", f"{text}, before specserve was installed", "set it: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", text)


def _first_line(*command: str) -> str:
    """Of what a program says; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


MACHINE_CHECKS: dict[str, Check] = {
    "python": python_and_packages,
    "cpu": cpu,
    "kernels": native_kernels,
    "quantization": quantization,
    "gpu": gpu,
    "huge pages": pages,
    "file handles": handles,
    "caches": caches,
    "clock": clock,
}
