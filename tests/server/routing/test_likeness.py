"""Profiles and the choice among them: deterministic, bounded, and right on the demo tasks' held-out rows."""

import json

import numpy as np
import pytest
from places import ROOT

from specserve.errors import AdapterError
from specserve.routing_profile import (
    MAX_PROFILE_BYTES,
    MAX_PROMPTS,
    PROFILE_FILE,
    RoutingProfile,
    excerpt,
    parse_profile,
    profile_of,
    routed_text,
    write_profile,
)
from specserve.server.routing.likeness import FEW_THRESHOLD, NUM_FEATURES, cosines, features_of, likeness_of
from specserve.server.routing.router import choice_of
from specserve.training.data.rows import read_rows, routed_texts

TASKS = ("debtags", "control2json", "summary")


@pytest.fixture(scope="module")
def likely():
    adapters = ROOT / "examples" / "adapters"
    files = {name: adapters / name / PROFILE_FILE for name in TASKS}
    return {name: likeness_of(parse_profile(path.read_bytes(), str(path))) for name, path in files.items()}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_find_their_adapter(likely, task):
    texts = routed_texts(read_rows(ROOT / "examples" / "data" / f"{task}.dev.jsonl"))
    right = sum(choice_of(text, likely).adapter == task for text in texts)
    assert right >= 0.95 * len(texts)


def test_what_fits_no_adapter_is_the_base_model_s(likely):
    lines = (ROOT / "bench" / "data" / "chat_prompts.jsonl").read_text().splitlines()
    chosen = [choice_of(json.loads(line)["prompt"], likely).adapter for line in lines]
    assert chosen.count(None) >= 0.95 * len(chosen)
    assert choice_of("", likely).adapter is None and choice_of("hi", {}).others == []


def test_one_adapter_alone_is_chosen_for_its_own_and_not_for_others(likely):
    alone = {"summary": likely["summary"]}
    asked = "Summarise this software package in one line.\n\nA library that reads and writes tar archives."
    assert choice_of(asked, alone).adapter == "summary"
    assert choice_of("Write a haiku about autumn rain.", alone).adapter is None


def test_the_nearest_below_its_threshold_is_nobody_s_and_equals_go_by_name(likely):
    twins = {"b": likely["summary"], "a": likely["summary"]}
    text = "Summarise this software package in one line.\n\nA tool that plays chess."
    routing = choice_of(text, twins)
    assert routing.adapter == "a" and [other.adapter for other in routing.others] == ["b"]
    assert routing.score == routing.others[0].score >= routing.others[0].threshold
    none = choice_of("Summarise!", likely)
    assert none.adapter is None and none.score is None and len(none.others) == len(TASKS)
    assert none.others[0].score == max(other.score for other in none.others)


def test_a_score_does_not_depend_on_the_other_adapters(likely):
    text = "Package: wesnoth-1.16-did\nVersion: 1:1.16.9-1"
    together = cosines(text, [one.direction for one in likely.values()])
    assert [float(cosines(text, [one.direction])[0]) for one in likely.values()] == together.tolist()


@pytest.mark.parametrize("text", ["", " \n\t", "a", "ab", "\ud800", "x" * 5_000_000, "日本語の文", "\0"])
def test_features_of_any_text_have_length_one_or_none(text):
    features = features_of(text)
    assert features.shape == (NUM_FEATURES,) and np.isfinite(features).all()
    assert np.linalg.norm(features) == pytest.approx(float(bool(text.strip())), abs=1e-5)


def test_few_prompts_need_a_clear_likeness():
    assert likeness_of(RoutingProfile(("one prompt", "another prompt"))).threshold == FEW_THRESHOLD
    same = likeness_of(RoutingProfile(("the same",) * 16))
    assert choice_of("the same", {"same": same}).adapter == "same"  # whose prompts do not spread at all


def test_a_profile_is_even_distinct_and_bounded(tmp_path):
    texts = [f"prompt {idx % 100}" for idx in range(1000)]
    assert profile_of(texts, 4).prompts == ("prompt 0", "prompt 25", "prompt 50", "prompt 75")
    assert profile_of(["", " "]).prompts == () and profile_of(["a", "a", "b"]).prompts == ("a", "b")
    long = profile_of([f"{idx}" + "\N{GRINNING FACE}" * 9000 for idx in range(500)], MAX_PROMPTS)
    write_profile(tmp_path, long)
    assert (tmp_path / PROFILE_FILE).stat().st_size <= MAX_PROFILE_BYTES and len(long.prompts) > 8
    assert parse_profile((tmp_path / PROFILE_FILE).read_bytes(), "it") == long
    assert all(prompt == excerpt(prompt) for prompt in long.prompts)


def test_answers_are_not_compared():
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("tool", "42"), ("user", "Bye")]
    assert routed_text(turns) == "Be brief.\n\nHi\n\nBye"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "Expected `object`"),
        (b'{"prompts": []}', "1 to 64"),
        (b'{"prompts": [1]}', "Expected `str`"),
        (b'{"prompts": ["a"], "format_version": 2}', "format_version 2"),
        (b'{"prompts": ["a"], "more": 1}', "more"),
        (b"\xff", "routing.json"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(body, words):
    with pytest.raises(AdapterError, match=words):
        parse_profile(body, "routing.json")
