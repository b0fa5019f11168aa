"""OpenAI's API beyond the plain answer: best_of, usage in streams, continued messages, names, ids and retry headers."""

import pytest
import requests
from server_fixture import assert_error

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLED = {"prompt": "The quick", "max_tokens": 8, "temperature": 1.2, "seed": 3, "ignore_eos": True}


def mean_logprob(choice):
    values = choice["logprobs"]["token_logprobs"]
    return sum(values) / len(values)


def test_best_of_answers_the_n_choices_of_highest_mean_logprob(server):
    every = server.post(TEXT, {**SAMPLED, "n": 6, "logprobs": 0}).json()["choices"]
    ranked = sorted(every, key=mean_logprob, reverse=True)
    body = server.post(TEXT, {**SAMPLED, "n": 2, "best_of": 6}).json()
    assert [choice["text"] for choice in body["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 6 * 8  # all of them were generated
    scored = server.post(TEXT, {**SAMPLED, "best_of": 6, "logprobs": 1}).json()["choices"]
    assert len(scored) == 1 and mean_logprob(scored[0]) == max(map(mean_logprob, every))


def test_best_of_ranks_each_prompt_by_itself(server):
    body = {**SAMPLED, "prompt": ["The quick", "A server"], "best_of": 3}
    together = [choice["text"] for choice in server.post(TEXT, body).json()["choices"]]
    alone = [server.post(TEXT, {**body, "prompt": prompt}).json()["choices"][0]["text"] for prompt in body["prompt"]]
    assert together == alone


def test_best_of_below_n_and_in_streams_is_refused(server):
    assert_error(server.post(TEXT, {**SAMPLED, "n": 3, "best_of": 2}), 400, "best_of is 2", param="best_of")
    assert_error(server.post(TEXT, {**SAMPLED, "best_of": 2, "stream": True}), 400, "stream", param="best_of")
    assert len(server.stream(TEXT, {**SAMPLED, "n": 2, "best_of": 2})) > 2


def test_continuous_usage_grows_to_the_final_usage(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in ((TEXT, {**SAMPLED, "n": 2}), (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "n": 2})):
        events = server.stream(path, {"max_tokens": 8, **body, "stream_options": options})
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == counts[-2] and len(set(counts)) > 2
        assert len({event["usage"]["prompt_tokens"] for event in events}) == 1
    events = server.stream(TEXT, {**SAMPLED, "stream_options": {"include_usage": True}})
    assert all(event["usage"] is None for event in events[:-1])
    assert all("usage" not in event for event in server.stream(TEXT, SAMPLED))


@pytest.mark.parametrize("opening", ["Sure, the", " <|im_end|> the ", "a"])
def test_continue_final_message_ends_the_prompt_with_its_text(server, opening):
    messages = [{"role": "user", "content": "Say a"}, {"role": "assistant", "content": opening}]
    body = {"messages": messages, "continue_final_message": True}
    ids = server.post("/tokenize", body).json()["tokens"]
    prompt = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert prompt == f"<|im_start|>user\nSay a<|im_end|>\n<|im_start|>assistant\n{opening}"
    answer = server.post(CHAT, {**body, "max_tokens": 6, "temperature": 0}).json()["choices"][0]["message"]["content"]
    assert answer == server.complete(ids, max_tokens=6, ignore_eos=False)["text"]
    both = {**body, "add_generation_prompt": True}
    assert_error(server.post(CHAT, both), 400, "exclude", param="continue_final_message")
    empty = {**body, "messages": [messages[0], {"role": "assistant", "content": ""}]}
    assert_error(server.post(CHAT, empty), 400, "text", param="continue_final_message")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3-8B", "a/b/c", "nobody"])
def test_unknown_model_is_404_also_when_it_is_named_like_a_hub_model(server, name):
    for field in ("model", "adapter_id"):
        error = assert_error(server.post(TEXT, {"prompt": "x", field: name}), 404, name, param="model")
        assert error["code"] == "model_not_found" and error["type"] == "invalid_request_error"
    assert_error(server.get(f"/v1/models/{name}"), 404)


def test_request_id_is_echoed_on_answers_streams_and_errors_and_made_where_it_is_missing(server):
    headers = {"X-Request-Id": "trace-7"}
    for body in (SAMPLED, {**SAMPLED, "stream": True}, {**SAMPLED, "top_p": 9}):
        assert server.post(TEXT, body, headers=headers).headers["X-Request-Id"] == "trace-7"
    assert server.get("/nowhere", headers=headers).headers["X-Request-Id"] == "trace-7"
    made = {server.get("/health", headers=sent).headers["X-Request-Id"] for sent in ({}, {}, {"X-Request-Id": "a b"})}
    assert len(made) == 3 and all(len(value) == 32 for value in made)


def test_head_answers_where_get_does(server):
    for path in ("/health", "/v1/models", "/openapi.json"):
        assert requests.head(server.url + path, timeout=60).status_code == 200
    assert requests.head(server.url + TEXT, timeout=60).status_code == 405


def test_seed_user_and_metadata_change_nothing_but_are_accepted(server):
    first, second = (
        server.post(TEXT, {**SAMPLED, **extra}).json()["choices"][0]["text"]
        for extra in ({}, {"user": "u", "metadata": {"team": "x"}, "store": False, "service_tier": "auto"})
    )
    assert first == second
    assert_error(server.post(TEXT, {**SAMPLED, "suffix": "end"}), 400, "suffix", param="suffix")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("get", "/v1/files"),
        ("get", "/v1/files/file-1/content"),
        ("get", "/v1/batches/batch_1"),
        ("post", "/v1/batches/batch_1/cancel"),
    ],
)
def test_a_server_without_a_folder_for_batches_names_the_flag(server, method, path):
    body = ({},) if method == "post" else ()
    assert_error(getattr(server, method)(path, *body), 404, "--batch-dir")
