"""Losses, calibration and metrics of tasks that pool, against what can be counted by hand or by another library."""

import math

import msgspec
import pytest
import torch
import torch.nn.functional as F

from specserve.adapter_kinds import Question
from specserve.pooled_values import labels_of, probabilities
from specserve.training.data.batching import epoch_starts, plan_run
from specserve.training.pooling.calibration import best_temperature, best_threshold, calibrated
from specserve.training.pooling.classes import balanced_weights, question_losses
from specserve.training.pooling.contrastive import ContrastiveObjective
from specserve.training.pooling.examples import EmbedExample
from specserve.training.pooling.metrics import (
    classification_metrics,
    ranked,
    ranks_of,
    reranking_metrics,
    retrieval_metrics,
)
from specserve.training.pooling.ranking import listwise_loss, pairwise_loss
from specserve.training.pooling.settings import EmbedConfig
from specserve.training.run_config import RunConfig

KINDS = Question("kind", "multi_class", ("a", "b", "c"), 0)
TAGS = Question("tags", "multi_label", ("x", "y"), 3)


class Vectors:
    """Stands in for a model: a text of one token is that row of a table."""

    def __init__(self, num=12, size=8):
        self.table = torch.randn(num, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.parameters = [self.table]

    def pooled(self, texts):
        return self.table[[text[0] for text in texts]]

    def for_all(self, texts, batch_tokens, *, scored):
        return self.pooled(texts).detach()


def contrastive(examples, starts=(), **embed):
    config = RunConfig(embed=EmbedConfig(**embed))
    return ContrastiveObjective(config, Vectors(), examples, 10, starts)


def example(query, positive, *negatives):
    return EmbedExample((query,), (positive,), tuple((text,) for text in negatives), 1)


def test_infonce_is_the_cross_entropy_of_a_query_over_all_documents_of_the_step():
    rows = [example(0, 1, 2), example(3, 4), example(5, 6)]
    objective = contrastive(rows, temperature=0.1)
    table = F.normalize(objective.model.table, dim=-1)
    scores = table[[0, 3, 5]] @ table[[1, 4, 6, 2]].T / 0.1
    want = F.cross_entropy(scores, torch.tensor([0, 1, 2]), reduction="none")
    assert torch.allclose(objective.row_losses([0, 1, 2]), want)
    assert objective.loss_sum([0, 1, 2]).item() == pytest.approx(want.sum().item())
    both = contrastive(rows, temperature=0.1, symmetric=True).row_losses([0, 1, 2])
    back = F.cross_entropy(scores[:, :3].T, torch.tensor([0, 1, 2]), reduction="none")
    assert torch.allclose(both, (want + back) / 2)
    shorter = contrastive(rows, temperature=0.1, dimensions=(4,)).row_losses([0, 1, 2])
    short = F.normalize(objective.model.table[:, :4], dim=-1)
    of_four = F.cross_entropy(short[[0, 3, 5]] @ short[[1, 4, 6, 2]].T / 0.1, torch.tensor([0, 1, 2]), reduction="none")
    assert torch.allclose(shorter, (want + of_four) / 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_document_that_is_known_to_fit_is_no_negative(symmetric):
    same_query = contrastive([example(0, 1), example(0, 2), example(3, 2)], symmetric=symmetric)
    alone = contrastive([example(0, 1)], symmetric=symmetric)
    assert alone.row_losses([0]).item() == pytest.approx(0.0, abs=1e-6)
    assert same_query.row_losses([0, 1])[0].item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(same_query.row_losses([0, 1, 2])).all()


def test_mined_negatives_are_near_but_not_too_near_and_never_fit():
    rows = [example(0, 1), example(2, 3), example(0, 4)]
    objective = contrastive(rows, starts=(0, 5), mined_negatives=2)
    angles = torch.tensor([0.0, 0.1, 1.0, 1.2, 0.2])  # of query 0, its 1, query 2, its 3, and 4 that fits 0, too
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.no_grad():
        objective.model.table = F.pad(table, (0, 6))
    objective.begin(0)
    assert objective.state() == {"mined": []}  # the first epoch has none
    objective.begin(5)
    # Of query 0: document 3 alone, as 1 and 4 fit; of query 2: none scores less than 0.95 of its own but 1 and 4.
    assert objective.state() == {"mined": [[1], [2, 0], [1]]}
    found = objective.step_loss([0, 1], 5, 2.0, 1, None)
    assert found.values["loss_with_mined"] > found.loss_sum.item() / 2


def test_epochs_begin_where_rows_come_again_and_no_row_stands_alone():
    lengths = [10] * 9 + [95]
    plan = plan_run(lengths, 100, 3, 3.0, None, least_rows=2)
    starts = epoch_starts(plan)
    assert len(starts) == 3 and starts[0] == 0 and all(len(batch) >= 2 for batch in plan)
    for begin, end in zip(starts, [*starts[1:], len(plan)], strict=True):
        assert sorted(idx for batch in plan[begin:end] for idx in batch) == list(range(10))


def test_ranking_losses_by_hand():
    outputs, scores = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([3.0, 1.0, 0.0])
    log_p = outputs.log_softmax(0)
    assert listwise_loss(outputs, scores).item() == pytest.approx(-(0.75 * log_p[0] + 0.25 * log_p[1]).item())
    pairs = [math.log1p(math.exp(-d)) for d in (1.0, 2.0, 1.0)]
    assert pairwise_loss(outputs, scores).item() == pytest.approx(sum(pairs) / 3)
    assert pairwise_loss(outputs, torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx((pairs[1] + pairs[2]) / 2)


def test_balanced_weights_give_labels_equal_sums():
    weights = balanced_weights(KINDS, [0] * 6 + [1] * 3 + [2] + [None])
    assert (weights * torch.tensor([6.0, 3.0, 1.0])).tolist() == pytest.approx([10 / 3] * 3)
    assert balanced_weights(TAGS, [(1.0, 0.0)] * 2 + [(0.0, 0.0)] * 8).tolist() == [4.0, 10.0]


def test_a_temperature_brings_overconfident_outputs_back():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 3, generator=generator) * 2
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0].tolist()
    assert best_temperature(KINDS, logits * 4, targets) == pytest.approx(4.0, rel=0.15)
    (question,) = calibrated([KINDS], logits * 4, [(target,) for target in targets])
    raw, after = (
        classification_metrics([q], (logits * 4).tolist(), [(t,) for t in targets]) for q in (KINDS, question)
    )
    assert after["task"]["calibration_error"] < 0.5 * raw["task"]["calibration_error"]
    assert after["task"]["micro_f1"] == raw["task"]["micro_f1"]
    assert calibrated([KINDS], logits[:9], [(target,) for target in targets[:9]]) == (KINDS,)  # too few rows to tell


def test_a_threshold_has_the_best_f1():
    chances = torch.tensor([0.9, 0.8, 0.35, 0.3, 0.3, 0.2, 0.15, 0.1])
    holds = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert best_threshold(chances, holds) == 0.25
    assert best_threshold(chances, torch.zeros(8)) == 0.5


def test_losses_of_questions_are_those_of_their_kinds():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    assert question_losses(KINDS, logits, [0, 2]).tolist() == pytest.approx(
        [-logits[0].log_softmax(0)[0].item(), math.log(3)]
    )
    assert question_losses(TAGS, logits[:, :2], [(1.0, 0.0), (0.0, 0.0)])[1].item() == pytest.approx(math.log(2))


def test_ranks_count_ties_against_the_adapter():
    assert ranks_of(torch.tensor([0.5, 0.9, 0.5, 0.1]), [0]) == [3]
    assert ranks_of(torch.tensor([0.5, 0.9, 0.5, 0.1]), [1, 3]) == [1, 4]
    assert ranked([0.5, 0.5, 0.9], [1.0, 0.0, 0.5]) == [0.5, 0.0, 1.0]


def test_retrieval_metrics_by_hand():
    got = retrieval_metrics([[1], [4], [2, 20]])
    assert got["recall@1"] == pytest.approx(1 / 3) and got["recall@10"] == pytest.approx(2.5 / 3)
    assert got["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 2) / 3)
    pair = 1 / math.log2(3) / (1 + 1 / math.log2(3))
    assert got["ndcg@10"] == pytest.approx((1 + 1 / math.log2(5) + pair) / 3)
    lists = reranking_metrics([[1.0, 0.0], [0.0, 1.0]])
    assert lists["first_is_best"] == 0.5 and lists["mrr"] == 0.75 and lists["main"] == 0.75


def test_classification_metrics_by_hand():
    """Said a, b, b, c where a, b, c, c are right; of the labels x is said twice and right once, y once and right."""
    outputs = [[2, 0, 0, 3, -3], [0, 2, 0, 3, -3], [0, 2, 0, -3, 3], [0, 0, 2, -3, -3]]
    targets = [(0, (1.0, 0.0)), (1, (0.0, 0.0)), (2, (0.0, 1.0)), (2, (1.0, 1.0))]
    found = classification_metrics([KINDS, TAGS], [list(map(float, row)) for row in outputs], targets)
    kind, tags = found["questions"]["kind"], found["questions"]["tags"]
    assert kind["accuracy"] == 0.75 and kind["micro_f1"] == 0.75
    assert kind["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert tags["accuracy"] == 0.5 and tags["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert tags["macro_f1"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (1 + 2)) / 2)
    assert found["task"]["micro_f1"] == pytest.approx(2 * (3 + 2) / (4 + 4 + 3 + 4))
    higher = msgspec.structs.replace(TAGS, thresholds=(0.99, 0.5))  # of x, whose chance is 0.95
    assert classification_metrics([higher], [list(map(float, outputs[1]))], [((0.0, 0.0),)])["task"]["accuracy"] == 1.0


def test_calibration_error_by_hand():
    """Nine in ten that hold, said with 0.5 each: 0.4 too few."""
    outputs = [[0.0, 0.0, 0.0, 0.0, 0.0]] * 10
    targets = [((1.0, 1.0) if idx else (0.0, 0.0),) for idx in range(10)]
    got = classification_metrics([TAGS], outputs, targets)["questions"]["tags"]
    assert got["calibration_error"] == pytest.approx(0.4) and got["reliability"] == [(0.5, 0.9, 20)]
    assert labels_of(TAGS, probabilities(TAGS, outputs[0])) == ["x", "y"]


def test_probabilities_are_learned_as_they_are_beside_answers():
    torch.manual_seed(0)
    logits = torch.randn(3, 3, dtype=torch.float64)
    found = question_losses(KINDS, logits.float(), [(0.2, 0.5, 0.3), 1, (0.0, 1.0, 0.0)])
    logs = logits.log_softmax(-1)
    want = torch.stack([-(torch.tensor([0.2, 0.5, 0.3]) * logs[0]).sum(), -logs[1, 1], -logs[2, 1]])
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    weights = balanced_weights(KINDS, [(0.2, 0.5, 0.3), 1, None])
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2 / (3 * 1.5), 2 / 3]))


def test_a_label_without_a_probability_adds_nothing():
    logits = torch.tensor([[0.3, -2.0], [1.0, 0.5]], requires_grad=True)
    losses = question_losses(TAGS, logits, [(0.25, math.nan), (1.0, 0.75)])
    first = F.binary_cross_entropy_with_logits(logits[0, 0], torch.tensor(0.25))
    both = F.binary_cross_entropy_with_logits(logits[1], torch.tensor([1.0, 0.75]))
    torch.testing.assert_close(losses, torch.stack([first, both]))
    losses.sum().backward()
    assert logits.grad[0, 1] == 0 and bool(logits.grad.isfinite().all())
    weights = balanced_weights(TAGS, [(0.25, math.nan), (1.0, 0.75)])
    torch.testing.assert_close(weights, torch.tensor([0.75 / 1.25, 0.25]))


def test_probabilities_calibrate_and_are_measured_by_their_likelier_side():
    outputs = torch.tensor([[0.0, 0, 0, 2.0, -2.0]] * 15 + [[0.0, 0, 0, -2.0, 1.0]] * 15)
    targets = [[None, (0.9, math.nan)]] * 15 + [[None, (0.2, 0.6)]] * 15
    found = calibrated((KINDS, TAGS), outputs, targets)[1]
    assert found.temperature > 0 and 0 < found.thresholds[0] < 1
    assert classification_metrics((KINDS, TAGS), outputs.tolist(), targets)["task"]["micro_f1"] == 1.0
    soft = classification_metrics((KINDS,), [[2.0, 0, 0], [0, 2.0, 0]], [[(0.6, 0.3, 0.1)], [(0.6, 0.3, 0.1)]])
    assert soft["task"]["accuracy"] == 0.5
