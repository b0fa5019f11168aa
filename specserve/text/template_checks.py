"""What can be told of a chat template from its text alone, without running it."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes


def parse(template: str) -> jinja2.nodes.Template:
    """The template's tree; raises `jinja2.TemplateError`."""
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    return environment.parse(template)


def may_render_here(template: Any) -> bool:
    """Whether the model's own template, which is trusted as its weights are, only goes through what it is given.

    Others, which count, multiply or call themselves, are rendered where they can be stopped.
    """
    if not isinstance(template, str):
        return template is None
    try:
        tree = parse(template)
    except (jinja2.TemplateError, RecursionError):
        return False
    calls = {call.node.name for call in tree.find_all(jinja2.nodes.Call) if isinstance(call.node, jinja2.nodes.Name)}
    strange = tree.find_all((jinja2.nodes.Mul, jinja2.nodes.Pow, jinja2.nodes.Macro))
    return not calls & {"range", "lipsum"} and next(iter(strange), None) is None


class _Generation(jinja2.ext.Extension):
    """transformers' block around what an assistant says; it changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
