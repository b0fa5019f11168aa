"""instructor: pydantic models out of structured output and out of tools."""

from typing import Literal

import instructor
import openai
from cases import MESSAGES, check_answer, run
from pydantic import BaseModel, ConfigDict

FIELDS = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "max_retries": 1}


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a model that knows nothing adds properties for ever

    ok: bool
    level: Literal["low", "high"]


def ask(url, key, mode):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key=key), mode=mode)
    answer = client.chat.completions.create(**FIELDS, response_model=Answer)
    check_answer(answer.ok, answer.level)


def case_structured_json_schema(url, key):
    ask(url, key, instructor.Mode.JSON_SCHEMA)


def case_tools(url, key):
    ask(url, key, instructor.Mode.TOOLS)


if __name__ == "__main__":
    run(globals())
