"""Linear layers with one order of sums, and an engine that has them, under Triton's interpreter or on CUDA.

test_under_triton.py and test_linear_rows.py run this file as a process.
"""

from __future__ import annotations

from collections import Counter

import linear_row_cases
import pytest
import torch
from engine_fixture import Result, make_engine, request, run, tokens_of
from linear_row_cases import BIASES
from peft_adapters import make_peft_adapter
from scaled_weight_cases import FORMATS, check_scaled_bits, check_scaled_definition
from tiny_models import make_tiny_model
from triton.runtime import interpreter
from triton_interpreter import IS_INTERPRETED, row_uniform_dot  # noqa: F401  (before anything imports triton)

from specserve.compute.cuda.decoder import TritonDecoder
from specserve.compute.decoder_weights import GROUPS
from specserve.drafting.cost_model import CostModel
from specserve.errors import ModelError
from specserve.kernels import linear_fused
from specserve.kernels.linear_rows import linear_rows
from specserve.kernels.scaled_weights import ScaledLinear

DEVICE = "cpu" if IS_INTERPRETED else "cuda"


@pytest.mark.parametrize("has_bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (200, 72), (264, 100)], ids=str)
def test_rows_equal_the_definition(sizes, dtype, has_bias):
    linear_row_cases.check_definition(*sizes, dtype, has_bias, DEVICE, (1, 3, 16, 17, 32, 33, 64, 65, 130))


def test_tiles_of_many_outputs_equal_the_definition():
    linear_row_cases.check_definition(24, 16392, torch.bfloat16, True, DEVICE, (3, 17))


def test_a_row_has_the_same_bits_at_every_number_of_rows_and_place():
    linear_row_cases.check_bits(
        264, 100, torch.bfloat16, DEVICE, (1, 5, 16, 17, 32) if IS_INTERPRETED else range(1, 65)
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 8), (272, 100)], ids=str)
def test_rows_of_weights_of_8_bits_equal_the_definition(sizes, dtype, form):
    check_scaled_definition(*sizes, dtype, form, DEVICE, (1, 3, 16, 17, 33, 65, 130, 300))


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_has_the_same_bits_at_every_number_of_rows_where_weights_have_8_bits(form):
    check_scaled_bits(272, 100, form, DEVICE, (1, 5, 16, 17, 32) if IS_INTERPRETED else range(1, 301))


@pytest.fixture(scope="module", params=["none", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMATS)])
def exact_engine(request, tmp_path_factory):
    """One layer in bf16 or 8 bits, with a LoRA on all linears; steps of up to 32 rows, on CUDA of many more.

    `row_uniform_dot` sums square products, such as those of a tile of 64 rows, in another order.
    """
    root = tmp_path_factory.mktemp("exact")
    model_dir = make_tiny_model(root / "model", num_hidden_layers=1)
    adapter = make_peft_adapter(model_dir, root / "adapter", r=4, std=0.3)
    sizes = {"max_num_seqs": 8, "max_batched_tokens": 32} if IS_INTERPRETED else {"max_num_seqs": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
        settings = {"max_batched_tokens": 512, "kernels": "triton", "exact": "on", "dtype": "bf16", "device": DEVICE}
        settings["quantization"] = request.param
        if IS_INTERPRETED:
            patch.setattr(linear_fused, "_PROGRAMS", 1)  # few, as each takes as long as a whole tile
        engine = make_engine(model_dir, **settings | sizes)
        yield engine, engine.load_adapter("lora", adapter).content_hash


@pytest.mark.skipif(not IS_INTERPRETED, reason="the interpreter counts launches")
def test_a_layer_of_few_rows_is_five_launches_and_of_more_nine(exact_engine, monkeypatch):
    engine, _ = exact_engine
    launched: Counter[str] = Counter()
    launch = interpreter.GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched[self.fn.__name__.removesuffix("_kernel")] += 1
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    few = {"linear_rope": 1, "ragged_attention": 1, "linear_add": 2, "linear_gated": 1}
    more = {"add_rms_norm": 2, "linear_rows": 4, "rope_store": 1, "ragged_attention": 1, "gated_activation": 1}
    for num_rows, layer in ((16, few), (17, more)):
        launched.clear()
        tokens_of(run(engine, [request("a", range(60, 60 + num_rows), salt=str(num_rows), max_tokens=1)]))
        found = {name: launched[name] for name in few | more}
        found["add_rms_norm"] -= 1  # of the last layer's output
        found["linear_rows"] -= 1  # the lm_head
        assert found == dict.fromkeys(few | more, 0) | layer, num_rows
        assert not launched["join_splits"]  # here one program has all of a tile's keys


def test_the_engine_multiplies_by_it_where_exact_is_on(exact_engine, tmp_path):
    engine, _ = exact_engine
    assert isinstance(engine.decoder, TritonDecoder) and engine.info.is_exact
    linears = engine.decoder.lm_head, engine.decoder.layers[-1].down
    assert engine.decoder.fused == frozenset(GROUPS)  # so that steps of up to 16 rows are fused, larger ones not
    if engine.info.dtype == "bfloat16":
        assert all(linear._product is linear_rows for linear in linears)
    else:
        assert all(isinstance(linear, ScaledLinear) for linear in linears)
    with pytest.raises(ModelError, match="exact=on cannot be kept: weights are float32"):
        make_engine(make_tiny_model(tmp_path, num_hidden_layers=1), kernels="triton", exact="on", device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        ("llama", GROUPS),
        ("qwen2", GROUPS),  # biases
        ("smollm3", GROUPS),  # layers without positions
        ("ministral3", GROUPS),  # queries that grow
        ("qwen3", {"o", "gate_up", "down"}),  # norms of heads
        ("gemma2", {"qkv", "gate_up"}),  # norms of outputs, capped scores
        ("olmo2", {"gate_up"}),  # norms of all heads as one and of outputs, none of inputs
        ("gemma3", {"gate_up"}),  # these, and norms of outputs; windows, two embeddings of positions
    ],
)
def test_what_is_fused_of_an_architecture_has_the_bits_of_the_launches_apart(architecture, fused, tmp_path):
    model_dir = make_tiny_model(tmp_path, architecture)
    adapter = make_peft_adapter(model_dir, tmp_path / "adapter", r=4, target_modules=["o_proj", "up_proj"], std=0.3)
    found, decoders = [], []
    for way in ("on", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
            if IS_INTERPRETED:
                patch.setattr(linear_fused, "_PROGRAMS", 1)
            patch.setenv("SPECSERVE_FUSED_LINEARS", way)
            settings = {"kernels": "triton", "exact": "on", "dtype": "bf16", "device": DEVICE}
            engine = make_engine(model_dir, max_num_seqs=4, max_batched_tokens=32, **settings)
            key = engine.load_adapter("lora", adapter).content_hash
            requests = [
                request(idx, range(20 + idx, 29), max_tokens=3, adapter=key if idx == 2 else None, logprobs=2)
                for idx in range(3)
            ]
            results = [run(engine, [each]) for each in requests] + [run(engine, requests)]
        decoders.append(engine.decoder)
        found.append([(result.tokens, result.logprobs) for each in results for result in each.values()])
    assert decoders[0].fused == frozenset(fused) and not decoders[1].fused
    assert found[0] == found[1]


@pytest.mark.parametrize("form", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_an_engine_with_weights_of_8_bits_writes_what_a_model_of_their_values_writes(form, tmp_path):
    model_dir = make_tiny_model(tmp_path, num_hidden_layers=1)
    settings = {"kernels": "triton", "quantization": form, "dtype": "bf16", "device": DEVICE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
        engine = make_engine(model_dir, max_num_seqs=2, max_batched_tokens=32, **settings)
        plain = make_engine(model_dir, kernels="torch", dtype="fp32")
    ours, theirs = engine.decoder, plain.decoder
    for group in ("qkv", "o", "gate_up", "down"):
        getattr(theirs.layers[0], group)._weight = getattr(ours.layers[0], group).unpacked().cpu()
    theirs.lm_head._weight = ours.lm_head.unpacked().cpu()
    assert engine.info.dtype == form and ours.embed.dtype == torch.bfloat16
    # Prompts behind which no two tokens are as likely as each other but for what bf16 activations round.
    requests = [request(at, range(at, at + 12), max_tokens=4, logprobs=1, ignore_eos=True) for at in (45, 125)]
    results, wanted = run(engine, requests), run(plain, requests)
    assert tokens_of(results) == tokens_of(wanted)
    for name, result in results.items():
        want = [scored.logprob for scored in wanted[name].logprobs]
        assert [scored.logprob for scored in result.logprobs] == pytest.approx(want, abs=0.12), name


def test_a_request_has_the_same_bits_alone_in_company_with_drafts_and_from_the_cache(exact_engine):
    engine, adapter = exact_engine
    num, length = (4, 3) if IS_INTERPRETED else (60, 24)

    def requests(mode, salt, drafts=None):
        for idx in range(num):
            prompt = [7, 8, 9] * 3 if idx % 3 == 0 else range(20 + idx, 38 + 2 * idx)
            prediction = drafts[str(idx)].tokens[: idx % length] + [3] if drafts else ()
            yield request(
                idx, prompt, adapter=adapter if idx % 2 else None, mode=mode, salt=salt, prediction=prediction,
                max_tokens=length, ignore_eos=True, logprobs=2, temperature=0.8 * (idx % 4 == 3), seed=idx,
            )  # fmt: skip

    alone: dict[str, Result] = {}
    for each in requests("off", "alone"):
        alone |= run(engine, [each])
    tokens_of(alone)
    ways = {
        "in company": run(engine, requests("off", "company"), stagger=2),
        "with drafts": run(engine, requests("fixed", "drafts", alone)),
        "from the cache": run(engine, requests("fixed", "drafts", alone)),
    }
    assert sum(result.usage.accepted_draft_tokens for result in ways["with drafts"].values()) > 0
    assert sum(result.usage.cached_tokens for result in ways["from the cache"].values()) > 0
    for way, results in ways.items():
        for name, result in results.items():
            assert (result.tokens, result.logprobs) == (alone[name].tokens, alone[name].logprobs), (way, name)
