"""Lookahead heads in the engine: garbage changes no token, unequal heads draft together, misfits are refused."""

import gc
import json
import logging

import pytest
import torch
from emulated_library import ARM_CPUS, arm_library
from engine_fixture import make_engine, request, run, tokens_of
from lookahead_adapters import make_lookahead_adapter
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from specserve.adapters.lora import read_adapter
from specserve.adapters.served_base import ServedBase
from specserve.drafters.head import HeadWeights, best_token, cell, head_shapes, initial_state, scores
from specserve.drafters.head_files import VOCAB_STEP, pad_vocab
from specserve.drafters.head_native import NativeHeadRunner
from specserve.drafters.head_source import HeadRunner, HeadSource
from specserve.kernels.native import Team, load_library

SHAPES = [
    {"draft_len": 6},
    {"draft_len": 2, "history": False, "vocab_size": 70},
    {"state_size": 24, "vocab_size": 64, "window": 0, "draft_len": 9},
    {"draft_len": 12, "std": 30.0},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["torch", "native"])
def setup(request, model_dir, tmp_path_factory):
    engine = make_engine(model_dir, kernels=request.param)
    root = tmp_path_factory.mktemp("adapters")
    hashes = [
        engine.load_adapter(str(i), make_lookahead_adapter(model_dir, root / str(i), seed=i, **shape)).content_hash
        for i, shape in enumerate(SHAPES)
    ]
    plain = engine.load_adapter("plain", make_peft_adapter(model_dir, root / "plain", seed=9, std=0.3, r=8))
    assert plain.lookahead is None
    return engine, [*hashes, plain.content_hash, None]


def requests_for(adapters, mode, **sampling):
    prompts = [[(7 * i + j * (i + 1)) % 320 for j in range(3 + 5 * i)] for i in range(12)]
    return [
        request(i, prompt, adapter=adapters[i % len(adapters)], mode=mode, max_tokens=20 + i, seed=i, **sampling)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("stagger", [0, 2])
def test_heads_that_draft_garbage_change_no_token(setup, sampling, stagger):
    engine, adapters = setup
    want = tokens_of(run(engine, requests_for(adapters, "off", **sampling)))
    results = run(engine, requests_for(adapters, "fixed", **sampling), stagger=stagger)
    assert tokens_of(results) == want
    drafted = engine.stats().drafted_by_source
    assert drafted["head"] > 0 and drafted["history"] > 0


def test_drafts_of_different_adapters_have_their_own_lengths(setup, monkeypatch):
    engine, adapters = setup
    lens: dict[str, int] = {}
    propose = engine.proposer.propose

    def recording(items, *args):
        propose(items, *args)
        for item in items:
            heads = sum(source == "head" for source in item.draft_sources)
            lens[item.seq.adapter_hash] = max(lens.get(item.seq.adapter_hash, 0), heads)

    monkeypatch.setattr(engine.proposer, "propose", recording)
    run(engine, requests_for(adapters, "fixed"))
    assert lens[adapters[1]] == 2
    assert lens[adapters[2]] > 2 and lens[adapters[3]] > 2
    assert lens[adapters[4]] == lens[None] == 0
    if isinstance(heads := engine.proposer.growth.heads, HeadRunner):
        assert sorted(len(stack.heads) for stack in heads._stacks.values()) == [1, 3]  # two vocabularies share one


def test_a_head_that_raises_is_dropped_and_nothing_changes(setup, monkeypatch):
    engine, adapters = setup
    want = tokens_of(run(engine, requests_for(adapters, "off")))

    def broken(self, sources):
        raise RuntimeError("head bug")

    monkeypatch.setattr(type(engine.proposer.growth.heads), "step", broken)
    assert tokens_of(run(engine, requests_for(adapters, "fixed"))) == want


def test_what_drafts_for_a_sequence_leaves_with_it_and_outlives_its_adapter(
    setup, model_dir, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.CRITICAL)  # a captured traceback would hold sequences
    engine, _ = setup
    num_sequences = engine.proposer.growth.library.num_sequences
    gc.collect()
    before = num_sequences()
    key = engine.load_adapter("leaves", make_lookahead_adapter(model_dir, tmp_path / "a", seed=77)).content_hash
    options = {"adapter": key, "mode": "fixed", "max_tokens": 30, "ignore_eos": True}
    for name in ("ends", "is aborted", "fails", "never drafts"):
        engine.add_request(request(name, range(5, 20), **options | ({"mode": "off"} if "never" in name else {})))
    assert num_sequences() == before + 3
    for _ in range(3):
        engine.step()
    engine.adapters.unload(key)
    gc.collect()
    engine.step()
    engine.abort("is aborted")
    forward = engine.runner.forward

    def failing(items, adapters):
        if any(item.seq.request_id == "fails" for item in items):
            raise RuntimeError("a model's bug")
        return forward(items, adapters)

    monkeypatch.setattr(engine.runner, "forward", failing)
    engine.step()
    assert num_sequences() == before + 1
    while engine.has_work():
        engine.step()
    assert num_sequences() == before and key not in engine.registry.adapters


def test_a_head_whose_state_becomes_nan_says_nothing_and_nothing_changes(setup, monkeypatch):
    engine, adapters = setup
    want = tokens_of(run(engine, requests_for(adapters, "off")))
    set_hidden = HeadSource.set_hidden
    monkeypatch.setattr(
        HeadSource, "set_hidden", lambda self, last, *args: set_hidden(self, last * float("nan"), *args)
    )
    before = engine.stats().drafted_by_source.get("head", 0)
    assert tokens_of(run(engine, requests_for(adapters, "fixed"))) == want
    assert engine.stats().drafted_by_source.get("head", 0) == before


@pytest.fixture(params=["here", *(pytest.param(name, marks=pytest.mark.slow) for name in ARM_CPUS)])
def library(request, tmp_path):
    if request.param == "here":
        yield load_library()
        return
    with arm_library(request.param, tmp_path) as emulated:
        yield emulated


def test_the_native_heads_guess_what_the_torch_heads_guess(model_dir, tmp_path, library):
    """Of every shape, position by position, fed what was guessed, a wrong token now and then."""
    heads, base = [], ServedBase.of_files(model_dir, torch.device("cpu"))
    for seed, shape in enumerate(SHAPES[:3] * 2):
        path = make_lookahead_adapter(model_dir, tmp_path / str(seed), seed=seed, **{"draft_len": 9, **shape})
        ahead = read_adapter(path, base).lookahead
        assert ahead is not None and ahead.head is not None, ahead
        heads.append(ahead)
    prompt = [(5 * i * i + 3) % 320 for i in range(40)]
    hidden = torch.randn(len(heads), 64, generator=torch.Generator().manual_seed(0))
    tapped = torch.randn(len(heads), 64, generator=torch.Generator().manual_seed(1))
    guesses = []
    for runner in (HeadRunner(), NativeHeadRunner(Team(library, 2))):
        sources = [HeadSource(ahead.head, prompt) for ahead in heads]
        for row, source in enumerate(sources):
            source.set_hidden(hidden, tapped, row, len(prompt) + 1)
            source.begin([*prompt, prompt[7]])
        runner.begin(sources)
        seen = []
        for position in range(8):
            runner.step(sources)
            for idx, source in enumerate(sources):
                seen.append(source.peek())
                source.follow(seen[-1].token if seen[-1] and (position + idx) % 4 else prompt[9 + position])
        guesses.append(seen)
    same = sum(a == b for a, b in zip(*guesses, strict=True))
    assert same >= 0.95 * len(guesses[0]), (same, len(guesses[0]))  # a level may fall on the other side of its edge
    assert sum(guess is not None for guess in guesses[0]) > 30


def test_heads_in_one_batch_compute_what_each_computes_alone():
    torch.manual_seed(0)
    one = [
        HeadWeights(**{name: torch.randn(1, *shape) * 0.3 for name, shape in head_shapes(32, 16, 50, 4).items()})
        for _ in range(3)
    ]
    stacked = HeadWeights(
        **{name: torch.cat([getattr(w, name) for w in one]) for name in HeadWeights.__dataclass_fields__}
    )
    last, tapped = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    tokens, moved = torch.randint(0, 51, (3, 2)), torch.randint(0, 3, (3, 2))
    window = torch.randint(-1, 51, (3, 2, 4))

    def step(weights, pick):
        state = initial_state(weights, last[pick], tapped[pick])
        state = cell(weights, state, tokens[pick], moved[pick], window[pick][..., 0].clamp(min=0))
        return best_token(*scores(weights, state, window[pick]), window[pick])

    together = step(stacked, slice(None))
    for idx, weights in enumerate(one):
        alone = step(weights, slice(idx, idx + 1))
        assert torch.equal(together[0][idx], alone[0][0])
        assert torch.allclose(together[1][idx], alone[1][0], atol=1e-5)


def test_a_padded_vocabulary_changes_no_choice():
    torch.manual_seed(1)
    num_vocab, width = 50, 4
    shapes = head_shapes(32, 16, num_vocab, width)
    tensors = {name: torch.randn(1, *shape) * 0.3 for name, shape in shapes.items()}
    weights, padded = HeadWeights(**tensors), HeadWeights(**pad_vocab(tensors))
    shift = padded.embed.shape[1] - weights.embed.shape[1]
    assert shift == VOCAB_STEP - num_vocab

    def moved_up(index):  # "another token" and the slots behind it
        return torch.where(index >= num_vocab, index + shift, index)

    last, tapped = torch.randn(1, 64, 32), torch.randn(1, 64, 32)
    tokens, moved = torch.randint(0, num_vocab + 1, (1, 64)), torch.randint(0, 3, (1, 64))
    window = torch.randint(-1, num_vocab + 1, (1, 64, width))
    results = []
    for head, place in ((weights, lambda index: index), (padded, moved_up)):
        state = initial_state(head, last, tapped)
        state = cell(head, state, place(tokens), moved, place(window[..., 0].clamp(min=0)))
        results.append(best_token(*scores(head, state, place(window)), place(window)))
    assert torch.equal(moved_up(results[0][0]), results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert (results[0][0] > num_vocab).any() and (results[0][0] < num_vocab).any()


def spoil_tensor(name, change):
    def spoil(path):
        tensors = load_file(path / "lookahead.safetensors")
        change(tensors, name)
        save_file(tensors, path / "lookahead.safetensors")

    return spoil


def truncate(name):
    def spoil(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return spoil


def edit_config(**changes):
    def spoil(path):
        config = json.loads((path / "lookahead_config.json").read_text())
        config.update(changes)
        (path / "lookahead_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return spoil


def set_nan(tensors, name):
    tensors[name].view(-1)[3] = float("nan")


SPOILED = {
    "another version": (edit_config(format_version=99), "format_version 99"),
    "another base": (edit_config(base_hash="0" * 64), "another base model"),
    "another tokenizer": (edit_config(tokenizer_hash="0" * 64), "another tokenizer"),
    "another LoRA": (edit_config(lora_hash="0" * 64), "another LoRA"),
    "hidden size": (edit_config(hidden_size=65), "hidden_size is 65"),
    "tap layer": (edit_config(tap_layer=2), "tap_layer is 2"),
    "vocabulary beyond the model's": (edit_config(vocab=list(range(300, 400))), "token 399"),
    "vocabulary not ascending": (edit_config(vocab=[3, 2]), "ascending"),
    "vocabulary of another size": (edit_config(vocab=list(range(99))), "embed is [101, 16], wanted is [100, 16]"),
    "unknown field": (edit_config(colour="red"), "colour"),
    "missing field": (edit_config(draft_len=None), "draft_len"),
    "draft length": (edit_config(draft_len=65), "draft_len"),
    "an endless field": (edit_config(**{"k" * 5000: 1}), "unknown field"),
    "not UTF-8": (lambda path: (path / "lookahead_config.json").write_bytes(b'{"a": "\x81"}'), "lookahead_config.json"),
    "not JSON": (lambda path: (path / "lookahead_config.json").write_text("{"), "lookahead_config.json"),
    "no weights": (lambda path: (path / "lookahead.safetensors").unlink(), "lookahead.safetensors"),
    "no configuration": (lambda path: (path / "lookahead_config.json").unlink(), "lookahead_config.json"),
    "truncated weights": (truncate("lookahead.safetensors"), "lookahead.safetensors"),
    "NaN": (spoil_tensor("gates_x", set_nan), "gates_x holds values that are not finite"),
    "missing tensor": (spoil_tensor("moves", lambda tensors, name: tensors.pop(name)), "'moves' is missing"),
    "truncated history": (truncate("lookahead_history.bin"), "history"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_does_not_fit_is_refused_with_the_reason_and_the_lora_serves_without(model_dir, setup, tmp_path, case):
    engine, _ = setup
    spoil, reason = SPOILED[case]
    path = make_lookahead_adapter(model_dir, tmp_path / "adapter", seed=0)
    want = tokens_of(run(engine, [request("a", [5, 6, 7], adapter=engine.load_adapter("a", path).content_hash)]))
    spoil(path)
    info = engine.load_adapter("spoiled", path)
    assert info.lookahead is not None and info.lookahead.error is not None
    assert reason in info.lookahead.error and len(info.lookahead.error) < 1000
    assert (info.lookahead.draft_len is None) == (case != "truncated history")
    assert tokens_of(run(engine, [request("a", [5, 6, 7], adapter=info.content_hash, mode="fixed")])) == want


def test_a_changed_head_is_another_adapter(model_dir, setup, tmp_path):
    engine, _ = setup
    path = make_lookahead_adapter(model_dir, tmp_path / "adapter", seed=1)
    before = engine.load_adapter("a", path).content_hash
    edit_config(draft_len=3)(path)
    assert engine.load_adapter("a", path).content_hash != before
