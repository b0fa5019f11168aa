import pytest
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model's directory."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
