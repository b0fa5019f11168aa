"""The joint trainer: it learns, resumes identically, and stops when it goes wrong."""

import errno
import io
import json
import os
import signal
import types
import zipfile

import msgspec
import pytest
import torch
import torch.distributed as dist
from tiny_models import make_tiny_model
from training_fixture import make_trainer, run_config, write_rows

from specserve.errors import UserError
from specserve.training.checkpoint import CHECKPOINT_FILE, read_checkpoint
from specserve.training.data.batching import default_epochs, plan_epoch, plan_run
from specserve.training.health import Health
from specserve.training.metrics_file import MetricsFile
from specserve.training.run_config import CheckpointConfig, JointConfig, OptimizerConfig
from specserve.training.run_identity import check_same_run, run_identity
from specserve.training.schedule import Schedule
from specserve.training.signals import Interrupted


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 60)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_every_example_is_in_one_batch_of_limited_size():
    lengths = [5 + (i * 37) % 90 for i in range(200)]
    batches = plan_epoch(lengths, 300, seed=1)
    assert sorted(idx for batch in batches for idx in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 300 for batch in batches)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert plan_epoch(lengths, 300, seed=1) == batches != plan_epoch(lengths, 300, seed=2)
    assert len(plan_run(lengths, 300, 0, 2.5, None)) == pytest.approx(2.5 * len(batches), abs=4)
    assert len(plan_run(lengths, 300, 0, 2.5, 7)) == 7


@pytest.mark.parametrize(
    ("num_rows", "batch_tokens", "epochs"),
    [
        (1, 850, 10.0),
        (3, 850, 10.0),
        (90, 850, 4.0),
        (90, 4000, 8.0),
        (200, 850, 1.8),
        (360, 850, 1.0),
        (4000, 850, 1.0),
    ],
)
def test_few_rows_are_seen_more_often_until_there_are_enough_steps_and_rows(num_rows, batch_tokens, epochs):
    lengths = [30 + (i * 37) % 120 for i in range(num_rows)]
    found = default_epochs(lengths, batch_tokens, 0, min_steps=24, min_rows=360)
    assert found == epochs
    assert num_rows < 90 or len(plan_run(lengths, batch_tokens, 0, found, None)) >= 24


def test_a_short_run_warms_up_for_some_steps_and_a_long_one_for_its_share():
    def rates(num_steps, **optimizer):
        schedule = Schedule(num_steps, OptimizerConfig(**optimizer), JointConfig())
        return [round(schedule.rate(step), 3) for step in range(num_steps)]

    assert rates(24)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates(24)[-1] < 0.1
    assert rates(4)[:2] == [1.0, 1.0]
    assert rates(24, warmup=0.0)[0] == 1.0
    assert rates(200)[:10] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@pytest.mark.parametrize("loss", ["ce", "kl", "lk"])
def test_both_losses_fall(model_dir, rows, tmp_path, loss):
    config = run_config(epochs=6)
    config = msgspec.structs.replace(config, head=msgspec.structs.replace(config.head, loss=loss))
    trainer = make_trainer(model_dir, rows, tmp_path / "run", config)
    trainer.train()
    values = metrics(tmp_path / "run")
    assert len(values) == len(trainer.plan)
    heads = [value["head_loss"] for value in values if "head_loss" in value]
    assert values[-1]["loss"] < 0.7 * values[0]["loss"]
    assert heads[-1] < 0.8 * heads[0]
    assert "head_loss" not in values[0]  # the LoRA starts alone


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(model_dir, rows, tmp_path):
    whole = make_trainer(model_dir, rows, tmp_path / "whole")
    whole.train()
    first = make_trainer(model_dir, rows, tmp_path / "parts")
    stop = len(first.plan) // 2
    first.train(until=stop)
    second = make_trainer(model_dir, rows, tmp_path / "parts")
    second.resume()
    assert second.step == stop
    second.train()
    keep = ("step", "loss", "head_loss", "grad_norm")
    a, b = ([{k: v for k, v in m.items() if k in keep} for m in metrics(tmp_path / d)] for d in ("whole", "parts"))
    assert a == b
    for x, y in zip(whole.objective.model.parameters, second.objective.model.parameters, strict=True):
        assert torch.equal(x, y)


def test_a_signal_ends_the_run_after_its_checkpoint(model_dir, rows, tmp_path):
    trainer = make_trainer(model_dir, rows, tmp_path / "run")
    step = trainer.train_step

    def interrupted():
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = interrupted
    with pytest.raises(Interrupted, match="--resume"):
        trainer.train()
    assert trainer.step == 3
    again = make_trainer(model_dir, rows, tmp_path / "run")
    again.resume()
    assert again.step == 3


def test_nan_stops_the_run_and_the_last_good_checkpoint_stays(model_dir, rows, tmp_path):
    trainer = make_trainer(model_dir, rows, tmp_path / "run")
    trainer.train(until=2)
    good = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    with torch.no_grad():
        trainer.objective.model.parameters[0].fill_(float("nan"))
    with pytest.raises(UserError, match="loss is nan.*optimizer.lr"):
        trainer.train()
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == good


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(model_dir, rows, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, rows, tmp_path / "run")
    trainer.train(until=2)
    good = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    trainer.train(until=4)
    assert trainer.step == 4 and (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == good
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_resuming_what_is_not_there_is_refused(model_dir, rows, tmp_path):
    with pytest.raises(UserError, match="to resume from"):
        make_trainer(model_dir, rows, tmp_path / "run").resume()


@pytest.fixture(scope="module")
def begun(model_dir, rows, tmp_path_factory):
    """A directory with the checkpoint of a run that was stopped."""
    trainer = make_trainer(model_dir, rows, tmp_path_factory.mktemp("begun") / "run")
    trainer.train(until=2)
    return trainer


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("lora.r", 8),
        ("lora.alpha", 16),
        ("lora.dropout", 0.0),
        ("lora.target_modules", ("q_proj",)),
        ("head.lr", 1e-3),
        ("head.tap_layer", 0),
        ("joint.detach_prob", 0.1),
        ("optimizer.lr", 1e-3),
        ("optimizer.weight_decay", 0.1),
        ("optimizer.epochs", 3),
        ("data.system", "be brief"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(begun, model_dir, key, value):
    section, _, field = key.rpartition(".")
    config = begun.config
    if section:
        nested = msgspec.structs.replace(getattr(config, section), **{field: value})
        config = msgspec.structs.replace(config, **{section: nested})
    else:
        config = msgspec.structs.replace(config, **{field: value})
    saved = read_checkpoint(begun.directory / CHECKPOINT_FILE)["identity"]
    with pytest.raises(UserError, match=f"{key} was .* and is .*another --output"):
        check_same_run(saved, run_identity(config, model_dir, begun.objective.examples, begun.plan), "the checkpoint")


def test_a_checkpoint_of_other_rows_or_another_model_is_refused_by_name(begun, model_dir, tmp_path):
    saved = read_checkpoint(begun.directory / CHECKPOINT_FILE)["identity"]
    check_same_run(saved, run_identity(begun.config, model_dir, begun.objective.examples, begun.plan), "the checkpoint")
    others = [*begun.objective.examples[1:], begun.objective.examples[0]]
    with pytest.raises(UserError, match="the training rows as tokens was"):
        check_same_run(saved, run_identity(begun.config, model_dir, others, begun.plan), "the checkpoint")
    qwen = make_tiny_model(tmp_path / "qwen", "qwen2")
    with pytest.raises(UserError, match="the base model was"):
        check_same_run(saved, run_identity(begun.config, qwen, begun.objective.examples, begun.plan), "the checkpoint")
    two = run_identity(begun.config, model_dir, begun.objective.examples, begun.plan, num_processes=2)
    with pytest.raises(UserError, match="the number of processes was 1 and is 2"):
        check_same_run(saved, two, "the checkpoint")


def test_a_broken_checkpoint_is_named(begun, tmp_path):
    whole = (begun.directory / CHECKPOINT_FILE).read_bytes()
    path = tmp_path / CHECKPOINT_FILE
    for content, reason in ((b"", "it is empty"), (whole[: len(whole) // 2], "whole checkpoint"), (b"PK no", "whole")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{CHECKPOINT_FILE} is not a.*{reason}.*remove it"):
            read_checkpoint(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as good, zipfile.ZipFile(path, "w") as damaged:
        for name in good.namelist():
            damaged.writestr(name, b"\x80\x02." if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(UserError, match=f"{CHECKPOINT_FILE} is not a whole checkpoint .pop from empty list"):
        read_checkpoint(path)
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match="another version"):
        read_checkpoint(path)


def test_a_checkpoint_of_every_step_is_never_of_diverged_weights(model_dir, rows, tmp_path):
    config = run_config(lr=0.02, epochs=4)
    config = msgspec.structs.replace(config, checkpoint=CheckpointConfig(every_steps=1))
    trainer = make_trainer(model_dir, rows, tmp_path / "run", config)
    rate = lambda step: 1.0 if step < 8 else -1.0  # from there on it climbs  # noqa: E731
    trainer.objective.schedule = types.SimpleNamespace(
        rate=rate, head_rate=lambda step: 0.0, head_weight=lambda step: 0.0
    )
    with pytest.raises(UserError, match="lower optimizer.lr.*checkpoint.pt holds the last good weights") as error:
        trainer.train()
    losses = [value["loss"] for value in metrics(tmp_path / "run")]
    again = make_trainer(model_dir, rows, tmp_path / "run", config)
    again.resume()
    assert f"step {again.step}" in str(error.value)
    assert 7 <= again.step <= 12 and len(losses) < 38
    assert again._loss_now() < 0.8 * losses[0] < 0.5 * losses[-1]


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_that_end_as_nan_are_no_result(model_dir, rows, tmp_path, steps):
    config = run_config(lr=1e36, max_steps=steps, warmup=0.0)
    trainer = make_trainer(model_dir, rows, tmp_path / "run", config)
    with pytest.raises(UserError, match="lower optimizer.lr.*no checkpoint has been written") as error:
        trainer.train()
    assert "has no gradient" not in str(error.value)
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()


def test_the_first_step_without_a_gradient_is_told_from_weights_that_ran_away():
    health = Health()
    assert "no token with loss" in health.problem(0, 2.0, 0.0)
    health.see(2.0)
    assert "3 steps have driven" in health.problem(3, 11.0, 0.0)
    assert health.problem(3, 2.1, 1.0) is None
    assert health.problem(3, 0.0, 0.0) is None  # a step of rows that say nothing


def test_good_weights_are_near_the_best_and_a_growing_loss_does_not_move_the_measure():
    health = Health()
    for loss in [2.0] + [0.1] * 30:
        health.see(loss)
    for loss in (0.3, 0.6, 0.9, 1.4):
        health.see(loss)
    assert health.is_good(0.4) and not health.is_good(1.0) and not health.is_good(float("nan"))


def test_a_resumed_run_has_each_step_once_in_its_metrics(model_dir, rows, tmp_path):
    trainer = make_trainer(model_dir, rows, tmp_path / "run")
    trainer.train(until=2)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # a step behind the checkpoint, and a torn line
    again = make_trainer(model_dir, rows, tmp_path / "run")
    again.resume()
    again.train(until=4)
    assert [value["step"] for value in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_full_disk_tears_no_line_of_the_metrics(tmp_path, capfd):
    class FullDisk(io.FileIO):
        def write(self, data):
            room = 99 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:room])

    file = MetricsFile(tmp_path, 0)
    file._file = FullDisk(tmp_path / "metrics.jsonl", "ab")
    for step in range(1, 9):
        file.write({"step": step, "loss": 1.0})
    assert [value["step"] for value in metrics(tmp_path)] == [1, 2, 3]
    assert "".join(capfd.readouterr()).count("takes no more lines: No space left") == 1


def test_the_head_does_not_reach_the_lora_when_its_weight_is_zero_or_detached(model_dir, rows, tmp_path):
    import msgspec

    def grads(**joint):
        config = run_config()
        config = msgspec.structs.replace(config, joint=msgspec.structs.replace(config.joint, start=0.0, **joint))
        trainer = make_trainer(model_dir, rows, tmp_path / "run", config)
        trainer.step = 5
        trainer.train_step()
        return [p.grad.clone() for p in trainer.objective.model.parameters]

    alone, detached, reached = grads(head_weight=0.0), grads(detach_prob=1.0), grads(detach_prob=0.0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, detached, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, reached, strict=True))


def test_a_process_without_a_row_of_the_batch_adds_no_gradient(model_dir, rows, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, rows, tmp_path / "run")
    trainer.plan = [[0, 1], [2], *trainer.plan[2:]]
    trainer.processes.num, trainer.processes.rank = 2, 1
    monkeypatch.setattr(trainer, "_check", lambda *args: None)
    monkeypatch.setattr(trainer.processes, "sum", lambda value: value + 1.0)  # what the other process has
    summed = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: summed.append(float(tensor.abs().sum())))
    trainer.train_step()
    assert sum(summed) > 0
    summed.clear()
    trainer.train_step()
    assert len(summed) == sum(len(group.parameters) for group in trainer.objective.groups()) and sum(summed) == 0
