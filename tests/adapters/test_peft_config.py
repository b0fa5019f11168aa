"""adapter_config.json: modules, ranks and alphas as PEFT itself has them; everything else a named error, in time."""

import json
import random
import re
import time

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils.other import get_pattern_key
from tiny_models import MODEL_TYPES, SIZES
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specserve.adapters import peft_config, peft_matching
from specserve.adapters.peft_config import ModuleLora, parse_config
from specserve.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MODULES = ["model.embed_tokens", *(f"model.layers.{i}.{name}" for i in range(12) for name in LINEARS), "lm_head"]


def parsed(**fields):
    return parse_config("a", json.dumps({**PLAIN, **fields}).encode())


def resolved(fields, modules=MODULES, ties_embedding=False):
    return parsed(**fields).resolve(modules, ties_embedding)


# -- as PEFT matches

NAMES = [
    *("q_proj", "v_proj", "proj", "mlp.up_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"),
    *("embed_tokens", "model.embed_tokens", "self_attn", "", "_proj", "1.self_attn.k_proj", "nobody"),
]
REGEXES = [
    *(r".*_proj", r".*\.(q|k)_proj", "q_proj", "(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)", "All-Linear"),
    *(
        r"model\.layers\.[0-3]\..*",
        "lm_head",
        r"(?i).*Q_PROJ",
        r"model.*[02468]\.\w+\.\w+",
        r".*(?<!q)_proj",
        r".*embed.*",
    ),
]
PATTERNS = [
    *(
        "q_proj",
        "^model.layers.0.self_attn.q_proj",
        r"layers\.1\..*",
        "model.layers.1.mlp.up_proj",
        "up.proj",
        "^q_proj",
    ),
    *(r"\d+.mlp.down_proj", "q_proj|v_proj", r".*\.1?0\..*", r"self_attn\.[qk]_proj$", "lm_head", "embed_tokens"),
    *("proj", r"(q)_proj"),
]
LAYERS_PATTERNS = [
    "layers",
    "h",
    ["layers"],
    ["h", "layers"],
    ["layers", "h"],
    r"model\.layers",
    "l[a-z]+",
    "",
    [],
    ["model|layers"],
]


def random_fields(rng):
    fields = {"target_modules": rng.sample(NAMES, rng.randint(1, 5)) if rng.random() < 0.7 else rng.choice(REGEXES)}
    if rng.random() < 0.3:
        fields["exclude_modules"] = rng.choice([rng.choice(REGEXES), rng.sample(NAMES, 2), [], ""])
    if rng.random() < 0.5 and isinstance(fields["target_modules"], list):
        fields["layers_to_transform"] = rng.choice([0, 1, [0, 3, 11], [], [1]])
        if rng.random() < 0.7:
            fields["layers_pattern"] = rng.choice(LAYERS_PATTERNS)
    fields["rank_pattern"] = {key: 16 + i for i, key in enumerate(rng.sample(PATTERNS, rng.randint(0, 4)))}
    fields["alpha_pattern"] = {key: 16.5 + i for i, key in enumerate(rng.sample(PATTERNS, rng.randint(0, 4)))}
    return fields


def as_peft_has_it(fields):
    config = PeftConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = {module for module in MODULES if module.endswith("_proj")}
    found = {}
    for module in MODULES:
        if check_target_module_exists(config, module):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            found[module] = ModuleLora(rank, alpha, False)
    return found


def test_modules_ranks_and_alphas_are_those_of_peft(monkeypatch):
    rng, selected, apart = random.Random(0), 0, 0
    for number in range(250):
        fields = random_fields(rng)
        config = parsed(**fields)
        if number >= 20:  # the first ones as they are, in processes of their own
            monkeypatch.setattr(peft_matching, "is_plain", lambda fields: True)
        elif not peft_matching.is_plain({**config.raw, "layers_pattern": []}):
            apart += 1
        ours = config.resolve(MODULES, False)
        assert {module: said for module, said in ours.items() if isinstance(said, ModuleLora)} == as_peft_has_it(
            fields
        ), fields
        assert ours.keys() == set(MODULES)
        selected += sum(isinstance(said, ModuleLora) for said in ours.values())
    assert selected > 2500 and apart > 5, "nearly nothing is selected, so this test shows nothing"


@pytest.mark.parametrize("fields", [
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "lm_head", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "ensure_weight_tying": True},
    {"target_modules": r".*q_proj|embed_tokens", "ensure_weight_tying": True},
    {"target_modules": r".*q_proj|.*\.embed_tokens", "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "ensure_weight_tying": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ties_embedding", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_peft_builds_has_lora_on_these_modules(fields, ties_embedding):
    config = CONFIG_MAPPING["llama"](**SIZES, vocab_size=320, tie_word_embeddings=ties_embedding)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    peft_model = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields))
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    modules = [module for module in MODULES if not (match := re.search(r"\.(\d+)\.", module)) or int(match[1]) < 2]
    ours = resolved(fields, modules, ties_embedding)
    assert {module: (said.rank, said.scale) for module, said in ours.items() if isinstance(said, ModuleLora)} == theirs


def test_default_targets_are_pefts():
    known = MODEL_TYPES.values() & DEFAULT_TARGETS.keys()
    assert {tuple(DEFAULT_TARGETS[name]) for name in known} == {peft_matching.DEFAULT_TARGETS}


def test_every_field_of_peft_is_known():
    known = peft_config._FIELDS.keys() | peft_config._PATTERNS.keys() | peft_config._REFUSED_FEATURES.keys()
    assert vars(PeftConfig()).keys() - known - peft_config._IGNORED <= {"peft_type", "_custom_modules"}


def test_which_field_leaves_a_module_out():
    said = resolved({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [1]})
    assert said["model.layers.1.self_attn.k_proj"] == "exclude_modules"
    assert said["model.layers.0.self_attn.q_proj"] == "layers_to_transform"
    assert said["model.layers.1.self_attn.v_proj"] == "target_modules"


# -- in time

CATASTROPHE = "([a-z_.0-9]+)+!"


@pytest.mark.parametrize("fields", [
    {"rank_pattern": {"q_proj": 4, CATASTROPHE: 4}},
    {"alpha_pattern": {CATASTROPHE: 4}},
    {"target_modules": CATASTROPHE},
    {"exclude_modules": CATASTROPHE},
    {"layers_to_transform": [1], "layers_pattern": CATASTROPHE},
], ids=lambda fields: next(iter(fields)))  # fmt: skip
def test_a_catastrophic_pattern_is_refused_in_time_by_its_name(fields, monkeypatch):
    monkeypatch.setattr(peft_config, "MATCHING_CPU_S", 0.1)
    start = time.monotonic()
    with pytest.raises(AdapterError, match=re.escape(CATASTROPHE) + ".* takes more than 0.1 s") as caught:
        resolved({"target_modules": ["q_proj", "k_proj"], **fields})
    assert caught.value.status == 400 and time.monotonic() - start < 20


def test_a_machine_that_is_too_busy_says_so(monkeypatch):
    monkeypatch.setattr(peft_config, "MATCHING_TIMEOUT_S", 0.2)
    with pytest.raises(AdapterError, match="too busy") as caught:
        resolved({"target_modules": CATASTROPHE})
    assert caught.value.status == 503


@pytest.mark.parametrize("pattern", ["(", "[a", "(?P<idx>a)(?P<idx>b)", "a{99999999999999}", "(" * 5000, "\\p{L}", "*"])
def test_what_is_no_regular_expression_is_refused_by_its_name(pattern):
    for fields in ({"rank_pattern": {pattern: 4}}, {"target_modules": pattern}):
        with pytest.raises(AdapterError, match="is not a regular expression: .") as caught:
            resolved(fields)
        assert len(str(caught.value)) < 500


def test_many_patterns_of_usual_shape_are_quick():
    """As EVA writes them: the full name of every module, of a model with 80 layers."""
    modules = [f"model.layers.{i}.{name}" for i in range(80) for name in LINEARS]
    start = time.process_time()
    said = resolved(
        {"target_modules": modules, "rank_pattern": {module: 5 + i for i, module in enumerate(modules)}}, modules
    )
    assert [said[module].rank for module in modules] == [5 + i for i in range(len(modules))]
    assert time.process_time() - start < 2


# -- values

HUGE = 10**400
BAD = {
    "r": [None, 0, -1, 4.0, True, "4", [4], float("nan"), float("inf")],
    "lora_alpha": [None, 0, -8, True, "8", [8], float("nan"), float("inf"), HUGE],
    "rank_pattern": ["q_proj", [], ["q_proj"], 4, {"q_proj": 4.0}, {"q_proj": "4"}, {"q_proj": None}, {"q_proj": 0}],
    "alpha_pattern": ["q_proj", [], {"q_proj": "4"}, {"q_proj": float("nan")}, {"q_proj": HUGE}, {"q_proj": True}],
    "use_rslora": ["false", 1, []],
    "bias": [None, "all", "lora_only", 5],
    "target_modules": [5, {"q_proj": 1}, ["q_proj", 5], True],
    "exclude_modules": [5, {}, [None]],
    "layers_to_transform": ["1", 1.0, [1.0], [True], -1, {}, [[1]]],
    "layers_pattern": [5, {}, [5]],
    "init_lora_weights": [1, [], "PiSSA", "loftq", "lora_ga", "zeros"],
    "ensure_weight_tying": ["true", 0],
    "use_dora": [True, 1, "no"],
    "trainable_token_indices": [[1]],
    "modules_to_save": [["lm_head"]],
    "target_parameters": [["x"]],
    "use_of_a_future_version": [True, [1], {"a": 1}],
}  # fmt: skip


@pytest.mark.parametrize("field", BAD)
def test_a_value_of_the_wrong_kind_is_refused_by_field_and_value(field):
    for value in BAD[field]:
        with pytest.raises(AdapterError) as caught:
            resolved({field: value, **({"target_modules": "q_proj"} if field == "none" else {})})
        message = str(caught.value)
        assert field in message and "\n" not in message and len(message) < 400, (field, value)


@pytest.mark.parametrize("fields", [
    {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "init_lora_weights": None},
    {"init_lora_weights": "Gaussian"}, {"init_lora_weights": "eva"}, {"init_lora_weights": "orthogonal"},
    {"lora_alpha": 0.5}, {"lora_dropout": float("nan")}, {"fan_in_fan_out": True}, {"eva_config": {"rho": 2.0}},
    {"modules_to_save": []}, {"megatron_config": None}, {"task_type": None}, {"bias": "none"},
    {"future_switch": False, "future_config": None, "future_list": [], "future_group_size": 16, "future_name": "x"},
], ids=str)  # fmt: skip
def test_what_does_not_change_the_arithmetic_is_taken(fields):
    assert isinstance(resolved(fields)["model.layers.0.self_attn.q_proj"], ModuleLora)


@pytest.mark.parametrize("text,part", [
    (b'{"peft_type": "LORA", "r": 4, "r": 8}', "'r' twice"),
    (b'{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "'a' twice"),
    (b'{"peft_type": "LORA"', "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"", "not valid JSON"),
    (b'"LORA"', "holds str"), (b'{"peft_type": "\\ud800"}', "peft_type"), (b'{"lora_parameters": {"rank": 8}}', "MLX"),
    (b'{"peft_type": "LORA", "lora_alpha": 8}', "no r;"),
    (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"peft_type": "LORA", "bias": ' + b"[" * 400 + b"]" * 400 + b"}", "bias"),
], ids=lambda value: str(value[:40]))  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused(text, part):
    with pytest.raises(AdapterError, match=part) as caught:
        parse_config("a", text)
    str(caught.value).encode()


def test_layers_with_a_regular_expression_are_refused_as_peft_does():
    for fields in ({"layers_to_transform": [1]}, {"layers_pattern": "layers"}):
        with pytest.raises(AdapterError, match="target_modules is a string"):
            resolved({"target_modules": ".*q_proj", **fields})
        with pytest.raises(ValueError):
            PeftConfig(target_modules=".*q_proj", **fields)
    with pytest.raises(AdapterError, match="layers_pattern"):
        resolved({"layers_pattern": "layers"})
