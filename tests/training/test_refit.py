"""A head is fitted to what its adapter served: it drafts better, the LoRA stays, and a worse one is not written."""

import fcntl
import json
import os
import random

import pytest
from engine_fixture import make_engine, request, run, tokens_of
from lookahead_adapters import make_base_head, make_lookahead_adapter
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.cli.main import exit_code_of as cli
from specserve.drafters.head_files import read_config
from specserve.drafting.serving_log import ServingLog
from specserve.file_hash import file_hash
from specserve.model.fingerprint import base_fingerprint
from specserve.training import refit as refit_module

ENDINGS = ("lookahead_config.json", "lookahead.safetensors")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    """An adapter with a random head, one without, a base head, and a log of outputs of each."""
    root = tmp_path_factory.mktemp("served")
    adapter = make_lookahead_adapter(model_dir, root / "own", seed=1, history=False, vocab_size=60)
    plain = make_peft_adapter(model_dir, root / "plain", seed=2, std=0.3, r=4)
    base = make_base_head(model_dir, root / "base", seed=3, history=False)
    for path in (adapter, plain, base):
        (path / "run.yaml").write_text("head: {hidden_size: 16, vocab_size: 64, draft_len: 5, train_steps_ahead: 4}\n")
    log = ServingLog(root / "log", 1 << 20)
    words = random.Random(0).sample(range(10, 300), 24)  # each word has one that follows, as in a narrow task
    for name in (adapter, plain, base):
        lora = name / "adapter_model.safetensors"
        for number in range(80):
            output = [words[(number + idx) % len(words)] for idx in range(20)]
            prompt = [3, 4, 5 + number]
            log.add(
                file_hash(lora) if lora.exists() else base_fingerprint(model_dir), f"3:bob:{number % 2}", prompt, output
            )
    log.close()
    return root


def copied(root, name, to):
    to.mkdir()
    for file in (root / name).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def fit(directory, root, model_dir, *more):
    return cli(["refit", str(directory), "--serving-log", str(root / "log"), "--model", str(model_dir), *more])


@pytest.mark.parametrize("name", ["own", "plain", "base"])
def test_a_refitted_head_drafts_better_and_changes_no_token(served, model_dir, tmp_path, capsys, name):
    directory = copied(served, name, tmp_path / name)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert fit(directory, served, model_dir, "--epochs", "8") == 0
    out = capsys.readouterr().out
    assert f"the head in {directory} is replaced" in out and "80 outputs" in out
    assert ("there was no head" in out) == (name == "plain")
    after = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert {file for file in after if after[file] != before.get(file)} == set(ENDINGS)
    assert "head" in read_config(directory / ENDINGS[0]).acceptance
    if name == "base":
        engine, key, old, old_key = make_engine(model_dir, base_head=str(directory)), None, make_engine(model_dir), None
        assert engine.info.base_head.error is None
    else:
        engine, old = make_engine(model_dir), make_engine(model_dir)
        info, was = engine.load_adapter(name, directory), old.load_adapter(name, served / name)
        assert info.lookahead.error is None and info.content_hash != was.content_hash
        key, old_key = info.content_hash, was.content_hash
    requests = [[request(i, [3 + i, 9, 5 + 2 * i % 40, 7], adapter=k, mode="fixed", max_tokens=24) for i in range(6)]
                for k in (key, old_key)]  # fmt: skip
    assert tokens_of(run(engine, requests[0])) == tokens_of(run(old, requests[1]))
    assert engine.stats().drafted_by_source["head"] > 0


def test_jumps_are_decided_by_what_was_served(served, model_dir, tmp_path, monkeypatch):
    """The old head is judged as it drafts, without them."""
    directory, rng = copied(served, "own", tmp_path / "own"), random.Random(1)
    assert not read_config(directory / ENDINGS[0]).copy_jumps
    log = ServingLog(tmp_path / "log", 1 << 20)
    for _ in range(80):
        prompt = rng.sample(range(10, 300), 60)
        output = [token for start in (40, 20, 30, 10) for token in prompt[start : start + 5]]
        log.add(file_hash(directory / "adapter_model.safetensors"), "", prompt, output)
    log.close()
    seen = []

    def anchors_of(head, settings, *arguments):
        seen.append(settings.copy_jumps)
        return real(head, settings, *arguments)

    real = refit_module.anchors_of
    monkeypatch.setattr(refit_module, "anchors_of", anchors_of)
    monkeypatch.setattr(refit_module, "fit_head", lambda *arguments: None)
    monkeypatch.setattr(refit_module, "expected_tokens", lambda *arguments: 1.0 + len(seen))
    assert fit(directory, tmp_path, model_dir) == 0
    assert seen == [False, True, True, True, True] and read_config(directory / ENDINGS[0]).copy_jumps


def test_a_head_that_is_no_better_is_not_written(served, model_dir, tmp_path, capsys, monkeypatch):
    directory = copied(served, "own", tmp_path / "own")
    before = (directory / ENDINGS[1]).read_bytes()
    monkeypatch.setattr(refit_module, "expected_tokens", lambda *args: 1.5)
    assert fit(directory, served, model_dir, "--epochs", "1") == 0
    assert "left as it was: the new one is no better" in capsys.readouterr().out
    assert (directory / ENDINGS[1]).read_bytes() == before


def test_what_cannot_be_fitted_is_said(served, model_dir, tmp_path, capsys):
    directory = copied(served, "own", tmp_path / "own")

    def error(*arguments, of=directory, root=served):
        assert fit(of, root, model_dir, *arguments) == 2
        return capsys.readouterr().err

    assert "has 0 different outputs of key 'alice'" in error("--key", "alice")
    (tmp_path / "log").mkdir()
    assert "has 0 different outputs of" in error(root=tmp_path)
    assert "neither an adapter nor a head" in error(of=tmp_path / "log")
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "another refit is at work" in error()
    os.close(fd)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "lookahead.safetensors", "adapter_config.json"])
def test_what_changed_while_a_head_was_fitted_is_left_as_it_is(served, model_dir, tmp_path, capsys, monkeypatch, file):
    directory, other = copied(served, "own", tmp_path / "own"), tmp_path / "other"
    make_lookahead_adapter(model_dir, other, seed=8, history=False, vocab_size=60)
    done = refit_module.rewrite_acceptance

    def meanwhile(*arguments):
        done(*arguments)
        (directory / file).unlink() if file == "adapter_config.json" else (other / file).replace(directory / file)

    monkeypatch.setattr(refit_module, "rewrite_acceptance", meanwhile)
    before = (directory / ENDINGS[0]).read_bytes()
    assert fit(directory, served, model_dir, "--epochs", "1") == 2
    assert f"{directory} has changed meanwhile; its head is left as it was" in capsys.readouterr().err
    assert (directory / ENDINGS[0]).read_bytes() == before


def test_a_head_of_another_base_is_not_replaced(served, model_dir, tmp_path, capsys):
    directory = copied(served, "own", tmp_path / "own")
    config = json.loads((directory / ENDINGS[0]).read_text())
    (directory / ENDINGS[0]).write_text(json.dumps({**config, "base_hash": "0" * 64}))
    assert fit(directory, served, model_dir) == 2
    assert "its head belongs to another base model" in capsys.readouterr().err


def test_an_end_between_the_two_files_leaves_a_head_that_is_refused(served, model_dir, tmp_path):
    directory = copied(served, "own", tmp_path / "own")
    other = make_lookahead_adapter(model_dir, tmp_path / "other", seed=7, history=False, vocab_size=60)
    (directory / ENDINGS[1]).write_bytes((other / ENDINGS[1]).read_bytes())  # the new weights, the old configuration
    engine = make_engine(model_dir)
    info = engine.load_adapter("own", directory)
    assert "is not the file that lookahead_config.json belongs to" in info.lookahead.error
    assert tokens_of(run(engine, [request(0, [3, 4, 5], adapter=info.content_hash)]))["0"]
    config = json.loads((directory / ENDINGS[0]).read_text())
    del config["head_hash"]  # of an older version
    (directory / ENDINGS[0]).write_text(json.dumps(config))
    assert make_engine(model_dir).load_adapter("own", directory).lookahead.error is None
