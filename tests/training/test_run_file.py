"""A run's configuration: what wins, what is refused and how it is said, and that a saved one reads back equal."""

import json

import pytest
from places import ROOT

from specserve.errors import UserError
from specserve.training.run_file import check_ready, known_keys, load_run, save_resolved
from specserve.training.settings_table import settings_table


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


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", "0.001"])
def test_a_number_may_be_written_with_an_exponent(run_yaml, text):
    assert load_run(run_yaml, [f"optimizer.lr={text}"], {}).optimizer.lr == 1e-3
    run_yaml.write_text(run_yaml.read_text() + f"optimizer: {{lr: {text}}}\n")
    assert load_run(run_yaml, [], {}).optimizer.lr == 1e-3


@pytest.mark.parametrize("text", ["q_proj", "[q_proj]", "[q_proj, q_proj]"])
def test_one_module_may_stand_alone(run_yaml, text):
    assert load_run(run_yaml, [f"lora.target_modules={text}"], {}).lora.target_modules == ("q_proj",)
    assert load_run(run_yaml, ["lora.target_modules=q_proj, lm_head"], {}).lora.target_modules == ("q_proj", "lm_head")
    assert load_run(run_yaml, ["lora.target_modules=all-linear"], {}).lora.target_modules == "all-linear"


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
        ("epochs=3", "did you mean 'distill.epochs' or 'optimizer.epochs'"),
        ("learning_rate=0.1", "did you mean 'optimizer.lr'"),
        ("data.max_lenn=3", "did you mean 'data.max_len'"),
        ("quux=3", "known are .*optimizer.lr"),
        ("lora.r=0", "lora.r is 0.*>= 1"),
        ("lora.r=many", "lora.r is 'many'"),
        ("optimizer.lr=-1", "optimizer.lr is -1"),
        ("head.copy_window=true", "head.copy_window is True"),
        ("dtype=fp64", "dtype is 'fp64'"),
        ("optimizer.lr=.inf", "optimizer.lr is inf: a finite number"),
        ("head.lr=.nan", "head.lr is nan: a finite number"),
        ("optimizer.lr=1000", "optimizer.lr is 1000.*<= 1"),
        ("lora.target_modules=[]", "lora.target_modules is empty"),
        ("lora.target_modules=[q_proj, nosuch]", "lora.target_modules holds 'nosuch', which is no module"),
        ("lora.target_modules=q_porj", "holds 'q_porj'.*did you mean 'q_proj'"),
        ("lora.target_modules=.*(q|v)_proj", "regular expressions"),
        ("lora.target_modules=[model.layers.0.self_attn.q_proj]", "names of single layers are not supported"),
        ("lora.target_modules=3", "lora.target_modules is 3"),
        ("lora.target_modules=[3]", "holds 3"),
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


@pytest.mark.parametrize(
    ("saved", "modules"), [(["v_proj", "k_proj"], ("k_proj", "v_proj")), (".*layers.1.*", ".*layers.1.*")]
)
def test_a_lora_that_is_gone_on_from_keeps_what_it_is(run_yaml, tmp_path, saved, modules):
    (tmp_path / "old").mkdir()
    own = {"r": 512, "lora_alpha": 12.5, "lora_dropout": 0.5, "target_modules": saved}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(own))
    overrides = [f"lora.adapter={tmp_path / 'old'}", "lora.dropout=0.1"]
    config = load_run(run_yaml, overrides, {"lora.r": 512})
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (512, 12.5, 0.1)
    assert config.lora.target_modules == modules
    save_resolved(config, tmp_path / "saved.yaml")
    assert load_run(tmp_path / "saved.yaml", [], {}) == config
    with pytest.raises(UserError, match="lora.r is 8, but the LoRA of lora.adapter has 512 and keeps it: leave lora.r"):
        load_run(run_yaml, overrides, {"lora.r": 8})


def test_the_page_on_training_lists_every_setting_with_default_and_meaning():
    table = settings_table()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == known_keys()
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert page.endswith(table + "\n"), "run `python -m specserve.training.settings_table` and put it there"
