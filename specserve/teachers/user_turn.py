"""What a user would begin with, asked of the model itself: its chat template up to the user's first word.

Xu et al. 2024, "Magpie": a model that was aligned on conversations goes on from there with prompts like theirs.
"""

from __future__ import annotations

import re
import secrets

from ..errors import UserError
from ..text.tokenizer import TextTokenizer


def user_turn(tokenizer: TextTokenizer) -> tuple[list[int], int]:
    """The tokens before a user's first words, and the special token that ends them. Raises `UserError`."""
    if tokenizer.template.text is None:
        raise UserError(
            "the model has no chat template, so it cannot be asked what a user would say; put a chat_template.jinja "
            "into its directory",
            param="teacher",
        )
    message = {"role": "user", "content": secrets.token_hex(16)}
    chat = tokenizer.template.hidden_chat([message], add_generation_prompt=False)
    before, found, behind = tokenizer.template.render_chat(chat).partition(chat.messages[0]["content"])
    specials = tokenizer.special_tokens
    end = re.search("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)", behind)
    if not found or end is None:
        raise UserError(
            "the chat template writes no special token behind a user's message, so what a user would say has no end; "
            "write prompts by hand, or make them with `specserve synthesize`",
            param="teacher",
        )
    tokens = tokenizer.encode_marked(before, chat.marks)
    if not tokens:
        raise UserError(
            "the chat template writes nothing before a user's message, so the model cannot be asked what a user would "
            "say; write prompts by hand, or make them with `specserve synthesize`",
            param="teacher",
        )
    return tokens, specials[end[0]]
