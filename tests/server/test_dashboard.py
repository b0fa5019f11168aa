"""The Grafana dashboard asks for metrics that there are, and the compose file names files that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from places import ROOT

from specserve.cli.main import serve
from specserve.cli.options import load_settings
from specserve.config import ServeConfig
from specserve.server.access.network import host_allowed

MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "specserve.json").read_text())
HOSTS = ("host.docker.internal:8000", "localhost:8000", "127.0.0.1:8000")
# Made by what the tiny model's requests do not do.
NOT_YET = {"specserve_engine_drafted_by_source", "specserve_spec_decode_num_accepted_tokens_per_pos_total"}


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (item["query"]["query"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query")


def test_every_metric_of_the_dashboard_is_served(server):
    server.complete(model="alpha")
    text = server.get("/metrics").text
    served = set(re.findall(r"^(specserve_\w+)", text, re.MULTILINE))
    described = {name + "_total" for name in re.findall(r"^# TYPE (\w+?)(?:_total)? counter", text, re.MULTILINE)}
    described |= set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    named = {name for query in queries() for name in re.findall(r"specserve_\w+", query)}
    assert len(named) > 25 and named - NOT_YET <= served, named - NOT_YET - served
    assert named <= served | described, named - served - described


def test_panels_have_titles_and_queries_and_do_not_overlap():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert panel["title"] and place["x"] + place["w"] <= 24 and not own & cells
        assert panel["type"] == "row" or panel["targets"]
        cells |= own
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for query in queries():
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query


@pytest.mark.parametrize("path", sorted(MONITORING.rglob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("file", ["deploy/monitoring/compose.yaml", "docs/monitoring.md"])
def test_a_server_as_it_is_told_to_be_started_answers_containers_and_this_host(file):
    (command,) = re.findall(r"specserve serve (--host .*)", (ROOT / file).read_text())
    config = load_settings(ServeConfig, serve.make_context("serve", command.split()).params)
    assert [name for name in HOSTS if not host_allowed(name, config)] == []
    assert config.api_key is not None  # it is open to the network


def test_the_compose_file_mounts_what_there_is():
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (MONITORING / source).exists(), mount
