"""The head's losses against their definitions written out token by token."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch

from specserve.drafters.head import cell, initial_state, scores
from specserve.training.data.dataset import Example
from specserve.training.head_fit import with_jumps
from specserve.training.head_module import LookaheadHead, build_anchors
from specserve.training.losses import TargetProbs, head_loss
from specserve.training.run_config import HeadConfig

VOCAB = [3, 5, 7, 9]
HIDDEN = 6


@pytest.fixture
def setup():
    torch.manual_seed(0)
    head = LookaheadHead(HIDDEN, 16, VOCAB, 2)
    prompt, completion = [1, 30, 5, 31], [3, 7, 30, 9]  # 30 is out of the vocabulary, and stands in the prompt
    example = Example(prompt + completion, [False] * 4 + [True] * 4, 0)
    anchors = build_anchors([example], [0], VOCAB, 2, 0, 2)
    last, tapped = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    teacher = TargetProbs.of(2 * torch.randn(4, 40), torch.tensor(VOCAB))
    return head, anchors, last[anchors.rows], tapped[anchors.rows], teacher, completion


@torch.no_grad()
def distributions(head, anchors, last, tapped):
    """(anchor, step) -> the head's probability of each local token, and of each slot's token that is unknown."""
    weights = head.weights()
    state = initial_state(weights, last[None], tapped[None])
    for step in range(anchors.inputs.shape[1]):
        window = anchors.window[:, step]
        state = cell(
            weights, state, anchors.inputs[None, :, step], anchors.moved[None, :, step], window[None, :, 0].clamp(min=0)
        )
        vocab, slots = scores(weights, state, window[None])
        probs = torch.softmax(torch.cat([vocab[0], slots[0]], dim=-1), dim=-1)
        for row in range(len(anchors)):
            if anchors.valid[row, step]:
                merged = probs[row, : len(VOCAB) + 1].tolist()
                for slot, local in enumerate(window[row].tolist()):
                    if local >= 0:
                        merged[local] += probs[row, len(VOCAB) + 1 + slot].item()
                yield row, step, merged, probs[row]


def expected(kind, head, anchors, last, tapped, teacher):
    total = weight_sum = 0.0
    for row, step, merged, probs in distributions(head, anchors, last, tapped):
        target = int(anchors.targets[row, step])
        hits = [slot for slot, hit in enumerate(anchors.hits[row, step].tolist()) if hit]
        if kind == "ce" or target == len(VOCAB):
            chance = sum(float(probs[len(VOCAB) + 1 + slot]) for slot in hits)
            if target < len(VOCAB) or not hits:
                chance += float(probs[target])
            value = -math.log(chance)
        else:
            at = int(anchors.rows[row]) + 1 + step
            ids, wanted = teacher.ids[at].tolist(), teacher.log_probs[at].exp().tolist()
            merged = [merged[idx] for idx in ids]
            if len(ids) <= len(VOCAB):  # all that is not kept is one outcome
                wanted, merged = [*wanted, 1 - sum(wanted)], [*merged, 1 - sum(merged)]
            kl = sum(w * (math.log(w) - math.log(m)) for w, m in zip(wanted, merged, strict=True))
            variation = sum(abs(w - m) for w, m in zip(wanted, merged, strict=True)) / 2
            share = math.exp(-3.0 * (1 - variation))
            value = kl if kind == "kl" else share * kl + (1 - share) * variation
        total += 0.9**step * value
        weight_sum += 0.9**step
    return total / weight_sum


@pytest.mark.parametrize(("kind", "kept"), [("ce", 5), ("kl", 5), ("lk", 5), ("kl", 2), ("lk", 2)])
def test_the_loss_is_what_its_definition_says(setup, kind, kept):
    head, anchors, last, tapped, teacher, _ = setup
    teacher = TargetProbs(teacher.ids[:, :kept], teacher.log_probs[:, :kept])
    loss, rate = head_loss(head, last, tapped, anchors, 0.9, kind, teacher)
    assert loss.item() == pytest.approx(expected(kind, head, anchors, last, tapped, teacher), rel=1e-4)
    assert rate.shape == (2,)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_the_teacher_of_a_step_is_the_row_before_its_token(setup):
    """Only rows whose distributions are compared may change the loss: row 0 predicts the token already known."""
    head, anchors, last, tapped, teacher, _ = setup
    loss = head_loss(head, last, tapped, anchors, 0.9, "kl", teacher)[0].item()
    for row, matters in ((0, False), (1, True)):
        changed = TargetProbs(teacher.ids, teacher.log_probs.clone())
        changed.log_probs[row] = teacher.log_probs[row].flip(0)
        assert (head_loss(head, last, tapped, anchors, 0.9, "kl", changed)[0].item() != loss) is matters


def test_the_likeliest_outcomes_are_kept_and_small():
    logits = 3 * torch.randn(70, 1000)
    vocab = torch.arange(0, 1000, 2)
    whole = torch.softmax(logits, dim=-1)[:, vocab]
    whole = torch.cat([whole, 1 - whole.sum(dim=-1, keepdim=True)], dim=-1)
    parts = [TargetProbs.of(part, vocab) for part in logits.split(30)]
    kept = TargetProbs.joined(parts, torch.device("cpu"))
    assert kept.ids.shape == kept.log_probs.shape == (70, 64) and kept.ids.dtype == torch.int16
    at = torch.tensor([69, 3, 30])
    some = kept.rows(at, torch.device("cpu"))
    wanted = whole[at].topk(64, dim=-1)
    assert torch.equal(some.ids, wanted.indices)
    torch.testing.assert_close(some.log_probs.exp(), wanted.values, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("completion", "jumps"),
    [([20, 21, 22, 23, 24, 25], False), ([50, 51, 40, 41, 30, 31], True), ([90, 91, 92, 93, 94, 95], False)],
)
def test_copies_jump_where_that_finds_more_of_the_answers(completion, jumps):
    prompt = [1, *range(20, 60), 2]
    examples = [Example(prompt + completion, [False] * len(prompt) + [True] * len(completion), 0)] * 3
    config = HeadConfig(copy_window=2)
    assert with_jumps(config, examples, 1).copy_jumps is jumps
    assert with_jumps(msgspec.structs.replace(config, copy_jumps=not jumps), examples, 1).copy_jumps is not jumps


def test_a_head_that_knows_the_base_models_words_is_saved_as_one_that_does_not():
    torch.manual_seed(0)
    words = torch.randn(len(VOCAB), HIDDEN)
    head = LookaheadHead(HIDDEN, 16, VOCAB, 2, words)
    tensors = head.tensors()
    plain = LookaheadHead(HIDDEN, 16, VOCAB, 2)
    assert tensors.keys() == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(tensors["embed"][0, :-1], words @ head.word_weight.detach())
    plain.load_state_dict(tensors)
    state = torch.randn(1, 3, 16)
    window = torch.tensor([[[0, 2], [-1, -1], [4, 1]]])
    for a, b in zip(scores(head.weights(), state, window), scores(plain.weights(), state, window), strict=True):
        torch.testing.assert_close(a, b)
    scores(head.weights(), state, window)[0].sum().backward()
    assert head.word_weight.grad.norm() > 0 and head.embed.grad.norm() > 0
