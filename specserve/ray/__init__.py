"""specserve on the machines of a Ray cluster: `specserve ray config.yaml`, or `serve run specserve.ray:app`.

The name is found on first use: Ray is imported by whoever asks for it.
"""

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(".application", __name__).app
