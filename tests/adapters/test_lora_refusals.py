"""PEFT directories that cannot be served as PEFT serves them: refused with one sentence, whatever they hold."""

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch
from adapter_edits import (
    CATASTROPHE,
    base_of,
    cast,
    config_of,
    drop_a,
    drop_b,
    edit_config,
    edit_tensors,
    garbage,
    keep,
    overlap,
    pickled,
    poison,
    rename,
    scale,
    tensors_of,
    truncate,
    wrong_shape,
)
from engine_fixture import check_baseline, request
from peft_adapters import ALL_MODULES, make_peft_adapter
from safetensors.torch import load_file, save_file

from specserve.adapter_files import WEIGHTS_FILE
from specserve.adapters import peft_config as lora_config
from specserve.adapters.lora import LoraAdapter, read_adapter
from specserve.errors import AdapterError


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "linears": make_peft_adapter(model_dir, root / "linears", use_rslora=True),
        "everything": make_peft_adapter(model_dir, root / "everything", r=6, embed=True, lm_head=True),
    }


REFUSALS = {
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json"),
    "config is no JSON": (lambda path: (path / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda path: (path / "adapter_config.json").write_text("[]"), "peft_type"),
    "deep config": (lambda path: (path / "adapter_config.json").write_text("[" * 100_000), "not valid JSON"),
    "other peft type": (config_of(peft_type="IA3"), "IA3"),
    "dora": (config_of(use_dora=True), "DoRA"),
    "bias": (config_of(bias="all"), "bias"),
    "lora bias": (config_of(lora_bias=True), "bias"),
    "modules to save": (config_of(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (config_of(init_lora_weights="pissa_niter_4"), "pissa"),
    "remote code": (config_of(auto_map={"x": "y"}), "remote code"),
    "rank of config": (config_of(r=3), "rank"),
    "rank a million": (config_of(r=10**6), "rank"),
    "zero alpha": (config_of(lora_alpha=0), "lora_alpha is 0"),
    "alpha pattern as a string": (config_of(alpha_pattern="q_proj"), "alpha_pattern is 'q_proj'"),
    "alpha over fp32's range": (config_of(lora_alpha=1e300), "range of float32"),
    "a future switch": (config_of(use_future=True), "use_future"),
    "narrower targets": (
        config_of(target_modules=["q_proj"]),
        "k_proj has weights, but target_modules",
    ),
    "PEFT's own targets": (
        config_of(target_modules=None),
        "k_proj has .*null, which is q_proj and v",
    ),
    "narrower regular expression": (
        config_of(target_modules=".*q_proj"),
        "target_modules.*leaves it",
    ),
    "fewer layers": (config_of(layers_to_transform=[1]), "layers.0.*but layers_to_transform"),
    "other layers pattern": (
        config_of(layers_to_transform=[0, 1], layers_pattern="h"),
        "has weights, but layers_to_transform",
    ),
    "excluded": (config_of(exclude_modules=["o_proj"]), "o_proj has weights, but exclude_modules"),
    "unsaved random module": (
        lambda path: (keep(path, *ALL_MODULES[1:]), edit_config(path, init_lora_weights=False)),
        "q_proj.*have no weights",
    ),
    "unsaved module of no known start": (
        lambda path: (keep(path, *ALL_MODULES[1:]), edit_config(path, init_lora_weights=None)),
        "q_proj.*have no weights",
    ),
    "alpha NaN": (config_of(lora_alpha=float("nan")), "lora_alpha"),
    "pickle": (pickled, "pickle"),
    "truncated": (truncate, "safetensors"),
    "huge header": (garbage(2**60), "safetensors"),
    "overlapping tensors": (overlap, "safetensors"),
    "missing A": (tensors_of(drop_a), "lora_A"),
    "no prefix": (tensors_of(rename("base_model.model.", "")), "PEFT's name"),
    "another infix": (tensors_of(rename("model.layers", "model.text.layers")), "PEFT's name"),
    "a layer by another spelling": (tensors_of(rename("layers.1.", "layers.01.")), "layers.01"),
    "MLX's names": (tensors_of(rename("lora_A.weight", "lora_a")), "PEFT's name"),
    "an extra tensor": (tensors_of(lambda t: t | {"x.y": torch.zeros(2)}), "x.y"),
    "a trained norm": (
        tensors_of(lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(64)}),
        "model.norm.weight",
    ),
    "int8": (tensors_of(cast(torch.int8)), "int8"),
    "fp8 of exponents alone": (tensors_of(cast(torch.float8_e8m0fnu)), "float8_e8m0fnu"),
    "1e300 in fp64": (tensors_of(scale(1e300)), "beyond the range of float32"),
    "NaN in fp8": (lambda path: edit_tensors(path, lambda t: cast(torch.float8_e5m2)(poison(float("nan"))(t))), "NaN"),
    "missing B": (tensors_of(drop_b), "lora_B"),
    "wrong shape": (tensors_of(wrong_shape), "99.*wants"),
    "NaN": (tensors_of(poison(float("nan"))), "NaN"),
    "infinity": (tensors_of(poison(float("inf"))), "infinite"),
    "unknown module": (tensors_of(rename("q_proj", "z_proj")), "z_proj"),
    "layer beyond the model": (tensors_of(rename("layers.1.", "layers.77.")), "layers"),
    "no tensors": (lambda path: save_file({}, path / WEIGHTS_FILE), "no LoRA tensors"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unservable_adapter_is_refused_with_one_clear_sentence(engine, adapters, tmp_path, name):
    spoil, word = REFUSALS[name]
    path = shutil.copytree(adapters["linears"], tmp_path / "spoiled")
    spoil(path)
    before = counts(engine)
    with pytest.raises(AdapterError, match=f"(?s){word}") as caught:
        engine.load_adapter("spoiled", path)
    assert "\n" not in str(caught.value) and "spoiled" in str(caught.value)
    assert counts(engine) == before


def counts(engine):
    """All stats but those of the latest steps, which say how long ago they were."""
    return msgspec.structs.replace(engine.stats(), recent_steps=[])


def test_values_are_judged_as_they_are_served(adapters, model_dir, tmp_path):
    path = shutil.copytree(adapters["linears"], tmp_path / "large")
    edit_tensors(path, lambda tensors: {name: tensor * 1e6 for name, tensor in tensors.items()})
    assert isinstance(read_adapter(path, base_of(model_dir, torch.bfloat16)), LoraAdapter)
    with pytest.raises(AdapterError, match="beyond the range of float16"):
        read_adapter(path, base_of(model_dir, torch.float16))
    alpha = shutil.copytree(adapters["linears"], tmp_path / "alpha")
    edit_config(alpha, lora_alpha=70_000, use_rslora=False, alpha_pattern={"q_proj": 700_000})
    assert isinstance(read_adapter(alpha, base_of(model_dir, torch.bfloat16)), LoraAdapter)
    with pytest.raises(AdapterError, match="lora_alpha 700000 over rank 8, a factor beyond the range of float16"):
        read_adapter(alpha, base_of(model_dir, torch.float16))


def test_rank_above_the_limit_is_refused(adapters, model_dir):
    with pytest.raises(AdapterError, match="max-lora-rank"):
        read_adapter(adapters["linears"], base_of(model_dir), max_rank=7)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_a_trained_copy_of_the_base_is_refused_however_little_it_differs(engine, adapters, model_dir, tmp_path, module):
    path = shutil.copytree(adapters["everything"], tmp_path / "copied")
    base = load_file(model_dir / "model.safetensors")[f"{module}.weight"]
    copy = f"base_model.model.{module}.base_layer.weight"
    for same in (base.clone(), base.bfloat16(), base.bfloat16().float(), base.half()):
        edit_tensors(path, lambda tensors, same=same: tensors | {copy: same})
        engine.load_adapter("copied", path)
    trained = base.clone()
    trained[7] += 5e-3
    for changed, word in ((trained, "differs"), (base[:-1].clone(), "resized"), (base.to(torch.float8_e5m2), "float8")):
        edit_tensors(path, lambda tensors, changed=changed: tensors | {copy: changed})
        with pytest.raises(AdapterError, match=f"{copy}.*{word}"):
            engine.load_adapter("copied", path)


def test_steps_go_on_while_a_catastrophic_pattern_is_matched(engine, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_config, "MATCHING_CPU_S", 0.3)
    path = shutil.copytree(adapters["linears"], tmp_path / "slow")
    edit_config(path, alpha_pattern={CATASTROPHE: 4})
    engine.add_request(request("a", [3, 1, 4], max_tokens=400, ignore_eos=True))
    longest, num_steps = 0.0, 0
    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(engine.adapters.read, "slow", path)
        while not reading.done():
            start = time.monotonic()
            num_steps += bool(engine.step())
            longest = max(longest, time.monotonic() - start)
    assert isinstance(reading.exception(), AdapterError) and CATASTROPHE in str(reading.exception())
    assert num_steps > 10 and longest < 30.0
    engine.abort("a")
    check_baseline(engine)


VALUES = [
    None,
    True,
    False,
    0,
    1,
    4,
    -1,
    2**70,
    1e300,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "q_proj",
    "(",
    ".*_proj",
    [],
    {},
]
VALUES += [
    ["q_proj"],
    ["k_proj", 3],
    {"q_proj": 4},
    {"(": 4},
    {"q_proj": "x"},
    {".*": None},
    [[]],
    "none",
    "all-linear",
    [0],
]


def test_whatever_a_configuration_says_is_served_or_refused(adapters, model_dir, tmp_path):
    rng, base, served = random.Random(1), base_of(model_dir), 0
    path = shutil.copytree(adapters["linears"], tmp_path / "fuzzed")
    config = json.loads((path / "adapter_config.json").read_text())
    for _ in range(200):
        fuzzed = dict(config)
        for _ in range(rng.choice((1, 1, 2, 3))):
            key, value = rng.choice([*config, "use_future", "x"]), rng.choice(VALUES)
            nested = rng.random() < 0.2
            fuzzed[key] = {rng.choice(["q_proj", ".*", "a"]): value} if nested else value
            if rng.random() < 0.05:
                del fuzzed[rng.choice([*fuzzed])]
        (path / "adapter_config.json").write_text(json.dumps(fuzzed))
        try:
            served += isinstance(read_adapter(path, base), LoraAdapter)
        except AdapterError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert 20 < served < 180


def test_whatever_the_tensors_are_is_served_or_refused(adapters, model_dir, tmp_path):
    rng, base, served = random.Random(2), base_of(model_dir), 0
    path = shutil.copytree(adapters["everything"], tmp_path / "fuzzed")
    tensors = load_file(path / WEIGHTS_FILE)
    dtypes = [getattr(torch, name) for name in ("int8", "bool", "uint8", "int64", "float8_e4m3fn", "half", "double")]
    for _ in range(100):
        fuzzed, key = dict(tensors), rng.choice(sorted(tensors))
        value = fuzzed.pop(key)
        new = rng.choice([key, key, key.replace("lora", "LORA"), key + "x", key.replace("1", "9"), "\ud7ff\n" + key])
        change = rng.randrange(6)
        if change < 2:
            value = value.to(rng.choice(dtypes))
        elif change < 4:
            value = rng.choice(
                [value.T, value[:0], value[0], value[None], value[0, 0], value.repeat(2, 1)]
            ).contiguous()
        elif change == 4:
            value = value * rng.choice([1e38, 1e-45, float("nan"), 0.0])
        save_file({**fuzzed, new: value}, path / WEIGHTS_FILE)
        try:
            served += isinstance(read_adapter(path, base), LoraAdapter)
        except AdapterError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert 5 < served < 95
