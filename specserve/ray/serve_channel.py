"""The way to one replica through a Ray Serve handle: a stream of frames from it, and calls that bring it ours.

Frames go over Serve's own connection between deployments (gRPC) and not through Ray's object store: a stream lasts as
long as its front, and a stored object for each frame costs both ends twice the CPU time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ray.serve.handle import DeploymentHandle


class ServeChannel:
    """To the replica called `name`, by a handle whose deployment routes with `NamedRouter`."""

    def __init__(self, handle: DeploymentHandle, name: str):
        direct = handle.options(_by_reference=False)
        self._attach = direct.options(method_name="attach", stream=True)
        self._tell = direct.options(method_name="tell")
        self._name = name

    async def attach(self, front: str) -> AsyncGenerator[bytes]:
        """As `wire.Channel.attach`."""
        frames = self._attach.remote(front, to=self._name)
        try:
            async for frame in frames:
                yield frame
        finally:
            frames.cancel()

    async def tell(self, front: str, frame: bytes) -> None:
        """As `wire.Channel.tell`."""
        await self._tell.remote(front, frame, to=self._name)
