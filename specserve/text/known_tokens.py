"""Tokens that a tokenizer knows and its model has no weights of: which texts have them, and a look at both at start.

Such tokenizers are common and mostly harmless (Gemma's of models that do not see has an image token), as is the other
way round, rows of weights without a token. Where no prompt can do without such a token the files belong to two models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ..errors import ModelError, UserError
from .tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_TRIED = "quokka"
_FIX = "take the tokenizer and chat template of the model"


def check_known(tokens: Iterable[int], tokenizer: TextTokenizer, vocab_size: int | None) -> None:
    """Raises `UserError` for a token that a model of `vocab_size` tokens has no weights of; None: any has."""
    if vocab_size is not None and (token := max(tokens, default=0)) >= vocab_size:
        raise UserError(f"its token {unknown(token, tokenizer, vocab_size)}; {_FIX}", param="model")


def unknown(token: int, tokenizer: TextTokenizer, vocab_size: int) -> str:
    """What is wrong with `token`."""
    return (
        f"{tokenizer.token_text(token)!r} is number {token} of the tokenizer, and the base model has weights of "
        f"{vocab_size} tokens"
    )


def check_tokenizer(tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Look at start what a model of `vocab_size` tokens cannot be asked, and what its template loses; the log says it.

    Raises `ModelError` where neither texts nor conversations can be sent to it.
    """
    chat = _tried_chat(tokenizer)
    if chat and _TRIED not in tokenizer.decode(chat):
        logger.warning(
            "the chat template leaves out what a user says: templates of models that see may take a content as a list "
            "of parts alone, and get a text here; serve another chat_template.jinja"
        )
    if tokenizer.vocab_size <= vocab_size:
        return
    of_text = _beyond(tokenizer.encode(_TRIED), vocab_size)
    of_chat = _beyond(chat, vocab_size)
    if of_text is not None and (of_chat is not None or tokenizer.template.text is None):
        raise ModelError(f"no prompt can be served: the token {unknown(of_text, tokenizer, vocab_size)}; {_FIX}")
    num_beyond = tokenizer.vocab_size - vocab_size
    logger.info("the tokenizer has %d more tokens than the model has weights of; no prompt may have them", num_beyond)
    for what, token in (("conversation", of_chat), ("text with its special tokens", of_text)):
        if token is not None:
            logger.warning("every %s is refused: the token %s; %s", what, unknown(token, tokenizer, vocab_size), _FIX)


def _tried_chat(tokenizer: TextTokenizer) -> Sequence[int]:
    """A conversation's token ids; none where only a request can tell."""
    if tokenizer.template.text is None or not tokenizer.template.is_trusted:
        return []
    try:
        return tokenizer.encode_chat([{"role": "user", "content": _TRIED}])
    except UserError:  # which the template gives to whoever asks
        return []


def _beyond(tokens: Sequence[int], vocab_size: int) -> int | None:
    return next((token for token in tokens if token >= vocab_size), None)
