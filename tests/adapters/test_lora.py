"""PEFT directories: all that PEFT writes for LoRA gives peft's tokens; all else is refused with one sentence."""

import functools
import shutil

import pytest
import torch
from adapter_edits import cast, config_of, edit_config, edit_tensors, keep, tensors_of
from engine_fixture import make_engine, request, run, tokens_of
from peft import PeftModel
from peft_adapters import ALL_MODULES, make_peft_adapter
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, load_theirs, make_tiny_model

from specserve.adapter_files import WEIGHTS_FILE
from specserve.errors import AdapterError

KINDS = {
    "rank 1": {"r": 1},
    "rank 64, large alpha": {"r": 64, "lora_alpha": 128},
    "rslora": {"r": 8, "use_rslora": True},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "one module": {"target_modules": ["down_proj"], "r": 5},
    "rank and alpha patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 7, r"layers\.0\.mlp\.up_proj": 2},
        "alpha_pattern": {"o_proj": 3, "down_proj": 40},
    },
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"embed": True},
    "lm_head": {"lm_head": True},
    "everything": {"embed": True, "lm_head": True, "r": 6, "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: make_peft_adapter(model_dir, root / kind.replace(" ", "_").replace(",", ""), seed=i, std=0.15, **kwargs)
        for i, (kind, kwargs) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module", params=["auto", "torch"])
def kernels(request):
    return request.param


@pytest.fixture(scope="module")
def mixed(kernels, model_dir, adapters):
    """Every kind of adapter and the base in one batch, twice, with logprobs."""
    engine = make_engine(model_dir, kernels=kernels)
    hashes = {kind: engine.load_adapter(kind, path).content_hash for kind, path in adapters.items()}
    requests = [
        request(f"{kind} {i}", [3, 1, 4, 1, 5, 9, 2, 6 + i], adapter=h, max_tokens=12, ignore_eos=True, logprobs=0)
        for i in range(2)
        for kind, h in [*hashes.items(), ("base", None)]
    ]
    return run(engine, requests)


def peft_reference(model_dir, path, prompt, num_tokens):
    model = load_theirs(model_dir)
    if path is not None:
        model = PeftModel.from_pretrained(model, path)
    model.eval()
    ids = torch.tensor([prompt])
    logprobs = []
    with torch.inference_mode():
        for _ in range(num_tokens):
            row = model(input_ids=ids).logits[0, -1]
            token = int(row.argmax())
            logprobs.append(float(row.log_softmax(-1)[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ids[0, len(prompt) :].tolist(), logprobs


@functools.cache
def mixed_reference(model_dir, path, last):
    return peft_reference(model_dir, path, [3, 1, 4, 1, 5, 9, 2, last], 12)


@pytest.mark.parametrize("kind", [*KINDS, "base"])
def test_mixed_batch_equals_peft_adapter_by_adapter(mixed, adapters, model_dir, kind):
    base = mixed["base 0"].tokens
    for i in range(2):
        tokens, logprobs = mixed_reference(model_dir, adapters.get(kind), 6 + i)
        result = mixed[f"{kind} {i}"]
        assert result.error is None and result.tokens == tokens
        assert [item.logprob for item in result.logprobs] == pytest.approx(logprobs, abs=1e-4)
    if kind != "base":
        base_logprobs = [item.logprob for item in mixed["base 0"].logprobs]
        assert mixed[f"{kind} 0"].tokens != base or [
            item.logprob for item in mixed[f"{kind} 0"].logprobs
        ] != pytest.approx(base_logprobs, abs=1e-3), "the adapter changes nothing, so this test shows nothing"


@pytest.mark.parametrize("architecture", [name for name in MODEL_TYPES if name != "llama"])
def test_other_architectures_equal_peft(architecture, tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", architecture)
    has_others = architecture in ("phi3", "glm", "glm4", "granite4")
    modules, scales = "all-linear" if has_others else ALL_MODULES, architecture == "granite"
    places = {"embed": scales or architecture.startswith("gemma"), "lm_head": scales}
    path = make_peft_adapter(model_dir, tmp_path / "a", r=4, std=0.15, target_modules=modules, **places)
    engine = make_engine(model_dir)
    content_hash = engine.load_adapter("a", path).content_hash
    results = tokens_of(
        run(
            engine,
            [
                request("a", [3, 1, 4, 1, 5], adapter=content_hash, max_tokens=10, ignore_eos=True),
                request("b", [3, 1, 4, 1, 5], max_tokens=10, ignore_eos=True),
            ],
        )
    )
    assert results["a"] == peft_reference(model_dir, path, [3, 1, 4, 1, 5], 10)[0]
    assert results["b"] == peft_reference(model_dir, None, [3, 1, 4, 1, 5], 10)[0]


@pytest.mark.parametrize("architecture", [name for name in MODEL_TYPES if "that sees" in name])
def test_a_model_that_sees_is_served_under_the_names_of_every_transformers(architecture, tmp_path):
    """Of model and adapter; an adapter of its language model alone is one of it, too."""
    model_dir = make_tiny_model(tmp_path / "model", architecture)
    adapter = make_peft_adapter(
        model_dir, tmp_path / "a", target_modules=r".*language_model.*\.(q|v|down)_proj", std=0.3
    )
    model, lora = (
        load_file(folder / name) for folder, name in ((model_dir, "model.safetensors"), (adapter, WEIGHTS_FILE))
    )
    answers = []
    for of_model, of_lora in (
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
    ):
        renamed = {name.replace("language_model.model.", of_model): tensor for name, tensor in model.items()}
        save_file(renamed, model_dir / "model.safetensors")
        renamed = {name.replace("model.language_model.", of_lora): tensor for name, tensor in lora.items()}
        save_file(renamed, adapter / WEIGHTS_FILE)
        if of_lora == "model.":
            edit_config(adapter, target_modules=["q_proj", "v_proj", "down_proj"])
        engine = make_engine(model_dir)
        asked = request("a", [3, 1, 4], adapter=engine.load_adapter("a", adapter).content_hash, max_tokens=10)
        answers.append(tokens_of(run(engine, [asked, request("b", [3, 1, 4], max_tokens=10)])))
    assert answers[1:] == answers[:1] * 2 and answers[0]["a"] != answers[0]["b"]


SERVED = {
    "all-linear": config_of(target_modules="all-linear"),
    "targets by a regular expression": config_of(target_modules=r".*\.(self_attn|mlp)\.\w+_proj"),
    "targets by full names": lambda path: edit_config(
        path, target_modules=[f"model.layers.{i}.{p}.{m}_proj" for i in (0, 1) for p, m in PLACES]
    ),
    "PEFT's own targets": lambda path: (edit_config(path, target_modules=None), keep(path, "q_proj", "v_proj")),
    "excluded modules": lambda path: (edit_config(path, exclude_modules=r".*\.o_proj"), keep(path, *ALL_MODULES[:3])),
    "layers by a pattern": lambda path: (
        edit_config(path, layers_to_transform=[1], layers_pattern="layers", target_modules=list(ALL_MODULES)),
        keep(path, "layers.1."),
    ),
    "patterns of all kinds": lambda path: edit_config(
        path, alpha_pattern={"^model.layers.0.mlp.up_proj": 3, r".*1.*\.k_proj": 5.5, "mlp.down_proj": 50, "o.proj": 1}
    ),
    "a module without weights": lambda path: keep(path, *ALL_MODULES[1:]),
    "orthogonal": config_of(init_lora_weights="orthogonal"),
    "fan_in_fan_out": config_of(fan_in_fan_out=True, lora_dropout=0.5),
    "alpha of no whole number": config_of(lora_alpha=2.5, use_rslora=None),
    "fields of a future version": config_of(use_future=False, future_group_size=16),
    "fp64": tensors_of(cast(torch.float64)),
    "bf16": tensors_of(cast(torch.bfloat16)),
    "fp16": tensors_of(cast(torch.float16)),
    "fp8 e4m3": tensors_of(cast(torch.float8_e4m3fn)),
    "fp8 e5m2": tensors_of(cast(torch.float8_e5m2)),
}
PLACES = [("self_attn", name) for name in "qkvo"] + [("mlp", name) for name in ("gate", "up", "down")]


def served_and_theirs(engine, model_dir, path, num_tokens=5):
    content_hash = engine.load_adapter("edited", path).content_hash
    prompt = [3, 1, 4, 1, 5, 9]
    ask = request("a", prompt, adapter=content_hash, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    result = run(engine, [ask])["a"]
    assert result.error is None
    tokens, logprobs = peft_reference(model_dir, path, prompt, num_tokens)
    return (result.tokens, [item.logprob for item in result.logprobs]), (tokens, pytest.approx(logprobs, abs=1e-4))


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.filterwarnings("ignore")
def test_what_a_configuration_and_its_tensors_may_say_equals_peft(engine, adapters, model_dir, tmp_path, kind):
    path = shutil.copytree(adapters["rslora"], tmp_path / "edited")
    SERVED[kind](path)
    ours, theirs = served_and_theirs(engine, model_dir, path)
    assert ours == theirs


@pytest.mark.filterwarnings("ignore")
def test_loras_on_tied_embeddings_equal_peft_apart_and_as_one(tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    path = make_peft_adapter(model_dir, tmp_path / "a", r=4, std=0.15, embed=True, lm_head=True)
    engine = make_engine(model_dir)
    ours, theirs = served_and_theirs(engine, model_dir, path)
    assert ours == theirs
    edit_config(path, ensure_weight_tying=True, target_modules=[*ALL_MODULES, "embed_tokens"])
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        engine.load_adapter("a", path)
    edit_tensors(path, lambda tensors: tensors | tied_head(tensors))
    ours, theirs = served_and_theirs(engine, model_dir, path)
    assert ours == theirs


def tied_head(tensors):
    embed, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
    return {
        f"{head}A.weight": tensors[f"{embed}B"].T.contiguous(),
        f"{head}B.weight": tensors[f"{embed}A"].T.contiguous(),
    }


def test_identity_is_the_content_not_the_name(engine, adapters, tmp_path):
    path = adapters["rank 1"]
    copy = shutil.copytree(path, tmp_path / "renamed")
    assert engine.load_adapter("x", copy).content_hash == engine.load_adapter("y", path).content_hash
    tensors = load_file(copy / WEIGHTS_FILE)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, copy / WEIGHTS_FILE)
    assert engine.load_adapter("x", copy).content_hash != engine.load_adapter("y", path).content_hash
