"""A chat request's conversation, checked: messages, how they end, and what else the template is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .tools.prompt import answered_call, tool_calls
from .types import Conversation, Message, TextPart

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2048
MAX_TEMPLATE_KWARGS = 64
RESERVED_TEMPLATE_KWARGS = frozenset(
    "chat_template conversation conversations messages tools documents add_generation_prompt continue_final_message "
    "tokenize padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens raise_exception strftime_now".split()
)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them: role, text, and what they have of tools."""
    if not messages:
        raise UserError("messages is empty; send at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"messages has {len(messages)} entries; at most {MAX_MESSAGES} are allowed", param="messages")
    result: list[dict[str, Any]] = []
    for idx, message in enumerate(messages):
        where = f"messages[{idx}]"
        if message.role not in ROLES:
            raise UserError(
                f"{where}.role is {message.role[:64]!r}; served are {', '.join(ROLES)}", param=f"{where}.role"
            )
        if message.function_call or message.audio:
            raise UserError(f"{where}: function_call and audio are not supported", param=where, code="unsupported")
        if message.tool_calls and message.role != "assistant":
            raise UserError(f"{where}: only assistant messages have tool_calls", param=f"{where}.tool_calls")
        calls = tool_calls(message, where)
        reasoning = message.reasoning_content or message.reasoning
        if reasoning and message.role != "assistant":
            raise UserError(f"{where}: only assistant messages have reasoning_content", param=where)
        if message.content is None and not calls and not reasoning:
            raise UserError(f"{where}.content is missing", param=f"{where}.content")
        role = "system" if message.role == "developer" else message.role
        item: dict[str, Any] = {"role": role, "content": joined(message.content or "")}
        if reasoning:
            item["reasoning_content"] = reasoning
        if calls:
            item["tool_calls"] = calls
        if role == "tool":
            item |= answered_call(message, result, where)
        result.append(item)
    return result


def chat_ending(request: Conversation) -> tuple[bool, bool]:
    """(open an answer, continue the last message) of a conversation; it cannot end both ways."""
    if not request.continue_final_message:
        return request.add_generation_prompt is not False, False
    if request.add_generation_prompt:
        raise UserError(
            "continue_final_message and add_generation_prompt exclude each other; send one",
            param="continue_final_message",
        )
    if request.messages and not joined(request.messages[-1].content or ""):
        raise UserError("continue_final_message needs text in the last message", param="continue_final_message")
    return False, True


def template_variables(given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """What the chat template is given beside the conversation: `chat_template_kwargs` and `reasoning_effort`.

    Names that it does not read change nothing.
    """
    given = given or {}
    where = "chat_template_kwargs"
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise UserError(f"{where} has {len(given)} names; at most {MAX_TEMPLATE_KWARGS} are allowed", param=where)
    for name, value in given.items():
        if name in RESERVED_TEMPLATE_KWARGS:
            raise UserError(
                f"{where}.{name} would replace what the server gives the template; leave it out", param=where
            )
        if not isinstance(value, str | int | float | None):
            raise UserError(
                f"{where}.{name[:64]} is {type(value).__name__}; send text, a number, true, false or null", param=where
            )
    if effort is None:
        return given
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {}), **given}


def joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
