"""Whether launches begin early follows from a trial on the device; one that fails it is served all the same."""

from __future__ import annotations

import logging

import pytest
import torch
from triton_process import needs_triton

from specserve.kernels import dependent_launch as module
from specserve.kernels.dependent_launch import dependent_launch

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.delenv("SPECSERVE_DEPENDENT_LAUNCH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module._can_overlap.cache_clear()
    yield
    module._can_overlap.cache_clear()


def test_launches_begin_early_where_the_trial_succeeds_and_it_is_made_once(monkeypatch):
    trials = []
    monkeypatch.setattr(module, "_keeps_order", lambda device: trials.append(device) or True)
    for _ in range(2):
        assert dependent_launch(CUDA) == {"IS_DEPENDENT": True, "launch_pdl": True}
    assert trials == [CUDA] and dependent_launch(torch.device("cpu")) == {"IS_DEPENDENT": False}


@pytest.mark.parametrize(
    ("trial", "reason"),
    [(RuntimeError("CUDA error: invalid resource handle"), "RuntimeError: CUDA error"), (False, "were not there")],
    ids=["a capture that fails", "old values"],
)
def test_a_device_on_which_the_trial_fails_has_one_launch_after_the_other(trial, reason, monkeypatch, caplog):
    def try_it(device):
        if isinstance(trial, Exception):
            raise trial
        return trial

    monkeypatch.setattr(module, "_keeps_order", try_it)
    with caplog.at_level(logging.WARNING):
        assert [dependent_launch(CUDA) for _ in range(2)] == [{"IS_DEPENDENT": False}] * 2
    assert caplog.text.count(reason) == 1


def test_nothing_is_tried_on_older_cards_and_other_makes_and_where_it_is_off(monkeypatch):
    monkeypatch.setattr(module, "_keeps_order", lambda device: pytest.fail("it was tried"))
    monkeypatch.setenv("SPECSERVE_DEPENDENT_LAUNCH", "off")
    assert dependent_launch(CUDA) == {"IS_DEPENDENT": False}
    monkeypatch.delenv("SPECSERVE_DEPENDENT_LAUNCH")
    module._can_overlap.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)  # of a build for AMD's, whose capabilities are other numbers
    assert dependent_launch(CUDA) == {"IS_DEPENDENT": False}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    module._can_overlap.cache_clear()
    assert dependent_launch(CUDA) == {"IS_DEPENDENT": False}


@pytest.mark.gpu
@needs_triton
def test_the_trial_on_a_card(monkeypatch):
    monkeypatch.undo()
    if torch.cuda.get_device_capability() < module.FIRST_CAPABILITY:
        pytest.skip("launches begin early from Hopper on")
    assert module._keeps_order(CUDA)
