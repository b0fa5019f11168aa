"""Whether the machines of a cluster can serve what is to be deployed, asked before anything that serves is touched.

A front and replicas of another model are replaced together: one that a machine lacks would end what served before.
Each machine that a replica fits on looks up the model and the folder of adapters, and fetches the model where it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..config import RayConfig
from ..errors import UserError, shortened
from ..model.store import resolve_model
from .parts import packed, replica_part, unpacked


def check_machines(config: RayConfig) -> None:
    """Raises `UserError`, by the machine's name. One that goes meanwhile is none that anything is placed on."""
    sent, asked = packed(replica_part(config)), []
    for node in ray.nodes():
        if node["Alive"] and (_fits(config, node["Resources"]) or node["NodeManagerAddress"] == config.front_node):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = node["NodeManagerHostname"]  # of containers on one host, more than one may have it
            asked.append((name, _problem.options(scheduling_strategy=here).remote(sent)))
    for name, answer in asked:
        try:
            problem = ray.get(answer)
        except RayTaskError as error:  # specserve is not there, or fails
            problem = shortened(error.cause or error)
        except RayError:
            continue
        if problem is not None:
            raise UserError(f"machine {name} cannot serve this, nothing was changed: {problem}")


def _fits(config: RayConfig, resources: Mapping[str, Any]) -> bool:
    return resources.get("CPU", 0) >= config.replica_cpus and resources.get("GPU", 0) >= config.replica_gpus


@ray.remote(num_cpus=0, max_retries=0)
def _problem(sent: bytes) -> str | None:
    """Of the machine that this runs on."""
    try:
        config = unpacked(sent)
        resolve_model(config.model, revision=config.revision)
    except UserError as error:
        return str(error)
    if config.adapters_dir is not None and not Path(config.adapters_dir).is_dir():
        return f"adapters_dir {config.adapters_dir} is not a directory there"
    return None
