"""Whose settings are whose: an update replaces the replicas, the front, or neither, by what has changed.

Each gets a copy of the settings in which what it does not read stands at its default, so that what it depends on and
what replaces it cannot differ. Ray Serve replaces what has another version.
"""

from __future__ import annotations

import platform
from hashlib import blake2b

import msgspec

from .. import __version__
from ..config import EngineConfig, RayConfig, ServeConfig
from ..errors import UserError

_OF_THE_CLUSTER = frozenset(RayConfig.__struct_fields__) - frozenset(ServeConfig.__struct_fields__)
_OF_BOTH = frozenset({
    "model", "revision", "quantization", "prefix_caching", "speculation", "max_draft_tokens", "adapter_roots",
    "adapters_dir", "allowed_adapter_urls", "allowed_hub_repos", "allowed_adapter_networks", "adapter_cache_dir",
    "adapter_cache_gib", "adapter_fetch_timeout_s", "shared_store", "drain_timeout_s", "engine_timeout_s",
    "engine_step_timeout_s", "log_level",
})  # fmt: skip
_OF_REPLICAS = frozenset(EngineConfig.__struct_fields__) - _OF_BOTH
_OF_THE_FRONT = frozenset(ServeConfig.__struct_fields__) - frozenset(EngineConfig.__struct_fields__) - _OF_BOTH


def front_part(config: RayConfig) -> RayConfig:
    """What the front reads."""
    return _without(config, _OF_REPLICAS)


def replica_part(config: RayConfig) -> RayConfig:
    """What a replica reads."""
    return _without(config, _OF_THE_FRONT)


def version_of(part: RayConfig) -> str:
    """Another one where a setting of the part is, or specserve itself."""
    return blake2b(__version__.encode() + b"\0" + msgspec.json.encode(part), digest_size=8).hexdigest()


def served(config: ServeConfig) -> str:
    """What a front and its replicas must have in common: a frame means nothing between others."""
    return f"{config.model or 'the default model'} {config.revision or ''}".rstrip() + f", specserve {__version__}"


class _Sent(msgspec.Struct, frozen=True):
    version: str  # of specserve
    part: msgspec.Raw


def packed(part: RayConfig) -> bytes:
    """As it goes to the machine that it is for."""
    return msgspec.json.encode(_Sent(__version__, msgspec.Raw(msgspec.json.encode(part))))


def unpacked(sent: bytes) -> RayConfig:
    """Raises `UserError` where another specserve is installed here: settings, and frames, mean something else to it."""
    found = msgspec.json.decode(sent, type=_Sent)
    if found.version != __version__:
        raise UserError(
            f"specserve {__version__} is installed on {platform.node()}, and the application is of specserve "
            f"{found.version}; install the same version on all machines, then run the command again",
            status=503,
        )
    return msgspec.json.decode(found.part, type=RayConfig)


def _without(config: RayConfig, names: frozenset[str]) -> RayConfig:
    defaults = {field.name: field.default for field in msgspec.structs.fields(RayConfig)}
    return msgspec.structs.replace(config, **{name: defaults[name] for name in names | _OF_THE_CLUSTER})
