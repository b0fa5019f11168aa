"""The team of threads of the native path where there are fewer cores than threads."""

from __future__ import annotations

import os
import time

import pytest
import torch

from specserve.kernels.native import PANEL, Team, load_library
from specserve.kernels.packed import pack


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs threads that can be kept on one core")
def test_threads_without_a_core_are_left_out_and_tried_again_and_change_no_bit():
    matrix = pack(torch.randn(640, 512, generator=torch.Generator().manual_seed(0)), None, "f32")
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))

    def multiply(team: Team) -> torch.Tensor:
        y = torch.empty(len(x), matrix.num_panels * PANEL)
        team.linear(matrix.struct(), False, x.data_ptr(), len(x), y.data_ptr())
        return y

    def wait_for(team: Team, num_active: int) -> None:
        deadline = time.monotonic() + 60
        while team.num_active != num_active:
            assert torch.equal(multiply(team), expected)
            assert time.monotonic() < deadline

    expected = multiply(Team(load_library(), 1))
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        team = Team(load_library(), 3)  # its threads inherit the one core
        assert team.num_active == 3
        for num_active in (1, 3, 1):
            wait_for(team, num_active)
    finally:
        os.sched_setaffinity(0, cores)
