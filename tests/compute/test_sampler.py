"""The sampler against the exact distribution, and the verifier's rule."""

import numpy as np
import pytest
import torch
from scipy import stats

from specserve.compute.sampler import Sampler, best_of_rows, token_logprobs, uniform
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.row_group import RowGroup
from specserve.schedule.sequence import Sequence
from specserve.schedule.verifier import Verification, accepted_tokens

V = 40


@pytest.mark.parametrize("vocab_size", [64, 320, 330])
def test_the_best_of_a_row_is_the_first_of_the_largest(vocab_size):
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(0)) - 10.0
    logits[1] = -3.0
    logits[2, [5, 70 % vocab_size]] = 4.0
    logits[3, vocab_size - 1] = float("inf")
    values, best = best_of_rows(logits)
    assert torch.equal(values, logits.amax(-1)) and torch.equal(best, logits.argmax(-1))
    for row in range(9):  # a few rows go another way
        assert best_of_rows(logits[row : row + 1])[1].tolist() == [int(best[row])]
    logits[4, 17] = float("nan")
    assert best_of_rows(logits)[0].isnan().tolist() == [False] * 4 + [True] + [False] * 4


def sequence(sample_idx=0, prompt=(1, 2, 3), output=(), **params):
    sampling = SamplingParams(max_tokens=99, **params)
    seq = Sequence(1, GenerateRequest("r", list(prompt), sampling, sample_idx=sample_idx))
    for token in output:
        seq.tokens.append(token)
    return seq


def sample(sampler, logits, groups):
    return sampler.collect(sampler.launch(logits, groups))


def draw(logits, **kwargs):
    """One sampled token per row of logits [M, V], each row a sequence with its own seed."""
    groups = [RowGroup(sequence(seed=seed, **kwargs), seed) for seed in range(logits.shape[0])]
    return [tokens[0] for tokens in sample(Sampler([0]), logits, groups)]


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by its definition, in plain float64 numpy."""
    scaled = logits.double().numpy() / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    keep = np.ones(len(probs), bool)
    if top_k:
        keep[order[top_k:]] = False
        probs = np.where(keep, probs, 0) / probs[keep].sum()
    if top_p < 1:
        mass = np.cumsum(probs[order])
        keep[order[np.searchsorted(mass, top_p) + 1 :]] = False
        probs = np.where(keep, probs, 0) / probs[keep].sum()
    probs = np.where(probs < min_p * probs.max(), 0, probs)
    return probs / probs.sum()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_samples_follow_the_exact_distribution(params):
    torch.manual_seed(0)
    row = torch.randn(V) * 2
    num = 20000
    counts = np.bincount(draw(row.expand(num, V), **params), minlength=V)
    probs = exact(row, **params)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    assert stats.chisquare(counts[kept], probs[kept] * num).pvalue > 1e-4


def test_random_numbers_are_uniform_and_keyed_by_seed_sample_and_position():
    values = [uniform(7, 0, position) for position in range(5000)]
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert len({uniform(1, 0, 5), uniform(2, 0, 5), uniform(1, 1, 5), uniform(1, 0, 6)}) == 4
    assert uniform(2**64 - 1, 0, 0) == uniform(2**64 - 1, 0, 0)


def test_rows_of_a_verification_see_the_drafts_before_them():
    logits = torch.zeros(3, V)
    logits[:, 5], logits[:, 6] = 2.0, 1.5
    seq = sequence(temperature=0.0, frequency_penalty=1.0)
    (tokens,) = sample(Sampler([0]), logits, [RowGroup(seq, 0, [5, 6])])
    assert tokens == [5, 6, 5]  # after draft 5 its logit is 1.0, below 6; after drafts 5 and 6 they are 1.0 and 0.5
    for draft, sampled in zip([5, 6], tokens, strict=False):
        (alone,) = sample(Sampler([0]), logits[:1], [RowGroup(seq, 0)])
        assert alone == [sampled]
        seq.tokens.append(draft)


def test_penalties_bias_and_minimum_length():
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 9] = 2.0, 1.9
    sampler = Sampler([0])

    def greedy(row=logits, **kwargs):
        (tokens,) = sample(sampler, row, [RowGroup(sequence(temperature=0.0, **kwargs), 0)])
        return tokens[0]

    assert greedy() == 3
    assert greedy(repetition_penalty=1.2) == 9  # 3 stands in the prompt
    assert greedy(presence_penalty=0.5) == 3  # the prompt does not count for presence
    assert greedy(presence_penalty=0.5, output=(3,)) == 9
    assert greedy(logit_bias={3: -100.0}) == 9
    eos = torch.zeros(1, V)
    eos[0, 0], eos[0, 9], eos[0, 4] = 9.0, 5.0, 1.0
    assert greedy(eos) == 0
    assert greedy(eos, min_tokens=2) == 9
    assert greedy(eos, min_tokens=2, stop_token_ids=(9,)) == 4
    assert greedy(eos, min_tokens=2, output=(4, 4)) == 0


def test_nan_rows_give_no_tokens_and_leave_other_groups_alone():
    logits = torch.zeros(3, V)
    logits[1, 4] = float("nan")
    logits[2, 8] = 1.0
    groups = [RowGroup(sequence(temperature=0.0), 0, [1]), RowGroup(sequence(temperature=0.0), 2)]
    assert sample(Sampler([0]), logits, groups) == [[], [8]]


def test_logits_are_not_modified():
    torch.manual_seed(0)
    logits = torch.randn(4, V)
    before = logits.clone()
    draw(logits, temperature=0.7, top_p=0.5, top_k=5, repetition_penalty=1.3, logit_bias={1: 2.0})
    assert torch.equal(logits, before)


def test_logprobs_are_raw_and_ranked():
    torch.manual_seed(0)
    logits = torch.randn(2, V)
    want = logits.log_softmax(-1)
    first, second = token_logprobs(logits, [0, 1], [int(logits[0].argmax()), 7], 3)
    assert first.rank == 1 and first.top[0][0] == int(logits[0].argmax()) and len(first.top) == 3
    assert second.logprob == pytest.approx(float(want[1, 7]), abs=1e-6)
    assert second.rank == int((want[1] > want[1, 7]).sum()) + 1
    assert token_logprobs(logits, [0, 1], [1, 2], 0)[0].top == []
    assert token_logprobs(logits, range(1, 2), [7], 3) == [second]


def test_logprobs_of_many_rows_are_made_in_pieces_and_are_each_rows_own():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1))
    rows, tokens = [i % 5 for i in range(300)], [i % V for i in range(300)]
    alone = [token_logprobs(logits, [row], [token], 2)[0] for row, token in zip(rows, tokens, strict=True)]
    assert token_logprobs(logits, rows, tokens, 2) == alone
    assert token_logprobs(logits, range(1, 5), tokens[1:5], 2) == alone[1:5] and token_logprobs(logits, [], [], 2) == []


VERIFIED = [  # drafts, what was sampled, what is kept of it
    ([], [4], [4]),
    ([4, 5], [4, 5, 6], [4, 5, 6]),
    ([4, 5], [4, 7, 6], [4, 7]),
    ([4, 5], [9, 5, 6], [9]),
]


@pytest.mark.parametrize(("drafts", "sampled", "kept"), VERIFIED)
def test_verifier_keeps_drafts_until_the_first_difference(drafts, sampled, kept):
    assert accepted_tokens(drafts, sampled) == kept


def test_all_sequences_of_a_step_are_verified_together_as_each_is_alone():
    groups, rows = [], [7]  # the first scores a prompt
    for drafts, sampled, _ in [*VERIFIED, *VERIFIED[::-1]]:
        groups.append(RowGroup(sequence(), len(rows), drafts))
        rows += sampled
    verification = Verification(groups, len(rows))
    assert verification.kept(np.array(rows)) == [kept for *_, kept in [*VERIFIED, *VERIFIED[::-1]]]
