"""The trainer's forward against transformers' own: the same loss and the same gradients for every architecture."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft_adapters import make_peft_adapter
from tiny_models import MODEL_TYPES, load_theirs, make_tiny_model
from transformers import AutoModelForCausalLM

from specserve.errors import UserError
from specserve.model.config import ModelConfig
from specserve.training.causal_attention import causal_attention
from specserve.training.data.dataset import Example
from specserve.training.head_fit import collect_states
from specserve.training.head_module import task_vocab
from specserve.training.lora_model import LoraModel, load_base
from specserve.training.preflight import check_targets
from specserve.training.run_config import LoraConfig

CASES = [
    *((name, {}) for name in MODEL_TYPES),
    ("gemma3", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 40, "head_dim": 32}),
    ("mistral", {"sliding_window": 8, "head_dim": 32, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_loss_and_gradients_are_those_of_the_whole_model(tmp_path, architecture, settings):
    make_tiny_model(tmp_path, architecture, **settings)
    torch.manual_seed(0)
    model = LoraModel(tmp_path, LoraConfig(r=4, alpha=8, dropout=0.0), torch.float32, torch.device("cpu"), None)
    with torch.no_grad():
        for parameter in model.parameters:  # B starts at zero, and with it A's gradient
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    tokens = torch.randint(3, 300, (2, 24)).tolist()
    examples = [Example(tokens[0], [False] * 9 + [True] * 15, 1), Example(tokens[1], [False, True, True] * 8, 2)]

    hidden = model.hidden(examples)
    F.cross_entropy(model.logits(hidden.last).float(), hidden.targets).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters]
    model.peft.zero_grad()
    labels = torch.tensor([[t if m else -100 for t, m in zip(e.tokens, e.loss_mask, strict=True)] for e in examples])
    model.peft(input_ids=torch.tensor(tokens), labels=labels).loss.backward()
    wanted = [parameter.grad for parameter in model.parameters]
    assert len(ours) == len(wanted) > 0
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    half = LoraModel(tmp_path, LoraConfig(r=4, alpha=8, dropout=0.0), torch.bfloat16, torch.device("cpu"), None)
    for parameter, value in zip(half.parameters, model.parameters, strict=True):
        parameter.data.copy_(value)
    hidden = half.hidden(examples)
    F.cross_entropy(half.logits(hidden.last).float(), hidden.targets).backward()
    rounded, exact = (torch.cat([g.flatten() for g in grads]) for grads in ([p.grad for p in half.parameters], wanted))
    assert (rounded - exact).norm() < 0.15 * exact.norm(), (rounded - exact).norm() / exact.norm()


@pytest.mark.parametrize("is_tied", [True, False])
def test_of_a_model_that_sees_the_lm_head_of_its_files_is_trained_on(tmp_path, is_tied):
    """Its text_config does not say that it is the embedding, or what is around it says so wrongly."""
    make_tiny_model(tmp_path, "mistral3 that sees", tie_word_embeddings=is_tied)
    file = tmp_path / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "tie_word_embeddings"}
    file.write_text(json.dumps(config))
    base = load_base(AutoModelForCausalLM, tmp_path, torch.float32, torch.device("cpu"))
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(base(ids).logits, load_theirs(tmp_path)(ids).logits, atol=1e-4, rtol=0)


def test_a_lora_that_is_gone_on_from_has_the_dropout_of_this_run(tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", "llama")
    adapter = make_peft_adapter(model_dir, tmp_path / "old", r=4)
    config = LoraConfig(adapter=str(adapter), dropout=0.25)
    model = LoraModel(model_dir, config, torch.float32, torch.device("cpu"), None)
    assert {each.p for each in model.peft.modules() if isinstance(each, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_of_two_products_is_torchs(num_kv_heads):
    torch.manual_seed(0)
    shapes = (2, 6, 17, 8), (2, num_kv_heads, 17, 8), (2, num_kv_heads, 17, 8)
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, 17, 6, 8)
    found, wanted = (
        causal_attention(*given, scale=0.3),
        F.scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2),
    )
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(*(torch.autograd.grad((x * weight).sum(), given) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_of_unequal_rows_has_the_gradients_of_its_rows_alone(tmp_path):
    make_tiny_model(tmp_path)
    torch.manual_seed(0)
    model = LoraModel(tmp_path, LoraConfig(r=4, alpha=8, dropout=0.0), torch.float32, torch.device("cpu"), None)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    lengths = (5, 40, 17)
    examples = [Example(torch.randint(3, 300, (n,)).tolist(), [False] * 3 + [True] * (n - 3), 1) for n in lengths]

    def gradients(*batches):
        model.peft.zero_grad()
        for batch in batches:
            hidden = model.hidden(batch)
            F.cross_entropy(model.logits(hidden.last).float(), hidden.targets, reduction="sum").backward()
        return [parameter.grad.clone() for parameter in model.parameters]

    together, alone = gradients(examples), gradients(*([example] for example in examples))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_states_of_a_row_with_several_answers_start_at_its_last_prompt(tmp_path):
    make_tiny_model(tmp_path)
    model = LoraModel(tmp_path, LoraConfig(r=4), torch.float32, torch.device("cpu"), None)
    tokens = torch.randint(3, 300, (2, 20)).tolist()
    masks = [[False] * 5 + [True] * 4 + [False] * 6 + [True] * 5, [False] * 8 + [True] * 12]
    examples = [Example(row, mask, 1) for row, mask in zip(tokens, masks, strict=True)]
    with torch.no_grad():  # what stands between layers may be beyond fp16's range
        model._causal.model.embed_tokens.weight *= 1e6
    last, tapped, starts = collect_states(model, examples, 100)
    assert model.hidden(examples).tapped.abs().max() > torch.finfo(torch.float16).max
    assert bool(tapped.isfinite().all()) and tapped.float().square().mean(dim=-1).sqrt().sub(1).abs().max() < 1e-2
    for example, start in zip(examples, starts, strict=True):
        with torch.no_grad():
            whole = model._causal.model(input_ids=torch.tensor([example.tokens])).last_hidden_state[0]
        wanted = whole[example.prompt_len - 1 : len(example.tokens) - 1]
        torch.testing.assert_close(last[start : start + len(wanted)].float(), wanted, rtol=2e-3, atol=2e-3)
    assert examples[0].answers == [tokens[0][5:9], tokens[0][15:]] and examples[0].completion == tokens[0][15:]
    assert task_vocab(examples, 300) == sorted({t for e in examples for answer in e.answers for t in answer})


def test_modules_of_other_models_are_refused(tmp_path):
    model = ModelConfig.from_dir(make_tiny_model(tmp_path, "phi3"))
    check_targets(LoraConfig(target_modules=("qkv_proj", "lm_head")), model)
    with pytest.raises(
        UserError, match="holds 'q_proj', which a Phi3ForCausalLM does not have; its linears are qkv_proj"
    ):
        check_targets(LoraConfig(target_modules=("o_proj", "q_proj")), model)
