"""The sampling and verification kernels under Triton's interpreter; test_under_triton.py runs it as a process."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (before anything imports triton)
from logit_edit_cases import check_edits
from sampling_cases import PARAMS, SHAPES, make_rows, make_tensors, run_kernels, sample_on_the_host
from triton_process import sweep
from verify_cases import make_verification, run_verify, verified_one_by_one

from specserve.kernels import sampling
from specserve.kernels.sampling import SamplingRow, SamplingScratch, sample_logits_reference


@sweep(
    {"shape": SHAPES, "sizes": ((1000, 0), (1000, 1), (4097, 2), (33, 3))},
    ("normal", (4097, 2)),
    ("flat", (33, 3)),
    ("peaked", (1000, 0)),
    ("ties", (1000, 1)),
    ("negative", (33, 3)),
)
def test_kernels_draw_what_reference_and_host_draw(shape, sizes):
    vocab_size, seed = sizes
    logits, rows = make_rows(shape, vocab_size, seed)
    params = make_tensors(rows, vocab_size, "cpu")
    tokens, bad = run_kernels(logits, params)
    assert tokens == sample_logits_reference(logits, params)[0].tolist()
    assert tokens == sample_on_the_host(logits, rows)
    assert not any(bad)


@pytest.mark.parametrize("places", [16, 256])
@pytest.mark.parametrize("shape", ["normal", "ties"])
def test_rows_that_keep_more_than_a_list_has_room_for_are_drawn_without(shape, places, monkeypatch):
    monkeypatch.setattr(sampling, "LIST_PLACES", places)
    logits, rows = make_rows(shape, 4097, 2)
    assert run_kernels(logits, make_tensors(rows, 4097, "cpu"))[0] == sample_on_the_host(logits, rows)


def test_what_was_drawn_from_a_list_is_drawn_anew_by_the_next_call_with_the_same_scratch():
    logits, _ = make_rows("normal", 1000)
    scratch = SamplingScratch.allocate(len(logits), 1000, "cpu")
    rows = [SamplingRow(0.8, top_p=0.9, uniform=0.7)] * len(logits)
    run_kernels(logits, make_tensors(rows, 1000, "cpu"), scratch)
    rows = [SamplingRow(1.5, uniform=0.9)] * len(logits)
    tokens, _ = run_kernels(logits, make_tensors(rows, 1000, "cpu"), scratch, cuts_top_k=False, cuts_top_p=False)
    assert tokens == sample_on_the_host(logits, rows)


@pytest.mark.slow
def test_a_large_vocabulary_of_several_blocks():
    logits, rows = make_rows("normal", 49152)
    tokens, bad = run_kernels(logits, make_tensors(rows, 49152, "cpu"))
    assert tokens == sample_on_the_host(logits, rows) and not any(bad)


@pytest.mark.parametrize("shape", ["normal", "ties"])
def test_forbidden_tokens_are_never_drawn_and_count_for_nothing(shape):
    vocab_size = 1000
    logits, rows = make_rows(shape, vocab_size)
    masks = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(5)) < 0.1
    masks[1] = False
    masks[1, 999] = True
    rows = [row._replace(mask_row=idx % 4 - 1) for idx, row in enumerate(rows)]
    logits[~logits.isfinite()] = -50.0
    tokens, bad = run_kernels(logits, make_tensors(rows, vocab_size, "cpu", masks))
    for idx, row in enumerate(rows):
        if row.mask_row >= 0:
            assert masks[row.mask_row, tokens[idx]]
            logits[idx, ~masks[row.mask_row]] = -torch.inf
    assert tokens == sample_on_the_host(logits, rows) and not any(bad)
    assert any(row.mask_row == 1 for row in rows)


def test_rows_that_are_no_distribution_are_flagged_and_leave_others_alone():
    logits, rows = make_rows("normal", 4099)
    want = sample_on_the_host(logits, rows)
    logits[1, 17] = logits[4, 4098] = float("nan")
    logits[5] = -torch.inf
    params = make_tensors([row._replace(mask_row=0 if idx == 7 else -1) for idx, row in enumerate(rows)], 4099, "cpu")
    tokens, bad = run_kernels(logits, params)  # a mask that allows nothing
    assert [idx for idx, flag in enumerate(bad) if flag] == [1, 4, 5, 7]
    for idx, (token, flag) in enumerate(zip(tokens, bad, strict=True)):
        assert token == (0 if flag else want[idx])
    assert (tokens, bad) == tuple(t.tolist() for t in sample_logits_reference(logits, params))


def test_a_nan_that_the_mask_hides_still_fails_its_row():
    logits, masks = torch.zeros(1, 64), torch.ones(1, 64, dtype=torch.bool)
    logits[0, 3], masks[0, 3] = float("nan"), False
    assert run_kernels(logits, make_tensors([SamplingRow(mask_row=0)], 64, "cpu", masks))[1] == [1]


def test_infinite_logits_share_the_mass():
    logits = torch.randn(4, 500)
    logits[:, [40, 300]] = float("inf")
    rows = [SamplingRow(1.0, uniform=u, top_p=0.9) for u in (0.0, 0.49, 0.51, 0.99)]
    assert run_kernels(logits, make_tensors(rows, 500, "cpu")) == ([40, 40, 300, 300], [0] * 4)


def test_stages_that_no_row_asks_for_may_be_left_out():
    logits, _ = make_rows("normal", 1000)
    for stages, wanted in (
        ({"draws": False}, [SamplingRow()]),
        ({"cuts_top_k": False, "cuts_top_p": False}, PARAMS[:3]),
        ({"cuts_top_k": False}, [PARAMS[0], *PARAMS[6:9]]),
        ({"cuts_top_p": False}, PARAMS[:6]),
    ):
        rows = [wanted[idx % len(wanted)]._replace(uniform=0.3) for idx in range(len(logits))]
        assert run_kernels(logits, make_tensors(rows, 1000, "cpu"), **stages)[0] == sample_on_the_host(logits, rows)


def test_rows_may_be_part_of_a_wider_tensor():
    logits, rows = make_rows("normal", 1000)
    wide = torch.full((len(logits), 1100), float("nan"))
    wide[:, :1000] = logits
    params = make_tensors(rows, 1000, "cpu")
    assert run_kernels(wide[:, :1000], params) == run_kernels(logits, params)


@sweep({"seed": range(6), "vocab_size": (50, 1000)}, (0, 50), (1, 1000))
def test_rows_are_edited_as_on_the_host_and_back(seed, vocab_size):
    check_edits(seed, vocab_size, "cpu")


def test_rows_of_a_step_that_names_more_tokens_than_have_a_buffer_are_edited_too():
    check_edits(2, 50, "cpu", most_rows=1)


@pytest.mark.parametrize("seed", range(4))
def test_verification_accepts_what_the_verifier_accepts(seed):
    case = make_verification(seed)
    assert run_verify(case) == verified_one_by_one(case)
