"""A worker of batches on a folder of its own, closed behind the test."""

from contextlib import asynccontextmanager

import pytest
from batch_setup import Setup


@pytest.fixture
def setup(tmp_path):
    @asynccontextmanager
    async def make(**kwargs):
        setup = Setup(tmp_path / "batches", **kwargs)
        try:
            yield setup
        finally:
            await setup.worker.close()

    return make
