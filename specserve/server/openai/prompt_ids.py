"""The prompts of a request as token ids: what may be sent as one, and how long it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import UserError
from ...messages import EngineInfo
from ...text.known_tokens import unknown
from ...text.tokenizer import TextTokenizer

MAX_PROMPTS = 64


def completion_prompts(
    prompt: str | list[Any], tokenizer: TextTokenizer, info: EngineInfo, add_special_tokens: bool = True
) -> list[tuple[str | None, list[int]]]:
    """(text, token ids) of each prompt: a text, a list of texts, token ids, or a list of token id lists."""
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        items: list[Any] = [prompt]
    else:
        items = prompt if isinstance(prompt, list) else [prompt]
    if not items:
        raise UserError("prompt is an empty list; send a text or token ids", param="prompt")
    if len(items) > MAX_PROMPTS:
        raise UserError(f"prompt has {len(items)} entries; at most {MAX_PROMPTS} are allowed", param="prompt")
    result: list[tuple[str | None, list[int]]] = []
    for item in items:
        if isinstance(item, str):
            tokenizer.check_len([item], info.max_model_len, "prompt")
            ids = tokenizer.encode(item, add_special_tokens)
            check_prompt_ids(ids, info, tokenizer)  # before the next one is tokenised
            result.append((item, ids))
        elif isinstance(item, list) and all(type(token) is int for token in item):
            ids = item
            result.append((None, item))
        else:
            raise UserError(
                f"prompt: expected text or lists of token ids, got {type(item).__name__} in the list", param="prompt"
            )
        if not ids:
            raise UserError("prompt is empty; send at least one token", param="prompt")
    return result


def check_prompt_ids(ids: Sequence[int], info: EngineInfo, tokenizer: TextTokenizer) -> None:
    """Token ids in range, and a prompt that leaves room for an answer in the context and in the KV cache."""
    for limit, what in (
        (info.max_model_len, "the context"),
        (info.num_kv_blocks * info.block_size, "the whole KV cache"),
    ):
        if len(ids) > limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens; {what} holds {limit}",
                param="prompt",
                code="context_length_exceeded",
            )
    bad = next((token for token in ids if not 0 <= token < info.vocab_size), None)
    if bad is not None and 0 <= bad < tokenizer.vocab_size:
        raise UserError(
            f"the prompt's token {unknown(bad, tokenizer, info.vocab_size)} (0 to {info.vocab_size - 1}); leave the "
            "token out, or serve the model with its own tokenizer and chat template",
            param="prompt",
        )
    if bad is not None:
        raise UserError(f"prompt: token id {bad} is outside 0..{info.vocab_size - 1}", param="prompt")
