"""A call's prompts, conversations, parameters and adapters, one or many, as one list of what is asked.

Owns what may stand for a prompt and how several arguments go together; nothing is tokenised or checked further here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .params import LoRARequest, SamplingParams
from .service import Adapter, Ask

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


def completion_asks(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    adapter: Adapter | Sequence[Adapter | None] | None,
) -> list[Ask]:
    """One for each prompt. Raises `UserError`."""
    many = [prompts] if _is_prompt(prompts) else list(prompts)
    bodies = [_prompt_body(prompt) for prompt in many]
    return _asks(bodies, params, adapter, SamplingParams())


def chat_asks(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    adapter: Adapter | Sequence[Adapter | None] | None,
    fields: Mapping[str, Any],
) -> list[Ask]:
    """One for each conversation; `fields` of the body go with all. Raises `UserError`."""
    if isinstance(messages, str | Mapping):
        raise UserError(
            'messages is no list; send [{"role": "user", "content": "..."}], or a list of such lists', param="messages"
        )
    many: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
    given = {name: value for name, value in fields.items() if value is not None}
    bodies = [{"messages": list(conversation), **given} for conversation in many]
    return _asks(bodies, params, adapter, SamplingParams(max_tokens=None))


def adapter_of(adapter: Any, lora_request: Any) -> Any:
    """Both names of one argument. Raises `UserError` where both are given."""
    if adapter is not None and lora_request is not None:
        raise UserError("adapter and lora_request are two names of one argument; give one", param="adapter")
    return adapter if adapter is not None else lora_request


def one_adapter_of(adapter: Any, lora_request: Any) -> Adapter | None:
    """The same of a call whose texts all have one adapter. Raises `UserError`."""
    given = adapter_of(adapter, lora_request)
    if isinstance(given, list | tuple):
        raise UserError("adapter is a list; all texts of a call have one adapter: make one call each", param="adapter")
    return _checked(_for_each(given, 1, str | Path | LoRARequest | None, "adapter")[0])


def _asks(bodies: list[dict[str, Any]], params: Any, adapter: Any, default: SamplingParams) -> list[Ask]:
    num = len(bodies)
    all_params = _for_each(params if params is not None else default, num, SamplingParams, "sampling_params")
    adapters = _for_each(adapter, num, str | Path | LoRARequest | None, "adapter")
    return [Ask(body, one, _checked(which)) for body, one, which in zip(bodies, all_params, adapters, strict=True)]


def _for_each(value: Any, num: int, single: Any, name: str) -> list[Any]:
    """`value` for each of `num`, or as many values. Raises `UserError`."""
    if isinstance(value, single) or not isinstance(value, Sequence):
        value = [value] * num
    if len(value) != num:
        raise UserError(f"{name} has {len(value)} entries for {num} prompts; give one, or one for each", param=name)
    wrong = next((item for item in value if not isinstance(item, single) and not hasattr(item, "lora_name")), None)
    if wrong is not None:
        expected = "SamplingParams" if name == "sampling_params" else "a name, a path, a LoRARequest or None"
        raise UserError(f"{name}: expected {expected}, got {type(wrong).__name__}", param=name)
    return list(value)


def _checked(adapter: Any) -> Adapter | None:
    """With vLLM's own LoRARequest as ours."""
    if isinstance(adapter, str | Path | LoRARequest | None):
        return adapter
    path = getattr(adapter, "lora_path", "")
    return LoRARequest(adapter.lora_name, lora_path=path, load_inplace=bool(getattr(adapter, "load_inplace", False)))


def _is_prompt(value: Any) -> bool:
    """Whether it is one prompt: a text, a mapping or token ids."""
    if isinstance(value, str | Mapping):
        return True
    return not isinstance(value, Sequence) or (len(value) > 0 and not isinstance(value[0], str | Mapping | Sequence))


def _prompt_body(prompt: Any) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if isinstance(prompt, Mapping):
        unknown = next((key for key in prompt if key not in ("prompt", "prompt_token_ids", "cache_salt")), None)
        if unknown is not None:
            raise UserError(
                f"a prompt has no key {unknown!r}; it has prompt or prompt_token_ids, and cache_salt", param="prompt"
            )
        body = {"cache_salt": prompt["cache_salt"]} if "cache_salt" in prompt else {}
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return body | {"prompt": prompt}
    try:
        return body | {"prompt": [int(token) for token in prompt]}
    except (TypeError, ValueError):
        raise UserError(
            f"a prompt is a text, a list of token ids, or a dict of one; got {type(prompt).__name__}", param="prompt"
        ) from None
