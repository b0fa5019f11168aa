"""specserve on the machines of a Ray cluster: `specserve ray config.yaml`, or `serve run specserve.ray:app`.

The name is found on first use: Ray is imported by whoever asks for it.
"""

from ..lazy_names import lazy_names

__all__ = ["app"]

__getattr__, __dir__ = lazy_names(__name__, {"app": "application"})
