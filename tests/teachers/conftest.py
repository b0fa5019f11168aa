"""A tiny model with an adapter, for teachers that run here."""

import pytest
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapter_dir(model_dir, tmp_path_factory):
    return make_peft_adapter(model_dir, tmp_path_factory.mktemp("adapters") / "alpha", r=4, std=0.3)
