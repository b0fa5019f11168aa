"""A model directory is loaded exactly or refused by name: config.json, weight files, tensors."""

from __future__ import annotations

import json
import os

import pytest
import torch
from decoder_driver import Driver, native_choice
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, load_theirs, make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from specserve.compute.loader import load_model
from specserve.errors import ModelError
from specserve.memory import give_memory_back
from specserve.model.config import NO_ROPE, ModelConfig
from specserve.model.shapes import tensor_shapes

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
GRANITE_4 = {"architectures": ["GraniteMoeHybridForCausalLM"]}
ARCHITECTURES = [name for name in MODEL_TYPES if "sees" not in name]


@pytest.fixture
def model_dir(tmp_path):
    return make_tiny_model(tmp_path / "model", tie_word_embeddings=False)


def edit_config(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def logits(path, dtype="auto"):
    driver = Driver(load_model(path, CPU, dtype))
    return driver.step([(driver.sequence(), [1, 2, 3, 4])])[0]


def refused(path, *parts):
    with pytest.raises(ModelError) as caught:
        load_model(path, CPU)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expected_tensors_are_those_that_transformers_writes(tmp_path, architecture):
    path = make_tiny_model(tmp_path, architecture)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    assert tensor_shapes(ModelConfig.from_dir(path)) == written


def test_sharded_weights_equal_one_file(model_dir, tmp_path):
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(logits(sharded), logits(model_dir))
    (shard, *_) = sorted(sharded.glob("*.safetensors"))
    shard.unlink()
    refused(sharded, f"lacks {shard.name}", "index")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_keeps_the_checkpoint_dtype(model_dir, dtype):
    edit_tensors(model_dir, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    decoder = load_model(model_dir, CPU)
    assert decoder.weight_dtype_name == str(dtype).removeprefix("torch.")
    assert decoder.embed.dtype == dtype and decoder.device == CPU
    assert load_model(model_dir, CPU, "fp32").weight_dtype_name == "float32"


def test_missing_unexpected_and_mis_shaped_tensors_are_named_together(model_dir):
    def change(tensors):
        tensors.pop("model.norm.weight")
        tensors["model.extra.weight"] = torch.zeros(3)
        tensors[Q_PROJ] = torch.zeros(64, 65)

    edit_tensors(model_dir, change)
    refused(
        model_dir,
        "model.norm.weight [64] is missing",
        "model.extra.weight is not part of this architecture",
        f"{Q_PROJ} has shape [64, 65], wanted [64, 64]",
    )


def test_a_long_list_of_problems_is_cut(model_dir):
    edit_config(model_dir, num_hidden_layers=100)
    refused(model_dir, "model.layers.2.input_layernorm.weight [64] is missing", "more")


def test_absurd_sizes_are_refused_before_anything_is_allocated(model_dir):
    edit_config(model_dir, vocab_size=10**12)
    refused(model_dir, "model.embed_tokens.weight has shape [320, 64], wanted [1000000000000, 64]")


def test_integer_weights_are_refused(model_dir):
    edit_tensors(model_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}))
    refused(model_dir, f"{Q_PROJ} has dtype I8", "BF16")


def test_benign_extras_are_tolerated(tmp_path):
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    before = logits(path)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit_tensors(path, change)
    assert torch.equal(logits(path), before)


@pytest.mark.parametrize("architecture", ["llama", "mistral3 that sees", "llava"])
@pytest.mark.parametrize(
    ("says", "holds"),
    [("absent", "own"), (True, "own"), (False, "own"), (True, "copy"), (True, "none"), ("absent", "none")],
    ids=str,
)
def test_an_lm_head_that_is_not_the_embedding_is_served_whatever_the_configuration_says(
    tmp_path, architecture, says, holds
):
    """As transformers does: one in the files counts if it differs, and what is said if there is none."""
    if architecture != "mistral3 that sees" and (says, holds) == ("absent", "none"):
        pytest.skip("a head that is missing, and nothing says so, is an error")
    made = "mistral3 that sees" if architecture == "llava" else architecture
    path = make_tiny_model(tmp_path, made, tie_word_embeddings=holds != "own")
    if architecture == "llava":  # its parts have the same names
        edit_config(path, architectures=["LlavaForConditionalGeneration"], model_type="llava")
    text = json.loads((path / "config.json").read_text())
    edit_config(path, tie_word_embeddings=says)
    if "text_config" in text:
        text["text_config"].pop("tie_word_embeddings")
        edit_config(path, text_config=text["text_config"])

    def change(tensors):
        tensors.pop("lm_head.weight", None)
        (embedding,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
        if holds != "none":
            name = "language_model.lm_head.weight" if "text_config" in text else "lm_head.weight"
            tensors[name] = embedding.clone() if holds == "copy" else embedding.flip(0).contiguous()

    edit_tensors(path, change)
    assert ModelConfig.from_dir(path).tie_word_embeddings == (holds != "own")
    theirs = load_theirs(path).eval()(torch.tensor([[1, 2, 3, 4]])).logits[0, -1:]
    torch.testing.assert_close(logits(path)[-1:], theirs, atol=1e-4, rtol=0)


def test_a_missing_head_of_an_untied_model_is_refused(model_dir):
    edit_tensors(model_dir, lambda tensors: tensors.pop("lm_head.weight"))
    refused(model_dir, "lm_head.weight [320, 64] is missing")


def test_a_running_model_does_not_depend_on_its_files(model_dir):
    decoder = load_model(model_dir, CPU)
    driver = Driver(decoder)
    before = driver.step([(driver.sequence(), [1, 2, 3])])[0].clone()
    file = model_dir / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert torch.equal(driver.step([(driver.sequence(), [1, 2, 3])])[0], before)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks of memory are read in Linux' /proc")
def test_loading_never_holds_the_weights_twice(tmp_path):
    path = make_tiny_model(tmp_path, vocab_size=24_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=3)
    edit_tensors(path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    for quantization in ("none", "int8"):
        give_memory_back()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins again
        before = memory_mib("VmRSS")
        decoder = load_model(path, CPU, "bf16", [native_choice(quantization=quantization)])
        held, grown = memory_mib("VmRSS") - before, memory_mib("VmHWM") - before
        assert decoder.embed.nbytes / 2**20 == pytest.approx(35, abs=1) and 70 < held < 150
        # Pieces in fp32 take 43 to 75; beside them all weights in 16 bits would be 75, the largest matrix in fp32 70.
        assert grown < held + 100
        del decoder


def memory_mib(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:")) / 1024


def test_pickles_are_never_loaded(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    refused(model_dir, "no model.safetensors", "pytorch_model.bin is a pickle")


def test_truncated_and_absent_files_are_refused(model_dir, tmp_path):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(model_dir, "not readable as safetensors")
    file.unlink()
    refused(model_dir, "has no model.safetensors")
    refused(tmp_path / "nowhere", "has no config.json")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a safetensors index"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "lacks x.safetensors"),
        ('{"weight_map": {"a": 3}}', "not a safetensors index"),
    ],
)
def test_a_bad_index_is_refused(model_dir, index, message):
    (model_dir / "model.safetensors.index.json").write_text(index)
    refused(model_dir, message)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": ["BertModel"]}, ["BertModel", "LlamaForCausalLM"]),
        ({"architectures": "absent", "model_type": "opt"}, ["opt", "LlamaForCausalLM"]),
        ({"hidden_act": "relu"}, ["relu", "silu"]),
        ({"hidden_size": "absent"}, ["config.json has no 'hidden_size'"]),
        ({"hidden_size": "64"}, ["hidden_size='64' must be a whole number"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings=0 must be", "at least 1"]),
        (GRANITE_4 | {"layer_types": ["attention", "mamba"]}, ["mamba is not supported", "attention and an MLP"]),
        (GRANITE_4 | {"layer_types": ["attention"] * 2}, ["num_local_experts=8 is not supported"]),
        ({"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0}, ["residual_multiplier=0 must be"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps='1e-5' must be a number"]),
        ({"num_key_value_heads": 3}, ["4 heads a multiple of 3 KV heads"]),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, ["mrope", "llama3"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -4}}, ["factor -4", "yarn"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["no 'factor'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["8 of 16 dimensions", "LlamaFor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2}}, ["partial_rotary_factor=2"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {}}
            | {"quantization_config": {"quant_method": "fp8"}},
            ["fp8"],
        ),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}}, ["opt", "Llava"]),
        ({"final_logit_softcapping": 0}, ["final_logit_softcapping=0", "above 0"]),
        ({"no_rope_layer_interval": 4, "no_rope_layers": [1]}, ["no_rope_layers has 1", "2"]),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_named(model_dir, changes, parts):
    edit_config(model_dir, **changes)
    refused(model_dir, *parts)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_config_is_refused(model_dir, text):
    (model_dir / "config.json").write_text(text)
    refused(model_dir, "config.json")


@pytest.mark.parametrize("kinds", [["chunked_attention"] * 3, ["full_attention"] * 2], ids=str)
def test_unknown_or_miscounted_layer_types_are_refused(tmp_path, kinds):
    path = make_tiny_model(tmp_path, "gemma3")
    edit_config(path, layer_types=kinds)
    refused(path, "layer_types", "full_attention and sliding_attention")


def test_an_architecture_is_recognised_by_its_model_type(model_dir):
    before = load_model(model_dir, CPU).config
    edit_config(model_dir, architectures="absent")
    assert load_model(model_dir, CPU).config == before


def test_an_older_name_means_the_same_architecture(tmp_path):
    path = make_tiny_model(tmp_path, "ernie4_5")
    before = ModelConfig.from_dir(path)
    edit_config(path, architectures=["Ernie4_5_ForCausalLM"])
    assert ModelConfig.from_dir(path) == before


@pytest.mark.parametrize(
    ("architecture", "num_ropes"),
    [("gemma3", 2), ("olmo3", 2), ("exaone4", 2), ("smollm3", 2), ("gemma2", 1), ("ministral3", 1)],
)
def test_rotary_embeddings_stand_once_in_the_order_of_their_layers(tmp_path, architecture, num_ropes):
    """Kept costs of steps are found by the configuration's text, which so is the same in every process."""
    path = make_tiny_model(tmp_path, architecture)
    changes = {"rope_parameters": "absent", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    if architecture == "ministral3":
        changes = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
    edit_config(path, **changes)
    config = ModelConfig.from_dir(path)
    assert list(config.ropes) == list(dict.fromkeys(config.rope_keys)) and len(config.ropes) == num_ropes
    assert architecture == "smollm3" or len(set(config.windows)) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_keys_mean_what_transformers_assumes(tmp_path, architecture):
    path = make_tiny_model(tmp_path, architecture)
    absent = ["sliding_window", "query_pre_attn_scalar", "rms_norm_eps", "layer_types", "rope_parameters", "head_dim"]
    absent += ["attn_logit_softcapping", "final_logit_softcapping"]
    absent += ["max_window_layers", "use_sliding_window", "tie_word_embeddings", "attention_bias", "no_rope_layers"]
    absent += ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
    if architecture in ("gemma3", "mistral", "ministral3"):  # text_config of those that see says next to nothing
        absent += ["vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    if architecture == "granite4":  # without these its layers are recurrent
        absent.remove("layer_types")
    edit_config(path, **dict.fromkeys(absent, "absent"))
    ours, theirs = ModelConfig.from_dir(path), AutoConfig.from_pretrained(path)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if architecture == "mistral" else "full"] * 2
    assert ours.windows == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
    sizes = (ours.vocab_size, ours.num_heads, ours.num_kv_heads, ours.max_position_embeddings)
    names = ("vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    assert sizes == tuple(getattr(theirs, name) for name in names)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    multipliers = (ours.embed_scale, ours.logits_divisor, ours.attention_scale)
    assert "granite" not in architecture or multipliers == (1.0, 1.0, theirs.attention_multiplier)
    turned = getattr(theirs, "no_rope_layers", [1] * len(kinds))
    assert [key != NO_ROPE for key in ours.rope_keys] == [bool(is_turned) for is_turned in turned]
    rope = theirs.rope_parameters
    assert ours.rotary_dim == ours.head_dim * rope.get("partial_rotary_factor", 1)
    for kind, config in ours.ropes.items() - {(NO_ROPE, ours.ropes.get(NO_ROPE))}:
        assert config.theta == rope.get(kind, rope)["rope_theta"]
