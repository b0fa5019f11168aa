"""Task history that learns from what is served: drafts improve, tenants stay apart, a restart forgets nothing."""

import pytest
from engine_fixture import make_engine, request, run, tokens_of
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.drafting.served_history import SUFFIX, ServedHistories

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory):
    return make_peft_adapter(model_dir, tmp_path_factory.mktemp("adapter") / "a", seed=3, std=0.3, r=4)


def serve(engine, key, name, salt="", mode="fixed"):
    ask = request(name, PROMPT, adapter=key, mode=mode, salt=salt, max_tokens=40, ignore_eos=True, temperature=1.0)
    return run(engine, [ask])[name]


def learned(engine, key, salt):
    """Wait for the table's thread and build the table from what is pending."""
    histories = engine.proposer.sources._served
    table = histories._tables[key, salt].result(timeout=30)
    table.flush()
    return table.current


def start(model_dir, directory):
    engine = make_engine(model_dir, learn_history=True, history_dir=str(directory))
    return engine


def test_drafts_improve_with_use_for_the_same_tenant_only_and_survive_a_restart(model_dir, adapter_dir, tmp_path):
    engine = start(model_dir, tmp_path)
    key = engine.load_adapter("a", adapter_dir).content_hash
    plain = serve(engine, key, "plain", mode="off")
    want = tokens_of({"a": plain})["a"]
    assert learned(engine, key, "").num_tokens > 0
    second = serve(engine, key, "second")
    assert second.tokens == want
    assert second.usage.accepted_by_source["history"] > 25
    assert second.usage.num_forwards < 0.5 * plain.usage.num_forwards
    other = serve(engine, key, "other", salt="another tenant")
    assert other.tokens == want and other.usage.accepted_by_source.get("history", 0) == 0
    engine.close()
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2

    engine = start(model_dir, tmp_path)
    key = engine.load_adapter("a", adapter_dir).content_hash
    engine.proposer.sources._served._table(key, "", None).result(timeout=30)
    again = serve(engine, key, "again")
    assert again.tokens == want and again.usage.accepted_by_source["history"] > 25
    engine.close()


def test_nothing_is_learned_unless_switched_on(model_dir, adapter_dir):
    engine = make_engine(model_dir)
    key = engine.load_adapter("a", adapter_dir).content_hash
    serve(engine, key, "a")
    assert engine.proposer.sources._served is None
    engine.close()


def test_tables_are_bounded_and_what_leaves_is_saved(tmp_path):
    histories = ServedHistories(tmp_path, vocab_size=100, max_tables=3)
    for tenant in range(10):
        histories.learn("adapter", str(tenant), None, [tenant, 1, 2, 3])
    assert len(histories._tables) == 3
    histories.close()
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 10


def test_a_damaged_file_costs_only_itself(tmp_path):
    histories = ServedHistories(tmp_path, vocab_size=100)
    histories.learn("adapter", "", None, [1, 2, 3])
    histories.close()
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    path.write_bytes(path.read_bytes()[:-3])
    histories = ServedHistories(tmp_path, vocab_size=100)
    assert histories._table("adapter", "", None).result(timeout=30).current.num_tokens == 0
    histories.learn("adapter", "", None, [4, 5, 6])
    histories.close()
    again = ServedHistories(tmp_path, vocab_size=100)
    assert again._table("adapter", "", None).result(timeout=30).current.num_tokens > 0
    again.close()
