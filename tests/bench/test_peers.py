"""What `python -m bench.peers` asks its peers for, and the rates and ratios that it makes of their answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.peers.cases import CASES, Prompts, interleaved
from bench.peers.columns import Peer
from bench.peers.table import report


class Answering:
    """A worker that takes `prompt_s` for each token of a prompt and `step_s` for each step."""

    def __init__(self, prompt_s: float, step_s: float):
        self.prompt_s, self.step_s = prompt_s, step_s
        self.asked: list[dict] = []

    def measure(self, request):
        self.asked.append(request)
        started = self.prompt_s * sum(map(len, request["prompts"]))
        decode_s = self.step_s * (request["num_tokens"] - 1)
        return {
            "wall_s": started + decode_s,
            "decode_s": decode_s,
            "num_decode_tokens": len(request["prompts"]) * (request["num_tokens"] - 1),
            "token_ids": [[7] * request["num_tokens"] for _ in request["prompts"]],
        }


def peers():
    ours, theirs, llama = Answering(0.001, 0.01), Answering(0.002, 0.04), Answering(0.001, 0.02)
    return [
        Peer("specserve", "bf16", "off", ours, ours),
        Peer("specserve int8", "int8", "off", ours, ours),
        Peer("vllm", "bf16", "off", theirs, theirs),
        Peer("llamacpp Q8_0", "gguf", "off", llama, None, max_batch=1),
    ]


def test_prompts_and_decoding_have_rates_and_ratios_of_their_own(capsys):
    columns = peers()
    cells = interleaved(columns, [1, 8], Prompts([[1], [2]], 30, range(512, 600)), [], 5, rounds=2)
    summary = report(cells, columns)
    assert [(row["adapters"], row["batch"]) for row in summary] == [(case, n) for case in CASES[:2] for n in (1, 8)]
    for row in summary:
        vllm = row["peers"]["vllm"]
        assert vllm["prompt_tokens_per_s"]["median"] == 500 and vllm["specserve_over_it_prompt"]["median"] == 2
        assert vllm["decode_tokens_per_s"]["median"] == 25 * row["batch"]
        assert vllm["specserve_over_it_decode"]["median"] == 4
        assert ("llamacpp Q8_0" in row["peers"]) == ((row["adapters"], row["batch"]) == ("no LoRA", 1))
    assert "no LoRA, batch 1: specserve int8 decodes 2.00x llamacpp Q8_0" in capsys.readouterr().out
    asked = [prompt for request in columns[2].plain.asked for prompt in request["prompts"]]
    assert {len(prompt) for prompt in asked} == {30} and len(set(map(tuple, asked))) == len(asked)


def test_given_prompts_are_asked_in_turn_and_have_no_rate_of_their_own():
    columns = peers()[:1]
    (cell, _) = interleaved(columns, [1], Prompts([[1], [2]], 0, range(9)), [], 3, rounds=3)
    assert cell.prompt_tokens_per_s == {} and len(cell.tokens_per_s["specserve"]) == 3
    asked = [request["prompts"] for request in columns[0].plain.asked]
    assert asked == [[[1]], [[1]]] + [[[1]], [[2]]] * 3  # the warm-up, then the two cases take turns


@pytest.fixture
def recorder(monkeypatch):
    """A recorder of workers, each of whose steps takes a second."""
    path = Path(__file__).parents[2] / "bench/peers/workers/worker_io.py"  # imported by scripts that lie beside it
    spec = importlib.util.spec_from_file_location("worker_io", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter(range(100)).__next__))

    def record(num_requests, has_one_length, steps):
        recorded = module.Recorder(num_requests, has_one_length)
        for step in steps:
            recorded.add_step(step.items())
        return recorded.result()

    return record


def steps_of(begins, num_tokens, each=1):
    """A token (or `each`) a step for request i from step begins[i] on, up to its `num_tokens`."""
    last = max(begin + -(-num_tokens // each) for begin in begins)
    return [
        {
            idx: [7] * min(each, num_tokens - each * (step - begin))
            for idx, begin in enumerate(begins)
            if 0 <= step - begin < -(-num_tokens // each)
        }
        for step in range(last)
    ]


def test_decoding_is_timed_while_the_whole_batch_decodes(recorder):
    """Three requests begin one after the other, so the first is done two steps before the last."""
    found = recorder(3, True, steps_of([0, 1, 2], 10))
    assert found["wall_s"] == 12 and list(map(len, found["token_ids"])) == [10, 10, 10]
    assert (found["decode_s"], found["num_decode_tokens"]) == (7, 21)  # steps 4 to 10, three tokens each


def test_answers_that_end_by_themselves_are_timed_up_to_the_last(recorder):
    found = recorder(3, False, steps_of([0, 1, 2], 10))
    assert (found["decode_s"], found["num_decode_tokens"]) == (9, 24)  # steps 4 to 12; the last two are not full


def test_a_step_of_several_tokens_counts_whole(recorder):
    found = recorder(2, True, steps_of([0, 0], 9, each=4))
    assert (found["decode_s"], found["num_decode_tokens"]) == (2, 10)


def test_where_the_first_request_ends_before_the_last_begins_there_is_no_rate_of_decoding(recorder, capsys):
    found = recorder(2, True, steps_of([0, 5], 3))
    assert (found["decode_s"], found["num_decode_tokens"]) == (0, 0)
    columns = peers()[2:3]
    columns[0].plain.measure = lambda request: found | {"token_ids": [[7] * request["num_tokens"]] * 2}
    cells = interleaved(columns, [2], Prompts([[1], [2]], 0, range(9)), [], 3, rounds=1)
    row = report(cells, columns)[0]["peers"]["vllm"]
    assert row["decode_rounds"] == [None] and "decode_tokens_per_s" not in row and row["tokens_per_s"]
    assert "NaN" in capsys.readouterr().out
