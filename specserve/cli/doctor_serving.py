"""What `specserve doctor` looks at for a server with these settings: model, memory, adapters, port, keys and TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config import ServeConfig
from ..errors import AdapterError, ModelError, UserError
from .doctor import Check, Finding

_CPU_KV_GIB = 2.0  # without --kv-cache-gib
_SPARE_BYTES = 1 << 30  # Python, torch and activations


def local_model(config: ServeConfig) -> Path | None:
    """The model's directory, where it is here; None where it would be fetched. Raises `UserError`."""
    from ..model.store import default_model_dir, is_hub_id, resolve_model

    if not config.model:
        folder = default_model_dir()
        return folder if folder.is_dir() else None
    if Path(config.model).expanduser().exists() or not is_hub_id(config.model):
        if config.model.endswith(".gguf"):
            return None if Path(config.model).expanduser().is_file() else resolve_model(config.model)
        return resolve_model(config.model, config.revision, progress=False)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


def model(config: ServeConfig) -> Iterator[Finding]:
    """Whether it is here, of a kind that is served, and fits into memory."""
    from ..model.config import ModelConfig

    folder = local_model(config)
    name = config.model or "the default model"
    if folder is None:
        pull = f"specserve pull {config.model}".rstrip()
        yield Finding("model", "warning", f"{name} is not here yet; the first start fetches or converts it", pull)
        return
    shape = ModelConfig.from_dir(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors; give a directory with safetensors weights", param="model")
    size = sum(file.stat().st_size for file in files)
    yield Finding("model", "ok", f"{folder.name}: {shape.architecture}, {size / 2**30:.2f} GiB")
    yield from _memory(config, size)


def _memory(config: ServeConfig, model_bytes: int) -> Iterator[Finding]:
    import torch

    from ..memory import available_bytes

    if config.device != "cpu" and torch.cuda.is_available():
        free, what = torch.cuda.mem_get_info()[0], "free on the GPU"
        kv_gib = config.kv_cache_gib or 0.0  # of what the model leaves
    else:
        free, what = available_bytes(), "free"
        kv_gib = config.kv_cache_gib or _CPU_KV_GIB
    needed = model_bytes + int(kv_gib * 2**30) + _SPARE_BYTES
    found = f"{free / 2**30:.1f} GiB {what}; model, KV cache and what stands around them take {needed / 2**30:.1f} GiB"
    if free >= needed:
        yield Finding("memory", "ok", found)
    else:
        fix = "a smaller --kv-cache-gib, --quantization int8, or a smaller model"
        yield Finding("memory", "missing" if free < model_bytes else "warning", found, fix)


def adapters(config: ServeConfig) -> Iterator[Finding]:
    """Each as the server would read it, where the model is here; else by its files alone."""
    if config.adapters_dir is None:
        yield Finding("adapters", "ok", "no --adapters-dir")
        return
    directory = Path(config.adapters_dir)
    if not directory.is_dir():
        raise UserError(f"adapters_dir {config.adapters_dir!r} is not a directory; create it or leave it out")
    from ..server.adapter_paths import AdapterPaths

    paths = AdapterPaths(config.adapters_dir, "")
    names = sorted(paths.folders())
    problems = {name: problem for name in names if (problem := _problem_of(directory / name, name, config))}
    for name, problem in problems.items():
        yield Finding("adapters", "missing", problem, f"specserve adapters inspect {directory / name}")
    good = [name for name in names if name not in problems]
    if good or not problems:
        shown = ", ".join(good[:8]) + (f" and {len(good) - 8} more" if len(good) > 8 else "")
        yield Finding("adapters", "ok", f"{len(good)} in {directory}: {shown}" if good else f"none in {directory}")


def _problem_of(directory: Path, name: str, config: ServeConfig) -> str | None:
    from ..adapters.lora import read_adapter
    from ..adapters.served_base import ServedBase
    from ..compute.device_choice import choose_device
    from .adapters import summarise

    problems = summarise(directory).problems
    if problems:
        return problems[0]
    try:
        folder = local_model(config)
        if folder is None:
            return None
        base = ServedBase.of_files(folder, choose_device(config), config.dtype)
    except UserError:  # what is wrong with the model, or the device, has its own line
        return None
    try:
        adapter = read_adapter(directory, base, name=name, max_rank=config.max_lora_rank)
    except AdapterError as error:
        return str(error)
    return adapter.lookahead.error if adapter.lookahead is not None and adapter.lookahead.error else None


def port(config: ServeConfig) -> Iterator[Finding]:
    from ..server.connections import bind

    listener = bind(config.host, config.port)
    try:
        yield Finding("port", "ok", f"{config.host}:{listener.getsockname()[1]} is free")
    finally:
        listener.close()


def keys(config: ServeConfig) -> Iterator[Finding]:
    """The file of keys, and whether others than this machine can ask without a key."""
    from ..server.access.key_file import read_keys
    from ..server.access.keys import needs_key
    from ..server.access.network import is_loopback

    if config.api_keys_file is not None:
        entries = read_keys(Path(config.api_keys_file))
        yield Finding("keys", "ok", f"{len(entries)} names in {config.api_keys_file}")
    if not needs_key(config) and not is_loopback(config.host):
        fix = "--api-key, or --api-keys-file (specserve keys new NAME --file keys.yaml)"
        yield Finding("keys", "warning", f"{config.host} is open to others and no key is asked for", fix)


def tls(config: ServeConfig) -> Iterator[Finding]:
    """The certificate, and whether keys are sent to others without one."""
    from ..server.access.keys import needs_key
    from ..server.access.network import is_loopback
    from ..server.tls import certificate_of

    if certificate_of(config) is not None:
        yield Finding("tls", "ok", f"certificate and key of {config.tls_certfile}")
    elif needs_key(config) and not is_loopback(config.host):
        found = f"keys are sent unencrypted to {config.host}"
        yield Finding("tls", "warning", found, "--tls-certfile and --tls-keyfile, or a proxy that has them")


SERVING_CHECKS: dict[str, Check] = {
    "model": model,
    "adapters": adapters,
    "port": port,
    "keys": keys,
    "tls": tls,
}
