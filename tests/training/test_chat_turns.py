"""Answers and their stops from chat templates: small equivalents of each family's, on a tiny tokenizer.

The real ones are in test_chat_families.py, marked slow.
"""

import datetime
import json

import pytest
from sentencepiece_tokenizer import SCHEMES, make_sentencepiece
from tiny_models import make_tokenizer
from tokenizers import AddedToken
from tool_templates import HERMES, LLAMA3

from specserve.adapters.pooling_config import PoolingConfig
from specserve.errors import ModelError, UserError
from specserve.text.pooled_text import embedded_ids
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.check import shown_as_trained
from specserve.training.data.dataset import tokenize
from specserve.training.data.rows import parse_row

SPECIALS = ["<|header|>", "<|eot|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims every text, as Llama's and Gemma's templates do.
TRIMMING = (
    "{% for m in messages %}<|header|>{{ m.role }}\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n\n{% endif %}"
)
# Thinks before the last answer and drops the thinking of earlier ones, as Qwen3's does.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}<think>
{{ m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content or \
m.reasoning_content else '' }}
</think>

{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Channels, and another end for the last answer than for earlier ones, as gpt-oss's has.
CHANNELS = (
    "{% for m in messages %}<|header|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|channel|>analysis {{ m.thinking }}<|end|><|header|>assistant{% endif %}"
    "<|channel|>final {{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant{% endif %}"
)
# The system message stands in the last message, if that is the user's; nothing opens an answer.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}<|header|>{{ system + '\n' if loop.last and system else '' }}{{ m.content }}<|eot|>"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
)
# The prompt itself opens the thinking block.
OPENING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ m.content }}", "{{ ('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content }}"
)
# DeepSeek-R1's distills open a block that they never write, and drop what an answer thought; QwQ as well.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|header|>{{ m.content }}{% endif %}{% if m.role == 'assistant' %}"
    "<|channel|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|channel|><think>\n{% endif %}"
)
QWQ = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
)
# Nemotron 3 opens a block, and writes one without thoughts otherwise.
NEMOTRON = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% elif m.role == "
    "'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
)
# EXAONE's prompts are not to think unless a variable says so.
NOT_THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif").replace(
    "{{ m.content }}", "{{ '<think>\n' + m.thinking + '\n</think>\n\n' if m.thinking else '' }}{{ m.content }}"
)
# Magistral's knows thoughts, and writes those alone that are parts of a content.
MAGISTRAL = "{# [THINK] [/THINK] #}" + CHATML


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A tokenizer with a template; `<|endoftext|>` is 317, `<|im_end|>` 319."""
    fast = make_tokenizer(317)
    fast.add_tokens([AddedToken(text, special=True) for text in SPECIALS], special_tokens=True)

    def make(template):
        fast.chat_template = template
        path = tmp_path_factory.mktemp("tokenizer")
        fast.save_pretrained(path)
        return TextTokenizer(path)

    return make


def ids(tokenizer, *texts):
    return [tokenizer.encode(text)[0] for text in texts]


def row(*texts, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return parse_row(json.dumps({"messages": messages, **fields}), 7, "rows.jsonl line 7")


def trained(tokenizer, rows, eos):
    return [shown_as_trained(example, tokenizer) for example in tokenize(rows, tokenizer, ids(tokenizer, *eos))]


def test_the_template_says_which_of_several_eos_ids_ends_an_answer(make):
    tokenizer = make(CHATML)
    eos = ["<|endoftext|>", "<|im_end|>"]
    assert min(ids(tokenizer, *eos)) == tokenizer.encode("<|endoftext|>")[0]
    assert trained(tokenizer, [row("Hi", "Yes", "More", "No")], eos) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes<|im_end|>]]\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n[[No<|im_end|>]]"
    ]


@pytest.mark.parametrize("text", ["\n\nYes", " Yes", "Yes \n", "Y\n\n<|im_end|> <|eot|>"])
@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (TRIMMING, "<|eot|>"), (THINKING, "<|im_end|>")])
def test_no_answer_loses_its_loss_to_spaces_or_spelled_tokens(make, template, end, text):
    tokenizer = make(template)
    examples = tokenize([row("Hi", text, "More", text)], tokenizer, ids(tokenizer, end, "<|endoftext|>"))
    stop = ids(tokenizer, end)[0]
    masked = [[t for t, m in zip(e.tokens, e.loss_mask, strict=True) if m] for e in examples]
    assert sum(tokens.count(stop) for tokens in masked) == 2  # both turns, each with its own stop alone
    assert all(tokens[-1] == stop for tokens in masked)
    whole = "".join(tokenizer.decode(tokens) for tokens in masked)
    assert whole.count(text.strip()) == 2
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    assert examples[-1].prompt == tokenizer.encode_chat([*history, {"role": "user", "content": "More"}])
    assert examples[0].tokens[: examples[0].loss_mask.index(True)] == tokenizer.encode_chat(history[:1])


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each(make):
    texts = trained(make(THINKING), [row("Hi", "Yes", "More", "<think>\nhm\n</think>\n\nNo")], ["<|im_end|>"])
    assert [text.split("assistant\n", 1)[1] for text in texts] == [
        "[[<think>\n\n</think>\n\nYes<|im_end|>]]",
        "Yes<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\nhm\n\n</think>\n\nNo<|im_end|>]]",
    ]


def test_reasoning_before_a_call_is_history_where_the_template_keeps_it(make):
    template = HERMES.replace(
        "{{ m.content }}{% for",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for",
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "reasoning": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b", "thinking": "told"},
    ]
    rows = [parse_row(json.dumps({"messages": messages}), 1, "")]
    (text,) = trained(make(template), rows, ["<|im_end|>"])
    parts = [part.partition("]]")[0] for part in text.split("[[")[1:]]
    assert [part.partition("</think>")[0] for part in parts] == ["<think>ask", "<think>told"]
    assert "</think>" in text[: text.rindex("[[")]  # the second prompt still has the first one's


def test_channels_belong_to_the_answer_and_only_its_last_end_stops(make):
    tokenizer = make(CHANNELS)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "final", "reasoning_content": "think"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "B"},
    ]
    rows = [parse_row(json.dumps({"messages": messages}), 1, "")]
    texts = trained(tokenizer, rows, ["<|return|>", "<|call|>"])
    assert [text.rpartition("<|header|>assistant[[")[2] for text in texts] == [
        "<|channel|>analysis think<|end|><|header|>assistant<|channel|>final final<|return|>]]",
        "<|channel|>final B<|return|>]]",
    ]


def test_a_block_that_the_prompt_opens_is_closed_by_the_answer(make):
    (text,) = trained(make(OPENING), [row("Hi", "Yes")], ["<|im_end|>"])
    assert text.endswith("<|im_start|>assistant\n<think>\n[[\n</think>\n\nYes<|im_end|>]]")


@pytest.mark.parametrize(
    ("template", "said", "fields", "want"),
    [
        (R1, "Yes", {}, "<|channel|><think>\n[[\n</think>\n\nYes<|im_end|>]]"),
        (R1, "Yes", {"reasoning_content": "hm"}, "<|channel|><think>\n[[hm\n</think>\n\nYes<|im_end|>]]"),
        (R1, "<think>\nhm\n</think>\n\nYes", {}, "<|channel|><think>\n[[hm\n</think>\n\nYes<|im_end|>]]"),
        (R1, "hm\n</think>\n\nYes", {}, "<|channel|><think>\n[[hm\n</think>\n\nYes<|im_end|>]]"),
        (R1, "Yes", {"thinking": "a <|im_end|>"}, "<think>\n[[a <|im_end|>\n</think>\n\nYes<|im_end|>]]"),
        (R1.replace("<think>\n", "<think>"), "Yes", {}, "<|channel|><think>[[</think>Yes<|im_end|>]]"),
        (QWQ, "Yes", {}, "assistant\n<think>\n[[\n</think>\n\nYes<|im_end|>]]"),
        (QWQ, "<think>hm</think>Yes", {}, "assistant\n<think>\n[[hm\n</think>\n\nYes<|im_end|>]]"),
        (NEMOTRON, "Yes", {}, "assistant\n<think>\n[[</think>Yes<|im_end|>]]"),
        (NEMOTRON, "Yes", {"reasoning_content": "hm"}, "assistant\n<think>\n[[hm\n</think>\nYes<|im_end|>]]"),
        (
            NEMOTRON.replace("<think>\n{% endif", "<think>\n\n{% endif"),
            "Yes",
            {"reasoning_content": "hm"},
            "assistant\n<think>\n\n[[hm\n</think>\nYes<|im_end|>]]",
        ),
        (MAGISTRAL, "Yes", {"reasoning": "hm"}, "assistant\n[[[THINK]hm[/THINK]Yes<|im_end|>]]"),
        (MAGISTRAL, "Yes", {}, "assistant\n[[Yes<|im_end|>]]"),
    ],
)
def test_thoughts_that_a_template_never_writes_are_written_as_its_models_do(make, template, said, fields, want):
    """The prompt is the server's; an answer without thoughts closes the block that this has opened."""
    tokenizer = make(template)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So", "weight": 0}]
    messages = [*earlier, {"role": "user", "content": "More"}, {"role": "assistant", "content": said, **fields}]
    value = parse_row(json.dumps({"messages": messages}), 1, "")
    (example,) = tokenize([value], tokenizer, ids(tokenizer, "<|im_end|>"))
    assert shown_as_trained(example, tokenizer).endswith(want)
    served = [{key: message[key] for key in ("role", "content")} for message in messages[:3]]
    assert example.prompt == tokenizer.encode_chat(served)


@pytest.mark.parametrize(
    ("said", "want", "num_marks"),
    [("[THINK]hm[/THINK]\nYes", "[THINK]hm[/THINK]Yes", 2), ("Yes [THINK]", "Yes [THINK]", 0)],
)
def test_thoughts_in_a_text_get_the_tokens_that_mark_them(tmp_path, said, want, num_marks):
    """What a text spells of special tokens is letters, but for a block that it begins with."""
    fast = make_tokenizer(317)
    fast.add_tokens([AddedToken(text, special=True) for text in ("[THINK]", "[/THINK]")], special_tokens=True)
    fast.chat_template = MAGISTRAL
    fast.save_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    (example,) = tokenize([row("Hi", said)], tokenizer, ids(tokenizer, "<|im_end|>"))
    assert tokenizer.decode(example.completion) == f"{want}<|im_end|>"
    assert sum(map(tokenizer.is_special, example.completion)) == num_marks + 1


@pytest.mark.parametrize("template", [R1, QWQ])
def test_each_answer_of_a_conversation_stands_behind_the_prompt_that_asks_for_it(make, template):
    """Later prompts have earlier answers without the block, so each is a row of its own."""
    texts = trained(make(template), [row("a", "<think>one</think>A", "b", "B")], ["<|im_end|>"])
    assert [text.partition("[[")[2] for text in texts] == [
        "one\n</think>\n\nA<|im_end|>]]",
        "\n</think>\n\nB<|im_end|>]]",
    ]
    assert "one" not in texts[1] and "</think>" not in texts[1].partition("[[")[0]


def test_a_call_without_thoughts_closes_the_block_first(make):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (text,) = trained(make(QWQ), [parse_row(json.dumps({"messages": messages}), 1, "")], ["<|im_end|>"])
    assert text.endswith(
        '<think>\n[[\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>]]'
    )


def test_tools_calls_and_results_are_written_by_the_template(make):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"function": {"name": "weather", "arguments": {"city": "Bonn <|im_end|>"}}}  # as data sets write it
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sunny"},
    ]
    value = parse_row(json.dumps({"messages": messages, "tools": tools}), 1, "")
    called = '{"name": "weather", "%s": {"city": "Bonn <|im_end|>"}}'
    for template, name in ((HERMES, "arguments"), (LLAMA3, "parameters"), (CHATML, "arguments")):
        tokenizer = make(template)
        (example,) = tokenize([value], tokenizer, ids(tokenizer, "<|im_end|>"))
        shown = shown_as_trained(example, tokenizer)
        assert '"weather"' in shown[: shown.index("[[")]  # the definition
        parts = [part.partition("]]")[0] for part in shown.split("[[")[1:]]
        wanted = called % name
        if template != LLAMA3:
            wanted = f"<tool_call>\n{wanted}\n</tool_call>"
        assert [part.strip() for part in parts] == [wanted + "<|im_end|>", "Sunny<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "eos", "fields", "message"),
    [
        (CHATML, ["<|endoftext|>"], {}, r"'<\|im_end\|>' \(id 319\).*would not stop.*is 317.*generation_config.json"),
        (CHATML, [], {}, "eos_token_id is none"),
        (CHATML.replace("<|im_end|>", ""), ["<|im_end|>"], {}, "no special token behind"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), ["<|im_end|>"], {}, "content"),
        (CHATML, ["<|im_end|>"], {"reasoning_content": "hm"}, "leaves out the message's reasoning"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<plan>{% endif"), ["<|im_end|>"], {}, ".im_start.>ass"),
        (
            "{# <think> </think> #}" + CHATML.replace("assistant\n{% e", "assistant\n<plan>{% e"),
            ["<|im_end|>"],
            {"reasoning_content": "hm"},
            ".im_start.>ass",
        ),
        (NOT_THINKING, ["<|im_end|>"], {"thinking": "hm"}, r"closes the block of thoughts \('<think>.*leave the reas"),
        (NOT_THINKING, ["<|im_end|>"], {"content": "<think>hm</think>Yes"}, "closes the block of thoughts"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:5] }}"), ["<|im_end|>"], {}, "leaves out.*content"),
        ("{{ raise_exception('never') }}", ["<|im_end|>"], {}, "never"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_row(make, template, eos, fields, message):
    tokenizer = make(template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A long answer", **fields}]
    value = parse_row(json.dumps({"messages": messages}), 7, "rows.jsonl line 7")
    with pytest.raises(UserError, match=f"^rows.jsonl line 7: messages.1.: .*{message}"):
        tokenize([value], tokenizer, [tokenizer.encode(text)[0] for text in eos])


def test_other_special_tokens_may_stand_before_the_end(make):
    """Command R7B ends a response, and then the turn."""
    template = CHATML.replace("{{ m.content }}<|im_end|>", "<|channel|>{{ m.content }}<|end|>\n<|im_end|>")
    (text,) = trained(make(template), [row("Hi", "Yes")], ["<|im_end|>"])
    assert text.endswith("assistant\n[[<|channel|>Yes<|end|>\n<|im_end|>]]")


# GLM's models end an answer with the token that begins the next message.
GLM = (
    "{% for m in messages %}<|{{ 'channel' if m.role == 'assistant' else 'header' }}|>\n"
    "{% if m.thinking and loop.last %}{{ m.thinking }}. {% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|channel|>{% endif %}"
)


def test_an_answer_may_end_with_the_next_messages_beginning(make):
    tokenizer = make(GLM)
    (text,) = trained(tokenizer, [row("Hi", "Yes", "More", "No")], ["<|endoftext|>", "<|header|>"])
    assert text == "<|header|>\nHi<|channel|>[[\nYes<|header|>]]\nMore<|channel|>[[\nNo<|header|>]]"
    thought = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "thinking": "hm"}]
    (text,) = trained(tokenizer, [parse_row(json.dumps({"messages": thought}), 1, "")], ["<|header|>"])
    assert text == "<|header|>\nHi<|channel|>[[\nhm. Yes<|header|>]]"  # which is gone once the user goes on
    with pytest.raises(UserError, match="no special token behind"):
        trained(tokenizer, [row("Hi", "Yes")], ["<|endoftext|>"])  # where its server would not stop


def test_an_answer_is_found_where_the_template_drops_what_the_prompt_had(make):
    """gpt-oss leaves out the reasoning of earlier tool calls once a last answer follows."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or add_generation_prompt else '' }}")
    (text,) = trained(make(template), [row("Hi", "Yes")], ["<|im_end|>"])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes<|im_end|>]]"


def test_an_answer_is_found_where_the_template_moves_the_system_message(make):
    """Every prompt is what a server makes of it; the space before an answer is the template's, and learned."""
    texts = {"system": "Brief!", "user": "Hi", "assistant": "Yes"}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]
    rows = [parse_row(json.dumps({"messages": messages}), 1, "")]
    assert trained(make(MISTRAL), rows, ["<|im_end|>"]) == [
        "<|header|>Brief!\nHi<|eot|>[[ Yes<|im_end|>]]",
        "<|header|>Hi<|eot|> Yes<|im_end|><|header|>Brief!\nHi<|eot|>[[ No<|im_end|>]]",
    ]


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        ({"eos_token_id": [0, 3]}, {"eos_token_id": 5}, {0, 3, 319}),
        ({}, {"eos_token_id": 5}, {5, 319}),
        ({}, {}, {319}),
    ],
)
def test_serving_stops_at_the_models_ids_and_at_the_tokenizers_own(tmp_path, generation, config, want):
    make_tokenizer(317).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert eos_token_ids(tmp_path) == want


@pytest.mark.parametrize("name, want", [("q", 1), ("<|no such token|>", 0), (None, 0)])
def test_serving_stops_at_an_end_that_is_no_added_token(tmp_path, name, want):
    """InternLM 2's tokenizer.json lists no added tokens; its </s> is a word of the vocabulary."""
    make_tokenizer(317).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": name}))
    found = eos_token_ids(tmp_path)
    assert len(found) == want and (not want or TextTokenizer(tmp_path).decode(list(found)) == name)


@pytest.mark.parametrize("eos", [[0, None], "<|im_end|>", [[0]], 2.0, -1, True])
def test_ends_that_are_no_ids_are_refused_by_file(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id .* an id or a list of ids"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", "[]"])
def test_a_file_of_ends_that_cannot_be_read_is_refused_by_name(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_spelled_token_puts_no_space_into_a_message_or_an_answer(tmp_path, scheme):
    """SentencePiece begins each text that it is given with a space, Llama 2's behind each special token, too."""
    template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    make_sentencepiece(tmp_path, scheme, template)
    tokenizer = TextTokenizer(tmp_path)
    plain, spelled = tokenize([row("the fox", "dog"), row("the <s>fox</s>", "dog")], tokenizer, ids_of_end(tokenizer))
    assert spelled.completion == plain.completion
    assert tokenizer.decode(spelled.prompt).replace("<s>fox</s>", "fox") == tokenizer.decode(plain.prompt)
    shape = PoolingConfig("embed", query_prefix="find: ")
    pooled = [tokenizer.decode(embedded_ids(tokenizer, shape, text, is_query=True)) for text in ("a b", "a <s>b")]
    assert pooled[1] == pooled[0].replace("b", "<s>b")
    spelling = tokenize([row("the fox", "a </s> dog")], tokenizer, ids_of_end(tokenizer))[0]
    assert tokenizer.decode(spelling.tokens).endswith("\na </s> dog</s>") and spelling.prompt == plain.prompt


def ids_of_end(tokenizer):
    return [tokenizer.special_tokens["</s>"]]


def test_a_template_that_writes_the_date_writes_the_day_that_is_given(make):
    template = "{% set day = strftime_now('%d %b %Y') %}\n{{ day }}, the {{ strftime_now('%-d') }}th: "
    template += "{{ strftime_now('%F %T %%d %%%d ') }}" + CHATML
    tokenizer = make(template).on(datetime.date(2024, 7, 26))
    (text,) = trained(tokenizer, [row("Hi", "Yes")], ["<|im_end|>"])
    assert text.startswith("26 Jul 2024, the 26th: 2024-07-26 00:00:00 %d %26 <|im_start|>user")
    assert text.endswith("[[Yes<|im_end|>]]")
    assert tokenizer.decode(tokenizer.on(None).encode_chat([{"role": "user", "content": "Hi"}])) != text.split("[[")[0]


def test_a_model_without_template_is_refused(make):
    tokenizer = make(None)
    with pytest.raises(UserError, match="no chat template"):
        tokenize([row("Hi", "Yes")], tokenizer, [319])
