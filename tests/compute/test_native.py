"""The native CPU forward: packed formats, rows that do not depend on their batch, adapters, and when it is missing."""

from __future__ import annotations

import ctypes
import platform
import random
from dataclasses import replace

import pytest
import torch
from decoder_driver import Driver, native_choice
from engine_fixture import make_engine, request, run, tokens_of
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from specserve.compute.loader import load_model
from specserve.compute.native.choice import choose_native
from specserve.compute.native.decoder import NativeDecoder
from specserve.compute.torch.decoder import Decoder
from specserve.config import EngineConfig
from specserve.errors import ModelError
from specserve.kernels import native
from specserve.kernels.native import STRUCTS, Team, load_library
from specserve.kernels.native_build import NativeError
from specserve.kernels.packed import GROUPS, pack, unpack

CPU = torch.device("cpu")
FORMATS = ["f32", "bf16", "int8", "int4"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # Sizes that are no multiples of a panel, heads that share keys.
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=80, intermediate_size=144, vocab_size=330)


def random_tokens(num: int, seed: int) -> list[int]:
    return torch.randint(320, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def multiply(matrix, x: torch.Tensor, is_bf16: bool) -> torch.Tensor:
    y = torch.full((x.shape[0], matrix.num_panels * native.PANEL), float("nan"))
    Team(load_library(), 2).linear(matrix.struct(), is_bf16, x.data_ptr(), x.shape[0], y.data_ptr())
    return y[:, : matrix.n]


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("n, k", [(1, 1), (64, 64), (65, 63), (130, 200), (30, 576)])
def test_a_packed_matrix_multiplies_as_unpacked(weight_format, n, k):
    generator = torch.Generator().manual_seed(n * k)
    matrix = pack(torch.randn(n, k, generator=generator), None, weight_format)
    x = torch.randn(75, k, generator=generator)
    for is_bf16 in {False, load_library().uses_bf16 and weight_format != "f32"}:
        given = x.bfloat16().float() if is_bf16 else x
        expected = given.double() @ unpack(matrix).double().t()
        for rows in (1, 2, 5, 6, 7, 64, 75):
            got = multiply(matrix, x[:rows].contiguous(), is_bf16).double()
            torch.testing.assert_close(got, expected[:rows], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_packing_keeps_the_weights(weight_format):
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    error = (unpack(pack(weight, None, weight_format)) - weight).abs().max(dim=1).values
    limit = {"f32": 0.0, "bf16": 0.0, "int8": 0.5 / 127, "int4": 0.2}[weight_format]
    assert (error <= limit * weight.abs().max(dim=1).values + 1e-6).all()
    if weight_format == "int4":
        rms = (unpack(pack(weight, None, "int4")) - weight).square().mean().sqrt()
        assert rms < 0.11  # plain rounding to sixteen even steps has 0.12 on these groups
    assert (unpack(pack(torch.zeros(3, GROUPS["int4"]), None, weight_format)) == 0).all()


@pytest.mark.parametrize(
    "dtype, quantization", [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "int4")]
)
def test_a_row_has_the_same_bits_in_every_batch(model_dir, dtype, quantization):
    """Prefill in one step, in chunks, beside other sequences, and one row at a time."""
    decoder = load_model(model_dir, CPU, dtype, [native_choice(quantization=quantization)])
    assert isinstance(decoder, NativeDecoder)
    driver = Driver(decoder, num_blocks=64)
    prompt = random_tokens(70, 1)
    (whole,) = driver.step([(driver.sequence(), prompt)])
    chunked, seq, rng, start = [], driver.sequence(), random.Random(0), 0
    other = driver.sequence()
    while start < len(prompt):
        end = min(len(prompt), start + rng.choice([1, 2, 6, 13, 30]))
        rows, _ = driver.step([(seq, prompt[start:end]), (other, random_tokens(rng.choice([1, 4, 9]), start))])
        chunked.append(rows)
        start = end
    assert torch.equal(torch.cat(chunked), whole)


@pytest.fixture(scope="module")
def plain_library():
    """The library for an x86 CPU with AVX2 and nothing newer: fp32 activations, weights widened."""
    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    flags = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in native.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", flags)
        return load_library.__wrapped__()


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_without_bf16_instructions_weights_of_16_bits_and_fewer_are_multiplied_in_fp32(
    model_dir, plain_library, quantization
):
    choice = replace(native_choice(quantization=quantization), library=plain_library)
    decoder = load_model(model_dir, CPU, "bf16", [choice])
    assert decoder.compute_dtype == torch.float32
    driver, prompt = Driver(decoder), random_tokens(41, 3)
    (whole,) = driver.step([(driver.sequence(), prompt)])
    seq = driver.sequence()
    (chunk,), (rest,) = (driver.step([(seq, part)]) for part in (prompt[:29], prompt[29:]))
    assert torch.equal(torch.cat([chunk, rest]), whole)
    usual = Driver(load_model(model_dir, CPU, "bf16", [native_choice(quantization=quantization)]))
    (expected,) = usual.step([(usual.sequence(), prompt)])
    assert (whole - expected).square().mean().sqrt() / expected.square().mean().sqrt() < 0.03


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_sixteen_bits_and_fewer_stay_close_to_transformers(model_dir, quantization):
    decoder = load_model(model_dir, CPU, "bf16", [native_choice(quantization=quantization)])
    prompt = random_tokens(40, 2)
    driver = Driver(decoder)
    (logits,) = driver.step([(driver.sequence(), prompt)])
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].float()
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < {"none": 0.03, "int8": 0.06, "int4": 0.5}[quantization], error


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"dtype": "bf16", "quantization": "int8"},
                                      {"dtype": "bf16", "quantization": "int4"}], ids=str)  # fmt: skip
def test_drafts_change_no_token_at_16_bits_or_fewer(model_dir, tmp_path, settings):
    """In fp32 tests/engine/test_exactness.py says so; here because no row's result depends on its batch."""
    engine = make_engine(model_dir, kernels="native", **settings)
    ends = {"r": 6, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}
    shapes = [{"r": 4}, {"r": 3, "target_modules": ["q_proj", "down_proj"]}, {"r": 24}, ends]
    adapters = [None] + [
        engine.load_adapter(
            str(i), make_peft_adapter(model_dir, tmp_path / str(i), seed=i, std=0.3, **shape)
        ).content_hash
        for i, shape in enumerate(shapes)
    ]

    def traffic(mode):
        return [
            request(f"{i}", random_tokens(5 + 9 * i, i) * 2, adapter=adapters[i % 5], mode=mode, max_tokens=40,
                    temperature=0.9 * (i % 2), seed=i, ignore_eos=True, prediction=answers.get(str(i), ()))
            for i in range(10)
        ]  # fmt: skip

    answers: dict[str, list[int]] = {}
    answers = tokens_of(run(engine, traffic("off")))
    for stagger in (0, 1, 3):
        results = run(engine, traffic("auto"), stagger=stagger)
        assert tokens_of(results) == answers
        assert sum(result.usage.accepted_draft_tokens for result in results.values()) > 100


def test_an_adapter_on_all_modules_adds_what_peft_adds(model_dir, tmp_path):
    """Against the torch path, which is tested against peft: embedding, lm_head, ragged ranks, in one batch."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shapes = [{"r": 5, "target_modules": modules}, {"r": 33, "target_modules": modules[2:5]}, {"r": 1}]
    results = []
    for way in ("torch", "native"):
        engine = make_engine(model_dir, kernels=way)
        assert isinstance(engine.decoder, Decoder if way == "torch" else NativeDecoder)
        hashes = [
            engine.load_adapter(str(i), make_peft_adapter(model_dir, tmp_path / str(i), seed=i, std=0.3, **shape)
                                if way == "torch" else tmp_path / str(i)).content_hash
            for i, shape in enumerate(shapes)
        ]  # fmt: skip
        requests = [request(i, random_tokens(20, i), adapter=hashes[i % 3], ignore_eos=True) for i in range(6)]
        results.append(tokens_of(run(engine, requests)))
    assert results[0] == results[1]


def test_without_a_compiler_torch_serves_and_says_so(model_dir, monkeypatch, caplog):
    def none():
        raise NativeError("no C++ compiler was found")

    monkeypatch.setattr("specserve.compute.native.choice.load_library", none)
    assert isinstance(make_engine(model_dir).decoder, Decoder)
    assert "no C++ compiler was found" in caplog.text
    with pytest.raises(ModelError, match="kernels=native needs the native CPU path: no C"):
        make_engine(model_dir, kernels="native")
    with pytest.raises(ModelError, match="quantization=int8 needs the native CPU path"):
        make_engine(model_dir, quantization="int8")


def test_what_the_native_path_cannot_serve_is_named(model_dir, caplog):
    assert isinstance(make_engine(model_dir, block_size=8).decoder, Decoder)
    assert "block_size=8 is no multiple of 16" in caplog.text
    with pytest.raises(ModelError, match="block_size=8"):
        make_engine(model_dir, block_size=8, quantization="int4")
    with pytest.raises(ModelError, match="runs on cuda"):
        choose_native(EngineConfig(quantization="int8"), torch.device("cuda"))


def test_the_library_is_built_once_and_a_failing_compiler_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS))  # quick
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeError, match="no such option"):
        load_library.__wrapped__()
    monkeypatch.delenv("CXX")
    first, second = load_library.__wrapped__(), load_library.__wrapped__()
    assert first.build_s > 0 and second.build_s == 0
    assert len(list((tmp_path / "specserve" / "native").iterdir())) == 1


def declared(*fields: tuple[str, type]) -> dict[str, type[ctypes.Structure]]:
    return STRUCTS | {"Lora": type("Lora", (ctypes.Structure,), {"_fields_": list(fields)})}


A, B, RANK, SCALE = ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int32), ("scale", ctypes.c_float)
LAYOUTS = {
    "a field too few": ((A, B, RANK), "field scale of struct Lora is 4 bytes at 20 in kernels/cpu, but missing in ker"),
    "a field too many": (
        (A, B, RANK, SCALE, ("c", ctypes.c_int32)),
        "field c of struct Lora is missing in kernels/cpu",
    ),
    "another size": (
        (A, ("b", ctypes.c_int32), RANK, SCALE),
        "field b of struct Lora is 8 bytes at 8 in .* but 4 bytes",
    ),
    "another order": ((B, A, RANK, SCALE), "field a of struct Lora is 8 bytes at 0 in .* but 8 bytes at 8 in"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_struct_that_python_and_the_library_declare_differently_is_refused_by_field(case):
    fields, message = LAYOUTS[case]
    with pytest.raises(NativeError, match=message):
        native.sources().check_layout(load_library().functions, declared(*fields))
    native.sources().check_layout(load_library().functions, STRUCTS)
