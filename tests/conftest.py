"""One torch thread: the models are tiny, and threads that wait for each other cost more than they compute.

And Ctrl-C means what it means: who starts tests in the background may have it ignored, which their processes inherit.
"""

import signal

import pytest
import torch
from stopped_clock import Clock

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Long tests first: one that begins last is waited for by the other process."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def clock():
    """It stands until the test moves it."""
    return Clock()
