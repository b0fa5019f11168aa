"""What `python -m bench.peers` asks its peers for, and the rates and ratios that it makes of their answers."""

from __future__ import annotations

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
