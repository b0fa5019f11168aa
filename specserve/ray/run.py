"""`specserve ray`: a Ray cluster, or one of this machine, the application on it, and their end."""

from __future__ import annotations

import os
import signal
import threading
from uuid import uuid4

import msgspec
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from ..config import RayConfig
from ..errors import UserError, shortened
from ..server.console import say, settle
from .application import NAME, QUIET, application
from .preflight import check_machines

OWNER_S = 10.0  # that a front may take to say whose it is
NUM_STARTS = 3  # of a cluster of this machine
STORE_BYTES = 128 * 2**20  # of shared memory, of which frames take none


def serve_on_ray(config: RayConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises `UserError` where that cannot begin."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # its 30 s are few where cores are busy
    stop, owner = threading.Event(), uuid4().hex
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(address)
        else:
            _begin_patiently(config)
    except Exception as error:  # Ray raises plain ones
        where = f"at {address}" if address else "on this machine; /tmp/ray/session_latest/logs may say why"
        raise UserError(f"there is no Ray cluster {where}: {shortened(error)}", param="ray_address") from error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        try:
            is_update = NAME in serve.status().applications
            config = msgspec.structs.replace(config, front_node=config.front_node or get_node_ip_address())
            made = application(config, owner=owner, is_update=is_update)
            if address:
                check_machines(config)
            front = serve.run(made, name=NAME, route_prefix=None)
            front.owned_by.remote(owner).result()
            url = front.public_url.remote().result()
        except RuntimeError as error:
            what = "cannot be updated, what serves stays as it is" if is_update else "does not start"
            raise UserError(f"the application {what}: {_why() or error}") from error
        updated = ", updated," if is_update else ""
        say(f"specserve with {config.num_replicas} replicas{updated} is ready at {url}")
        stop.wait()
        if not address or _owner(front, owner) == owner:  # a cluster of this command ends with it
            say("shutting down; running requests may finish")
            serve.delete(NAME)
        else:
            say("the application was updated by another command, to which it is left")
    finally:
        if not address:
            serve.shutdown()
        ray.shutdown()
        settle()


def _owner(front: DeploymentHandle, otherwise: str) -> str:
    """Who deployed last; `otherwise` where no front is there to say."""
    try:
        return front.owner.remote().result(timeout_s=OWNER_S)
    except Exception:  # Ray raises many
        return otherwise


def _why() -> str:
    """What a deployment that fails says of it last; nothing where none says anything."""
    application = serve.status().applications.get(NAME)
    said = [found.message for found in application.deployments.values()] if application is not None else []
    lines = [line.strip() for message in said for line in message.splitlines() if "Error" in line]
    return shortened(lines[-1]) if lines else ""


def _join(address: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="warning")


def _begin_patiently(config: RayConfig) -> None:
    """As `_begin`. Ray's raylet ends where its agent takes more than half a minute to import, as it may on busy cores;
    the next one finds in memory what the first has read."""
    for left in reversed(range(NUM_STARTS)):
        try:
            _begin(config)
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if not left:
                raise
            say(f"Ray did not start ({shortened(error)}); once more")


def _begin(config: RayConfig) -> None:
    """A cluster of this machine alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = (config.max_replicas or config.num_replicas) * config.replica_cpus
    ray.init(
        address="local",  # and none that `ray start` has begun here, or that has ended and left its address
        num_cpus=max(cores, int(wanted) + 1),
        include_dashboard=False,
        log_to_driver=True,
        logging_level="warning",
        object_store_memory=STORE_BYTES,
    )
