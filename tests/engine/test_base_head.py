"""A head of the bare base drafts for requests without adapter and for adapters without head, and changes no token."""

import logging
from types import SimpleNamespace

import pytest
from engine_fixture import make_engine, request, run, tokens_of
from lookahead_adapters import make_base_head, make_lookahead_adapter
from oracle_drafter import SAMPLERS
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.adapters.lookahead import Lookahead
from specserve.drafters.acceptance import SharedAcceptance
from specserve.drafting.base_head import BaseHead


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base_head(model_dir, tmp_path_factory):
    return make_base_head(model_dir, tmp_path_factory.mktemp("base"), seed=5, tap_layer=0)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """One without a head, one with a head of another layer and shape."""
    root = tmp_path_factory.mktemp("adapters")
    plain = make_peft_adapter(model_dir, root / "plain", seed=1, std=0.3, r=4)
    return [plain, make_lookahead_adapter(model_dir, root / "own", seed=1, state_size=24)]


def requests_for(hashes, mode, sampler):
    settings = {"mode": mode, "max_tokens": 24, **SAMPLERS[sampler]}
    return [request(i, range(3 + i, 20 + 2 * i), adapter=hashes[i % 3], seed=i, **settings) for i in range(6)]


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_tokens_are_those_without_a_head_and_the_head_drafts_for_base_and_headless_adapter(
    model_dir, base_head, adapters, kernels
):
    bare = make_engine(model_dir, kernels=kernels)
    engine = make_engine(model_dir, kernels=kernels, base_head=str(base_head))
    assert engine.info.base_head.draft_len == 6 and engine.info.base_head.error is None
    assert engine.info.base_head.history_tokens > 0 and bare.info.base_head is None
    hashes = [None] + [engine.load_adapter(path.name, path).content_hash for path in adapters]
    for path in adapters:
        bare.load_adapter(path.name, path)
    sources = [s.source for s in engine.proposer.sources.of(request("x", range(9)))]
    assert sources == ["ngram", "history", "head"]
    sources = [s.source for s in engine.proposer.sources.of(request("x", range(9), adapter=hashes[1]))]
    assert sources == ["ngram", "head"]  # the base's history is not its own
    for sampler in list(SAMPLERS)[:2]:
        want = tokens_of(run(bare, requests_for(hashes, "off", sampler)))
        for mode in ("fixed", "auto"):
            results = run(engine, requests_for(hashes, mode, sampler), stagger=2)
            assert tokens_of(results) == want
            if mode == "fixed":
                for i in (0, 1, 3, 4):  # base, and the adapter without a head
                    assert results[str(i)].usage.draft_tokens > 0
    drafts = {entry.name: entry for entry in engine.stats().drafts_by_adapter}
    assert drafts[None].draft_tokens > 0 and drafts["plain"].draft_tokens > 0


def test_an_adapter_that_leaves_takes_its_record_along(model_dir, base_head, adapters):
    engine = make_engine(model_dir, base_head=str(base_head))
    key = engine.load_adapter("plain", adapters[0]).content_hash
    run(engine, [request(0, range(5, 30), adapter=key, mode="fixed", max_tokens=20)])
    assert set(engine.proposer.sources._base._fallbacks) == {key}
    engine.registry.unload(key)
    engine.adapters.forget_left()
    assert not engine.proposer.sources._base._fallbacks
    results = run(engine, [request(1, range(5, 30), mode="fixed", max_tokens=8)])
    assert results["1"].usage.draft_tokens > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_hash": "ab" * 32}, "a LoRA, not the bare base model"),
        ({"base_hash": "ab" * 32}, "another base model"),
        ({"tap_layer": 7}, "tap_layer is 7"),
    ],
)
def test_a_head_of_something_else_is_refused_with_the_reason_and_the_base_served(
    model_dir, tmp_path, caplog, changes, message
):
    path = make_base_head(model_dir, tmp_path / "base", history=False, **changes)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(model_dir, base_head=str(path))
    assert message in engine.info.base_head.error and message in caplog.text
    assert tokens_of(run(engine, [request(0, range(5, 20))]))["0"]


def test_a_directory_without_a_head_is_said_and_the_base_served(model_dir, tmp_path):
    engine = make_engine(model_dir, base_head=str(tmp_path / "nowhere"))
    assert "holds no lookahead head" in engine.info.base_head.error


def test_the_base_head_is_no_head_of_an_adapter(model_dir, tmp_path):
    path = make_lookahead_adapter(model_dir, tmp_path / "a", lora_hash="", history=False)
    info = make_engine(model_dir).load_adapter("a", path)
    assert "the bare base model, not this LoRA" in info.lookahead.error


def test_an_adapter_for_which_the_base_head_is_mostly_wrong_drafts_without_it_but_for_a_try_now_and_then():
    head = object()
    base = BaseHead(Lookahead(head, None, SharedAcceptance(), None))
    wrong, right = (SimpleNamespace(content_hash=name, lookahead=None) for name in ("wrong", "right"))

    def see(adapter, is_right, num):
        source = SimpleNamespace(source="head", prior=[0.5] * 12)
        for _ in range(num):
            base.acceptance_of(adapter).observe(source, 3, is_right)

    assert base.head_of(wrong) is head
    see(wrong, False, 199)
    see(right, True, 400)
    assert base.head_of(wrong) is head
    see(wrong, False, 100)
    found = [base.head_of(wrong) is head for _ in range(128)]
    assert found.count(True) == 2
    assert all(base.head_of(right) is head for _ in range(10))
    assert base.head_of(None) is head  # its own record is none of theirs
    see(wrong, True, 400)
    assert base.head_of(wrong) is head
    base.adapter_left("wrong")
    base.adapter_left("wrong")


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_heads_of_one_step_may_each_read_another_layer(tmp_path, kernels, caplog):
    deep = make_tiny_model(tmp_path / "model", num_hidden_layers=11)
    paths = [make_lookahead_adapter(deep, tmp_path / f"{idx}", seed=idx, tap_layer=idx) for idx in range(10)]
    engine = make_engine(deep, kernels=kernels, base_head=str(make_base_head(deep, tmp_path / "base", tap_layer=10)))
    hashes = [None] + [engine.load_adapter(path.name, path).content_hash for path in paths]

    def outputs(mode):
        return tokens_of(run(engine, [
            request(f"{mode} {idx}", range(3 + idx, 20 + idx), adapter=one, mode=mode, max_tokens=8)
            for idx, one in enumerate(hashes)
        ]))  # fmt: skip

    assert list(outputs("fixed").values()) == list(outputs("off").values())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]  # of a step that failed
