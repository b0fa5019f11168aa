"""One row's object as a conversation: messages in the API's shape, reasoning, tools, and which answers carry loss.

Owns the fields of every row format. A field that would shape the conversation and is not read is an error that names
it; others (ids, sources) are ignored and listed by `--check-data`. Tool calls and definitions are checked by the
server's own rules, so what trains can be served.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ...chat.messages import chat_messages
from ...chat.tools.definitions import Tool, all_tools
from ...chat.types import Message
from ...errors import UserError
from .answers import REASONING_FIELDS

ROLE_NAMES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("user", "assistant", "system", "developer", "tool")
}
_COMMON = {"system", "tools", "weight"}
_MOST_WEIGHT = 100.0
_HARMLESS = {"parallel_tool_calls", "tool_choice"}  # of requests: they change no prompt
_REFUSED = (
    *("functions", "function_call", "documents", "history", "chat_template_kwargs", "chat_template"),
    *("images", "image", "videos", "audios", "chosen", "rejected"),
)
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", *REASONING_FIELDS}


@dataclass(frozen=True, slots=True)
class Conversation:
    """`reasoning[i]` is what stands before message i's text; `no_loss` are answers that are context only."""

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...] = ()
    reasoning: dict[int, str] = dataclasses.field(default_factory=dict)
    no_loss: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()
    weight: float = 1.0  # of its loss
    others: tuple[Conversation, ...] = ()  # further answers to the same prompt, each with its weight

    def with_system(self, text: str) -> Conversation:
        """With `text` as its system message, unless it has one."""
        if self.messages[0]["role"] in ("system", "developer"):
            return self
        return dataclasses.replace(
            self,
            messages=[{"role": "system", "content": text}, *self.messages],
            reasoning={idx + 1: text for idx, text in self.reasoning.items()},
            no_loss=frozenset(idx + 1 for idx in self.no_loss),
            others=tuple(other.with_system(text) for other in self.others),
        )

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as the server hands them to the chat template, when a client sends the reasoning along."""
        return chat_messages(
            [Message(**message, reasoning_content=self.reasoning.get(i)) for i, message in enumerate(self.messages)]
        )


def read_conversation(value: dict[str, Any], where: str) -> Conversation:
    """The conversation of one row's object. Raises `UserError` that starts with `where` and names the field."""
    value = {name: item for name, item in value.items() if item is not None}
    for name in _REFUSED:
        if name in value:
            raise UserError(f"{where}: {name} is not read; leave it out, or write it into the messages", param="data")
    if "messages" in value:
        read = {"messages"}
        conversation = _Reader(where, "messages", "role", "content").read(value["messages"])
    elif "conversations" in value:
        read = {"conversations"}
        conversation = _Reader(where, "conversations", "from", "value").read(value["conversations"])
    elif "completions" in value:
        read = {"prompt", "completions"}
        conversation = _answers(value, where)
    else:
        pair, read = _pair(value, where)
        conversation = Conversation(pair)
    if "weight" in value:
        weight = _weight(value["weight"], f"{where}: weight")
        others = tuple(dataclasses.replace(other, weight=weight * other.weight) for other in conversation.others)
        conversation = dataclasses.replace(conversation, weight=weight * conversation.weight, others=others)
    messages = conversation.messages
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    if len(messages) < 2 or messages[0]["role"] == "assistant":
        raise UserError(f"{where}: nothing stands before the assistant's message; a prompt is needed")
    if value.get("system") not in (None, ""):  # ShareGPT's files have an empty one in most rows
        text = _text(value, "system", where)
        if messages[0]["role"] in ("system", "developer"):
            raise UserError(f"{where} has a system message and the field system; keep one", param="data")
        conversation = conversation.with_system(text)
    unread = tuple(name for name in value if name not in read | _COMMON | _HARMLESS)
    tools = _tools(value.get("tools"), where)
    others = tuple(dataclasses.replace(other, tools=tools) for other in conversation.others)
    return dataclasses.replace(conversation, tools=tools, unread=unread, others=others)


def _answers(value: dict[str, Any], where: str) -> Conversation:
    """A prompt with several answers."""
    if "completion" in value:
        raise UserError(f"{where} has completion and completions; keep one", param="data")
    given = value["completions"]
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: completions is {given!r:.100}; a list with answers is expected", param="data")
    question = {"role": "user", "content": _text(value, "prompt", where)}
    found = []
    for idx, item in enumerate(given):
        at = f"{where}: completions[{idx}]"
        if not isinstance(item, dict) or not item.keys() <= {"completion", "weight"}:
            raise UserError(f"{at} is {item!r:.100}; 'completion' and 'weight' are expected", param="data")
        answer = {"role": "assistant", "content": _text(item, "completion", at)}
        found.append(Conversation([question, answer], weight=_weight(item.get("weight", 1.0), f"{at}.weight")))
    return dataclasses.replace(found[0], others=tuple(found[1:]))


def _weight(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_WEIGHT:
        raise UserError(
            f"{at} is {value!r}; a number above 0 and up to {_MOST_WEIGHT:g} is expected (0: leave it out)",
            param="data",
        )
    return float(value)


def _pair(value: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], set[str]]:
    """Question and answer as messages, and the fields of that format."""
    if "prompt" in value or "completion" in value:
        question, answer, read = _text(value, "prompt", where), "completion", {"prompt"}
    elif "instruction" in value:
        question, answer = _text(value, "instruction", where), "output" if "output" in value else "response"
        read = {"instruction", "input"}
        if value.get("input"):
            question += "\n\n" + _text(value, "input", where)
    else:
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, value)) or 'none'}; wanted are 'messages', 'prompt' and "
            "'completion', 'conversations', or 'instruction' and 'output'",
            param="data",
        )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(value, answer, where)}]
    return messages, read | {answer}


class _Reader:
    """Reads a list of messages; tool results follow the calls that they answer."""

    def __init__(self, where: str, field: str, role_key: str, text_key: str):
        self.where, self.field, self.role_key, self.text_key = where, field, role_key, text_key
        self._open: list[tuple[str, str]] = []  # (id, function) of the latest calls without a result
        self._num_calls = 0

    def read(self, turns: Any) -> Conversation:
        if not isinstance(turns, list) or not turns:
            raise UserError(
                f"{self.where}: {self.field} is {type(turns).__name__}, not a list with messages", param="data"
            )
        messages: list[dict[str, Any]] = []
        reasoning: dict[int, str] = {}
        no_loss: set[int] = set()
        for idx, turn in enumerate(turns):
            at = f"{self.where}: {self.field}[{idx}]"
            if not isinstance(turn, dict):
                raise UserError(f"{at} is {type(turn).__name__}, not an object", param="data")
            turn = {name: item for name, item in turn.items() if item is not None}
            messages.append(self._message(turn, at))
            is_answer = messages[-1]["role"] == "assistant"
            given = [name for name in REASONING_FIELDS if name in turn]
            if given and (not is_answer or len(given) > 1):
                why = "only assistant messages have it" if not is_answer else f"{given[1]} says the same; keep one"
                raise UserError(f"{at}.{given[0]}: {why}", param="data")
            if given:
                reasoning[idx] = _text(turn, given[0], at)
            if "weight" in turn:
                if not is_answer or turn["weight"] not in (0, 1):
                    raise UserError(
                        f"{at}.weight is {turn['weight']!r}; it is 0 or 1, on assistant messages", param="data"
                    )
                if turn["weight"] == 0:
                    no_loss.add(idx)
        answers = [idx for idx, message in enumerate(messages) if message["role"] == "assistant"]
        if answers and no_loss.issuperset(answers):
            raise UserError(f"{self.where}: every assistant message has weight 0: nothing to learn", param="data")
        conversation = Conversation(messages, (), reasoning, frozenset(no_loss))
        try:
            conversation.for_template()
        except UserError as error:
            raise UserError(f"{self.where}: {error}", param="data") from None
        return conversation

    def _message(self, turn: dict[str, Any], at: str) -> dict[str, Any]:
        role = ROLE_NAMES.get(str(turn.get(self.role_key)))
        if role is None:
            wanted = ", ".join(ROLE_NAMES)
            raise UserError(f"{at}.{self.role_key} is {turn.get(self.role_key)!r}; wanted: {wanted}", param="data")
        known = {self.role_key, self.text_key, "weight"} | (_MESSAGE_FIELDS if self.field == "messages" else set())
        for name in turn:
            if name not in known or (name in ("name", "tool_call_id") and role != "tool"):
                raise UserError(f"{at}.{name} is not read; leave it out, or write it into the text", param="data")
        message: dict[str, Any] = {"role": role}
        calls = self._calls(turn["tool_calls"], at) if turn.get("tool_calls") else []
        is_optional = role == "tool" or bool(calls)
        if is_optional and turn.get(self.text_key, "") == "":
            message["content"] = ""
        else:
            message["content"] = _text(turn, self.text_key, at)
        if calls:
            if role != "assistant":
                raise UserError(f"{at}.tool_calls: only assistant messages have it", param="data")
            message["tool_calls"] = calls
        if role == "tool":
            message["tool_call_id"] = self._answered(turn, at)
        return message

    def _calls(self, calls: Any, at: str) -> list[dict[str, Any]]:
        """The calls as the API has them; data sets often leave out ids and write arguments as objects."""
        if not isinstance(calls, list):
            raise UserError(f"{at}.tool_calls is {type(calls).__name__}, not a list", param="data")
        result = []
        self._open = []
        for idx, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                raise UserError(
                    f"{at}.tool_calls[{idx}] must be {{'type': 'function', 'function': {{...}}}}", param="data"
                )
            extra = [name for name in call if name not in ("id", "type", "function", "index")]
            extra += [f"function.{name}" for name in function if name not in ("name", "arguments")]
            if extra:
                raise UserError(f"{at}.tool_calls[{idx}].{extra[0]} is not read; leave it out", param="data")
            self._num_calls += 1
            arguments = function.get("arguments")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            filled = {
                "id": call.get("id") or f"call{self._num_calls:05d}",  # nine characters, as Mistral's templates want
                "type": call.get("type", "function"),
                "function": {"name": function.get("name"), "arguments": arguments},
            }
            self._open.append((filled["id"], str(function.get("name"))))
            result.append(filled)
        return result

    def _answered(self, turn: dict[str, Any], at: str) -> Any:
        """The id of the call that a tool message answers: its own, or the first open one's."""
        call_id = turn.get("tool_call_id")
        if call_id is None:
            if not self._open:
                raise UserError(f"{at} answers no tool call of an assistant message before it", param="data")
            call_id = self._open[0][0]
        name = next((name for known, name in self._open if known == call_id), None)
        if "name" in turn and name is not None and turn["name"] != name:
            raise UserError(f"{at}.name is {turn['name']!r}, but the call is of {name!r}", param="data")
        self._open = [item for item in self._open if item[0] != call_id]
        return call_id


def _tools(value: Any, where: str) -> tuple[Tool, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where}: tools is text that is not JSON: {error}", param="data") from None
    if value in (None, "", []):
        return ()
    if not isinstance(value, list):
        raise UserError(f"{where}: tools is {type(value).__name__}, not a list of definitions", param="data")
    try:
        return all_tools(value)
    except UserError as error:
        raise UserError(f"{where}: {error}", param="data") from None


def _text(value: dict[str, Any], field: str, where: str) -> str:
    text = value.get(field)
    if isinstance(text, list) and text and all(_is_text_part(part) for part in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str) or not text.strip():
        found = "missing" if field not in value else "empty" if isinstance(text, str) else type(text).__name__
        raise UserError(f"{where}: {field} is {found}; text is expected", param="data")
    return text


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
