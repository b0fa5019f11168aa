"""`specserve synthesize` with a teacher at an endpoint: rows, what is dropped and why, and what ends a run."""

import json
import random

import pytest
from synthesis_place import SCHEMA, answer_of, input_of, what_is_asked, wise

from specserve.curation.synthesis.seeds import read_held_out
from specserve.training.data.rows import read_rows
from specserve.training.pooling.rows import read_pooling_rows


def test_rows_come_in_the_format_of_the_seeds_and_none_repeats_another(place):
    code, out, err = place.run("--include-seeds")
    assert code == 0, err
    rows = place.rows()
    assert len(rows) == 20 and rows[:8] == place.lines("seeds.jsonl")
    assert all(row == {"prompt": row["prompt"], "completion": answer_of(row["prompt"])} for row in rows)
    assert len({row["prompt"] for row in rows}) == 20
    assert len(read_rows(place.path / "rows.jsonl")) == 20
    assert place.verdicts() == {"kept": 12} and "12 of 12" in err and "12 rows of 12 candidates" in out
    report = place.lines("rows.report.json")[0]
    assert report["rows"] == 12 and report["teacher"]["requests"] == len(place.endpoint.bodies) == 3 + 12
    assert report["rounds"] == [{"round": 1, "candidates": 12, "rows": 12, "share_repeated": 0.0}]
    assert 0 < report["diversity"]["rows"]["nearest_similarity"] < 0.7


def test_an_ask_shows_seeds_that_differ_from_ask_to_ask(place):
    place.run("--per-ask", 1, "--examples", 3, "--vary", "Be brief.", "--vary", "Be odd.")
    asks = [body for body in place.endpoint.bodies if what_is_asked(body) == "proposal"]
    shown = [tuple(m["content"] for m in body["messages"] if m["role"] == "assistant") for body in asks]
    assert {len(set(seeds)) for seeds in shown} == {3} and len(set(shown)) > 6
    assert {body["messages"][-1]["content"] for body in asks} == {
        "Write another input. Be brief.", "Write another input. Be odd.",
    }  # fmt: skip
    assert len({body["seed"] for body in asks}) == len(asks) == 12


def test_the_same_command_makes_the_same_rows_and_another_seed_others(place):
    for out, seed in (("a.jsonl", 0), ("b.jsonl", 0), ("c.jsonl", 1)):
        cache = ("--teacher-cache", place.path / f"cache {out}")
        assert place.run("--seed", seed, *cache, out=out)[0] == 0
    assert place.rows("a.jsonl") == place.rows("b.jsonl") != place.rows("c.jsonl")
    assert place.lines("a.review.jsonl") == place.lines("b.review.jsonl")


def test_what_repeats_or_is_held_out_is_dropped_and_named(place):
    rng = random.Random(7)
    held_out, first = input_of(rng), input_of(rng)
    near = place.lines("seeds.jsonl")[2]["prompt"].replace("notes: ", "notes: so ")
    place.seeds([{"prompt": held_out, "completion": "{}"}], "dev.jsonl")
    turns = iter([json.dumps({"inputs": [first, f" {first.upper()}\n", near, held_out, "number: 12"]})])
    place.endpoint.respond = lambda body, number: (
        next(turns, None) or wise(body) if what_is_asked(body) == "proposal" else wise(body)
    )
    code, _, err = place.run("--held-out", place.path / "dev.jsonl", "--per-ask", 8, rows=2)
    assert code == 0, err
    found = place.candidates()[:5]
    assert [candidate["verdict"] for candidate in found] == [
        "kept", "duplicate", "near_duplicate", "held_out", "kept",
    ]  # fmt: skip
    assert found[1]["reason"] == "the same as candidate 1" and "with seed line 3" in found[2]["reason"]
    assert found[3]["reason"] == "the same text as dev.jsonl line 1"
    report = place.lines("rows.report.json")[0]
    assert report["held_out"] == {"files": 1, "dropped": 1, "seeds": []}
    assert report["rounds"][0]["share_repeated"] == 0.4


def test_held_out_files_of_one_name_are_all_looked_at(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "dev.jsonl")
        files[-1].write_text(json.dumps({"prompt": f"the row of {name}", "completion": "x"}) + "\n")
    assert sorted(read_held_out(files).values()) == ["the row of a", "the row of b"]
    assert list(read_held_out(files[:1])) == ["dev.jsonl line 1"]


def test_seeds_that_are_held_out_are_told(place):
    code, out, _ = place.run("--held-out", place.path / "seeds.jsonl", rows=1)
    assert (
        code == 0
        and "8 of the seeds are like held-out rows, the first in line 1 (seeds.jsonl line 1: the same text)" in out
    )


def test_answers_are_held_to_a_schema(place):
    def respond(body, number):
        text = wise(body)
        if what_is_asked(body) == "answer":
            assert body["response_format"]["json_schema"]["schema"] == SCHEMA
            return text.replace(": ", ":") if number % 2 else text.replace('"n"', '"number"')
        return text

    place.endpoint.respond = respond
    schema = place.write("schema.json", json.dumps(SCHEMA))
    code, _, err = place.run("--schema", schema, rows=5)
    assert code == 0, err
    assert all(row["completion"] == answer_of(row["prompt"]) for row in place.rows())
    dropped = [candidate for candidate in place.candidates() if candidate["verdict"] == "not_of_schema"]
    assert dropped and all('"number"' in candidate["teacher_wrote"] for candidate in dropped)


def test_a_schema_that_no_answer_meets_ends_the_run(place):
    schema = place.write(
        "schema.json", json.dumps({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]})
    )
    code, _, err = place.run("--schema", schema, rows=200)
    assert code == 2 and "answers makes a row; the last: the answer is not of the schema" in err
    assert len(place.endpoint.bodies) < 500 and set(place.verdicts()) == {"not_of_schema"}


def test_a_teacher_that_repeats_itself_for_ever_ends_the_run(place):
    text = input_of(random.Random(5))
    place.endpoint.respond = lambda body, number: (
        json.dumps({"inputs": [text] * 4}) if what_is_asked(body) == "proposal" else wise(body)
    )
    code, out, err = place.run(rows=40)
    assert code == 1 and len(place.rows()) == 1
    assert "the last 2 rounds brought nothing new" in out and len(place.endpoint.bodies) < 200
    place.endpoint.respond = lambda body, number: json.dumps({"inputs": [place.lines("seeds.jsonl")[0]["prompt"]]})
    code, _, err = place.run("--seed", 3, rows=40, out="none.jsonl")
    assert code == 2 and "no row came of" in err and not (place.path / "none.jsonl").exists()


def test_answers_that_cannot_be_read_are_shown_and_end_a_run_of_nothing_else(place):
    texts = ["Sure! Here are some inputs: ...", '{"inputs": []}', "[1]", '{"inputs": [5]}', '{"inputs": ["']
    place.endpoint.respond = lambda body, number: (
        texts[number % 9] if what_is_asked(body) == "proposal" and number % 9 < len(texts) else wise(body)
    )
    code, _, err = place.run(rows=30)
    assert code == 0, err
    malformed = [candidate for candidate in place.candidates() if candidate["verdict"] == "malformed"]
    assert malformed and all(candidate["teacher_wrote"] in texts and candidate["reason"] for candidate in malformed)
    place.endpoint.respond = lambda body, number: texts[number % len(texts)]
    code, _, err = place.run("--seed", 1, rows=60, out="none.jsonl")
    assert code == 2 and "proposals can be read" in err and "--per-ask 1" in err


@pytest.mark.parametrize("method", ["single", "refine"])
def test_a_teacher_that_fails_now_and_then_is_asked_for_others(place, method):
    place.endpoint.respond = lambda body, number: wise(body) if number % 3 else (400, {"error": {"message": "no"}}, {})
    code, _, err = place.run("--method", method, rows=10)
    assert code == 0 and "requests failed so far" in err and len(place.rows()) == 10


def test_a_teacher_that_is_gone_loses_nothing(place):
    assert place.run(rows=8)[0] == 0
    place.endpoint.respond = lambda body, number: (503, {"error": {"message": "gone"}}, {})
    code, _, err = place.run(rows=16)
    assert code == 2 and "gone" in err and "same command goes on" in err and len(place.rows()) == 8
    place.endpoint.respond = wise
    code, _, err = place.run(rows=16)
    assert code == 0 and len(place.rows()) == 16


def test_rows_are_held_to_limits_of_tokens(place, tiny):
    place.endpoint.respond = lambda body, number: (
        "name: x\nnumber: 1" if what_is_asked(body) == "proposal" and number % 2 else wise(body)
    )
    code, _, err = place.run("--per-ask", 1, "--min-row-tokens", 60, "--max-row-tokens", 200, "--model", tiny, rows=6)
    assert code == 0, err
    reasons = [candidate["reason"] for candidate in place.candidates() if candidate["verdict"] == "too_short"]
    assert reasons and all("tokens; at least 60 are wanted" in reason for reason in reasons)
    code, _, err = place.run("--max-row-tokens", 20, "--min-row-tokens", 40, out="other.jsonl")
    assert code == 2 and "no row has so many" in err


def chat(word):
    turns = (("system", "Be brief."), ("user", f"What is {word}?"), ("assistant", f"{word} it is"))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ANSWERS = [
    {"text": "I like tea", "answers": {"drink": "tea", "kind": True}},
    {"text": "mud", "answers": {"kind": False}},
]
RANKED = {"query": "find tea", "documents": ["tea", "mud", "dust"], "scores": [2, 0, 1]}


@pytest.mark.parametrize(
    ("rows", "read", "answer"),
    [
        ([chat("tea"), chat("milk"), chat("mud")], read_rows, "Nothing."),
        ([{"instruction": f"Say {word}", "output": word} for word in ("tea", "milk")], read_rows, "Nothing."),
        ([{"text": f"I like {word}", "label": word} for word in ("tea", "milk")], "classify", {"label": "milk"}),
        ([{"text": f"I like {word}", "labels": [word]} for word in ("tea", "mud")], "classify", {"labels": ["mud"]}),
        (ANSWERS, "classify", {"answers": {"kind": False}}),
        ([{"query": f"find {word}", "positive": f"it is {word}"} for word in ("a", "b")], "embed", {"positive": "y"}),
        ([RANKED], "rerank", {"positive": "a", "negatives": ["b", "c"]}),
    ],
    ids=["messages", "instruction", "label", "labels", "answers", "embed", "rerank"],
)
def test_every_format_that_trains_is_made(place, rows, read, answer):
    place.seeds(rows)
    place.endpoint.respond = lambda body, number: (
        wise(body) if what_is_asked(body) == "proposal" else answer if isinstance(answer, str) else json.dumps(answer)
    )
    code, _, err = place.run(rows=5)
    assert code == 0, err
    made = place.rows()
    assert len(made) == 5
    found = read(place.path / "rows.jsonl") if callable(read) else read_pooling_rows(place.path / "rows.jsonl", read)
    assert len(found) == 5
    if isinstance(answer, dict):
        assert all(answer.items() <= row.items() for row in made)
        assert all(len(row) == len(answer) + 1 for row in made)
    elif "messages" in rows[0]:
        assert made[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        (system,) = {
            body["messages"][0]["content"] for body in place.endpoint.bodies if what_is_asked(body) == "answer"
        }
        assert system == "Read a name and a number.\n\nBe brief."


def test_conversations_are_made_up_to_the_last_answer(place):
    turns = [{"role": role, "content": f"{role} {idx}"} for idx, role in enumerate(("user", "assistant") * 2)]
    place.seeds([{"messages": turns}])
    made = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    inputs = [
        made,
        made[:1],
        made[:2],
        made[1:],
        [{"role": "user"}],
        "text",
        [*made[:2], {"role": "user", "content": " "}],
    ]
    answers = iter(json.dumps({"inputs": [input]}) for input in inputs)
    place.endpoint.respond = lambda body, number: (
        next(answers, '{"inputs": []}') if what_is_asked(body) == "proposal" else "the answer"
    )
    code, _, err = place.run("--per-ask", 1, "--teacher-concurrency", 1, rows=7)
    assert code == 1, err
    end = {"role": "assistant", "content": "the answer"}
    assert [row["messages"] for row in place.rows()] == [[*made, end], [*made[:1], end]]
    assert sum(candidate["verdict"] == "malformed" for candidate in place.candidates()) >= 5
    assert len(read_rows(place.path / "rows.jsonl")) == 2


def test_inputs_begin_as_all_seeds_do(place):
    task = "Read what stands below.\n\n"
    place.seeds([{"prompt": task + word * 5, "completion": word} for word in ("tea ", "mud ", "salt ", "silk ")])
    inputs = [task + "new", "Read what\nstands below. Newer", "Read what stands above. No", "newest"]
    place.endpoint.respond = lambda body, number: (
        json.dumps({"inputs": inputs}) if what_is_asked(body) == "proposal" else "an answer"
    )
    assert place.run(rows=3)[0] == 1
    found = place.candidates()[:4]
    assert [candidate["verdict"] for candidate in found] == ["kept", "kept", "other_form", "other_form"]
    assert found[3]["reason"] == "it does not begin as all seeds do, with 'Read what stands below.'"


def test_labels_that_are_rare_are_shown_as_often_as_others(place):
    rows = [{"text": f"common {idx}", "label": "common"} for idx in range(30)] + [{"text": "rare", "label": "rare"}]
    place.seeds(rows)
    place.endpoint.respond = lambda body, number: (
        wise(body) if what_is_asked(body) == "proposal" else '{"label": "rare"}'
    )
    place.run("--per-ask", 1, "--examples", 2, rows=6)
    asks = [body["messages"] for body in place.endpoint.bodies if what_is_asked(body) == "proposal"]
    assert all(any(message["content"] == "rare" for message in messages) for messages in asks)


def test_inputs_alone_need_no_answers_not_even_in_the_seeds(place):
    rng = random.Random(1)
    place.seeds([{"prompt": input_of(rng)} for _ in range(3)])
    code, _, err = place.run("--inputs-only", rows=4)
    assert code == 0, err
    assert [list(row) for row in place.rows()] == [["prompt"]] * 4
    assert {what_is_asked(body) for body in place.endpoint.bodies} == {"proposal"}
    code, _, err = place.run(rows=4, out="other.jsonl")
    assert code == 2 and "line 1: completion is missing" in err


SEED = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no rows; a synthesis begins with at least one"),
        ("\n\n", "holds no rows"),
        (SEED + '{"text": "a", "label": "b"}\n', "line 1 is a row with a prompt and line 2 one with labels"),
        (SEED + '{"prompt": "a"\n', "line 2 is not JSON"),
        (SEED + "[]\n", "line 2 is list, not an object"),
        (SEED + '{"question": "a"}\n', "line 2 has the fields 'question'"),
        ('{"prompt": "a", "completion": " "}\n', "line 1: completion is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the last message is the user's"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
            ' "tools": [{"type": "function", "function": {"name": "f"}}]}\n',
            "line 1 has tools or reasoning",
        ),
        ('{"text": "a", "label": "b"}\n{"text": "a", "labels": ["b"]}\n', "some seeds have 'label'"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "label": true}\n', "label are of different types"),
    ],
)
def test_seeds_that_cannot_be_used_are_refused_before_anything_is_asked(place, content, problem):
    place.write("seeds.jsonl", content)
    code, _, err = place.run()
    assert code == 2 and problem in err and err.count("\n") == 1
    assert not place.endpoint.bodies and sorted(path.name for path in place.path.iterdir()) == ["seeds.jsonl"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--task", " "], "--task is empty"),
        (["--seeds", "none.jsonl"], "cannot read none.jsonl"),
        (["--held-out", "none.jsonl"], "cannot read none.jsonl"),
        (["--schema", "none.json"], "cannot read the schema none.json"),
        (["--near", "0.1"], "similarity of near duplicates is 0.1"),
        (["--output", "seeds.jsonl"], "is read, too"),
        (["--output", "other.txt"], "is there already"),
        (["--output", "."], "directory"),
        (["--rows", "0"], "--rows"),
        (["--max-tokens", "64"], "the longest answer is --max-answer-tokens"),
        (["--min-tokens", "64"], "are --min-row-tokens and --max-row-tokens"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_anything_is_asked(place, monkeypatch, flags, problem):
    monkeypatch.chdir(place.path)
    place.write("other.txt", "somebody's")
    code, _, err = place.run(*flags)
    assert code == 2 and problem in err and not place.endpoint.bodies
    assert place.path.joinpath("other.txt").read_text() == "somebody's"


def test_a_report_that_cannot_be_written_is_told_before_anything_is_asked(place):
    (place.path / "rows.report.json").mkdir()
    code, _, err = place.run()
    assert code == 2 and "rows.report.json would be written and is a folder" in err and not place.endpoint.bodies


@pytest.mark.parametrize(
    ("config", "told"), [(None, "is no folder of an adapter"), ({"r": 8}, "has no adapter_model.safetensors")]
)
def test_an_embedder_that_is_none_is_told_before_anything_is_asked(place, config, told):
    if config is not None:
        (place.path / "embedder").mkdir()
        place.write("embedder/adapter_config.json", json.dumps(config))
    code, _, err = place.run("--embedder", place.path / "embedder")
    assert code == 2 and told in err and err.count("\n") == 1 and not place.endpoint.bodies


def test_one_seed_is_enough_and_is_remarked_on(place):
    place.seeds(place.lines("seeds.jsonl")[:1])
    code, _, err = place.run(rows=3)
    assert code == 0 and "there is one seed" in err and len(place.rows()) == 3
