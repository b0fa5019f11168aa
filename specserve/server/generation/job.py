"""What the parts of a generation share: a client's request, checked and tokenised, as sequences for the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ...adapter_messages import AdapterInfo
from ...chat.reasoning import Thinking
from ...chat.tools.plan import ToolPlan
from ...messages import GenerateRequest
from ...text.tokenizer import TextTokenizer
from ..access.caller import Caller
from ..openai.request_types import ChatRequest, CompletionRequest
from ..routing.types import Routing
from ..spans import sampling_settings

ADAPTER_HEADER = "x-specserve-adapter"  # who answers a request that left it open
GUESSED_TOKENS = 256  # of a sequence whose client names no limit


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
    routing: Routing | None = None  # where the request left its adapter open
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        """Of its answer."""
        return {} if self.routing is None else {ADAPTER_HEADER: self.model}

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, as in its answer's usage."""
        return sum(len(ids) for _, ids in self.prompts)

    @property
    def prompt_lens(self) -> list[int]:
        """Of each sequence."""
        return [len(request.prompt_token_ids) for request in self.requests]

    @property
    def num_may_generate(self) -> int:
        """Tokens of all sequences; where the client leaves that open, which in a chat means all the room that there is,
        a guess stands for it."""
        limit = self.requests[0].sampling.max_tokens
        if not self.names_limit:
            limit = min(limit, GUESSED_TOKENS)
        return limit * len(self.requests)

    @property
    def generates(self) -> bool:
        return True

    @property
    def operation(self) -> str:
        """Its name in traces."""
        return "chat" if self.is_chat else "text_completion"

    @property
    def span_settings(self) -> dict[str, Any]:
        return sampling_settings(self.requests[0].sampling, self.n)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)
