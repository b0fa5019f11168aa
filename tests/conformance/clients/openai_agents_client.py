"""openai-agents over /v1/responses: runs, streams, further turns, typed answers, tools and hand-offs."""

from typing import Literal

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from cases import check_answer, run
from openai import AsyncOpenAI
from pydantic import BaseModel

WORDS = ["hello there", "good day"]  # a random model would never end by itself


class Answer(BaseModel):
    ok: bool
    level: Literal["low", "high"]


@function_tool
def set_level(ok: bool, level: Literal["low", "high"]) -> str:
    """Set the level."""
    check_answer(ok, level)
    return f"level is {level}"


def agent(url, key, words=True, **fields):
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    extra = {"structured_outputs": {"choice": WORDS}} if words else None
    settings = ModelSettings(temperature=0, max_tokens=400, extra_body=extra, **fields.pop("settings", {}))
    model = OpenAIResponsesModel(model=fields.pop("model", "tiny"), openai_client=client)
    return Agent(
        name=fields.pop("name", "first"), instructions="Be brief.", model=model, model_settings=settings, **fields
    )


async def case_run_stream_and_a_further_turn(url, key):
    result = await Runner.run(agent(url, key), "Say hello")
    assert result.final_output in WORDS and result.raw_responses[0].usage.output_tokens > 0
    stream = Runner.run_streamed(agent(url, key), "Say hello")
    kinds = [event.data.type async for event in stream.stream_events() if event.type == "raw_response_event"]
    assert stream.final_output == result.final_output
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    turn = [*result.to_input_list(), {"role": "user", "content": "Again"}]
    assert (await Runner.run(agent(url, key, model="alpha"), turn)).final_output in WORDS


async def case_typed_answer(url, key):
    answer = (await Runner.run(agent(url, key, words=False, output_type=Answer), "Say hello")).final_output
    check_answer(answer.ok, answer.level)


async def case_tools(url, key):
    called = agent(
        url, key, words=False, tools=[set_level], tool_use_behavior="stop_on_first_tool",
        settings={"tool_choice": "required", "parallel_tool_calls": False},
    )  # fmt: skip
    result = await Runner.run(called, "Set the level")
    assert result.final_output.startswith("level is ")
    stream = Runner.run_streamed(called, "Set the level")
    async for _ in stream.stream_events():
        pass
    assert stream.final_output == result.final_output
    turn = [*result.to_input_list(), {"role": "user", "content": "Well?"}]
    assert (await Runner.run(agent(url, key), turn)).final_output in WORDS


async def case_typed_answer_or_tools(url, key):
    either = agent(
        url, key, words=False, output_type=Answer, tools=[set_level], tool_use_behavior="stop_on_first_tool",
        settings={"parallel_tool_calls": False},
    )  # fmt: skip
    answers = {
        None: (await Runner.run(either, "Say hello")).final_output,
        "none": (await Runner.run(_choosing(either, "none"), "Say hello")).final_output,
        "required": (await Runner.run(_choosing(either, "required"), "Say hello")).final_output,
    }
    check_answer(answers["none"].ok, answers["none"].level)
    assert answers["required"].startswith("level is ")
    assert isinstance(answers[None], Answer) or answers[None].startswith("level is ")


def _choosing(first, choice):
    return first.clone(model_settings=first.model_settings.resolve(ModelSettings(tool_choice=choice)))


async def case_hand_off(url, key):
    first = agent(
        url, key, words=False, handoffs=[agent(url, key, name="second")],
        settings={"tool_choice": "required", "parallel_tool_calls": False},
    )  # fmt: skip
    result = await Runner.run(first, "Hello", max_turns=3)
    assert result.last_agent.name == "second" and result.final_output in WORDS


if __name__ == "__main__":
    run(globals())
