"""The manifest for KubeRay is what its schema, Ray Serve's own and the settings allow; no cluster has run it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from specserve import settings
from specserve.config import RayConfig
from specserve.errors import UserError

MANIFEST = Path(__file__).parents[2] / "examples" / "kuberay" / "rayservice.yaml"
SCHEMA = Path(__file__).with_name("rayservice_schema.json")


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


@pytest.fixture
def application(manifest):
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    return application


def test_the_manifest_is_what_kuberays_schema_allows(manifest):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # a number: refused there
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_its_arguments_are_settings_and_fit_the_pods(manifest, application):
    settings.check_names(application["args"], "the manifest")
    config = settings.load(RayConfig, application["args"], {})
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    spec = group["template"]["spec"]
    cpus = int(spec["containers"][0]["resources"]["limits"]["cpu"])
    assert config.num_replicas <= group["minReplicas"] * (cpus // config.replica_cpus)
    assert config.shared_store and config.drain_timeout_s < spec["terminationGracePeriodSeconds"]


@pytest.mark.slow
def test_ray_serve_takes_its_configuration(manifest, application):
    pytest.importorskip("ray.serve")
    from ray.serve.schema import ServeDeploySchema

    from specserve.ray.application import app

    found = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert found.applications[0].import_path == "specserve.ray:app"
    assert app({**application["args"], "shared_store": None}) is not None
    with pytest.raises(UserError, match="'num_replica' .* did you mean 'num_replicas'"):
        app({"num_replica": 2})
