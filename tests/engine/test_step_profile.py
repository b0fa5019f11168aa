"""Profiles of a step on the CPU's paths; that of the Triton path is in tests/triton/triton_engine_cases.py."""

from __future__ import annotations

import json

import pytest
from engine_fixture import make_engine, request, run
from lookahead_adapters import make_lookahead_adapter
from tiny_models import make_tiny_model

from specserve.engine.step_profile import StepProfile
from specserve.kernels.native import PHASES

SHARED = {"schedule", "propose drafts", "learn costs", "build the batch", "lm_head", "sample", "commit and emit"}


@pytest.mark.parametrize("kernels,own", [("torch", {"forward"}), ("native", {"call the kernels", *PHASES})])
def test_every_phase_of_a_path_is_seen_and_charged_once(kernels, own, tmp_path):
    model_dir = make_tiny_model(tmp_path / "model")
    engine = make_engine(model_dir, kernels=kernels)
    key = engine.load_adapter("a", make_lookahead_adapter(model_dir, tmp_path / "a", history=False)).content_hash
    profile = StepProfile(engine)
    run(engine, [request("warm", [5, 6, 7], max_tokens=3)])
    profile.start()
    run(engine, [request("a", [5, 6, 7], adapter=key, mode="fixed", max_tokens=8, ignore_eos=True)])
    summary = profile.summary()
    assert set(summary["ms_per_step"]) == {*SHARED, *own, "lookahead heads"}
    assert all(ms >= 0 for ms in summary["ms_per_step"].values())
    assert 0 < summary["model_share"] < 1 and "unseen" not in summary
    profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "sample" for event in events) == summary["steps"] > 1
    steps_ms = sum(event["dur"] for event in events if event["name"] == "commit and emit") / 1e3
    assert sum(summary["ms_per_step"].values()) * summary["steps"] == pytest.approx(steps_ms, rel=0.05, abs=0.1)
