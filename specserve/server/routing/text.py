"""Which text of a request is compared to adapters' profiles."""

from __future__ import annotations

from ...chat.messages import joined
from ...errors import UserError
from ...routing_profile import routed_text
from ..openai.request_types import ChatRequest, CompletionRequest


def request_text(request: CompletionRequest | ChatRequest) -> str:
    """All that the model is told. Raises `UserError` for several prompts and for token ids."""
    if isinstance(request, ChatRequest):
        return routed_text((message.role, joined(message.content or "")) for message in request.messages)
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        "model auto chooses an adapter by one text, and prompt is a list; send one text a request, or name a model",
        param="prompt",
    )
