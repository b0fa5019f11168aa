"""Small chat templates that render tools as each model family does, and a tokenizer with the family's markers."""

from __future__ import annotations

from tiny_models import make_tokenizer
from tokenizers import AddedToken

HERMES = """{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else '' }}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """
{%- for m in messages %}
{{- '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.tool_calls %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}
{%- else %}
{{- m.content }}
{%- endif %}
{%- if loop.first and tools %}{{- '\\n' + (tools | tojson) }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

MISTRAL = """
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if m == users[-1] and tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) }}
{{- ', "id": "' + c.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}
{{- ']<|im_end|>' }}
{%- else %}
{{- m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}"""

TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}
ADDED = {
    "hermes": [AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)],
    "llama3": [AddedToken("<|python_tag|>", special=True)],
    "mistral": [AddedToken("[TOOL_CALLS]", special=True)],
}


def make_tool_tokenizer(family: str, vocab_size: int, *, added: bool = True):
    """The tiny tokenizer of exactly `vocab_size` tokens with a family's template and, if `added`, its markers."""
    extra = ADDED[family] if added else []
    tokenizer = make_tokenizer(vocab_size - len(extra) - 3)
    tokenizer.add_tokens(extra, special_tokens=bool(extra) and extra[0].special)
    assert len(tokenizer) <= vocab_size
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer
