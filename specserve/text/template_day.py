"""Chat templates that write today's date, with another day in its place.

transformers gives templates `strftime_now`, and renders with data alone, so a function cannot be handed over: a macro
of that name, which stands before the template, takes its place.
"""

from __future__ import annotations

import datetime
import json

_FUNCTION = "strftime_now"
# All of datetime.strftime, the C library's included; "%%" is last, as what it stands for begins a directive.
_DIRECTIVES = (*(f"-{name}" for name in "demyjHIMS"), *"aAbBcCdDeFfgGhHIjmMnpRrStTuUVwWxXyYzZ%")


def on_day(template: str, day: datetime.date) -> str:
    """`template`, which takes the beginning of `day` for now."""
    if _FUNCTION not in template:
        return template
    said = (f"replace({json.dumps('%' + name)}, {json.dumps(day.strftime('%' + name))})" for name in _DIRECTIVES)
    macro = f"{{% macro {_FUNCTION}(format) %}}{{{{ format | {' | '.join(said)} }}}}{{% endmacro %}}"
    return macro + "{{ '' }}" + template  # after a block a line break would be left out
