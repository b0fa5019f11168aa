"""A conversation as text: the chat template of a model, or of an adapter, and what it may do with special tokens.

Special tokens are control characters: the template may write them, a message may not. What messages, tools and
variables spell of them is hidden behind marks while the template renders. Owns no token ids; tokenizer.py makes them.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .hidden_chat import HiddenChat, Marks
from .template_checks import may_render_here
from .template_day import on_day
from .template_worker import TemplateJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FAILED = "chat_template_failed"  # the code of an error that a template is the reason of


class ChatTemplate:
    """The template `text` as `tokenizer` reads it; None: there is none. `specials` are the special tokens' texts.

    `may_trust`: it is vouched for as the model's weights are, so that it is rendered here where it only goes through
    what it is given; `name` is what errors call it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text: Any,
        specials: Collection[str],
        *,
        may_trust: bool,
        name: str = "the chat template",
    ):
        self.text = text
        self.name = name
        self.is_trusted = may_trust and may_render_here(text)
        self._tokenizer = tokenizer
        self._specials = specials
        self._day: datetime.date | None = None
        self._given: dict[str, Any] = {}

    def on(self, day: datetime.date | None) -> ChatTemplate:
        """The same template, which takes `day` for today; None: today is."""
        other = copy.copy(self)
        other._day = day
        return other

    def given(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same template, which gets `variables` with every conversation. Raises `UserError` as `hidden_chat`."""
        self._check(variables)
        other = copy.copy(self)
        other._given = dict(variables)
        return other

    def of_adapter(self, text: Any, adapter: str, base: ChatTemplate) -> ChatTemplate:
        """The template `text` that an adapter brings: a stranger's program, unless it is the model's own."""
        is_own = text == base.text and base.is_trusted
        name = f"the chat template of adapter {adapter!r}"
        return ChatTemplate(self._tokenizer, text, self._specials, may_trust=is_own, name=name)

    def hidden_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> HiddenChat:
        """The conversation to render. Special tokens that messages, tool calls, tools or variables spell are letters:
        marks stand for them while it renders. Raises `UserError` for a variable that would replace a special token."""
        self._check(variables or {})
        variables = {**self._given, **(variables or {})}
        spells = any(special in message["content"] for message in messages for special in self._specials)
        marks = Marks()
        hidden: list[dict[str, Any]] = [
            {**self.hide({**message, "content": ""}, marks), "content": message["content"]} for message in messages
        ]
        hidden_tools = self.hide(tools, marks)
        hidden_variables = self.hide(variables, marks)
        plain = hidden == list(messages) and hidden_tools == tools and hidden_variables == variables
        if plain and not spells and not continue_final:
            return HiddenChat(hidden, tools, add_generation_prompt, marks, None, hidden_variables)
        for message in hidden:
            message["content"] = marks.new(message["content"])
        last_mark = hidden[-1]["content"] if continue_final else None
        return HiddenChat(hidden, hidden_tools, add_generation_prompt, marks, last_mark, hidden_variables)

    def _check(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in self._tokenizer.special_tokens_map:
                raise UserError(
                    f"chat_template_kwargs.{name} would replace a token of the model; leave it out",
                    param="chat_template_kwargs",
                )

    def hide(self, value: Any, marks: Marks) -> Any:
        """`value` with a mark for every special token that a text in it, or a key, spells."""
        if isinstance(value, dict):
            return {self.hide(key, marks): self.hide(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, marks) for item in value]
        if isinstance(value, str):
            for special in self._specials:
                if special in value:
                    value = value.replace(special, marks.of(special))
        return value

    def render_chat(self, chat: HiddenChat) -> str:
        return self.render(chat.messages, chat.add_generation_prompt, chat.tools, chat.variables)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation's text through the chat template. Raises `UserError` when that refuses the messages.

        variables: all that the template gets; default: the `given` ones.
        """
        template = self._text_for(tools)
        try:
            # transformers renders in an immutable sandbox: templates come with models and adapters.
            rendered: Any = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,  # type: ignore[arg-type]
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(self._given if variables is None else variables),
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise UserError(
                f"{self.name} refuses these messages: {error}", param="messages", code=TEMPLATE_FAILED
            ) from None
        return str(rendered)

    def job(self, chat: HiddenChat, timeout_s: float) -> TemplateJob:
        """What another process needs to render `chat` as `render` would. Raises `UserError`."""
        variables = {**self._tokenizer.special_tokens_map, **chat.variables}
        messages = [{key: item for key, item in message.items() if item is not None} for message in chat.messages]
        template = self._text_for(chat.tools)
        return TemplateJob(template, messages, chat.tools, chat.add_generation_prompt, variables, timeout_s)

    def _text_for(self, tools: list[dict[str, Any]] | None) -> str:
        """The template's text; a model may have several, one of them for tools."""
        if self.text is None:
            raise UserError("this model has no chat template; use /v1/completions", param="messages")
        text = self.text
        if isinstance(text, dict):
            name = "tool_use" if tools is not None and "tool_use" in text else "default"
            if name not in text:
                raise UserError(
                    f"{self.name} cannot be used: of {', '.join(sorted(text))} none is named 'default'",
                    param="messages",
                )
            text = text[name]
        return text if self._day is None else on_day(text, self._day)


def named_texts(value: Any) -> str | dict[str, str] | None:
    """A configuration's chat_template: a text, or several by name, which files have as a list. Raises `ValueError`."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, str | None):
        return value
    if isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair):
        return value
    raise ValueError("chat_template is neither a text nor a list of objects with a name and a template")
