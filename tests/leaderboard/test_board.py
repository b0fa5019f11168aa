"""Tasks, models and cells: what is run, what is kept, what is run again, and what a mistake is told."""

import contextlib
import datetime
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import pytest
from engine_fixture import make_engine, request, run
from lookahead_adapters import make_lookahead_adapter
from places import ROOT
from pooling_adapters import make_pooling_adapter
from pooling_rows import write_pooling_rows
from served_poolers import EMBEDDER, RANKER
from tiny_models import CHAT_TEMPLATE
from training_fixture import write_rows
from waiting import wait_until

from specserve.cli.main import exit_code_of
from specserve.errors import UserError
from specserve.leaderboard import judging
from specserve.leaderboard.candidates import candidate
from specserve.leaderboard.entries import Cell, KeptAnswer, Model, Task, TaskRow
from specserve.leaderboard.pairs import asked_hash, asks_of
from specserve.leaderboard.removal import removed
from specserve.leaderboard.runner import prompts_of
from specserve.leaderboard.store import LeaderboardStore, model_locks
from specserve.teachers import Answer, Budget, TeacherSpec
from specserve.text.tokenizer import TextTokenizer
from specserve.training.evaluation import answers as answers_module
from specserve.training.evaluation.task_metrics import task_metrics


def answers_made(board, capsys, *words, code=0):
    capsys.readouterr()
    assert board.cli("run", *words) == code
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "answers were missing" in line]
    return int(line.split()[0]), err


def test_scores_are_those_of_the_answers_and_missing_cells_are_shown(ran, capsys):
    found = ran.shown(capsys)
    by_name = {model["name"]: model for model in found["models"]}
    assert by_name["second"]["cells"]["text"] is None and by_name["second"]["average"] is None
    assert [model["name"] for model in found["models"]][-1] == "second"
    store = LeaderboardStore(ran.path)
    rows = store.rows(store.tasks()[0])
    kept = store.answers(store.cells()["json", "first"].config_hash)
    metrics = task_metrics([kept[row.prompt_hash].text for row in rows], [row.gold for row in rows])
    cell = by_name["first"]["cells"]["json"]
    assert cell["score"] == metrics["main"] and cell["num_rows"] == 30 == len(rows)
    assert cell["tokens_per_s"] > 0 and cell["tokens_per_verification"] >= 1.0 and "thread" in cell["hardware"]
    assert [task["metric"] for task in found["tasks"]] == ["field_match", "rouge_l"]  # the main ones, by their names
    score, text = by_name["base"]["cells"]["json"]["score"], by_name["base"]["cells"]["text"]["score"]
    assert by_name["base"]["average"] == pytest.approx((score + max(0, (text - 0.2) / 0.8)) / 2)
    assert ran.cli("show") == 0
    assert any(line.split() == ["second", "-", "0.000", "-"] for line in capsys.readouterr().out.splitlines())
    store.close()


def test_only_what_changed_is_run_again(begun, model_dir, adapters, tmp_path, capsys):
    num, err = answers_made(begun, capsys)
    assert num == 6 and "json by base: field_match" in err
    num, err = answers_made(begun, capsys)
    assert num == 0 and "json by base" not in err  # nor scored again
    changing = tmp_path / "adapter"
    shutil.copytree(adapters / "first", changing)
    assert begun.cli("add-model", "mine", "--model", model_dir, "--adapter", changing) == 0
    assert answers_made(begun, capsys)[0] == 6  # the new one's alone
    for file in (adapters / "second").iterdir():
        shutil.copy(file, changing)
    assert answers_made(begun, capsys)[0] == 6  # another adapter under the same name
    lines = (tmp_path / "dev.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"completion": '{"name": "cat", "n": 1}'}
    new = {"prompt": "name: emu\nnumber: 7", "completion": '{"name": "emu", "n": 7}'}
    (tmp_path / "dev.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:5], json.dumps(new)]))
    num, err = answers_made(begun, capsys)
    assert num == 2 and "the rows have changed" in err  # the new row, by both; another wanted answer needs none
    assert begun.cli("add", "json", "--data", tmp_path / "dev.jsonl", "--max-tokens", 4) == 0
    capsys.readouterr()
    assert begun.shown(capsys)["models"][0]["cells"]["json"] is not None  # until it is run again
    assert answers_made(begun, capsys)[0] == 12
    assert begun.cli("add", "json", "--data", tmp_path / "dev.jsonl", "--max-tokens", 4, "--metric", "valid_json") == 0
    assert begun.shown(capsys)["models"][0]["cells"]["json"] is None  # the old score was of another metric
    assert answers_made(begun, capsys)[0] == 0


def test_a_run_that_ends_in_the_middle_keeps_every_answer(begun, monkeypatch, capsys):
    put, num = LeaderboardStore.put_answer, 0

    def ends(store, *values):
        nonlocal num
        num += 1
        if num > 2:
            raise KeyboardInterrupt
        put(store, *values)

    monkeypatch.setattr(LeaderboardStore, "put_answer", ends)
    assert begun.cli("run", "--batch", 1) == 130
    assert begun.shown(capsys)["models"][0]["cells"]["json"] is None
    monkeypatch.setattr(LeaderboardStore, "put_answer", put)
    assert answers_made(begun, capsys)[0] == 4
    assert begun.shown(capsys)["models"][0]["cells"]["json"]["num_rows"] == 6


def test_answers_are_the_engines_with_the_adapters_template(ran, model_dir, adapters):
    store = LeaderboardStore(ran.path)
    task, cells = store.tasks()[1], store.cells()
    row = store.rows(task)[0]
    one = candidate(next(model for model in store.models() if model.name == "first"))
    prompt = prompts_of(one, task, [row.prompt_hash])[row.prompt_hash]
    engine = make_engine(model_dir)
    content_hash = engine.load_adapter("first", adapters / "first").content_hash
    result = run(engine, [request("r", prompt, max_tokens=6, adapter=content_hash)])["r"]
    kept = store.answers(cells["text", "first"].config_hash)[row.prompt_hash]
    assert (kept.num_tokens, kept.finish_reason) == (len(result.tokens), result.finish_reason)
    store.close()


def test_a_template_that_writes_the_date_writes_the_day_of_training(ran, adapters, tmp_path):
    dated = shutil.copytree(adapters / "first", tmp_path / "dated")
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%F') }}" + CHAT_TEMPLATE)
    store = LeaderboardStore(ran.path)
    task, stored = store.tasks()[1], next(model for model in store.models() if model.name == "first")
    stored = msgspec.structs.replace(stored, model=msgspec.structs.replace(stored.model, adapter=str(dated)))
    row, found = store.rows(task)[0], {}
    for run_file in (None, "data: {date: 2024-07-26}", "somebody: else's"):
        if run_file is not None:
            (dated / "run.yaml").write_text(run_file)
        one = candidate(stored)
        (prompt,) = prompts_of(one, task, [row.prompt_hash]).values()
        found[run_file] = one.identity, TextTokenizer(one.model_dir).decode(prompt)
    (unknown, today), (identity, then), foreign = found.values()
    assert then.startswith("2024-07-26<|im_start|>") and today.startswith(datetime.date.today().isoformat())
    assert identity != unknown and foreign == (unknown, today)
    store.close()


def test_a_model_that_fails_costs_the_others_nothing(begun, model_dir, adapters, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(adapters / "first", broken)
    assert begun.cli("add-model", "broken", "--model", model_dir, "--adapter", broken) == 0
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    _, err = answers_made(begun, capsys, code=1)
    assert "failed: json by broken" in err
    cells = {model["name"]: model["cells"]["json"] for model in begun.shown(capsys)["models"]}
    assert cells["base"] is not None and cells["broken"] is None


def test_what_an_engine_was_at_when_a_row_failed_is_nobodys_answer(begun, model_dir, adapters, monkeypatch, capsys):
    """Its other requests would answer for the next model's."""
    assert begun.cli("add-model", "first", "--model", model_dir, "--adapter", adapters / "first") == 0
    real, engines = answers_module.answer_mixed, []

    def fails_once(engine, requests, *args, **more):
        engines.append(engine)
        if len(engines) == 1:
            real(engine, requests[:3], *args, **more)
            engine.add_request(request("3", requests[3][1], max_tokens=6))
            raise UserError("an answer failed: it is not a number")
        return real(engine, requests, *args, **more)

    monkeypatch.setattr(answers_module, "answer_mixed", fails_once)
    num, err = answers_made(begun, capsys, code=1)
    assert num == 12 and "failed: json by base: an answer failed" in err and engines[0] is not engines[1]
    monkeypatch.setattr(answers_module, "answer_mixed", real)
    assert answers_made(begun, capsys)[0] == 3
    scores = [model["cells"]["json"] for model in begun.shown(capsys)["models"]]
    assert all(cell["num_rows"] == 6 for cell in scores)


def test_a_lookahead_adapter_answers_in_fewer_verifications_and_says_so(begun, model_dir, tmp_path, capsys):
    make_lookahead_adapter(model_dir, tmp_path / "drafting")
    assert begun.cli("add-model", "drafting", "--model", model_dir, "--adapter", tmp_path / "drafting") == 0
    answers_made(begun, capsys)
    cells = {model["name"]: model["cells"]["json"] for model in begun.shown(capsys)["models"]}
    assert cells["drafting"]["tokens_per_verification"] >= 1.0


@pytest.mark.parametrize("kind, metric, task_type", [("rerank", "mrr", "SEQ_CLS"), ("embed", "ndcg@10", None)])
def test_an_adapter_that_pools_has_its_own_tasks(begun, model_dir, tmp_path, capsys, kind, metric, task_type):
    rows = write_pooling_rows(tmp_path / "rows.jsonl", kind, 8)
    config = {"rerank": RANKER, "embed": EMBEDDER}[kind]
    more = (task_type,) if task_type else ()
    make_pooling_adapter(model_dir, tmp_path / "adapter", *more, num_labels=1, config=config)
    assert begun.cli("add", kind, "--kind", kind, "--data", rows, "--metric", metric) == 0
    assert begun.cli("add-model", "pools", "--model", model_dir, "--adapter", tmp_path / "adapter") == 0
    assert begun.cli("run") == 0
    models = {model["name"]: model for model in begun.shown(capsys)["models"]}
    cell = models["pools"]["cells"][kind]
    assert 0 < cell["metrics"][metric] == cell["score"] == models["pools"]["average"] and cell["num_rows"] == 8
    assert models["pools"]["cells"]["json"] is None and models["base"]["cells"][kind] is None
    assert begun.cli("show") == 0 and "tokens/s" in capsys.readouterr().out


def test_an_adapter_without_its_description_is_refused(begun, model_dir, tmp_path, capsys):
    make_pooling_adapter(model_dir, tmp_path / "mood", "SEQ_CLS", num_labels=2)
    assert begun.cli("add-model", "mood", "--model", model_dir, "--adapter", tmp_path / "mood") == 2
    assert "has no pooling_config.json" in capsys.readouterr().err


def test_two_processes_do_not_run_the_same_model(begun, model_dir, capsys):
    store = LeaderboardStore(begun.path)
    (model,) = store.models()
    holder = "import sys; from pathlib import Path; from specserve.leaderboard.store import model_locks\n"
    holder += f"locks = model_locks(Path({str(begun.path)!r})); assert locks.take({model.number})\n"
    holder += "print('held', flush=True); sys.stdin.read()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as other:
        assert other.stdout.readline() == "held\n"
        num, err = answers_made(begun, capsys)
        assert num == 0 and "base is left to another process" in err
        for name in ("base", "json"):
            assert begun.cli("remove", name) == 2 and "another process runs base now" in capsys.readouterr().err
        assert begun.cli("add-model", "again", "--model", model_dir) == 0  # which may be changed meanwhile
        other.kill()
    assert answers_made(begun, capsys, "--model", "base")[0] == 6
    locks = model_locks(begun.path)
    assert locks.take(model.number)
    locks.close()
    store.close()


@pytest.mark.parametrize(
    "words, said",
    [
        (["add", "a/b", "--data", "dev.jsonl"], "TASK 'a/b': give a name"),
        (["add", "t", "--data", "none.jsonl"], "there is no file none.jsonl"),
        (["add", "t", "--data", "dev.jsonl", "--metric", "bleu"], "'bleu' is none of this task's: give one of exact"),
        (["add", "t", "--data", "calls.jsonl"], "calls.jsonl line 1 does not end with an answer in text"),
        (["add-model", "m", "--adapter", "."], "is not a PEFT directory"),
        (["add-model", ".m"], "NAME '.m': give a name"),
        (["run", "--task", "none"], "there is no task 'none'; known are json"),
        (["run", "--model", "none"], "there is no model 'none'; known are base"),
        (["run", "--judge", "http://127.0.0.1:1"], "names no model"),
        (["remove", "none"], "has no task or model 'none'"),
        (["export", "."], "holds other things"),
    ],
)
def test_mistakes(begun, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}))
    if "--judge" in words:
        assert begun.cli("run") == 0
    assert begun.cli(*words) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_no_board(no_board, capsys):
    board = no_board
    assert board.cli("run") == 2 and "there is no leaderboard" in capsys.readouterr().err
    board.path.write_text("text, not a database, and long enough to be looked at as one" * 20)
    assert board.cli("show") == 2 and "cannot be used" in capsys.readouterr().err
    board.path.unlink()
    with sqlite3.connect(board.path) as db:
        db.execute("PRAGMA user_version = 99")
    assert (
        board.cli("show") == 2
        and "of a newer specserve (version 99, this one reads up to 3)" in capsys.readouterr().err
    )


def test_what_is_removed_goes_with_the_answers_that_nobody_else_has(begun, model_dir, adapters, capsys):
    assert begun.cli("add-model", "again", "--model", model_dir) == 0
    assert begun.cli("add-model", "first", "--model", model_dir, "--adapter", adapters / "first") == 0
    assert answers_made(begun, capsys)[0] == 12  # the same model under two names answers once
    store = LeaderboardStore(begun.path)
    texts = {answer.text for answer in store.answers(store.cells()["json", "first"].config_hash).values()}
    others = {answer.text for answer in store.answers(store.cells()["json", "base"].config_hash).values()}
    store.close()
    only = max((text.encode() for text in texts - others), key=len)
    assert only in begun.path.read_bytes()
    assert begun.cli("remove", "first") == 0 and "model first and 6 answers are removed" in capsys.readouterr().out
    assert only not in begun.path.read_bytes()
    assert begun.cli("remove", "again") == 0 and "0 answers are removed" in capsys.readouterr().out
    assert [model["name"] for model in begun.shown(capsys)["models"]] == ["base"]
    assert answers_made(begun, capsys)[0] == 0
    assert begun.cli("remove", "json") == 0 and "task json and 6 answers are removed" in capsys.readouterr().out
    assert begun.shown(capsys)["tasks"] == []


def test_answers_of_a_run_that_was_cut_short_are_their_models(tmp_path):
    store = LeaderboardStore(tmp_path / "board.sqlite3", create=True)
    try:
        row = TaskRow("prompt", "", "")
        for name in ("one", "two"):
            store.put_task(name, Task(kind="generate", data="x", metric="rouge_l"), name, [row])
        for number, config in ((1, "a"), (2, "a"), (2, "b")):
            store.put_owner(config, number)
            store.put_answer(config, "prompt", KeptAnswer("x", "stop", 1, 1, 1, 0.1, "here"))
        for name in ("first", "second"):
            store.put_model(name, Model(base=""))
        assert removed(store, "second") == ("model", 1) and store.answers("a") and not store.answers("b")
        assert removed(store, "one") == ("task", 0)
        assert removed(store, "two") == ("task", 1) and not store.answers("a")
    finally:
        store.close()


def test_verdicts_go_with_an_answer_that_nobody_else_gave(tmp_path):
    """Of two tasks with the same prompts, whose wanted answers differ: what a judge was asked differs, too."""
    store = LeaderboardStore(tmp_path / "board.sqlite3", create=True)
    rows = {name: TaskRow("prompt", "question", gold) for name, gold in (("one", "wanted"), ("two", "else"))}
    texts = {"first": "x", "second": "y", "third": "x", "fourth": "z"}
    asked = {
        (task, *pair): [asked_hash(ask) for ask in asks_of(row, *pair)]
        for task, row in rows.items()
        for pair in itertools.combinations("xyz", 2)
    }

    def kept():
        verdicts = store.judgments("judge")
        assert len(verdicts) % 2 == 0 and verdicts == store.judgments("another")
        return {key for key, hashes in asked.items() if set(hashes) <= set(verdicts)}

    try:
        for name, row in rows.items():
            store.put_task(name, Task(kind="generate", data="x", metric="rouge_l"), name, [row])
        for number, (name, text) in enumerate(texts.items(), 1):
            store.put_model(name, Model(base=""))
            store.put_owner(name, number)
            store.put_answer(name, "prompt", KeptAnswer(text, "stop", 1, 1, 1, 0.1, "here"))
        for digest in itertools.chain(*asked.values()):
            for judge in ("judge", "another"):
                store.put_judgment(judge, digest, "A")
        store.put_judge("judge", "judge")
        assert removed(store, "third") == ("model", 1) and kept() == set(asked)  # the first's answer is the same
        assert removed(store, "second") == ("model", 1) and kept() == {("one", "x", "z"), ("two", "x", "z")}
        assert removed(store, "one") == ("task", 0) and kept() == {("two", "x", "z")}
        assert removed(store, "first") == ("model", 1) and kept() == set()
    finally:
        store.close()


async def test_a_verdict_on_an_answer_that_is_removed_meanwhile_is_not_kept(tmp_path, monkeypatch):
    store, meanwhile = LeaderboardStore(tmp_path / "board.sqlite3", create=True), []
    try:
        for name in ("one", "two"):
            store.put_task(name, Task(kind="generate", data="x", metric="rouge_l"), name, [TaskRow(name, name, name)])
        for number, name in enumerate("xyz", 1):
            store.put_model(name, Model(base=""))
            store.put_owner(name, number)
            for task in store.tasks():
                store.put_answer(name, task.name, KeptAnswer(name, "stop", 1, 1, 1, 0.1, "here"))
                cell = Cell(score=1.0, row_scores=(1.0,), metrics={}, num_rows=1, hardware="here")
                store.put_cell(task, number, name, cell)

        @contextlib.asynccontextmanager
        async def open_judge(spec, budget):
            async def answers(asks):
                for idx, _ in enumerate(asks):
                    for name in meanwhile[idx : idx + 1]:
                        removed(store, name)
                    yield idx, [Answer('{"winner": "A"}', "stop", 1, 1)]

            yield SimpleNamespace(answers=answers, backend=SimpleNamespace(identity="judge"))

        monkeypatch.setattr(judging, "open_teacher", open_judge)
        meanwhile += ["z", "one"]
        asked = await judging.judge_pairs(store, TeacherSpec(model="default"), Budget(), 1)
        left = {asked_hash(ask) for ask in asks_of(TaskRow("two", "two", "two"), "x", "y")}
        assert store.judgments("judge").keys() == left and asked == (3, 0, 9)
        assert store.judges() == {"default": "judge"}
    finally:
        store.close()


def drop_indexes(db):
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql NOTNULL").fetchall():
        db.execute(f"DROP INDEX {name}")


def test_no_verdict_looks_through_all_answers(ran, no_board):
    with sqlite3.connect(ran.path) as source, sqlite3.connect(no_board.path) as old:
        source.backup(old)
        drop_indexes(old)
        old.execute("PRAGMA user_version = 2")
    source.close(), old.close()
    store = LeaderboardStore(no_board.path)
    try:
        asked, plans = [], []
        store._db.set_trace_callback(asked.append)
        row, texts = next(iter(store.texts().items()))
        asked.clear()
        assert not store.has_texts(row, (texts.pop(), "another"))
        store._db.set_trace_callback(None)
        for query in asked:
            plans += [step for *_, step in store._db.execute(f"EXPLAIN QUERY PLAN {query}")]
        assert plans and not [step for step in plans if step.startswith("SCAN")]
    finally:
        store.close()


def test_a_board_of_version_1_keeps_what_was_run_and_judged(ran, no_board):
    name = "judge@http://127.0.0.1:1/v1"
    with sqlite3.connect(ran.path) as source, sqlite3.connect(no_board.path) as old:
        source.backup(old)
        drop_indexes(old)
        old.execute("DROP TABLE judges")
        old.execute("DROP TABLE owners")
        old.execute("DELETE FROM judgments")
        said = [(judge, digest) for judge in (name, "default") for digest in ("one", "two")]
        old.executemany("INSERT INTO judgments VALUES (?, ?, 'A')", said)
        old.execute("PRAGMA user_version = 1")
    source.close(), old.close()
    found = []
    for read_only in (True, False, True):
        store = LeaderboardStore(no_board.path, read_only=read_only)
        (identity,) = store.judges().values()  # what is behind "default" may have changed
        found.append((store.judges(), store.judgments(identity), store.cells(), store.tasks(), store.models()))
        store.close()
    assert found[0] == found[1] == found[2]
    assert found[0][:2] == ({name: name}, {"one": "A", "two": "A"}) and len(found[0][2]) == 5


def test_a_task_and_a_model_of_one_name(begun, model_dir, capsys):
    assert begun.cli("add-model", "json", "--model", model_dir) == 0
    assert begun.cli("remove", "json") == 2
    assert "'json' is a task and a model; say which one with --task or --model" in capsys.readouterr().err
    assert begun.cli("remove", "base", "--task") == 2 and "has no task 'base'" in capsys.readouterr().err
    assert begun.cli("remove", "json", "--model") == 0
    found = begun.shown(capsys)
    assert [task["name"] for task in found["tasks"]] == ["json"] and len(found["models"]) == 1
    assert begun.cli("remove", "json") == 0


def test_a_task_whose_rows_are_gone_costs_the_others_nothing(begun, tmp_path, capsys):
    gone = write_rows(tmp_path / "gone.jsonl", 2, seed=2)
    assert begun.cli("add", "gone", "--data", gone, "--max-tokens", 6) == 0
    assert begun.cli("add", "last", "--data", write_rows(tmp_path / "last.jsonl", 2), "--max-tokens", 6) == 0
    gone.unlink()
    num, err = answers_made(begun, capsys, code=1)
    assert num == 8 and "failed: gone: cannot read" in err
    cells = begun.shown(capsys)["models"][0]["cells"]
    assert [name for name, cell in cells.items() if cell is None] == ["gone"]


def test_the_board_is_named_before_the_subcommand_or_behind_it(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--board", str(begun.path), "show"], ["--board", "none", "show", "--board", str(begun.path)]):
        assert exit_code_of(["leaderboard", *words]) == 0 and "1 models" not in capsys.readouterr().err
    assert (
        exit_code_of(["leaderboard", "show"]) == 2 and "no leaderboard leaderboard.sqlite3" in capsys.readouterr().err
    )
    assert list(tmp_path.glob("*.sqlite3")) == [begun.path]


def test_a_board_that_is_damaged_or_full_is_one_line(begun, monkeypatch, capsys):
    def is_full(*values):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(LeaderboardStore, "put_owner", is_full)
        assert begun.cli("run") == 2 and "cannot be used: database or disk is full" in capsys.readouterr().err
    content = bytearray(begun.path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)  # all pages but the first
    begun.path.write_bytes(content)
    assert begun.cli("show") == 2 and "cannot be used: database disk image is malformed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(begun, tmp_path, capsys):
    write_rows(tmp_path / "many.jsonl", 400, seed=3)
    assert begun.cli("add", "many", "--data", tmp_path / "many.jsonl", "--max-tokens", 64) == 0
    command = [sys.executable, "-m", "specserve.cli", "leaderboard", "run", "--board", str(begun.path), "--batch", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with sqlite3.connect(begun.path) as db, subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: db.execute("SELECT COUNT(*) FROM answers").fetchone()[0] > 20 or process.poll() is not None)
        process.kill()
        process.wait()
        (kept,) = db.execute("SELECT COUNT(*) FROM answers").fetchone()
        (wanted,) = db.execute("SELECT COUNT(DISTINCT task || prompt_hash) FROM task_rows").fetchone()
    db.close()
    num, _ = answers_made(begun, capsys)
    assert 20 < kept < wanted and num == wanted - kept
    cells = begun.shown(capsys)["models"][0]["cells"]
    assert cells["many"]["num_rows"] == 400 and cells["json"]["num_rows"] == 6
