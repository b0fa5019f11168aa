"""`specserve label`: votes of every kind of function, what a model makes of them, what is left of a run cut short."""

import fcntl
import json
import os
import random
import re
import resource
import textwrap
from pathlib import Path

import pytest
from fake_teacher import MODEL, FakeTeacher
from served_poolers import make_poolers
from tiny_models import make_tiny_model

from specserve.cli.main import exit_code_of
from specserve.curation.labelling.label_file import FunctionSpec, QuestionSpec, read_label_file
from specserve.curation.labelling.label_model import combined, too_few
from specserve.curation.labelling.run import label
from specserve.errors import UserError
from specserve.teachers import TeacherSpec
from specserve.training.data.rows import read_rows
from specserve.training.pooling.questions import questions_of
from specserve.training.pooling.rows import read_pooling_rows

TEXTS = ["a red fox", "the lazy dog", "fox and dog", "a jug of wine", "nothing here"]


@pytest.fixture
def folder(tmp_path):
    rows = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(rows)
    (tmp_path / "functions.py").write_text(
        textwrap.dedent("""
        from pathlib import Path

        def first(text):
            with open(Path(__file__).with_name("calls"), "a") as file:
                file.write(text + "\\n")
            if "wine" in text and Path(__file__).with_name("broken").exists():
                raise ValueError("no wine today")
            return next((word for word in ("fox", "dog", "jug") if word in text), None)

        def wrong(text):
            return "cat"

        def long(text):
            return ["long"] if len(text) > 11 else []
        """)
    )
    return tmp_path


def written(folder: Path, questions: str, **keys: str) -> Path:
    path = folder / "label.yaml"
    settings = {"data": "texts.jsonl", "output": "out.jsonl", **keys}
    lines = [f"{key}: {value}" for key, value in settings.items()]
    path.write_text("\n".join([*lines, "questions:", textwrap.indent(textwrap.dedent(questions), "  ")]))
    return path


BEAST = """
beast:
  labels: [fox, dog, jug]
  functions:
    - {name: fox, pattern: '\\bfox\\b', label: fox}
    - {name: dog, pattern: '\\bdog\\b', label: dog}
    - {name: first, python: 'functions.py:first'}
    - {name: never, pattern: unicorn, label: fox}
traits:
  several: true
  labels: [long, odd]
  functions:
    - {name: long, python: 'functions.py:long'}
    - {name: odd, pattern: '^a ', label: odd}
    - {name: lazy, pattern: lazy, label: odd, otherwise: abstain}
"""


async def test_patterns_and_functions_become_rows_that_classify_reads(folder):
    gold = {"text": "some other fox here", "answers": {"beast": "fox", "traits": ["long"]}}
    (folder / "gold.jsonl").write_text(json.dumps(gold))
    done = await label(read_label_file(written(folder, BEAST, gold="gold.jsonl", soft="false", label_model="majority")))
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["answers"].get("beast") for row in rows] == ["fox", "dog", "fox", "jug", None]
    assert [row["answers"]["traits"] for row in rows] == [["odd"], ["long"], [], ["long", "odd"], ["long"]]
    assert [row.text for row in read_pooling_rows(folder / "out.jsonl", "classify")] == TEXTS
    table = {row["function"]: row for row in done.report["questions"]["beast"]["functions"]}
    assert table["dog"]["coverage"] == pytest.approx(2 / 6) and table["dog"]["conflicts"] == pytest.approx(1 / 6)
    assert table["fox"]["accuracy"] == 1.0 and table["never"]["agreement"] is None
    assert done.report["questions"]["beast"]["majority"]["accuracy"] == 1.0
    warnings = "\n".join(done.report["warnings"])
    assert "beast: 'never' never votes" in warnings and "fewer than 3 functions vote on long, from" in warnings


def test_what_is_measured_on_becomes_no_row(folder, capsys):
    """Gold's texts judge, wherever they stand, and are not learned from; nor is what repeats a held-out row."""
    (folder / "gold.jsonl").write_text(
        json.dumps({"text": " a red  fox", "answers": {"beast": "fox"}}) + "\n"
        + json.dumps({"text": "a fox of another file", "answers": {"beast": "dog"}})
    )  # fmt: skip
    (folder / "dev.jsonl").write_text(json.dumps({"prompt": "Which: the lazy dog!", "completion": "dog"}))
    for prompt in ({}, {"prompt": "'Which: {text}'"}):
        held_out = "dev.jsonl" if prompt else "[dev.jsonl]"
        path = written(folder, BEAST, gold="gold.jsonl", held_out=held_out, label_model="majority", **prompt)
        assert exit_code_of(["label", str(path)]) == 0
        left_out = [TEXTS[0], TEXTS[1]] if prompt else [TEXTS[0]]
        out = " ".join(capsys.readouterr().out.split())
        assert f"{len(left_out)} of 5 texts are held out and became no rows; the first is line 1, as gold.jsonl" in out
        rows = (folder / "out.jsonl").read_text()
        assert [text in rows for text in TEXTS] == [
            text not in left_out for text in TEXTS
        ] and "another file" not in rows
        report = json.loads((folder / "out.jsonl.report.json").read_text())
        assert report["held_out"][0] == {"line": 1, "how": "the same text", "row": "gold.jsonl line 1"}
        assert report["gold"] == 2 and report["questions"]["beast"]["majority"]["rows"] == 2
    assert TEXTS[0] not in (folder / "calls").read_text().splitlines()  # nor asked about


async def test_rows_for_models_that_write_have_weights(folder):
    beast = BEAST[: BEAST.index("traits:")]
    await label(read_label_file(written(folder, beast, prompt="'What is in: {text}?'", label_model="majority")))
    rows = read_rows(folder / "out.jsonl")
    assert rows[0].conversation.messages[0]["content"] == "What is in: a red fox?"
    weights = {c.messages[-1]["content"]: c.weight for c in (rows[2].conversation, *rows[2].conversation.others)}
    assert weights == {"fox": pytest.approx(2 / 3, abs=1e-4), "dog": pytest.approx(1 / 3, abs=1e-4)}
    await label(read_label_file(written(folder, BEAST, prompt="'{text}'", label_model="majority")))
    second = read_rows(folder / "out.jsonl")[1].conversation
    assert json.loads(second.messages[-1]["content"]) == {"beast": "dog", "traits": ["long"]}
    assert second.weight == pytest.approx(2 / 3, abs=1e-4)  # one of three says that it is odd
    await label(read_label_file(written(folder, beast, prompt="'{text}'", soft="false")))
    assert json.loads((folder / "out.jsonl").read_text().splitlines()[1]) == {
        "prompt": "the lazy dog", "completion": "dog"
    }  # fmt: skip


async def test_votes_are_kept_and_only_what_changed_is_asked_again(folder):
    spec = read_label_file(written(folder, BEAST))
    (folder / "broken").touch()
    with pytest.raises(UserError, match=r"'first'\].*no wine today.*'a jug of wine'"):
        await label(spec)
    assert (folder / "calls").read_text().splitlines() == TEXTS[:4]
    votes = next((folder / "out.jsonl.votes").glob("beast_first-*.jsonl"))
    with open(votes, "ab") as file:
        file.write(b'[3, "ju')  # a process that was killed
    (folder / "broken").unlink()
    await label(spec)
    assert (folder / "calls").read_text().splitlines() == TEXTS[:4] + TEXTS[3:]
    first = (folder / "out.jsonl").read_bytes()
    more = BEAST.replace("{name: never,", "{name: article, pattern: '^a ', label: jug}\n    - {name: never,")
    await label(read_label_file(written(folder, more)))
    assert len((folder / "calls").read_text().splitlines()) == 6  # not once more
    assert (folder / "out.jsonl").read_bytes() != first
    os.utime(folder / "functions.py")
    (folder / "functions.py").write_text((folder / "functions.py").read_text() + "\n# another\n")
    await label(spec)
    assert len((folder / "calls").read_text().splitlines()) == 11  # the file changed, and its old votes are gone
    assert len(list((folder / "out.jsonl.votes").glob("beast_first-*"))) == 1


async def test_votes_are_found_again_by_the_text_alone(folder):
    """Of other texts, in another order and number, only new ones are asked about, each once."""
    spec = read_label_file(written(folder, BEAST))
    await label(spec, num_texts=2)
    assert (folder / "calls").read_text().splitlines() == TEXTS[:2]
    await label(spec)
    assert (folder / "calls").read_text().splitlines() == TEXTS
    texts = ["another fox", TEXTS[3], "another fox", TEXTS[0]]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = await label(spec)
    assert (folder / "calls").read_text().splitlines() == [*TEXTS, "another fox"]
    assert done.texts == 4 and [row["answers"]["beast"]["fox"] > 0.5 for row in map(
        json.loads, (folder / "out.jsonl").read_text().splitlines())] == [True, False, True, True]  # fmt: skip
    (votes,) = (folder / "out.jsonl.votes").glob("beast_first-*.jsonl")
    lines = votes.read_bytes().splitlines(keepends=True)
    votes.write_bytes(b"".join([lines[0][:9] + b"\n", b"3\n", *lines[1:]]))  # a damaged one costs itself alone
    await label(spec)
    assert (folder / "calls").read_text().splitlines() == [*TEXTS, "another fox", TEXTS[0]]


async def test_an_output_that_cannot_be_written_is_found_out_before_anything_is_asked(folder):
    (folder / "out.jsonl.report.json").mkdir()
    with pytest.raises(UserError, match=r"out.jsonl.report.json would be written and is a folder"):
        await label(read_label_file(written(folder, BEAST)))
    assert not (folder / "calls").exists()


async def test_a_function_that_was_changed_in_the_same_second_votes_anew(folder):
    """As long as before, so that no time and no size tells."""
    (folder / "functions.py").write_text("def first(text):\n    return 'fox'\n")
    times = (folder / "functions.py").stat()
    questions = "beast: {labels: [fox, dog], functions: [{name: first, python: 'functions.py:first'}]}"
    spec = read_label_file(written(folder, questions, soft="false"))
    for word in ("fox", "dog"):
        (folder / "functions.py").write_text(f"def first(text):\n    return '{word}'\n")
        os.utime(folder / "functions.py", ns=(times.st_atime_ns, times.st_mtime_ns))
        await label(spec)
        assert json.loads((folder / "out.jsonl").read_text().splitlines()[0])["answers"] == {"beast": word}


async def test_a_vote_that_does_not_fit_on_the_disk_is_taken_back(folder):
    spec = read_label_file(written(folder, BEAST))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (165, limits[1]))
        with pytest.raises(UserError, match=r"cannot write .*beast_fox-.*File too large"):
            await label(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (votes,) = (folder / "out.jsonl.votes").iterdir()
    assert votes.read_bytes().endswith(b"\n") and votes.read_bytes().count(b"\n") == 3
    assert (await label(spec)).rows == 5


async def test_prompts_ask_a_teacher_within_the_labels(folder, tmp_path):
    questions = """
    beast:
      labels: [fox, dog]
      functions:
        - {name: asked, prompt: 'Which of {labels}? {text}'}
    traits:
      several: true
      labels: [long, odd]
      functions:
        - {name: asked, prompt: 'What? {text}'}
    """
    given = {"a red fox": '{"label": "fox"}', "the lazy dog": '{"label": null}', "fox and dog": "[" * 100_000}

    def respond(body, number):
        text = body["messages"][0]["content"]
        if text.startswith("What?"):
            return '{"labels": ["odd"]}'
        assert text.startswith("Which of fox, dog? ")
        enum = body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"]
        assert enum == ["fox", "dog", None]
        if "nothing" in text:
            return (400, {"error": {"message": "too dull"}}, {})
        return given.get(text.removeprefix("Which of fox, dog? "), '{"label": "dog"}')

    async with FakeTeacher(respond).serving() as fake:
        teacher = TeacherSpec(model=MODEL, url=fake.url, cache_dir=tmp_path / "cache", accept_terms=True)
        done = await label(read_label_file(written(folder, questions)), teacher=teacher)
        num_asked = len(fake.bodies)
        again = await label(read_label_file(written(folder, questions)), teacher=teacher)
        assert len(fake.bodies) == num_asked + 1  # what failed is tried again, and nothing else
    rows = {row["text"]: row["answers"] for row in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}
    traits = [{"label": "long", "probability": 0.0}, {"label": "odd", "probability": 1.0}]
    assert rows["a red fox"] == {"beast": {"fox": 1.0, "dog": 0.0}, "traits": traits}
    read = questions_of(read_pooling_rows(folder / "out.jsonl", "classify"), 1, "out.jsonl")
    assert [(question.name, question.kind) for question in read] == [
        ("beast", "multi_class"),
        ("traits", "multi_label"),
    ]
    assert "beast" not in rows["the lazy dog"] and "beast" not in rows["fox and dog"] and "beast" not in rows[TEXTS[4]]
    warnings = "\n".join(done.report["warnings"])
    assert "'asked' has 1 answers that are none of the labels" in warnings
    assert "no answer to 1 texts" in warnings and "too dull" in warnings
    assert "too dull" in "\n".join(again.report["warnings"])


async def test_a_classifier_votes_where_it_is_sure(folder, tmp_path):
    model = make_tiny_model(tmp_path / "tiny", max_position_embeddings=256)
    tagger = make_poolers(model, tmp_path / "poolers") / "tagger"
    questions = f"""
    topic:
      labels: [fox, dog, jug]
      functions:
        - {{name: tagger, classifier: {tagger}, threshold: 0.0}}
        - {{name: sure, classifier: {tagger}, question: topic, threshold: 0.99}}
    odd:
      several: true
      labels: [odd]
      functions:
        - {{name: tagger, classifier: {tagger}, question: traits}}
    """
    done = await label(read_label_file(written(folder, questions)), model=str(model))
    table = done.report["questions"]["topic"]["functions"]
    assert [row["coverage"] for row in table] == [1.0, 0.0]
    assert done.report["questions"]["odd"]["functions"][0]["coverage"] == 1.0
    assert done.rows == len(TEXTS)
    with pytest.raises(UserError, match=r"answers no question 'mood'; it answers topic, traits"):
        await label(
            read_label_file(written(folder, questions.replace("question: traits", "question: mood"))), model=str(model)
        )


@pytest.mark.parametrize("model", ["majority", "dawid_skene", "mace"])
def test_models_weigh_functions_by_how_often_they_err(model):
    rng = random.Random(0)
    truth = [rng.choice("abc") for _ in range(100)]

    def votes(accuracy, coverage):
        return [(right if rng.random() < accuracy else rng.choice("abc")) if rng.random() < coverage else None
                for right in truth]  # fmt: skip

    given = {"good": votes(0.95, 1), "fair": votes(0.7, 0.6), "poor": votes(0.1, 1), "poorer": votes(0.0, 1)}
    functions = tuple(FunctionSpec(name=name, pattern="x", label="a") for name in given)
    answers = combined(given, QuestionSpec(labels=("a", "b", "c"), functions=functions), model)
    right = sum(max(answer, key=answer.get) == wanted for answer, wanted in zip(answers, truth, strict=True))
    assert right >= (80 if model != "majority" else 60), right
    assert all(sum(answer.values()) == pytest.approx(1) for answer in answers)
    several = QuestionSpec(labels=("a", "b"), functions=functions, several=True)
    holds = {name: [vote and {"a": vote == "a"} for vote in each] for name, each in given.items()}
    found = combined(holds, several, model)
    assert all(set(answer) == {"a"} for answer in found)
    assert too_few(holds, several) == [] and too_few({"good": given["good"]}, several) == []
    assert too_few({"good": holds["good"]}, several) == ["a"]


def test_texts_on_which_nobody_votes_have_no_answer():
    question = QuestionSpec(labels=("a", "b"), functions=(FunctionSpec(name="x", pattern="x", label="a"),))
    assert combined({"x": ["a", None], "y": ["a", None]}, question, "mace") == [{"a": 1.0, "b": 0.0}, None]
    assert combined({"x": [None, None]}, question, "dawid_skene") == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("pattern: unicorn, label: fox", "pattern: '(', label: fox"), r"'never'\]\.pattern.*no regular expression"),
        (("pattern: unicorn, label: fox", "pattern: x, label: cat"), r"'cat' is none of the labels fox, dog, jug"),
        (("pattern: unicorn, label: fox", "label: fox"), "it has none of pattern, python, prompt, classifier"),
        (("pattern: unicorn, label: fox", "pattern: x"), "pattern and label belong together"),
        (("label: fox}\n    - {name: dog", "label: fox, otherwise: absent}\n    - {name: dog"), "only where 'beast'"),
        (("pattern: unicorn, label: fox", "prompt: who"), "holds no {text}"),
        (("pattern: unicorn, label: fox", "prompt: '{text}'"), "name who answers them with --teacher"),
        (("pattern: unicorn, label: fox", "python: 'functions.py'"), "is not FILE.py:FUNCTION"),
        (("pattern: unicorn, label: fox", "python: 'functions.py:none'"), "has no function 'none'"),
        (("pattern: unicorn, label: fox", "python: 'missing.py:none'"), "cannot read .*missing.py"),
        (("pattern: unicorn, label: fox", "python: 'functions.py:wrong'"), "'cat' is none of the labels"),
        (("pattern: unicorn, label: fox", "classifier: none"), "is not an adapter's directory"),
        (("name: never", "name: dog"), "two functions of this question have this name"),
        (("labels: [fox, dog, jug]", "labels: [fox, fox, dog]"), "a label stands there twice"),
        (("labels: [fox, dog, jug]", "label: [fox]"), "unknown field `label`"),
        (("functions:", "functions: []\n  x:"), "questions"),
    ],
)
def test_what_is_wrong_with_a_label_file(folder, change, message, capsys):
    assert change[0] in BEAST
    assert exit_code_of(["label", str(written(folder, BEAST.replace(*change, 1)))]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("keys", "rows", "message"),
    [
        ({"text_field": "body"}, None, "line 1: body is missing; text is expected (text_field names the field)"),
        ({"gold": "gold.jsonl"}, None, "gold.jsonl answers none of the questions beast, traits"),
        ({"gold": "all.jsonl"}, None, "all 5 texts of"),
        ({"held_out": "[]", "gold": "all.jsonl"}, None, "on which nothing is to be trained"),
        ({"held_out": "[gold.jsonl, texts.jsonl]"}, None, "has the fields 'text', 'n', which are no row"),
        ({"held_out": "nowhere.jsonl"}, None, "cannot read"),
        ({"gold": "soft.jsonl"}, None, "soft.jsonl line 1 answers 'beast' with probabilities"),
        ({}, "", "holds no rows"),
        ({"label_model": "snorkel"}, None, "label_model"),
        ({"prompt": "who"}, None, "prompt: it holds no {text}"),
        ({"data": "nowhere.jsonl"}, None, "cannot read"),
        ({"output": "./texts.jsonl"}, None, "texts.jsonl is data, too, and would be written over"),
        ({"output": "gold.jsonl", "gold": "gold.jsonl"}, None, "gold.jsonl is gold, too"),
        ({"output": "gold.jsonl", "held_out": "gold.jsonl"}, None, "gold.jsonl is held_out, too"),
    ],
)
def test_what_is_wrong_with_its_data(folder, keys, rows, message, capsys):
    (folder / "gold.jsonl").write_text('{"text": "other", "label": "fox"}\n')
    (folder / "soft.jsonl").write_text('{"text": "a red fox", "answers": {"beast": {"fox": 1.0}}}\n')
    answers = [{"text": text, "answers": {"beast": "fox"}} for text in TEXTS]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    if rows is not None:
        (folder / "texts.jsonl").write_text(rows)
    assert exit_code_of(["label", str(written(folder, BEAST, **keys))]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out.jsonl").exists()
    if rows is None:
        assert json.loads((folder / "texts.jsonl").read_text().splitlines()[0]) == {"text": TEXTS[0], "n": 1}


async def test_two_runs_do_not_share_an_output(folder):
    spec = read_label_file(written(folder, BEAST))
    with open(folder / "out.jsonl.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing .*out.jsonl"):
            await label(spec)
        assert not (folder / "out.jsonl.votes").exists()
    await label(spec)
    assert not (folder / "out.jsonl.lock").exists()
