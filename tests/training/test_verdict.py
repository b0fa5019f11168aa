"""What is said of a finished run: of good ones nothing, of the rest what is wrong."""

import re

import pytest

from specserve.training.evaluation.report import model_card
from specserve.training.evaluation.verdict import steps_warning, summary_of, warnings_of


def report(**changes):
    speed = {"tokens_per_s": 90.0, "tokens_per_s_without_drafts": 30.0, "ratio": 3.0, "decode_ratio": 3.2}
    return {
        "rows": 40,
        "dtype": "fp32",
        "hardware": "x86_64",
        "task": {"exact_match": 0.8, "valid_json": 1.0, "field_match": 0.95, "main": 0.95},
        "speed": {"batch 1": speed, "batch 8": speed},
        "mean_accepted_length": 3.0,
        "mean_accepted_length_batch_1": 3.1,
        "answers_equal_with_and_without_drafts": 1.0,
        "accepted_by_source": {"head": 300, "ngram": 20},
        "answers_without_end": 0.0,
        "accepted_in_answers_without_end": 0.0,
        "lookahead": {"draft_len": 6, "history_tokens": 100, "error": None},
        "warnings": [],
        **changes,
    }


def test_a_good_run_ends_with_its_metric_and_its_speed():
    task, speed = summary_of(report())
    assert "exact_match 0.800, valid_json 1.000" in task and "40 held-out rows" in task and "main" not in task
    assert "batch 8: 90 tokens/s with drafts, 30 without (3.00x)" in speed
    assert summary_of(report(task={})) == [speed]  # of prompts alone
    assert warnings_of(report()) == [] == steps_warning(24, 24) == steps_warning(None, 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"exact_match": 0.0, "valid_json": 0.5, "field_match": 0.4, "main": 0.4}}, "only 50% .* valid JSON"),
        ({"task": {"exact_match": 0.0, "valid_json": 1.0, "field_match": 0.4, "main": 0.4}}, "40% of the fields"),
        ({"task": {"exact_match": 0.0, "rouge_l": 0.1, "main": 0.1}}, "ROUGE-L 0.10"),
        ({"answers_without_end": 0.3}, "30% of the answers do not end"),
        (
            {"accepted_in_answers_without_end": 0.9, "accepted_by_source": {"ngram": 80, "head": 20}},
            "most of the speed is that of repetition: 90% .* 80% copy the answer's own text",
        ),
    ],
)
def test_what_is_wrong_with_the_answers_is_said_on_the_console_and_on_the_card(changes, said):
    warnings = warnings_of(report(**changes))
    assert len(warnings) == 2 and re.search(said, warnings[0])
    assert f"> **Warning:** {warnings[0]}." in model_card("task", report(**changes, warnings=warnings))


def test_nothing_is_wanted_of_the_answers_of_a_bare_base():
    bad = {"task": {"exact_match": 0.0, "rouge_l": 0.1, "main": 0.1}, "answers_without_end": 0.3}
    assert warnings_of(report(**bad, is_base_head=True)) == [
        "30% of the answers do not end before the limit of tokens: they are long, or loop"
    ]


def test_few_steps_are_said_with_the_ways_to_more():
    assert "only 4 optimizer steps were taken (24 is" in steps_warning(4, 24)[0]
    assert "**Warning:**" not in model_card("task", report())


def test_the_card_of_a_lora_without_a_head_says_that_it_has_none():
    assert "beside it a small head" in model_card("task", report())
    card = model_card("task", report(lookahead=None))
    assert "no lookahead head" in card and "beside it" not in card and "--head-only" in card


def test_a_lora_that_no_run_trained_is_not_told_to_take_more_steps():
    task = {"valid_json": 0.1}
    assert "--check-data" in warnings_of(report(task=task, steps=30))[-1]
    assert "no head changes" in warnings_of(report(task=task, steps=None))[-1]
