"""The shipped adapters on the real base model: mixed traffic gives the tokens of plain decoding, and peft alone agrees.

Slow: minutes, and the default model must have been fetched (`specserve pull`).
"""

import shutil
import subprocess
import sys

import pytest
import torch
from engine_fixture import make_engine, request, run, tokens_of
from places import EXAMPLES

from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.dataset import read_rows, tokenize

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
DEMOS = ("control2json", "debtags", "summary")
PROMPTS_EACH = 2
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def model_dir():
    return resolve_model("")


@pytest.fixture(scope="module")
def prompts(model_dir):
    """Held-out prompts of each task as token ids."""
    tokenizer, eos = TextTokenizer(model_dir), eos_token_ids(model_dir)
    files = {name: EXAMPLES / "data" / f"{name}.dev.jsonl" for name in DEMOS}
    return {
        name: [e.prompt for e in tokenize(read_rows(file)[:PROMPTS_EACH], tokenizer, eos)]
        for name, file in files.items()
    }


@pytest.fixture(scope="module")
def setup(model_dir, tmp_path_factory):
    """An engine, and the hashes of the demo adapters, a random LoRA without a head and None for the base model."""
    root = tmp_path_factory.mktemp("adapters")
    command = [sys.executable, str(EXAMPLES / "make_adapters.py"), "--out", str(root), "--num", "1", "--rank", "16"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    engine = make_engine(model_dir, kv_cache_gib=0.5, max_batched_tokens=512, dtype="auto", kernels="native")
    infos = {name: engine.load_adapter(name, EXAMPLES / "adapters" / name) for name in DEMOS}
    assert all(info.lookahead is not None and info.lookahead.error is None for info in infos.values())
    plain = engine.load_adapter("random-0", root / "random-0")
    assert plain.lookahead is None
    return engine, {name: info.content_hash for name, info in infos.items()} | {"plain": plain.content_hash}


def mixed(adapters, prompts, mode, temperature):
    """Each demo adapter answers its own task; the plain LoRA and the base model get prompts of all three."""
    work = [(name, adapters[name], prompt) for name in DEMOS for prompt in prompts[name]]
    work += [
        (name, adapters.get(name), prompts[task][idx])
        for name, idx in (("plain", 0), ("base", 1))
        for task in DEMOS
    ]  # fmt: skip
    return [
        request(
            f"{idx}-{name}",
            prompt,
            adapter=adapter,
            mode=mode,
            max_draft_tokens=16,
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=idx,
        )
        for idx, (name, adapter, prompt) in enumerate(work)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_mixed_traffic_gives_the_same_tokens_with_speculation_off_and_on(setup, prompts, temperature):
    """As served by default, at 16 bits: no row depends on its batch, so sampled tokens are equal, too."""
    engine, adapters = setup
    plain = run(engine, mixed(adapters, prompts, "off", temperature))
    want = tokens_of(plain)
    assert all(result.usage.draft_tokens == 0 for result in plain.values())
    assert tokens_of(run(engine, mixed(adapters, prompts, "auto", temperature), stagger=2)) == want
    eager = run(engine, mixed(adapters, prompts, "fixed", temperature))
    assert tokens_of(eager) == want
    check_drafted(eager)


def test_in_torch_mixed_traffic_gives_the_same_greedy_tokens_with_speculation_off_and_on(model_dir, prompts):
    """In fp32; sampled tokens may differ there where a draw falls between the roundings of two row counts."""
    engine = make_engine(model_dir, kv_cache_gib=0.5, max_batched_tokens=512, kernels="torch")
    adapters = {name: engine.load_adapter(name, EXAMPLES / "adapters" / name).content_hash for name in DEMOS}
    adapters["plain"] = None
    want = tokens_of(run(engine, mixed(adapters, prompts, "off", 0.0)))
    assert tokens_of(run(engine, mixed(adapters, prompts, "fixed", 0.0), stagger=2)) == want


def check_drafted(results):
    for name in DEMOS:
        sources = [set(r.usage.accepted_by_source) for key, r in results.items() if key.endswith(name)]
        assert any("head" in names for names in sources), name
    for name in ("plain", "base"):
        assert sum(r.usage.draft_tokens for key, r in results.items() if key.endswith(name)) > 0


@pytest.mark.parametrize("name", DEMOS)
def test_the_lora_half_alone_in_peft_gives_the_same_greedy_tokens(model_dir, prompts, name, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    prompt = prompts[name][0]
    engine = make_engine(model_dir, kv_cache_gib=0.5, max_batched_tokens=512)
    adapter = engine.load_adapter(name, EXAMPLES / "adapters" / name).content_hash
    item = request("a", prompt, adapter=adapter, max_draft_tokens=16, max_tokens=MAX_TOKENS)
    ours = tokens_of(run(engine, [item]))["a"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(EXAMPLES / "adapters" / name / file, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=sorted(eos_token_ids(model_dir)),
            pad_token_id=0,
        )
    theirs = output[0, len(prompt) :].tolist()
    with model.disable_adapter(), torch.inference_mode():
        bare = model(input_ids=ids).logits[0, -1]
    with torch.inference_mode():
        assert not torch.allclose(model(input_ids=ids).logits[0, -1], bare, atol=0.1)  # the LoRA does something
    assert ours == theirs
