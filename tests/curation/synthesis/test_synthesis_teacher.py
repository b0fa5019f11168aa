"""A synthesis on the example rows with a tiny model as the teacher, in an engine of its own; an adapter that embeds."""

import json

import pytest
from peft_adapters import make_peft_adapter
from places import ROOT
from served_poolers import EMBEDDER, make_pooling_adapter

from specserve.cli.main import exit_code_of
from specserve.training.data.rows import read_rows

DATA = ROOT / "examples" / "data"


def test_the_example_rows_are_seeds_for_a_model_that_runs_here(tmp_path, talker, capsys):
    out = tmp_path / "rows.jsonl"
    options = ("dtype=fp32", "kv_cache_gib=0.05", "num_threads=1")
    code = exit_code_of(
        ["synthesize", "--seeds", str(DATA / "debtags.train.jsonl"), "--held-out", str(DATA / "debtags.dev.jsonl"),
         "--task", "Say what it is.", "--teacher", str(talker), "--teacher-cache", str(tmp_path / "cache"),
         *(word for option in options for word in ("--teacher-option", option)), "--per-ask", "1", "--examples", "2",
         "--max-answer-tokens", "64", "--rows", "3", "--output", str(out)]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert len(read_rows(out)) == 3
    report = json.loads((tmp_path / "rows.report.json").read_text())
    assert report["teacher"]["requests"] >= 6 and report["teacher"]["completion_tokens"] > 0


@pytest.mark.slow
def test_the_report_has_the_spread_of_topics_where_an_adapter_embeds(place, tiny):
    embedder = make_pooling_adapter(tiny, place.path / "embedder", config=EMBEDDER)
    code, out, err = place.run("--embedder", embedder, "--model", tiny, rows=4)
    assert code == 0 and "spread of topics" in out, err
    alpha = make_peft_adapter(tiny, place.path / "alpha", r=4)
    code, _, err = place.run("--embedder", alpha, "--model", tiny, rows=4, out="other.jsonl")
    assert code == 2 and "is for 'generate' (adapter_type)" in err and not (place.path / "other.jsonl").exists()
    diversity = place.lines("rows.report.json")[0]["diversity"]
    assert 0 < diversity["rows"]["topic_spread"] < 2 and 0 < diversity["seeds"]["topic_spread"] < 2
