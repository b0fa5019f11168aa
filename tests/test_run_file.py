"""A run's configuration: what wins, what is refused and how it is said, and that a saved one reads back equal."""

import pytest

from specserve.errors import UserError
from specserve.training.run_file import check_ready, load_run, save_resolved


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: out\ndata:\n  train: rows.jsonl\nlora:\n  r: 8\n  target_modules: [q_proj, v_proj]\n")
    return path


def test_flags_win_over_overrides_and_these_over_the_file(run_yaml):
    assert load_run(run_yaml, [], {}).lora.r == 8
    assert load_run(run_yaml, ["lora.r=32"], {"lora.r": None}).lora.r == 32
    assert load_run(run_yaml, ["lora.r=32"], {"lora.r": 64}).lora.r == 64
    assert load_run(run_yaml, ["lora.target_modules=[o_proj]"], {}).lora.target_modules == ("o_proj",)


def test_paths_of_a_file_are_relative_to_it_and_those_of_flags_to_the_working_directory(run_yaml):
    config = load_run(run_yaml, [], {"data.eval": "dev.jsonl"})
    assert config.data.train == str(run_yaml.parent / "rows.jsonl")
    assert config.output == str(run_yaml.parent / "out")
    assert config.data.eval == "dev.jsonl"


def test_a_saved_configuration_reads_back_equal(run_yaml, tmp_path):
    config = load_run(run_yaml, ["optimizer.epochs=0.5", "data.system=be brief"], {})
    save_resolved(config, tmp_path / "saved.yaml")
    assert load_run(tmp_path / "saved.yaml", [], {}) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=3", "unknown key 'lora.rank'.*did you mean 'lora.r'"),
        ("optimiser.lr=3", "did you mean 'optimizer.lr'"),
        ("lora.r=0", "lora.r is 0.*>= 1"),
        ("lora.r=many", "lora.r is 'many'"),
        ("optimizer.lr=-1", "optimizer.lr is -1"),
        ("head.copy_window=true", "head.copy_window is True"),
        ("dtype=fp64", "dtype is 'fp64'"),
        ("lora.r", "not KEY=VALUE"),
        ("lora.r=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_named(run_yaml, override, message):
    with pytest.raises(UserError, match=message):
        load_run(run_yaml, [override], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {r: 8, r: 9}", "stands twice"),
        ("- 1", "must hold"),
        ("a: [", "not valid YAML"),
        ("colour: red", "unknown key 'colour'"),
        ("lora: 3", "lora"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_run(path, [], {})


def test_what_a_run_cannot_start_without(run_yaml, tmp_path):
    with pytest.raises(UserError, match="data.train is missing"):
        check_ready(load_run(None, [], {}))
    with pytest.raises(UserError, match="output is missing"):
        check_ready(load_run(None, [], {"data.train": "x"}))
    with pytest.raises(UserError, match="there is no file"):
        check_ready(load_run(run_yaml, [], {}))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(UserError, match="not a PEFT directory"):
        check_ready(load_run(run_yaml, ["lora.adapter=nowhere"], {}))
