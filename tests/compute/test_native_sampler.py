"""The native sampler draws what the torch sampler draws, at every level of instructions."""

import numpy as np
import pytest
import torch
from sampling_cases import PARAMS, SHAPES, make_rows, pack, sample_on_the_host

from specserve.compute.grammar_masks import StepMasks
from specserve.compute.native.best_rows import BestRows
from specserve.compute.native.sampler import NativeSampler
from specserve.compute.sampler import Sampler
from specserve.kernels.native import DrawRow, Team
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.row_group import RowGroup
from specserve.schedule.sequence import Sequence

VOCAB_SIZES = [1, 40, 330, 20_011]


@pytest.fixture(scope="module", params=[1, 2])
def team(library, request):
    return Team(library, request.param)


def best(team, logits):
    num, vocab_size = logits.shape
    tokens, bad = np.full(num, -5, dtype=np.int64), np.full(num, 5, dtype=np.uint8)
    num_bad = team.best_of_rows(
        logits.data_ptr(), logits.stride(0), num, vocab_size, tokens.ctypes.data, bad.ctypes.data
    )
    assert num_bad == bad.sum()
    return tokens.tolist(), bad.tolist()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_best_of_a_row_is_the_first_of_the_largest(team, vocab_size):
    logits = torch.randn(9, vocab_size + 7, generator=torch.Generator().manual_seed(0)) - 10.0
    logits[:, vocab_size:] = 99.0  # behind the row
    logits[1] = -3.0
    logits[2, [5 % vocab_size, 17_000 % vocab_size]] = 4.0
    logits[3, vocab_size - 1] = float("inf")
    logits[4] = -float("inf")
    logits[5], logits[5, vocab_size // 2] = -0.0, 0.0  # equal
    rows = logits[:, :vocab_size]
    assert best(team, rows) == (rows.max(dim=-1).indices.tolist(), [0] * 9)
    for idx, at in ((0, 0), (4, vocab_size - 1), (6, vocab_size // 2)):
        logits[idx, at] = float("nan")
    tokens, bad = best(team, rows)
    assert bad == [1, 0, 0, 0, 1, 0, 1, 0, 0] and all(0 <= token < vocab_size for token in tokens)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_drawn_as_torch_draws_them(team, shape, vocab_size):
    for seed in range(3):
        logits, rows = make_rows(shape, vocab_size, seed)
        hot = [idx for idx, row in enumerate(rows) if row.temperature and logits[idx].max() > -torch.inf]
        structs = (DrawRow * len(hot))(*[
            DrawRow(logits[idx].data_ptr(), None, rows[idx].uniform, rows[idx].top_p, rows[idx].min_p,
                    rows[idx].temperature, min(rows[idx].top_k, 2**31 - 1))
            for idx in hot
        ])  # fmt: skip
        team.draw_rows(structs, vocab_size)
        want = sample_on_the_host(logits, rows)
        assert [struct.token for struct in structs] == [want[idx] for idx in hot], (shape, seed)
        assert not any(struct.is_dead for struct in structs)


class Masked:
    """Stands for a sequence's grammar; the most likely token is not asked for, as all rows are drawn."""

    problem = error = ""


class Masks:
    """The masks of rows that are drawn under a grammar: every third token is forbidden, or all are."""

    def __init__(self, vocab_size, dead_row):
        self.vocab_size, self.dead_row, self.seconds = vocab_size, dead_row, 0.0

    def masks(self, groups, also_greedy=False, room=None):
        rows = [g.first_row + idx for g in groups if g.seq.grammar for idx in range(g.num_rows)]
        allowed = torch.arange(self.vocab_size) % 3 > 0
        bits = [pack(allowed & (row != self.dead_row)).numpy() for row in rows]
        return StepMasks(rows, np.stack(bits)) if rows else None


def groups_of_all_kinds(logits):
    """Greedy and drawn, edited and not, with drafts, under masks; one of two rows has NaN in the second."""
    num = 0
    groups = []

    def add(drafts=(), grammar=None, **params):
        nonlocal num
        request = GenerateRequest("r", [1, 2, 3], SamplingParams(max_tokens=99, seed=num, **params))
        seq = Sequence(num, request, grammar)
        seq.tokens += [4, 5, 4]
        groups.append(RowGroup(seq, num, list(drafts)))
        num += len(drafts) + 1

    for row in PARAMS:
        add(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    best_tokens = logits.argmax(-1).tolist()
    add(best_tokens[num : num + 2], temperature=0.0)
    add([9], temperature=0.0, frequency_penalty=1.5, logit_bias={7: 3.0})
    add([9, 8], temperature=0.8, repetition_penalty=1.3, top_p=0.9)
    add([11], grammar=Masked(), temperature=1.0)
    add([12, 13], grammar=Masked(), temperature=0.7, top_k=40)
    dead_row = num - 1
    add(temperature=0.0, min_tokens=9)
    add([9], temperature=0.0)
    logits[num - 1, 3] = float("nan")
    add([best_tokens[num]], temperature=0.0)
    return groups, num, dead_row


@pytest.mark.parametrize("vocab_size", [40, 4_099])
def test_a_step_of_all_kinds_of_rows_is_sampled_as_the_torch_path_does(team, vocab_size):
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    groups, num_rows, dead_row = groups_of_all_kinds(logits)
    logits = logits[:num_rows]
    found = []
    for sampler in (
        Sampler([0], Masks(vocab_size, dead_row)),
        NativeSampler([0], Masks(vocab_size, dead_row), team, BestRows(team)),
    ):
        drawn = sampler._draw(logits, groups)
        found.append((drawn.tokens.tolist(), list(drawn.bad), list(drawn.dead)))
        found[-1] += (sampler.collect(sampler.launch(logits, groups)),)
    assert found[0][1:] == found[1][1:]
    bad = found[0][1]
    assert [t for t, is_bad in zip(found[0][0], bad, strict=True) if not is_bad] == [
        t for t, is_bad in zip(found[1][0], bad, strict=True) if not is_bad
    ]


def test_more_rows_than_ever_before_have_room(team):
    sampler = NativeSampler([0], Masks(40, -1), team, BestRows(team))
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    seq = Sequence(0, GenerateRequest("r", [1], SamplingParams(max_tokens=9, temperature=0.0)))
    groups = [RowGroup(seq, row) for row in range(300)]
    assert sampler.collect(sampler.launch(logits, groups)) == [[token] for token in logits.argmax(-1).tolist()]
