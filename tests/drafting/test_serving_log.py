"""The log of what was served: private, bounded, apart for each LoRA and tenant, and never in a step's way."""

import os
import resource
import stat

import pytest
from engine_fixture import make_engine, request, run, tokens_of
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.adapter_files import WEIGHTS_FILE
from specserve.drafting import serving_log
from specserve.drafting.serving_log import ServingLog, read_served
from specserve.file_hash import file_hash
from specserve.model.fingerprint import base_fingerprint


def log_of(directory, *records, max_bytes=1 << 20):
    log = ServingLog(directory, max_bytes)
    for record in records:
        log.add(*record)
    log.close()


def outputs(directory, *which):
    return [served.output for served in read_served(directory, *which)]


def test_outputs_are_read_by_lora_and_key(tmp_path):
    log_of(
        tmp_path / "log",
        ("a" * 64, "", [1, 2], [3, 4]),
        ("a" * 64, "3:bob:", [1], [5, 6]),
        ("a" * 64, "3:bob:x", [1], [7, 8]),
        ("a" * 64, "5:bobby:", [1], [9, 9]),
        ("b" * 64, "", [1], [8, 8]),
        ("", "", [1], [2, 2]),
        ("a" * 64, "", [1], [3]),  # too short to draft for
    )
    assert outputs(tmp_path / "log", "a" * 64) == [[3, 4], [5, 6], [7, 8], [9, 9]]
    assert outputs(tmp_path / "log", "a" * 64, "bob") == [[5, 6], [7, 8]]
    assert outputs(tmp_path / "log", "b" * 64) == [[8, 8]]
    assert outputs(tmp_path / "log", "") == [[2, 2]]
    assert read_served(tmp_path / "log", "b" * 64)[0].prompt == [1]


@pytest.mark.parametrize(
    "line",
    [
        '{"at": 1.0, "prompt": [1], "output": [2, 99999]}',
        '{"at": 1.0, "prompt": [-1], "output": [2, 3]}',
        '{"at": 1.0, "prompt": [1], "output": [2, 3.5]}',
        '{"at": 1.0, "prompt": [1], "output": [2, "x"]}',
        '{"at": 1.0, "prompt": [[1]], "output": [2, 3]}',
        '{"at": null, "prompt": [1], "output": [2, 3]}',
        '{"at": 1.0, "prompt": [1], "output": null}',
        '{"at": 1.0, "prompt": [1], "output": [2, 3], "more": 1}',
        "[" * 100_000,
        "\x00\xff",
    ],
    ids=lambda line: line[:48],
)
def test_lines_that_are_no_record_are_left_out(tmp_path, line):
    log_of(tmp_path / "log", ("a" * 64, "", [1, 2], [3, 4]))
    (file,) = (tmp_path / "log").iterdir()
    with open(file, "a", encoding="latin-1") as more:
        more.write(line + "\n")
    log_of(tmp_path / "log", ("a" * 64, "", [1, 2], [5, 6]))
    found = read_served(tmp_path / "log", "a" * 64, vocab_size=100)
    assert [served.output for served in found] == [[3, 4], [5, 6]]


def test_files_are_their_users_alone(tmp_path):
    log_of(tmp_path / "log", ("a", "", [1, 2], [3, 4]))
    (file,) = (tmp_path / "log").iterdir()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"bob" not in file.name.encode()


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path, monkeypatch):
    limit = 16_000
    records = [("a", str(tenant), [1] * 20, [number, tenant] * 10) for number in range(100) for tenant in range(3)]
    log_of(tmp_path / "log", *records, max_bytes=limit)
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) <= limit
    found = outputs(tmp_path / "log", "a")
    assert [99, 0] * 10 in found and [0, 0] * 10 not in found
    monkeypatch.setattr(serving_log, "MAX_FILES", 4)
    log_of(tmp_path / "log", *(("a", f"salt-{number}", [1], [number, 1]) for number in range(20)), max_bytes=limit)
    assert len(list((tmp_path / "log").iterdir())) <= 4
    assert [19, 1] in outputs(tmp_path / "log", "a")


def test_a_record_that_was_torn_by_an_end_costs_itself_alone(tmp_path):
    log_of(tmp_path, ("a", "", [1], [2, 3]), ("a", "", [1], [4, 5] * 12_000), max_bytes=1 << 23)
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 5)
    log_of(tmp_path, ("a", "", [1], [6, 7]), max_bytes=1 << 23)
    assert outputs(tmp_path, "a") == [[2, 3], [6, 7]]
    os.truncate(file, 9)  # in the midst of whose it is
    log_of(tmp_path, ("a", "", [1], [8, 9]))
    assert outputs(tmp_path, "a") == [[8, 9]]


@pytest.mark.parametrize("room", [30, 200])
def test_a_full_disk_tears_no_record_and_takes_more_when_there_is_room(tmp_path, room, caplog):
    """A limit of the process's file sizes cuts a record as a full disk does, the first one's header too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        log_of(tmp_path, *(("a", "", [1], [number, 1]) for number in range(6)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = outputs(tmp_path, "a")
    assert 0 < len(kept) < 6 if room == 200 else not kept
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= room and not file.read_bytes().rpartition(b"\n")[2]
    assert caplog.text.count("File too large; outputs are left out") == 1
    log_of(tmp_path, ("a", "", [1], [8, 9]))
    assert outputs(tmp_path, "a") == [*kept, [8, 9]]


def test_engines_that_share_a_folder_tear_nothing_of_each_others(tmp_path):
    logs = [ServingLog(tmp_path, 1 << 24) for _ in range(3)]
    for number in range(60):
        for log in logs:
            log.add("a", "", [1] * 500, [number, 1])
    for log in logs:
        log.close()
    assert sorted(outputs(tmp_path, "a")) == sorted([number, 1] for number in range(60) for _ in logs)


def test_a_file_that_goes_while_it_is_read_holds_nothing(tmp_path, monkeypatch):
    log_of(tmp_path, ("a", "", [1], [2, 3]), ("a", "salt", [1], [4, 5]))
    found = sorted(serving_log._files(tmp_path))
    found[0][0].unlink()
    monkeypatch.setattr(serving_log, "_files", lambda directory: iter(found))
    assert len(outputs(tmp_path, "a")) == 1


def test_a_disk_that_takes_nothing_costs_records_and_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    log_of(tmp_path / "file" / "log", *[("a", "", [1], [2, 3])] * 3)
    assert caplog.text.count("takes no more for now") == 1


def test_a_link_in_a_files_place_is_not_followed(tmp_path, caplog):
    log_of(tmp_path / "log", ("a", "", [1], [2, 3]))
    (file,) = (tmp_path / "log").iterdir()
    target = tmp_path / "target"
    target.write_text("")
    file.unlink()
    file.symlink_to(target)
    log_of(tmp_path / "log", ("a", "", [1], [2, 3]))
    assert target.read_text() == "" and "takes no more" in caplog.text


def test_a_full_queue_leaves_records_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(serving_log, "_WAITING", 1)
    log = ServingLog(tmp_path / "log", 1 << 20)
    write, blocked = log._write, []

    def slow(*item):
        while not blocked:
            pass
        write(*item)

    monkeypatch.setattr(log, "_write", slow)
    for number in range(5):
        log.add("a", "", [1], [number, 1])
    blocked.append(True)
    log.close()
    assert 1 <= len(outputs(tmp_path / "log", "a")) <= 3 and "too slow" in caplog.text


@pytest.mark.parametrize("prompt_len", [serving_log.MAX_TOKENS])
def test_outputs_beyond_the_limit_are_left_out(tmp_path, prompt_len):
    log_of(tmp_path, ("a", "", [1] * prompt_len, [2, 3]))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_keeps_what_each_lora_and_the_base_served(tmp_path):
    model_dir = make_tiny_model(tmp_path / "model")
    adapter = make_peft_adapter(model_dir, tmp_path / "a", r=4, std=0.3)
    engine = make_engine(model_dir, serving_log=str(tmp_path / "log"))
    key = engine.load_adapter("a", adapter).content_hash
    asked = [
        request(0, [5, 6, 7], max_tokens=9, ignore_eos=True),
        request(1, [5, 6, 8], adapter=key, salt="3:bob:x", mode="fixed", max_tokens=7, ignore_eos=True),
        request(2, [5, 6, 9], adapter=key, max_tokens=1),
    ]
    results = tokens_of(run(engine, asked))
    engine.close()
    lora_hash = file_hash(adapter / WEIGHTS_FILE)
    base_hash = base_fingerprint(model_dir)  # another base may log to the same folder
    (base,), (own,) = read_served(tmp_path / "log", base_hash), read_served(tmp_path / "log", lora_hash)
    assert (base.prompt, base.output) == ([5, 6, 7], results["0"])
    assert (own.prompt, own.output) == ([5, 6, 8], results["1"])
    assert read_served(tmp_path / "log", lora_hash, "bob") == [own]
