"""The native CPU forward: packed formats, rows that do not depend on their batch, adapters, and when it is missing.

What a level of instructions may change is run at every level that this machine has.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
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
from specserve.kernels import integers, native, native_build, native_levels
from specserve.kernels.huge_pages import HugePages
from specserve.kernels.native import STRUCTS, Team, load_library
from specserve.kernels.native_build import NativeError
from specserve.kernels.native_levels import LEVELS
from specserve.kernels.packed import integer_weights, pack, unpack
from specserve.model.shapes import PARENT

CPU = torch.device("cpu")
FORMATS = ["f32", "bf16", "int8", "int4"]
QUICK_FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # Sizes that are no multiples of a panel, heads that share keys.
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=80, intermediate_size=144, vocab_size=330)


def random_tokens(num: int, seed: int) -> list[int]:
    return torch.randint(320, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def multiply(team, matrix, x: torch.Tensor, is_bf16: bool) -> torch.Tensor:
    y = torch.full((x.shape[0], matrix.num_panels * native.PANEL), float("nan"))
    team.linear(matrix.struct(), is_bf16, x.data_ptr(), x.shape[0], y.data_ptr())
    return y[:, : matrix.n]


@pytest.mark.parametrize("weight_format", ["f32", "bf16"])
def test_a_packed_matrix_multiplies_as_unpacked(library, weight_format):
    team = Team(library, 2)
    for n, k in [(1, 1), (64, 64), (65, 63), (130, 200), (30, 576)]:
        generator = torch.Generator().manual_seed(n * k)
        matrix = pack(torch.randn(n, k, generator=generator), None, weight_format)
        x = torch.randn(75, k, generator=generator)
        for is_bf16 in {False, library.uses_bf16 and weight_format != "f32"}:
            given = x.bfloat16().float() if is_bf16 else x
            expected = given.double() @ unpack(matrix).double().t()
            for rows in (1, 2, 5, 6, 7, 64, 75):
                got = multiply(team, matrix, x[:rows].contiguous(), is_bf16).double()
                torch.testing.assert_close(got, expected[:rows], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_whole_numbers_multiply_as_the_reference_does_to_the_bit(library, weight_format):
    """So a row's result is the same at every level; rows of zeros, rows that are not finite, values of all sizes."""
    team = Team(library, 2)
    for n, k in [(1, 1), (64, 64), (65, 63), (130, 200), (30, 576), (70, 1024)]:
        generator = torch.Generator().manual_seed(n * k)
        matrix = pack(torch.randn(n, k, generator=generator), None, weight_format)
        size = torch.logspace(-42, 36, 70)[torch.randperm(70, generator=generator)].unsqueeze(1)
        x = (torch.randn(70, k, generator=generator) * size).bfloat16().float()
        x[3], x[5, 0], x[6, k - 1] = 0, float("inf"), float("nan")
        weights = integer_weights(matrix)
        expected = integers.multiply(F.pad(x, (0, matrix.kp - k)), weights.values, weights.scales)[:, :n]
        assert (expected[3] == 0).all() and expected[5:7].isnan().all() and expected.isnan().sum() == 2 * n
        for is_bf16 in {False, library.uses_bf16}:
            for rows in (*range(1, 20), 33, 64, 70):
                got = multiply(team, matrix, x[:rows].contiguous(), is_bf16)
                assert torch.equal(got.nan_to_num(777.0), expected[:rows].nan_to_num(777.0))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_product_of_a_row_has_the_same_bits_at_every_number_of_rows(library, weight_format):
    """More rows than a task of any level takes, inputs in several blocks, values whose products are subnormal.

    The last task of 513 rows has one, which lies in a tile as if there were sixteen.
    """
    generator = torch.Generator().manual_seed(5)
    matrix = pack(torch.randn(330, 600, generator=generator), None, weight_format)
    x = torch.randn(530, 600, generator=generator) * torch.logspace(0, -40, 530)[
        torch.randperm(530, generator=generator)
    ].unsqueeze(1)
    team, is_bf16 = Team(library, 2), library.uses_bf16 and weight_format != "f32"
    whole = multiply(team, matrix, x, is_bf16)
    assert torch.equal(multiply(team, matrix, x[:513].contiguous(), is_bf16), whole[:513])
    for rows in range(71):
        start = 7 * rows % 460
        assert torch.equal(
            multiply(team, matrix, x[start : start + rows].contiguous(), is_bf16), whole[start : start + rows]
        )


@pytest.mark.parametrize("weight_format", FORMATS)
def test_packing_keeps_the_weights(weight_format):
    weight = torch.randn(70, 190, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    error = (unpack(pack(weight, None, weight_format)) - weight).square().mean().sqrt()
    # Of 4 bits, even steps of one size for an output have 0.17.
    assert error <= {"f32": 0.0, "bf16": 0.0, "int8": 0.008, "int4": 0.066}[weight_format]
    assert (unpack(pack(torch.zeros(3, 32), None, weight_format)) == 0).all()


def test_whole_numbers_are_kept_by_packing_and_stay_within_a_byte():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    weight[3], weight[4], weight[5, 7] = 0, 1e-3, 1e4
    for bits in (8, 4):
        given, kept = integers.quantize(weight, bits), integer_weights(pack(weight, None, f"int{bits}"))
        assert torch.equal(given.values, kept.values) and torch.equal(given.scales, kept.scales)
        assert int(given.values.min()) >= -127
    assert given.codes is not None and given.steps is not None and given.offsets is not None
    groups = given.codes.view(64, -1, integers.GROUP).int() * given.steps.int().unsqueeze(-1)
    assert int(groups.max()) < 256 and int(given.codes.max()) < 16 and int(given.steps.min()) > 0
    assert torch.equal((groups + given.offsets.int().unsqueeze(-1)).view(64, -1), given.values.int())


@pytest.mark.parametrize("k, size", [(64, 64), (576, 64), (1536, 512), (2048, 512)])
def test_a_rotation_is_a_product_with_a_hadamard_matrix_of_its_block(k, size):
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    x = torch.randint(-8, 8, (5, k), generator=torch.Generator().manual_seed(k)).float()
    assert integers.rotation_size(k) == size
    assert torch.equal(integers.rotate(x), (x.view(-1, size) @ block).view(5, k))
    assert torch.equal(integers.rotate(integers.rotate(x)), x * size)


def test_more_inputs_than_exact_sums_allow_are_refused():
    with pytest.raises(ValueError, match="a matrix of 131073 inputs .* at most 131072 can"):
        pack(torch.zeros(1, (1 << 17) + 1), None, "int8")


@pytest.mark.parametrize("has_large_pages", [True, False])
def test_tensors_in_large_pages_lie_apart_and_at_cache_lines(has_large_pages, monkeypatch):
    if not has_large_pages:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    memory = HugePages()
    shapes = [
        ((3, 5), torch.bfloat16),
        ((0, 4), torch.float32),
        ((40 << 20,), torch.uint8),
        ((30, 1 << 20), torch.int8),
    ]
    tensors = [memory.empty(shape, dtype).fill_(i) for i, (shape, dtype) in enumerate(shapes)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel())
    assert all((tensor == i).all() and (tensor.shape, tensor.dtype) == shapes[i] for i, tensor in enumerate(tensors))


@pytest.mark.parametrize(
    "dtype, quantization", [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "int4")]
)
def test_a_row_has_the_same_bits_in_every_batch(model_dir, library, dtype, quantization):
    """Prefill in one step, in chunks, beside other sequences, and one row at a time."""
    decoder = load_model(model_dir, CPU, dtype, [native_choice(library, quantization=quantization)])
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


@torch.inference_mode()
def test_a_step_gives_the_logits_of_its_first_rows_and_their_best_tokens(model_dir, library):
    decoder = load_model(model_dir, CPU, "bf16", [native_choice(library)])
    driver = Driver(decoder)
    batch = driver.batch([(driver.sequence(), random_tokens(9, 1)), (driver.sequence(), random_tokens(5, 2))])
    hidden = decoder.forward(batch, driver.kv)
    want = decoder.logits(hidden, batch)
    for rows, num in (([8, 13, 2], 2), ([13], 1), (list(range(14)), 14), ([4], 0)):
        states, logits = decoder.step(dataclasses.replace(batch, hidden_rows=rows, num_logits=num), driver.kv)
        assert torch.equal(states, hidden[rows]) and torch.equal(logits, want[rows[:num]])
        for each in (logits, logits.clone(), want):  # the step's own, and others that it knows nothing of
            tokens, bad = decoder.best.of(each)
            assert tokens.tolist() == each.argmax(-1).tolist() and not bad


@pytest.mark.parametrize("quantization", ["none", "int8"])
@torch.inference_mode()
def test_rows_that_are_wanted_have_the_bits_that_they_have_among_all(model_dir, library, quantization):
    """The last layer leaves the others out: here of two sequences, in any order, a row twice, none."""
    decoder = load_model(model_dir, CPU, "bf16", [native_choice(library, quantization=quantization)])
    driver, last = Driver(decoder), decoder.config.num_layers - 1
    batch = driver.batch([(driver.sequence(), random_tokens(70, 1)), (driver.sequence(), random_tokens(9, 2))])
    taps = {0: batch.tokens, last: batch.tokens}
    whole, tapped = decoder.forward(batch, driver.kv, taps), dict(taps)
    for rows in ([69, 78], [78, 3, 40, 3], list(range(5, 60)), []):
        wanted = torch.tensor(rows, dtype=torch.int64)
        found = decoder.forward(dataclasses.replace(batch, hidden_rows=rows), driver.kv, taps)
        assert torch.equal(found, whole[wanted])
        assert all(torch.equal(taps[layer], tapped[layer][wanted]) for layer in taps)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_sixteen_bits_and_fewer_stay_close_to_transformers(model_dir, library, quantization):
    """And closer to it with the weights that were packed in place of the file's."""
    decoder = load_model(model_dir, CPU, "bf16", [native_choice(library, quantization=quantization)])
    assert decoder.compute_dtype == (torch.bfloat16 if library.uses_bf16 else torch.float32)
    prompt = random_tokens(40, 2)
    driver = Driver(decoder)
    (logits,) = driver.step([(driver.sequence(), prompt)])
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def error() -> float:
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0].float()
        return float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    assert error() < {"none": 0.03, "int8": 0.06, "int4": 0.4}[quantization]
    for idx, layer in enumerate(decoder._layers):
        for module, matrix in layer.modules.items():
            name = f"model.layers.{idx}.{PARENT[module]}.{module}"
            reference.get_submodule(name).weight.data = unpack(matrix)
    reference.lm_head.weight = torch.nn.Parameter(unpack(decoder._lm_head))
    assert error() < {"none": 0.03, "int8": 0.05, "int4": 0.05}[quantization]


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"dtype": "bf16", "quantization": "int8"},
                                      {"dtype": "bf16", "quantization": "int4"}], ids=str)  # fmt: skip
def test_drafts_change_no_token_at_16_bits_or_fewer(model_dir, tmp_path, library, settings):
    """In fp32 tests/engine/test_exactness.py says so; here because no row's result depends on its batch."""
    engine = make_engine(model_dir, kernels=library.level, **settings)
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
    for stagger, mode in ((0, "fixed"), (1, "fixed"), (3, "auto")):
        results = run(engine, traffic(mode), stagger=stagger)
        assert tokens_of(results) == answers
        # What auto drafts depends on what steps cost here.
        assert mode == "auto" or sum(result.usage.accepted_draft_tokens for result in results.values()) > 100


def test_an_adapter_on_all_modules_adds_what_peft_adds(model_dir, tmp_path, library):
    """Against the torch path, which is tested against peft: embedding, lm_head, ragged ranks, in one batch."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shapes = [{"r": 5, "target_modules": modules}, {"r": 33, "target_modules": modules[2:5]}, {"r": 1}]
    results = []
    for way in ("torch", library.level):
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


@pytest.fixture
def fresh_choice(monkeypatch, caplog):
    """Levels are looked for again, as in a new process; what is logged is kept."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("specserve.compute.native.choice.load_library", load_library.__wrapped__)


def test_without_a_compiler_torch_serves_and_says_so(model_dir, monkeypatch, caplog, fresh_choice, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(make_engine(model_dir).decoder, Decoder)
    assert "no C++ compiler was found" in caplog.text
    with pytest.raises(ModelError, match="kernels=native needs the native CPU path: no C"):
        make_engine(model_dir, kernels="native")
    with pytest.raises(ModelError, match="quantization=int8 needs the native CPU path"):
        make_engine(model_dir, quantization="int8")


def without(monkeypatch, *flags: str) -> None:
    """A CPU that lacks `flags`."""
    monkeypatch.setattr(native_levels, "cpu_flags", lambda: native_build.cpu_flags() - set(flags))


def served_level(model_dir, **settings) -> str:
    engine = make_engine(model_dir, dtype="bf16", **settings)
    assert tokens_of(run(engine, [request("a", random_tokens(9, 1), max_tokens=3)]))
    return engine.decoder.level


def test_a_cpu_without_the_instructions_is_served_by_the_next_level_and_says_why(
    model_dir, monkeypatch, caplog, fresh_choice
):
    without(monkeypatch, "amx_bf16", "avx512_bf16", "avx512vl")
    level = served_level(model_dir)
    assert level in ("avx2_vnni", "avx2", "generic")
    assert re.search(rf"instructions are {level}; not avx\w+: the CPU lacks ", caplog.text)


def test_an_operating_system_that_refuses_tiles_is_served_by_the_next_level_and_says_why(
    model_dir, monkeypatch, caplog, fresh_choice
):
    monkeypatch.setattr(native_levels, "cpu_flags", lambda: frozenset(LEVELS[0].cpu_flags) | native_build.cpu_flags())
    monkeypatch.setattr(native_levels, "_XFEATURE_XTILEDATA", 99)  # a feature that no kernel grants
    without_tiles = next(level for level in LEVELS[1:] if set(level.cpu_flags) <= native_build.cpu_flags())
    monkeypatch.setattr(native_levels, "LEVELS", (LEVELS[0], without_tiles))
    monkeypatch.setattr(native, "LEVELS", (LEVELS[0], without_tiles))
    assert served_level(model_dir) == without_tiles.name
    assert f"are {without_tiles.name}; not amx: the operating system refuses AMX tiles" in caplog.text


@pytest.mark.skipif(LEVELS[0].missing() is not None, reason="the CPU has no AMX")
def test_a_compiler_that_does_not_know_tiles_builds_the_next_level_and_it_says_why(
    model_dir, monkeypatch, caplog, fresh_choice, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", QUICK_FLAGS)
    old = tmp_path / "old-c++"
    compiler = native_build.find_compiler()
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *-mamx*) echo "unrecognized -mamx-tile" >&2; exit 1;; esac\nexec {compiler} "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert served_level(model_dir) == "avx512_bf16"
    assert "instructions are avx512_bf16; not amx: " in caplog.text and "unrecognized -mamx-tile" in caplog.text


def test_a_level_that_was_asked_for_serves_or_says_what_is_missing(model_dir, monkeypatch, fresh_choice, usual_levels):
    possible = next(level.name for level in reversed(usual_levels) if level.missing() is None)
    assert served_level(model_dir, kernels=possible) == possible
    without(monkeypatch, "avx512vl", "amx_tile")
    message = (
        r"kernels=amx cannot be had here: amx: the CPU lacks .*; leave kernels at auto .*, or name another "
        r"\((avx2_vnni, )?(avx2, )?g"
    )
    with pytest.raises(ModelError, match=message):
        make_engine(model_dir, kernels="amx")
    with pytest.raises(ModelError, match="kernels=avx2 cannot be had here: the model runs on cuda; levels"):
        choose_native(EngineConfig(kernels="avx2"), torch.device("cuda"))


def test_what_the_native_path_cannot_serve_is_named(model_dir, caplog):
    assert isinstance(make_engine(model_dir, block_size=8).decoder, Decoder)
    assert "block_size=8 is no multiple of 16" in caplog.text
    with pytest.raises(ModelError, match="block_size=8"):
        make_engine(model_dir, block_size=8, quantization="int4")
    with pytest.raises(ModelError, match="quantization=fp8 is for CUDA; on a CPU set it to int8 or int4"):
        make_engine(model_dir, quantization="fp8")


def test_the_library_is_built_once_and_a_failing_compiler_is_quoted(tmp_path, monkeypatch):
    compiler = native_build.find_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", QUICK_FLAGS)
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeError, match="no such option"):
        load_library.__wrapped__()
    counting = tmp_path / "counting-c++"
    counting.write_text(f'#!/bin/sh\ncase "$*" in *\\ -o\\ *) echo >> {tmp_path}/builds;; esac\nexec {compiler} "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    with ThreadPoolExecutor(2) as pool:  # as two processes would
        for library in [pool.submit(load_library.__wrapped__) for _ in range(2)]:
            assert library.result().build_s > 0  # or waited for who built it
    assert load_library.__wrapped__().build_s == 0
    assert (tmp_path / "builds").read_text() == "\n"
    assert len(list((tmp_path / "specserve" / "native").iterdir())) == 1


def test_a_disk_that_is_full_is_found_out_once_and_not_for_every_level(tmp_path, monkeypatch):
    """A compiler takes a minute to say so; what needs room is written beside the library, not to /tmp."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = tmp_path / "full-c++"
    full.write_text(
        f'#!/bin/sh\ncase "$*" in *\\ -o\\ *) echo "$TMPDIR" >> {tmp_path}/builds;; esac\n'
        "echo 'fatal error: error writing to x.s: No space left on device' >&2\nexit 1\n"
    )
    full.chmod(0o755)
    monkeypatch.setenv("CXX", str(full))
    with pytest.raises(native_build.CacheError, match="cannot be built into .*: No space left on device"):
        load_library.__wrapped__()
    (place,) = (tmp_path / "builds").read_text().splitlines()
    assert place.startswith(str(tmp_path / "specserve" / "native"))


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
        native.sources(LEVELS[0]).check_layout(load_library().functions, declared(*fields))
    native.sources(LEVELS[0]).check_layout(load_library().functions, STRUCTS)
