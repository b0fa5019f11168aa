"""report.html shows what report.json says, whatever rows and answers hold, and examples.json what a page may offer."""

import json
import re

import pytest
from html_page import Page
from test_verdict import report as small_report

from specserve.adapter_files import MAX_EXAMPLES, MAX_EXAMPLES_BYTES
from specserve.draft_sources import SOURCES
from specserve.server.adapter_extras import examples_of
from specserve.training.data.rows import parse_row
from specserve.training.evaluation.examples import write_examples
from specserve.training.evaluation.html_report import html_report
from specserve.training.evaluation.plots import plots_of

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
METRICS = [{"step": step, "loss": 3 / step, **({"head_loss": 5 / step} if step > 5 else {})} for step in range(1, 11)]


def token(text, source="target", forward=0, **fields):
    chance = None if source == "target" else 0.75
    return {"token_id": 1, "text": text, "source": source, "chance": chance, "forward": forward, **fields}


def report(**changes):
    made = {
        "reached_by_position": [0.8, 0.4],
        "accepted_length_histogram": {"1": 5, "4": 3, "60": 1},
        "warnings": [EVIL],
    }
    return small_report(**made | changes)


def examples():
    rejected = [{"token_id": 2, "text": EVIL, "source": "ngram", "chance": 0.5}]
    tokens = [token("The"), token(EVIL, "head", 1), token(" fox", forward=1, rejected=rejected), token("", "else", 2)]
    return [{"prompt": EVIL, "tokens": tokens}]


@pytest.fixture(scope="module")
def page():
    return Page(html_report(EVIL, report(), plots_of(report(), METRICS), examples()))


def test_nothing_of_rows_answers_or_names_becomes_markup(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "form"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(EVIL) >= 4  # title, heading, warning, prompt, token


def test_it_takes_nothing_from_elsewhere(page):
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert not [link for link in links if not link.startswith("#")]
    style = "".join(re.findall(r"<style>(.*?)</style>", html_report("x", report(), []), re.DOTALL))
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_tokens_say_where_they_came_from_and_what_had_been_guessed(page):
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert [span["class"] for span in spans] == ["token head", "missed"]
    assert spans[0]["title"] == "lookahead head, expected 75%"
    assert spans[1]["title"].startswith("n-gram had guessed") and "50%" in spans[1]["title"]
    assert "4 tokens in 3 forwards" in page.text


def test_plots_are_labelled_and_take_the_colours_of_the_page():
    plots = plots_of(report(), METRICS)
    assert [plot.name for plot in plots] == ["reached_by_position", "accepted_length", "speed", "loss"]
    for plot in plots:
        svg = plot.svg()
        assert svg.startswith("<svg role=") and f'aria-label="{plot.title}"' in svg and "var(--series-1)" in svg
        assert "currentColor" in svg and "<metadata" not in svg
    assert "32 or more" in plots[1].svg() and "eight at a time" in plots[2].svg()
    without = report(reached_by_position=[], accepted_length_histogram={})
    plots = plots_of(without, [])
    assert [plot.name for plot in plots] == ["reached_by_position", "accepted_length", "speed"]
    assert all(plot.svg() for plot in plots) and "none was" in plots[0].caption


def rows(*values):
    return [parse_row(json.dumps(value), line, "rows") for line, value in enumerate(values, 1)]


def test_examples_are_the_shortest_prompts_with_titles_of_their_own(tmp_path):
    given = rows(
        *({"prompt": f"Task:\n{'word ' * num}", "completion": "x"} for num in range(20, 0, -1)),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "Be brief."},
        {"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "b"}],
         "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]},
    )  # fmt: skip
    write_examples(tmp_path, given, "Answer.")
    examples = json.loads((tmp_path / "examples.json").read_text())
    assert len(examples) == MAX_EXAMPLES and len({example["title"] for example in examples}) == MAX_EXAMPLES
    assert examples[0] == {
        "title": "a",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
    }
    assert examples[1]["messages"][-1]["content"] == "Task:\nword " and examples[2]["title"] == "word word"
    write_examples(tmp_path, given[:1], None)
    assert json.loads((tmp_path / "examples.json").read_text()) == examples  # somebody may have chosen them


def test_examples_stay_within_their_bytes_and_none_is_no_file(tmp_path):
    long = rows(*({"prompt": str(num) * 20_000, "completion": "x"} for num in range(8)))
    write_examples(tmp_path, long, None)
    assert (tmp_path / "examples.json").stat().st_size <= MAX_EXAMPLES_BYTES
    assert json.loads((tmp_path / "examples.json").read_text())
    write_examples(tmp_path / "none", rows({"prompt": "x" * 70_000, "completion": "y"}), None)
    assert not (tmp_path / "none").exists()


def test_examples_are_those_that_a_server_shows(tmp_path):
    called = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    tool = [
        {"role": "user", "content": "t"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
    ]
    answer = {"role": "assistant", "content": "b"}
    given = rows({"messages": [*tool, answer]}, {"messages": [{"role": "user", "content": "asked"}, answer]})
    write_examples(tmp_path, given, None)
    body = (tmp_path / "examples.json").read_bytes()
    assert [example.title for example in examples_of(body, "the examples")] == ["asked"] and len(json.loads(body)) == 1


def test_a_report_has_the_shades_of_all_sources():
    page = html_report("name", report(), [], [])
    for css, source in SOURCES.items():
        assert f"--{css}: {source.light[0]}; --{css}-line: {source.light[1]};" in page
        assert f"--{css}: {source.dark[0]}; --{css}-line: {source.dark[1]};" in page
        assert f".{css} {{ background: var(--{css});" in page


def test_the_page_says_what_was_measured():
    for changes, said in (
        ({}, "a LoRA, and what drafts its next tokens"),
        ({"lookahead": None}, "A LoRA without a lookahead head."),
        ({"is_base_head": True}, "A lookahead head of the base model itself"),
    ):
        assert said in html_report("x", {**report(), **changes}, [])
