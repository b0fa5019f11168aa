"""The shipped adapters on the real base model: mixed traffic gives the tokens of plain decoding, and peft alone agrees.

Everything is fp32. Slow: minutes, and the default model must have been fetched (`specserve pull`).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_fixture import make_engine, request, run, tokens_of

from specserve.model_store import resolve_model
from specserve.sampler import Sampler, sample_rows, uniform
from specserve.special_tokens import eos_token_ids
from specserve.tokenizer import TextTokenizer
from specserve.training.dataset import read_rows, tokenize

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
EXAMPLES = Path(__file__).parent.parent / "examples"
DEMOS = ("control2json", "debtags", "summary")
PROMPTS_EACH = 2
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def model_dir():
    return resolve_model("")


@pytest.fixture(scope="module")
def prompts(model_dir):
    """Held-out prompts of each task as token ids."""
    tokenizer, eos = TextTokenizer(model_dir), min(eos_token_ids(model_dir))
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
    engine = make_engine(model_dir, kv_cache_gib=0.5, max_batched_tokens=512)
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


class RecordedRows:
    """Keeps the logits of every sampled row by request and the tokens before it."""

    def __init__(self, monkeypatch):
        self.rows = {}
        sample = Sampler.sample

        def recording(sampler, logits, groups):
            for group in groups:
                for idx in range(group.num_rows):
                    before = (*group.seq.tokens, *group.drafts[:idx])
                    self.rows[group.seq.request.request_id, before] = logits[group.first_row + idx].clone()
            return sample(sampler, logits, groups)

        monkeypatch.setattr(Sampler, "sample", recording)

    def take(self):
        rows, self.rows = self.rows, {}
        return rows


def assert_same_up_to_rounding(requests, want, got, want_rows, got_rows):
    """Equal tokens, but for a draw that falls between the two roundings of one distribution; it ends the comparison.

    Sampling inverts the cumulative distribution in vocabulary order, so logits that differ in the sixth digit, as they
    do between forwards of different row counts, move thousands of its steps a little: one draw in 500 to 1,700 fell on
    such a step at temperature 0.8. Each difference must be explained by that, and few may be.
    """
    num_split = 0
    for item in requests:
        key = item.request_id
        if want[key] == got[key]:
            continue
        pairs = zip(want[key], got[key], strict=False)
        first = next((idx for idx, (a, b) in enumerate(pairs) if a != b), None)
        assert first is not None, f"{key}: one answer is the beginning of the other"
        before = (*item.prompt_token_ids, *want[key][:first])
        a, b = want_rows[key, before], got_rows[key, before]
        assert (a - b).abs().max() < 5e-4, key
        draw = [(item.sampling, uniform(item.sampling.seed, item.sample_idx, len(before)))]
        assert (
            int(sample_rows(a[None], draw)) == want[key][first] and int(sample_rows(b[None], draw)) == got[key][first]
        )
        num_split += 1
    assert num_split <= len(requests) // 4


def test_mixed_traffic_gives_the_same_greedy_tokens_with_speculation_off_and_auto(setup, prompts, monkeypatch):
    engine, adapters = setup
    plain = run(engine, mixed(adapters, prompts, "off", 0.0))
    want = tokens_of(plain)
    assert all(result.usage.draft_tokens == 0 for result in plain.values())
    assert tokens_of(run(engine, mixed(adapters, prompts, "auto", 0.0), stagger=2)) == want
    monkeypatch.setattr(engine.proposer.cost_model, "row_price", lambda *args: 0.0)  # every draft is worth its row
    eager = run(engine, mixed(adapters, prompts, "auto", 0.0))
    assert tokens_of(eager) == want
    check_drafted(eager)


def test_mixed_traffic_samples_the_same_tokens_with_speculation_off_and_auto(setup, prompts, monkeypatch):
    engine, adapters = setup
    recorded = RecordedRows(monkeypatch)
    want = tokens_of(run(engine, mixed(adapters, prompts, "off", 0.8)))
    want_rows = recorded.take()
    requests = mixed(adapters, prompts, "auto", 0.8)
    got = tokens_of(run(engine, requests, stagger=2))
    assert_same_up_to_rounding(requests, want, got, want_rows, recorded.take())
    monkeypatch.setattr(engine.proposer.cost_model, "row_price", lambda *args: 0.0)
    eager = run(engine, requests)
    assert_same_up_to_rounding(requests, want, tokens_of(eager), want_rows, recorded.take())
    check_drafted(eager)


def check_drafted(results):
    for name in DEMOS:
        sources = [set(r.usage.accepted_by_source) for key, r in results.items() if key.endswith(name)]
        assert any("head" in names for names in sources), name
    for name in ("plain", "base"):
        assert sum(r.usage.draft_tokens for key, r in results.items() if key.endswith(name)) > 0


@pytest.mark.parametrize("name", DEMOS)
def test_the_lora_half_alone_in_peft_gives_the_same_greedy_tokens(setup, model_dir, prompts, name, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    engine, adapters = setup
    prompt = prompts[name][0]
    item = request("a", prompt, adapter=adapters[name], max_draft_tokens=16, max_tokens=MAX_TOKENS)
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
