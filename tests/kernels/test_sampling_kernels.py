"""Sampling and verification on the device draw and accept what the host does; the kernels run in other processes."""

from __future__ import annotations

import pytest
import torch
from logit_edit_cases import check_edits
from sampling_cases import SHAPES, make_rows, make_tensors, run_kernels, sample_on_the_host
from triton_process import needs_triton
from verify_cases import make_verification, run_verify, verified_one_by_one

from specserve.kernels.sampling import SamplingScratch, sample_logits_, sample_logits_reference
from specserve.kernels.verify import verify_reference


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(("vocab_size", "seed"), [(1000, 0), (4097, 2), (49152, 3)])
def test_the_reference_draws_what_the_sampler_draws(shape, vocab_size, seed):
    logits, rows = make_rows(shape, vocab_size, seed)
    tokens, bad = sample_logits_reference(logits, make_tensors(rows, vocab_size, "cpu"))
    assert tokens.tolist() == sample_on_the_host(logits, rows) and not bad.any()


@pytest.mark.parametrize("seed", range(4))
def test_the_verification_reference_accepts_what_the_verifier_accepts(seed):
    case = make_verification(seed)
    result = verify_reference(case.sampled, case.tokens, case.first_rows.tolist(), case.num_drafts.tolist())
    assert result == verified_one_by_one(case)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("vocab_size", [1000, 49152, 128256])
def test_cuda_kernels_draw_what_the_sampler_draws(shape, vocab_size):
    logits, rows = make_rows(shape, vocab_size)
    tokens, bad = run_kernels(logits.cuda(), make_tensors(rows, vocab_size, "cuda"))
    assert tokens == sample_on_the_host(logits, rows) and not any(bad)


@pytest.mark.gpu
@needs_triton
def test_cuda_sampling_replays_in_a_graph_with_other_logits_and_parameters():
    vocab_size = 49152
    logits, rows = make_rows("normal", vocab_size)
    params, static = make_tensors(rows, vocab_size, "cuda"), logits.cuda()
    scratch = SamplingScratch.allocate(len(rows), vocab_size, "cuda")
    tokens = torch.zeros(len(rows), dtype=torch.int64, device="cuda")
    bad = torch.zeros(len(rows), dtype=torch.int32, device="cuda")
    sample_logits_(tokens, bad, static, params, scratch)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_logits_(tokens, bad, static, params, scratch)
    others, _ = make_rows("ties", vocab_size, seed=1)
    rows = rows[3:] + rows[:3]
    static.copy_(others)
    params.copy_(make_tensors(rows, vocab_size, "cuda"))
    graph.replay()
    assert tokens.tolist() == sample_on_the_host(others, rows)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("seed", range(4))
def test_cuda_verification_accepts_what_the_verifier_accepts(seed):
    case = make_verification(seed)
    assert run_verify(case, "cuda") == verified_one_by_one(case)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("vocab_size", [50, 49152, 128256])
def test_cuda_edits_have_the_bits_of_the_hosts(vocab_size):
    for seed in range(6):
        check_edits(seed, vocab_size, "cuda")
