"""A teacher at an endpoint: what it is sent, what its answers become, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from email.utils import formatdate

import pytest
from fake_teacher import MODEL, FakeTeacher, completion, echo

from specserve.errors import UserError
from specserve.teachers import Answer, Ask, Budget, NoAnswerError, Price, TeacherError, TeacherSpec, open_teacher
from specserve.teachers.answer_cache import AnswerCache
from specserve.teachers.hosted import retry_after
from specserve.teachers.hosted_body import same_model
from specserve.teachers.usage import most_tokens


def ask(text: str, **fields) -> Ask:
    return Ask(({"role": "user", "content": text},), **{"max_tokens": 20, **fields})


USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
ASKS = [ask(f"question {idx}") for idx in range(12)]


class Endpoint:
    """A fake endpoint and a teacher of it, opened anew for each call: what is kept between is the cache."""

    def __init__(self, tmp_path):
        self.fake = FakeTeacher()
        self.spec = TeacherSpec(
            model=MODEL, url="", accept_terms=True, cache_dir=tmp_path, retry_wait_s=0.002, timeout_s=10
        )

    async def results(self, asks, *, budget=None, **changes):
        """(results in the order of `asks`, usage)."""
        spec = dataclasses.replace(self.spec, **{"url": self.fake.url, **changes})
        found: dict[int, object] = {}
        self.usage = None
        async with open_teacher(spec, budget) as teacher:
            self.usage = teacher.usage
            async with contextlib.aclosing(teacher.answers(asks)) as answers:
                async for index, result in answers:
                    assert index not in found
                    found[index] = result
        return [found[index] for index in sorted(found)], teacher.usage


@pytest.fixture
async def endpoint(tmp_path):
    endpoint = Endpoint(tmp_path)
    async with endpoint.fake.serving():
        yield endpoint


def texts(results):
    return [[answer.text for answer in result] for result in results]


async def test_what_is_asked_once_is_not_asked_again(endpoint):
    results, usage = await endpoint.results(ASKS, price=Price(1.0, 10.0))
    assert texts(results) == [[f"answer to question {idx}"] for idx in range(12)]
    assert results[0] == [Answer("answer to question 0", "stop", 2, 4)]
    assert (usage.requests, usage.cached, usage.prompt_tokens, usage.completion_tokens) == (12, 0, 24, 48)
    assert usage.cost == pytest.approx(24e-6 + 480e-6)
    again, usage = await endpoint.results([*ASKS, ASKS[0], ask("new")], price=Price(1.0, 10.0))
    assert again[:12] == results and (usage.requests, usage.cached) == (1, 13)
    assert usage.cached_cost == pytest.approx(13 / 12 * 504e-6)
    assert len(endpoint.fake.bodies) == 13


async def test_equal_asks_of_one_run_share_an_answer(endpoint):
    results, usage = await endpoint.results([ASKS[0]] * 5)
    assert len(endpoint.fake.bodies) == 1 and texts(results) == [["answer to question 0"]] * 5
    assert (usage.requests, usage.cached) == (1, 4)


async def test_two_at_once_pay_once_for_the_same(endpoint):
    async def slow(body, number):
        await asyncio.sleep(0.02)
        return echo(body)

    endpoint.fake.respond = slow
    both = await asyncio.gather(*(endpoint.results(asks, concurrency=4) for asks in (ASKS, ASKS[::-1], ASKS[:5])))
    assert texts(both[0][0]) == texts(both[1][0])[::-1] == [[f"answer to question {idx}"] for idx in range(12)]
    assert len(endpoint.fake.bodies) == 12 == sum(usage.requests for _, usage in both)
    assert sum(usage.cached for _, usage in both) == 17


async def test_another_program_that_hangs_is_waited_for_as_long_as_for_an_answer(endpoint):
    other = AnswerCache(endpoint.spec.cache_dir)
    spec = dataclasses.replace(endpoint.spec, url=endpoint.fake.url)
    async with open_teacher(spec) as teacher:
        assert other.take(ASKS[0].digest(teacher.backend.identity))
    start = time.monotonic()
    results, usage = await endpoint.results(ASKS, timeout_s=1.0)
    assert len(results) == 12 and usage.requests == 12 and time.monotonic() - start > 0.9
    other.close()


@pytest.mark.parametrize(
    "changes", [{"model": "wise-1-mini"}, {"fields": {"reasoning_effort": "low"}}, {"url": "other"}], ids=str
)
async def test_another_teacher_has_other_answers(endpoint, changes):
    await endpoint.results(ASKS[:1])
    if "url" in changes:
        changes = {"url": endpoint.fake.url.replace("127.0.0.1", "localhost")}
    _, usage = await endpoint.results(ASKS[:1], any_model=True, **changes)
    assert usage.requests == 1


async def test_bodies_say_what_is_asked(endpoint):
    schema = {"type": "object"}
    whole = ask("q", temperature=0.7, top_p=0.9, n=2, seed=5, stop=("\n",), schema=schema, top_logprobs=3, max_tokens=9)
    await endpoint.results([whole], fields={"reasoning_effort": "low", "top_p": None})
    assert endpoint.fake.bodies == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "q"}],
            "max_tokens": 9,
            "temperature": 0.7,
            "n": 2,
            "seed": 5,
            "stop": ["\n"],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            },
            "logprobs": True,
            "top_logprobs": 3,
            "reasoning_effort": "low",
        }
    ]


async def test_samples_that_an_endpoint_does_not_give_at_once_are_asked_for_one_by_one(endpoint):
    endpoint.fake.respond = lambda body, number: [f"sample {number}"]
    results, usage = await endpoint.results([ask("q", n=3, seed=7, temperature=1.0)])
    assert texts(results) == [["sample 0", "sample 1", "sample 2"]]
    assert [body["seed"] for body in endpoint.fake.bodies] == [7, 8, 9] and usage.prompt_tokens == 3


async def test_log_probabilities_are_of_bytes(endpoint):
    token = {"token": "\\xc3", "logprob": -0.5, "bytes": [195], "top_logprobs": [{"token": "é", "logprob": -1.0}]}
    endpoint.fake.respond = lambda body, number: completion("é", body, logprobs={"content": [token]})
    ((answer,),), _ = await endpoint.results([ask("q", top_logprobs=1)])
    assert answer.logprobs[0].token == b"\xc3" and answer.logprobs[0].top == (("é".encode(), -1.0),)


def failing(*bad, then=echo):
    """The first requests get `bad`, all others an answer."""
    return lambda body, number: bad[number] if number < len(bad) else then(body)


@pytest.mark.parametrize(
    "bad",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        (500, b"oh no", {}),
        (503, b"", {}),
        None,
        b"{ not json",
        b"<html>a proxy's page</html>",
        b'{"choices": []}',
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": "cut o"}, "finish_reason": None}]},
    ],
    ids=lambda bad: str(bad)[:40],
)
async def test_what_may_pass_is_tried_again(endpoint, bad):
    endpoint.fake.respond = failing(bad, bad)
    results, usage = await endpoint.results(ASKS)
    assert texts(results) == [[f"answer to question {idx}"] for idx in range(12)]
    assert usage.retries == 2 and usage.failed == 0


async def test_a_slow_answer_is_given_up_and_asked_for_again(endpoint):
    async def slow(body, number):
        await asyncio.sleep(5 if number == 0 else 0)
        return echo(body)

    endpoint.fake.respond = slow
    results, usage = await endpoint.results(ASKS[:1], timeout_s=1.0)  # in which the second answer comes
    assert texts(results) == [["answer to question 0"]] and usage.retries == 1


async def test_a_pause_that_is_asked_for_holds_for_all(endpoint):
    arrivals: list[float] = []

    def limited(body, number):
        arrivals.append(time.monotonic())
        return echo(body) if number else (429, {"error": {"message": "slow down"}}, {"retry-after-ms": "300"})

    endpoint.fake.respond = limited
    _, usage = await endpoint.results(ASKS, concurrency=1)
    assert usage.retries == 1 and arrivals[1] - arrivals[0] > 0.29


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((400, {"error": {"message": "context too long"}}, {}), "status 400: context too long"),
        ((403, {"error": "flagged"}, {}), "status 403: flagged"),
        ((422, {"detail": [{"msg": "field n"}]}, {}), "field n"),
        ((429, {"error": {"message": "come tomorrow"}}, {"Retry-After": "86400"}), "come tomorrow"),
        ({"choices": [{"message": {"refusal": "I will not"}, "finish_reason": "stop"}]}, "refuses to answer: I will"),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}, "content filter"),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}, "empty answer"),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "tool_calls"}]}, "finish_reason is 'tool_calls'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_will_not_pass_is_that_ask_s_result_alone(endpoint, bad, told):
    endpoint.fake.respond = lambda body, number: bad if body["messages"][0]["content"] == "bad" else echo(body)
    results, usage = await endpoint.results([*ASKS[:3], ask("bad"), *ASKS[3:]])
    assert isinstance(results[3], TeacherError) and told in str(results[3]) and MODEL in str(results[3])
    assert len(endpoint.fake.bodies) == 13 and usage.retries == 0
    assert texts(results[:3] + results[4:]) == [[f"answer to question {idx}"] for idx in range(12)]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((401, {"error": {"message": "bad key"}}, {}), "the key is refused"),
        ((404, b"page not found", {}), "no such address or model: status 404: page not found"),
        ((429, {"error": {"message": "pay", "code": "insufficient_quota"}}, {}), "the quota is used up"),
        ((307, b"", {"Location": "https://elsewhere/v1"}), "redirects to 'https://elsewhere/v1'"),
        ({**completion("x", {"messages": []}), "model": "llama"}, "answered as 'llama', and 'wise-1' was asked"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_no_other_ask_would_pass_ends_the_run(endpoint, bad, told):
    endpoint.fake.respond = lambda body, number: echo(body) if number < 3 else bad
    with pytest.raises(TeacherError, match=told):
        await endpoint.results(ASKS, concurrency=2)
    assert len(endpoint.fake.bodies) <= 5
    endpoint.fake.respond = failing()
    _, usage = await endpoint.results(ASKS)
    assert usage.cached == 3


async def test_an_endpoint_that_dies_ends_the_run_and_keeps_what_it_gave(endpoint):
    endpoint.fake.respond = lambda body, number: echo(body) if number < 4 else (502, b"bad gateway", {})
    asks = [ask(f"q{idx}") for idx in range(40)]
    with pytest.raises(TeacherError, match="5 requests in a row had no answer after 1 retries. What was answered is"):
        await endpoint.results(asks, max_retries=1, concurrency=4)
    assert len(endpoint.fake.bodies) < 25
    endpoint.fake.respond = failing()
    results, usage = await endpoint.results(asks)
    assert len(results) == 40 and usage.cached == 4


async def test_one_ask_that_always_fails_is_a_result(endpoint):
    endpoint.fake.respond = lambda body, number: None if body["messages"][0]["content"] == "poison" else echo(body)
    results, usage = await endpoint.results([ask("poison"), *ASKS], max_retries=2)
    assert isinstance(results[0], TeacherError) and results[0].retryable and "cannot reach" in str(results[0])
    assert len(results) == 13 and usage.failed == 1


async def test_requests_that_are_all_refused_end_the_run(endpoint):
    endpoint.fake.respond = lambda body, number: (400, {"error": {"message": "no such field: top_p"}}, {})
    with pytest.raises(TeacherError, match="no such field: top_p; the first 20 requests were all refused"):
        await endpoint.results([ask(f"q{idx}") for idx in range(100)], concurrency=3)
    assert len(endpoint.fake.bodies) < 25


async def test_nobody_there_is_one_line(endpoint):
    with pytest.raises(TeacherError, match=r"cannot reach wise-1@http://127.0.0.1:1/v1: .*; is it running") as raised:
        await endpoint.results(ASKS, url="http://127.0.0.1:1/v1")
    assert raised.value.ends_run and "\n" not in str(raised.value)


async def test_a_key_comes_from_its_variable_and_is_never_shown(endpoint, monkeypatch):
    endpoint.fake.key = "sk-secret-1"
    with pytest.raises(TeacherError, match="the environment variable TEACHER_KEY is not set"):
        await endpoint.results(ASKS, key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong-2")
    with pytest.raises(TeacherError, match=r"the key is refused \(from \$TEACHER_KEY\)") as raised:
        await endpoint.results(ASKS, key_env="TEACHER_KEY")
    assert "sk-wrong-2" not in str(raised.value) and "***" in str(raised.value)
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-1")
    results, _ = await endpoint.results(ASKS, key_env="TEACHER_KEY")
    assert len(results) == 12
    kept = b"".join(path.read_bytes() for path in endpoint.spec.cache_dir.iterdir())
    assert b"sk-secret-1" not in kept and b"answer to question 3" in kept


@pytest.mark.parametrize(
    "sent",
    [
        b"your header was Bearer sk-secret-1",
        {"choices": [], "header": "sk-secret-1"},
        (302, b"", {"Location": "/sk-secret-1"}),
    ],
    ids=["no JSON", "no choices", "redirect"],
)
async def test_an_endpoint_that_sends_a_key_back_does_not_show_it(endpoint, monkeypatch, sent):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-1")
    endpoint.fake.respond = lambda body, number: sent
    try:
        results, _ = await endpoint.results(ASKS[:1], key_env="TEACHER_KEY", max_retries=0)
        told = str(results[0])
    except TeacherError as error:
        told = str(error)
    assert "sk-secret-1" not in told and "***" in told


async def test_usage_below_zero_is_no_answer(endpoint):
    endpoint.fake.respond = lambda body, number: (
        completion("x", body) | {"usage": {"prompt_tokens": -1_000_000, "completion_tokens": 1}}
    )
    results, usage = await endpoint.results(ASKS[:1], price=Price(1.0, 1.0), max_retries=0)
    assert isinstance(results[0], TeacherError) and 0 < usage.cost == usage.lost_cost


async def test_no_more_requests_than_wanted_at_a_time(endpoint):
    async def slow(body, number):
        await asyncio.sleep(0.01)
        return echo(body)

    endpoint.fake.respond = slow
    await endpoint.results(ASKS, concurrency=3)
    assert endpoint.fake.most_running == 3


async def test_leaving_early_leaves_nothing_running(endpoint):
    async def slow(body, number):
        await asyncio.sleep(0.01 if number < 2 else 30)
        return echo(body)

    endpoint.fake.respond = slow
    async with open_teacher(dataclasses.replace(endpoint.spec, url=endpoint.fake.url)) as teacher:
        async with contextlib.aclosing(teacher.answers(ASKS)) as answers:
            await anext(answers)
    assert not [task for task in asyncio.all_tasks() if "answer" in repr(task.get_coro())]
    endpoint.fake.respond = failing()
    _, usage = await endpoint.results(ASKS)
    assert usage.cached >= 1


async def test_the_limit_of_cost_is_never_passed(endpoint):
    price, budget = Price(0.0, 1e6), Budget(50.0)  # an answer of 3 tokens costs 3, and may cost 20
    with pytest.raises(TeacherError, match="the limit of cost is reached: 33.0000 of 50.0000 is spent"):
        await endpoint.results([ask(f"q{idx}") for idx in range(40)], price=price, budget=budget)
    assert budget.spent == 33.0 and len(endpoint.fake.bodies) == 11
    results, usage = await endpoint.results([ask(f"q{idx}") for idx in range(14)], price=price, budget=Budget(50.0))
    assert len(results) == 14 and usage.cost + usage.cached_cost == 42.0 and usage.cached <= 11


PER_TOKEN = Price(0.0, 1e6)  # of answers; one may have 20


@pytest.mark.parametrize(
    ("bad", "cost"),
    [
        (5.0, 20),
        (None, 20),
        (b"{ not json", 20),
        (b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 7}}', 7),
        ({"choices": [{"message": {"content": "cut o"}, "finish_reason": None}], "usage": None}, 20),
        ((504, b"gave up on the model", {}), 20),
        ((500, b"oh no", {}), 0),
        ((429, b"", {"Retry-After": "0"}), 0),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_brings_no_answer_and_may_be_charged_counts_as_spent(endpoint, bad, cost):
    async def respond(body, number):
        if number == 0 and isinstance(bad, float):
            await asyncio.sleep(bad)
        return bad if number == 0 else echo(body)

    endpoint.fake.respond, budget = respond, Budget(100.0)
    timeout_s = 1.0 if isinstance(bad, float) else 10
    results, usage = await endpoint.results(ASKS[:1], price=PER_TOKEN, budget=budget, timeout_s=timeout_s)
    assert texts(results) == [["answer to question 0"]]
    assert usage.cost == budget.spent == 4 + cost and (usage.lost, usage.lost_cost) == (cost > 0, cost)


async def test_attempts_without_answers_do_not_pass_the_limit_of_cost(endpoint):
    endpoint.fake.respond, budget = lambda body, number: None, Budget(50.0)
    with pytest.raises(TeacherError, match=r"the limit of cost is reached: 40.0000 of 50.0000 is spent"):
        await endpoint.results(ASKS, price=PER_TOKEN, budget=budget, concurrency=1)
    assert len(endpoint.fake.bodies) == 2 and endpoint.usage.lost_cost == 40.0


async def test_nobody_there_costs_nothing(endpoint):
    with pytest.raises(TeacherError, match="cannot reach"):
        await endpoint.results(ASKS, url="http://127.0.0.1:1/v1", price=PER_TOKEN, max_retries=0)
    assert endpoint.usage.cost == endpoint.usage.lost == 0


async def test_fields_that_ask_for_longer_answers_are_set_aside(endpoint):
    with pytest.raises(TeacherError, match="the next request may cost 60"):
        await endpoint.results(ASKS, price=PER_TOKEN, budget=Budget(50), fields={"max_completion_tokens": 60})
    with pytest.raises(UserError, match="max_tokens=null takes away the limit of answers"):
        await endpoint.results(ASKS, price=PER_TOKEN, budget=Budget(50), fields={"max_tokens": None})
    assert not endpoint.fake.bodies
    long = ask("q", schema={"type": "object", "description": "x" * 10_000})
    assert most_tokens(long, 1, {})[0] > 10_000


REFUSALS = [
    {"choices": [{"message": {"refusal": "I will not"}, "finish_reason": "stop"}], "usage": USAGE},
    {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}], "usage": USAGE},
    {"choices": [{"message": {"content": ""}, "finish_reason": "tool_calls"}], "usage": USAGE},
    (400, {"error": {"message": "I will not", "code": "content_filter"}}, {}),
]


@pytest.mark.parametrize("bad", REFUSALS, ids=["refusal", "empty", "tool call", "filtered prompt"])
async def test_a_refusal_is_paid_for_once_and_asked_for_again_if_wanted(endpoint, bad):
    endpoint.fake.respond = lambda body, number: bad if body["messages"][0]["content"] == "bad" else echo(body)
    results, usage = await endpoint.results([ask("bad"), *ASKS[:2]], price=PER_TOKEN)
    assert isinstance(results[0], NoAnswerError) and usage.failed == 0
    assert usage.cost == 8 + (20 if isinstance(bad, tuple) else 1) and usage.lost == 0
    again, usage = await endpoint.results([ask("bad"), *ASKS[:2]], price=PER_TOKEN)
    assert str(again[0]) == str(results[0]) and (usage.cached, usage.cost) == (3, 0)
    assert len(endpoint.fake.bodies) == 3
    results, usage = await endpoint.results([ask("bad"), ask("bad"), *ASKS[:2]], retry_refused=True)
    assert isinstance(results[1], NoAnswerError) and (usage.requests, len(endpoint.fake.bodies)) == (1, 4)
    endpoint.fake.respond = failing()
    results, usage = await endpoint.results([ask("bad"), *ASKS[:2]], retry_refused=True)
    assert texts(results[:1]) == [["answer to bad"]] and usage.cached == 2
    results, usage = await endpoint.results([ask("bad")])
    assert texts(results) == [["answer to bad"]] and usage.cached == 1


async def test_answers_beside_a_refusal_are_kept(endpoint):
    def respond(body, number):
        told = completion(["one", "two", "three"], body)
        told["choices"][1]["message"] = {"refusal": "not this one"}
        return told

    endpoint.fake.respond = respond
    for cached in (0, 1):
        results, usage = await endpoint.results([ask("q", n=3, temperature=1.0)])
        assert texts(results) == [["one", "three"]] and (usage.cached, usage.failed) == (cached, 0)
    endpoint.fake.respond = lambda body, number: ["again"]
    results, _ = await endpoint.results([ask("q", n=3, temperature=1.0, seed=None)], retry_refused=True)
    assert texts(results) == [["one", "three", "again"]] and len(endpoint.fake.bodies) == 2


async def test_an_answer_that_is_cut_is_asked_for_again_alone(endpoint):
    def respond(body, number):
        told = completion(["one", "two", "three"][: body.get("n", 1)], body)
        told["choices"][0]["finish_reason"] = None if number == 0 else "stop"
        return told

    endpoint.fake.respond = respond
    results, usage = await endpoint.results([ask("q", n=3, seed=5)])
    assert texts(results) == [["two", "three", "one"]] and usage.retries == 0
    assert [(body.get("n", 1), body["seed"]) for body in endpoint.fake.bodies] == [(3, 5), (1, 7)]


async def test_samples_that_came_before_an_endpoint_failed_are_paid_for_once(endpoint):
    endpoint.fake.respond = lambda body, number: [f"sample {number}"] if number < 2 else (500, b"", {})
    whole = ask("q", n=3, seed=7, temperature=1.0)
    results, usage = await endpoint.results([whole], max_retries=1, price=PER_TOKEN)
    assert texts(results) == [["sample 0", "sample 1"]] and (usage.failed, usage.cost) == (1, 4)
    endpoint.fake.respond = lambda body, number: [f"sample {number}"]
    results, usage = await endpoint.results([whole], price=PER_TOKEN)
    assert texts(results) == [["sample 0", "sample 1", "sample 4"]] and endpoint.fake.bodies[-1]["seed"] == 9
    assert (usage.requests, usage.cost) == (1, 2)


async def test_a_teacher_that_refuses_all_ends_the_run(endpoint):
    endpoint.fake.respond = lambda body, number: REFUSALS[0]
    with pytest.raises(TeacherError, match="I will not; the first 20 requests were all refused"):
        await endpoint.results([ask(f"q{idx}") for idx in range(100)], concurrency=3)
    assert len(endpoint.fake.bodies) < 25


async def test_refusals_that_are_kept_count_among_the_first_and_end_nothing_by_themselves(endpoint):
    endpoint.fake.respond = lambda body, number: REFUSALS[0]
    asks = [ask(f"q{idx}") for idx in range(60)]
    await endpoint.results(asks[:19])
    with pytest.raises(TeacherError, match="I will not; the first 20 requests were all refused"):
        await endpoint.results(asks, concurrency=1)
    assert len(endpoint.fake.bodies) == 20
    results, usage = await endpoint.results(asks[:20])
    assert len(results) == 20 == usage.cached
    endpoint.fake.respond = lambda body, number: echo(body) if number == 20 else REFUSALS[0]
    await endpoint.results([ask("good")])
    results, _ = await endpoint.results([ask("good"), *asks])
    assert len(results) == 61, "what was answered before shows that it is the asks"


async def test_a_price_needs_token_counts(endpoint):
    endpoint.fake.respond = lambda body, number: {**completion("x", body), "usage": None}
    with pytest.raises(TeacherError, match="does not say how many tokens an answer took"):
        await endpoint.results(ASKS, price=PER_TOKEN, concurrency=2)
    assert endpoint.usage.cost == 20 * len(endpoint.fake.bodies) < 20 * 12
    results, usage = await endpoint.results(ASKS)
    assert len(results) == 12 == len(endpoint.fake.bodies) and usage.completion_tokens == 0, "answers are kept"


async def test_terms_are_agreed_to_once_for_each_model(endpoint):
    with pytest.raises(TeacherError, match="may forbid training other models.*--accept-teacher-terms"):
        await endpoint.results(ASKS[:1], accept_terms=False)
    assert not endpoint.fake.bodies
    await endpoint.results(ASKS[:1])
    results, _ = await endpoint.results(ASKS[:2], accept_terms=False)
    assert len(results) == 2
    with pytest.raises(TeacherError, match="may forbid"):
        await endpoint.results(ASKS[:1], accept_terms=False, model="wise-2")


async def test_the_newer_name_of_max_tokens_is_found(endpoint):
    def newer(body, number):
        if "max_tokens" in body:
            return 400, {"error": {"message": "max_tokens is not supported; use max_completion_tokens"}}, {}
        return echo(body)

    endpoint.fake.respond = newer
    results, _ = await endpoint.results(ASKS, concurrency=1)
    assert len(results) == 12 and [("max_tokens" in body) for body in endpoint.fake.bodies].count(True) == 1


async def test_a_schema_that_cannot_be_strict_is_asked_for_all_the_same(endpoint):
    def picky(body, number):
        if body["response_format"]["json_schema"]["strict"]:
            return 400, {"error": {"message": "Invalid schema for response_format: maxLength is not permitted"}}, {}
        return "{}"

    endpoint.fake.respond = picky
    results, _ = await endpoint.results([ask(f"q{idx}", schema={"type": "object"}) for idx in range(4)], concurrency=1)
    assert texts(results) == [["{}"]] * 4 and len(endpoint.fake.bodies) == 5


def test_what_endpoints_ask_to_wait():
    assert retry_after({"Retry-After": "7"}) == 7 and retry_after({"retry-after-ms": "250"}) == 0.25
    assert 50 < retry_after({"Retry-After": formatdate(time.time() + 60, usegmt=True)}) <= 61
    assert retry_after({"Retry-After": formatdate(time.time() - 60, usegmt=True)}) == 0
    assert retry_after({}) is None and retry_after({"Retry-After": "soon"}) is None


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("meta-llama/Llama-3-8B", "llama-3-8b", True),
        ("sonnet-latest", "sonnet-2025", True),
        ("gpt-4", "gpt-4o", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", True),
        ("wise-1", "llama", False),
    ],
)
def test_versions_of_a_model_are_that_model(asked, answered, same):
    assert same_model(asked, answered) is same
