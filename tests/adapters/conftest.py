"""What tests of adapters share: a tiny model with an output layer of its own, which adapters may target; an engine."""

import pytest
from engine_fixture import make_engine
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def engine(model_dir):
    return make_engine(model_dir)
