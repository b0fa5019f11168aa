"""Near duplicates and held-out rows, on the example data and on texts made for it."""

import json

import pytest
from places import ROOT

from specserve.curation.contamination import HeldOut
from specserve.errors import UserError
from specserve.training.data.near_duplicates import Near, NearDuplicates
from specserve.training.data.text_identity import common_shingles, shingles, similarity

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()


def prompts(split):
    return [json.loads(line)["prompt"] for line in (ROOT / f"examples/data/control2json.{split}.jsonl").open()]


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_what_is_near_is_found_and_nothing_else(threshold):
    """Against all pairs, compared by their letters."""
    texts = prompts("train")[:100]
    parts = [shingles(text) for text in texts]
    index, found, expected = NearDuplicates(threshold), {}, {}
    for idx, text in enumerate(texts):
        values = [similarity(parts[idx], other) for other in parts[:idx]]
        if values and max(values) >= threshold:
            expected[idx] = (str(values.index(max(values))), max(values))
        if (near := index.nearest(text)) is not None:
            found[idx] = (near.key, near.similarity)
        index.add(str(idx), text)
    assert found == expected and len(expected) > (90 if threshold < 0.5 else 0)


def test_a_threshold_that_would_call_everything_near_is_refused():
    with pytest.raises(UserError, match=r"0\.05; a number from 0\.3 to 1"):
        NearDuplicates(0.05)


def test_what_all_rows_of_a_task_have_is_not_compared():
    head = "You are given the control stanza of a package. Write it as JSON with the fields name and version: "
    texts = [f"{head}Package {name}" for name in ("hello", "firefox-esr", "gimp-plugins-extra")]
    for common, expected in ((frozenset(), True), (common_shingles([shingles(text) for text in texts]), False)):
        index = NearDuplicates(0.7, common)
        index.add("first", texts[0])
        assert (index.nearest(texts[1]) is not None) is expected
        assert index.nearest(f"{head}  package HELLO") == Near("first", 1.0)
    assert index.nearest(head) is None
    index.add("only the head", head)
    assert index.nearest(head) == Near("only the head", 1.0)


@pytest.fixture(scope="module")
def held_out():
    texts = {"dev 1": " ".join(WORDS), "dev 2": "Sort these words: apple pear", "dev 3": "yes"}
    return HeldOut(texts, known=["Sort these words: cherry", "Sort these words: date"])


@pytest.mark.parametrize(
    ("text", "key", "how"),
    [
        ("  ONE " + " ".join(WORDS[1:]), "dev 1", "the same text"),
        ("Yes", "dev 3", "the same text"),
        (" ".join([*WORDS, "more"]), "dev 1", "similarity"),
        (f"Before it: {' '.join(WORDS[:13])} and something else, with many words behind", "dev 1", "1 of its 3 runs"),
        ("Please now sort these words apple pear and whatever else comes to your mind", "dev 2", "1 of its 1 runs"),
    ],
)
def test_a_text_that_repeats_a_held_out_one_is_found(held_out, text, key, how):
    match = held_out.match(text)
    assert match is not None and match.key == key and how in match.how


@pytest.mark.parametrize("text", ["Sort these words: plum", f"{' '.join(WORDS[:12])} and others", "yes, of course"])
def test_other_texts_are_not(held_out, text):
    assert held_out.match(text) is None


def test_a_run_that_rows_of_the_task_share_is_no_contamination():
    head = "You are given the control stanza of a package. Write it as JSON with name and version: "
    text = f"Now: {head} all of it is new, and nothing of it is in any row that is kept for the end"
    assert HeldOut({"0": head + "a b"}).match(text) is not None
    assert HeldOut({"0": head + "a b"}, [head + "c", head + "d"]).match(text) is None
    assert HeldOut({"0": head + "a b", "1": head + "c d"}, [head + "e"]).match(text) is None


def test_the_example_rows_share_little_with_those_that_are_held_out():
    """Of 300: a sibling package, and one whose maintainers and dependencies fill a third of a short stanza."""
    held_out = HeldOut({str(idx): text for idx, text in enumerate(prompts("dev"))}, prompts("train")[:50])
    assert [match.key for text in prompts("train") if (match := held_out.match(text)) is not None] == ["4", "9"]
    assert all(held_out.match(text) is not None for text in prompts("dev"))
