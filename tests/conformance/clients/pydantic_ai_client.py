"""pydantic-ai: agents with text, native structured output, and output through tools."""

from typing import Literal

from cases import check_answer, run
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a model that knows nothing adds properties for ever

    ok: bool
    level: Literal["low", "high"]


def model(url, key):
    return OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))


SETTINGS = {"temperature": 0, "max_tokens": 200}


def case_text(url, key):
    answer = Agent(model(url, key)).run_sync("Say hello", model_settings={**SETTINGS, "max_tokens": 24})
    assert isinstance(answer.output, str) and answer.usage.output_tokens > 0


async def case_text_stream(url, key):
    agent = Agent(model(url, key))
    settings = {**SETTINGS, "max_tokens": 24}
    async with agent.run_stream("Say hello", model_settings=settings) as result:
        text = [part async for part in result.stream_text()][-1]
    assert text.strip() == (await agent.run("Say hello", model_settings=settings)).output.strip()


def case_structured_native(url, key):
    agent = Agent(model(url, key), output_type=NativeOutput(Answer))
    answer = agent.run_sync("Say hello", model_settings=SETTINGS).output
    check_answer(answer.ok, answer.level)


def case_tools_output(url, key):
    answer = Agent(model(url, key), output_type=Answer).run_sync("Say hello", model_settings=SETTINGS).output
    check_answer(answer.ok, answer.level)


if __name__ == "__main__":
    run(globals())
