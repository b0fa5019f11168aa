"""`specserve batch`: a file of rows to a file of answers, begun anew and where another run left it."""

import json
import shutil

import pytest
from tiny_models import make_tiny_model

from specserve.cli.batch import BatchFiles, _copied
from specserve.cli.batch_remote import _kept
from specserve.cli.main import exit_code_of
from specserve.server.access.caller import ANONYMOUS
from specserve.server.batches.disk import BatchDir
from specserve.server.batches.store import BatchStore
from specserve.server.batches.types import BatchUsage

NUM_ROWS = 12


def row(custom_id, url="/v1/completions", **fields):
    body = {"model": "tiny", "prompt": f"Say {custom_id}", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body | fields}


def run(capsys, *arguments):
    code = exit_code_of(["batch", *map(str, arguments)])
    return code, capsys.readouterr().err


@pytest.fixture
def source(tmp_path):
    rows = [row(f"r{idx}", **({"model": "none"} if idx == 7 else {})) for idx in range(NUM_ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return tmp_path / "in.jsonl"


def test_the_rows_that_an_earlier_run_left_are_answered_and_no_others(source, tmp_path, capsys):
    model, target = make_tiny_model(tmp_path / "tiny"), tmp_path / "out.jsonl"
    files = BatchFiles(source, target)
    store = BatchStore(BatchDir(files.progress, 1 << 30))
    _copied(store, files, files.check())
    (opened,) = store.open_batches()
    for line in (1, 4, NUM_ROWS):
        store.add_answer(opened, line, b'{"custom_id": "r%d"}\n' % (line - 1), False, BatchUsage())
    store.folder.file(opened.batch.input_file_id).unlink()  # the copy comes back from the file itself
    store.close()
    flags = ("--model", model, "--dtype", "fp32", "--kv-cache-gib", "0.02", "--num-threads", "1")
    changed = source.read_text()
    source.write_text(changed + "\n")
    code, err = run(capsys, source, target, *flags)
    assert code == 2 and "out.jsonl.progress" in err
    source.write_text(changed)
    code, err = run(capsys, source, target, *flags)
    assert code == 1 and f"{NUM_ROWS} rows, 1 of them failed (3 before)" in err
    lines = [json.loads(line) for line in target.open()]
    assert [line["custom_id"] for line in lines] == [f"r{idx}" for idx in range(NUM_ROWS)]
    assert [idx + 1 for idx, line in enumerate(lines) if set(line) == {"custom_id"}] == [1, 4, NUM_ROWS]
    assert lines[7]["response"]["status_code"] == 404
    assert lines[1]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "tiny"]


def test_an_end_behind_the_last_row_leaves_only_the_output_to_be_put(source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    files = BatchFiles(source, target)
    store = BatchStore(BatchDir(files.progress, 1 << 30))
    _copied(store, files, files.check())
    (opened,) = store.open_batches()
    output = store.folder.incoming()
    output.write(b"all of it\n")
    output.finish()
    store.end(opened, lambda batch: setattr(batch, "status", "completed"), {"output_file_id": output})
    assert store.batches(ANONYMOUS, None, 1)[0].output_file_id == output.id
    store.close()
    code, err = run(capsys, source, target)
    assert code == 0 and target.read_text() == "all of it\n" and not files.progress.exists()
    shutil.copytree(tmp_path, tmp_path / "copy")
    files.progress.mkdir()  # the folder goes last
    code, err = run(capsys, source, target)
    assert (code, err) == (0, f"{target} is complete\n") and not files.progress.exists()


def test_a_run_whose_folder_was_changed_says_so_and_its_part_of_an_output_is_not_taken_for_all(
    source, tmp_path, capsys
):
    target = tmp_path / "out.jsonl"
    files = BatchFiles(source, target)
    store = BatchStore(BatchDir(files.progress, 1 << 30))
    _copied(store, files, files.check())
    store.end(store.open_batches()[0], lambda batch: setattr(batch, "status", "failed"), {})
    store.close()
    code, err = run(capsys, source, target)
    assert code == 2 and "out.jsonl.progress" in err and "anew" in err and not target.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{\n[]\n", ["line 1", "line 2", "JSON"]),
        ("", ["no rows"]),
        (json.dumps(row("a")) + "\n" + json.dumps(row("a")), ["line 2", "'a'"]),
        (json.dumps(row("a")) + "\n" + json.dumps(row("b", "/v1/responses")), ["line 2", "/v1/completions"]),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_a_model_is_loaded(tmp_path, capsys, text, words):
    (tmp_path / "in.jsonl").write_text(text)
    code, err = run(capsys, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", tmp_path / "none")
    assert code == 2 and all(word in err for word in words), err
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_would_be_lost_are_refused(source, tmp_path, capsys):
    code, err = run(capsys, source, source)
    assert code == 2 and "is the input" in err
    (tmp_path / "out.jsonl").write_text("mine")
    code, err = run(capsys, source, tmp_path / "out.jsonl")
    assert code == 2 and "exists" in err and (tmp_path / "out.jsonl").read_text() == "mine"
    code, err = run(capsys, tmp_path / "none.jsonl", tmp_path / "o")
    assert code == 2 and "none.jsonl" in err
    code, err = run(capsys, source, tmp_path / "none" / "out.jsonl")
    assert code == 2 and "folder" in err
    code, err = run(capsys, source, tmp_path / "o.jsonl", "--url", "http://127.0.0.1:1", "--model", "x")
    assert code == 2 and "--model" in err


def test_two_commands_at_once_have_not_the_same_output(source, tmp_path, capsys):
    target, url = tmp_path / "out.jsonl", "http://127.0.0.1:1"
    files = BatchFiles(source, target)
    _kept(files, url)
    with files.held():
        code, err = run(capsys, source, target, "--url", url)
    assert code == 2 and "out.jsonl.progress is used by another process" in err
