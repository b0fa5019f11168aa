"""One torch thread: the models are tiny, and threads that wait for each other cost more than they compute."""

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Long tests first: one that begins last is waited for by the other process."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
