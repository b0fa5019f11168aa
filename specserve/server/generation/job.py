"""What the parts of a generation share: a client's request, checked and tokenised, as sequences for the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ...chat.reasoning import Thinking
from ...chat.tools.plan import ToolPlan
from ...messages import AdapterInfo, GenerateRequest
from ...text.tokenizer import TextTokenizer
from ..access.caller import Caller
from ..openai.request_types import ChatRequest, CompletionRequest


@dataclass(slots=True)
class Job:
    """A checked request; sequence i belongs to prompt i // n, and the best `num_choices` of a prompt are answered."""

    id: str
    model: str  # as the client named it
    adapter: str | None
    adapter_info: AdapterInfo | None  # of the adapter as it was when the prompt was made
    caller: Caller
    request: CompletionRequest | ChatRequest
    tokenizer: TextTokenizer
    prompts: list[tuple[str | None, list[int]]]
    n: int
    num_choices: int
    requests: list[GenerateRequest]
    names_limit: bool  # whether the client says how many tokens it wants at most
    deadline: float | None = None  # of time.monotonic()
    tools: ToolPlan | None = None
    thinking: Thinking | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, as in its answer's usage."""
        return sum(len(ids) for _, ids in self.prompts)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)
