"""The Ray Serve application: one front, and replicas on the CPU cores or GPUs that the settings ask for.

Deployed again, it is updated: Ray Serve replaces replicas one after another where their settings are others, and the
front only where its own are (`parts`), since names that were given at run time and open connections are the front's.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import ray
from ray import serve
from ray._private.state import available_resources_per_node  # Ray has no public one; sums say nothing of room
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from .. import settings
from ..config import RayConfig
from ..errors import UserError
from .front import Front, forwarder
from .parts import front_part, packed, replica_part, version_of
from .replica import EngineReplica

NAME = "specserve"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # calls are frames: the front logs requests
MAX_CALLS = 100_000  # at once to a replica or the front: the engine's own queue is what refuses
ONE_MORE = 1  # percent, which Ray Serve rounds up to a whole replica
LEAVE_S = 10.0  # beside the drain, until Ray kills who has not left


def app(arguments: dict[str, Any]) -> Application:
    """For `serve run specserve.ray:app KEY=VALUE ..`, and for `args` of Ray's own files: keys are settings, `config` a
    file of them. Raises `UserError`."""
    arguments = dict(arguments)
    file = arguments.pop("config", None)
    settings.check_names(arguments, "the arguments of specserve.ray:app")
    return application(settings.load(RayConfig, {"port": "0", **arguments}, os.environ, file), has_proxies=True)


def application(
    config: RayConfig, *, has_proxies: bool = False, owner: str = "", is_update: bool = False
) -> Application:
    """Of these settings; Ray's HTTP proxies hand on what they get if it `has_proxies`. `owner` is who deploys it. An
    update of one that runs waits for what the old front has begun."""
    if config.num_threads is None and config.device != "cuda":
        config = msgspec.structs.replace(config, num_threads=max(1, int(config.replica_cpus)))
    options: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas is not None and config.max_replicas > config.num_replicas:
        policy = AutoscalingPolicy(
            policy_function="specserve.ray.autoscaling:QueuedTokensPolicy",
            policy_kwargs={"tokens_a_replica": config.replica_waiting_tokens},
        )
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.num_replicas,
                max_replicas=config.max_replicas,
                upscale_delay_s=config.scale_up_delay_s,
                downscale_delay_s=config.scale_down_delay_s,
                policy=policy,
            )
        }
    replicas = serve.deployment(
        EngineReplica,
        name="EngineReplica",
        max_ongoing_requests=MAX_CALLS,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
        request_router_config=RequestRouterConfig(request_router_class="specserve.ray.named_router:NamedRouter"),
        max_surge_percent=ONE_MORE if has_room(config) else 0,
        graceful_shutdown_timeout_s=config.drain_timeout_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        logging_config=QUIET,
        **options,
    )
    front = serve.deployment(
        serve.ingress(forwarder)(Front) if has_proxies else Front,
        name="Front",
        num_replicas=1,
        max_ongoing_requests=MAX_CALLS,
        ray_actor_options={"num_cpus": 0, "resources": _at(config.front_node)},
        graceful_shutdown_timeout_s=config.drain_timeout_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        logging_config=QUIET,
    )
    of_front, of_replicas = front_part(config), replica_part(config)
    # Without one, Ray Serve takes everything for new each time; it has no public option for it.
    front._version, replicas._version = version_of(of_front), version_of(of_replicas)
    patience_s = config.drain_timeout_s + LEAVE_S if is_update else 0.0
    return front.bind(packed(of_front), replicas.bind(packed(of_replicas)), owner, patience_s)


def _at(address: str | None) -> dict[str, float]:
    """What Ray keeps for who shall run on the machine of that address. Raises `UserError` where there is none."""
    if address is None:
        return {}
    known = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else None
    if known is not None and address not in known:
        raise UserError(f"front_node is {address}; the cluster has {', '.join(known)}", param="front_node")
    return {f"node:{address}": 0.001}


def has_room(config: RayConfig) -> bool:
    """Whether some machine can hold one more replica now: then an update starts a new one before an old one leaves.

    `serve run` asks before it is connected, and does without.
    """
    if not ray.is_initialized():
        return False
    return any(
        free.get("CPU", 0.0) >= config.replica_cpus and free.get("GPU", 0.0) >= config.replica_gpus
        for free in available_resources_per_node().values()
    )
