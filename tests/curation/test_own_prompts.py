"""A model's own prompts: what is asked, what is dropped, and that a stopped search loses nothing."""

import json
import shutil

import pytest
from fake_teacher import OPTIONS

from specserve.cli.main import exit_code_of
from specserve.curation import own_prompts
from specserve.errors import UserError
from specserve.teachers import Teacher
from specserve.teachers.user_turn import user_turn
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.rows import parse_object


def search(out, talker, *flags):
    options = [word for name, value in OPTIONS.items() for word in ("--teacher-option", f"{name}={value}")]
    cache = ["--teacher-cache", str(out.parent / "cache")]
    return exit_code_of(["prompts", "--output", str(out), "--teacher", str(talker), *options, *cache, *flags])


def prompts_of(path):
    rows = [parse_object(line, "") for line in path.read_text().splitlines()]
    assert all(
        [list(row), row["messages"][0]["role"], len(row["messages"])] == [["messages"], "user", 1] for row in rows
    )
    return [row["messages"][0]["content"] for row in rows]


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    monkeypatch.setattr(own_prompts, "ROUND", 12)


def test_a_model_writes_prompts_that_differ_and_end(tmp_path, talker, capsys):
    first = tmp_path / "first.jsonl"
    assert search(first, talker, "--rows", "6") == 0
    found = prompts_of(first)
    assert len(set(found)) == 6 and all(len(text) >= 12 for text in found)
    out = capsys.readouterr().out
    assert "has 6 prompts of" in out
    held_out, others = tmp_path / "held_out.jsonl", tmp_path / "others.jsonl"
    held_out.write_text("".join(first.read_text().splitlines(keepends=True)[:3]))
    assert search(others, talker, "--rows", "6", "--held-out", str(held_out)) == 0
    assert prompts_of(others)[:3] == found[3:]
    assert "3 held out" in capsys.readouterr().out
    none = tmp_path / "none.jsonl"
    assert search(none, talker, "--rows", "6", "--temperature", "0") == 2
    assert "none of 24 texts is a prompt: 24 too short" in capsys.readouterr().err and not none.exists()
    assert search(first, talker, "--rows", "6") == 2
    assert "is there already" in capsys.readouterr().err


def test_a_stopped_search_asks_nothing_again(tmp_path, talker, monkeypatch):
    """The engine that runs on after the stop is never started: the cache answers."""
    whole, answers, num = Teacher.answers, [], 0

    def stopped(teacher, asks):
        nonlocal num
        num += 1
        if num == 2:
            raise KeyboardInterrupt
        answers.append(teacher)
        return whole(teacher, asks)

    monkeypatch.setattr(Teacher, "answers", stopped)
    out = tmp_path / "prompts.jsonl"
    assert search(out, talker, "--rows", "30") == 130
    assert not out.exists() and answers[0].usage.requests == 12
    assert search(out, talker, "--rows", "30") == 0
    assert len(prompts_of(out)) == 30 and answers[1].usage.cached == 12


def test_the_users_turn_is_the_templates_beginning_and_ends_with_its_token(talker, tmp_path):
    tokenizer = TextTokenizer(talker)
    before, end = user_turn(tokenizer)
    whole = tokenizer.encode_chat([{"role": "user", "content": "hello there"}], False)
    assert whole[: len(before)] == before and end in whole[len(before) :]
    assert tokenizer.decode(whole[len(before) : whole.index(end, len(before))]) == "hello there"
    tokenizer.template.text = "{{ mood }}<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>"
    moody, _ = user_turn(tokenizer.given({"mood": "a kind <|im_end|>"}))
    assert moody == tokenizer.encode_literal("a kind <|im_end|>") + tokenizer.encode("<|im_start|>user\n")
    for template, told in (
        (None, "no chat template"),
        ("{{ '[INST]' + messages[0]['content'] + '[/INST]' }}", "no special token behind"),
        ("{{ messages[0]['content'] + '<|im_end|>' }}", "nothing before"),
    ):
        tokenizer.template.text = template
        with pytest.raises(UserError, match=told):
            user_turn(tokenizer)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--teacher", "m@http://127.0.0.1:9/v1", "--teacher-any-model"), "is an endpoint"),
        (("--near", "0.1"), "from 0.3 to 1"),
        (("--held-out", "missing.jsonl"), "missing.jsonl"),
        (("--held-out", "/dev/null"), "/dev/null holds no rows"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(tmp_path, talker, capsys, flags, told):
    teacher = [] if "--teacher" in flags else ["--teacher", str(talker)]
    assert exit_code_of(["prompts", "--output", str(tmp_path / "p.jsonl"), *teacher, *flags]) == 2
    assert told in capsys.readouterr().err
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_a_model_that_cannot_be_asked_is_not_loaded(tmp_path, talker, capsys, monkeypatch):
    mute = shutil.copytree(talker, tmp_path / "mute")
    (mute / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    monkeypatch.delattr("specserve.teachers.local.AsyncLLM")
    assert search(tmp_path / "p.lock", mute) == 2  # a file of any name
    err = capsys.readouterr().err
    assert err.startswith("error: the chat template writes no special token") and "requests" not in err
