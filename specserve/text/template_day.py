"""Chat templates that write today's date, with another day in its place.

transformers gives templates `strftime_now`, and renders with data alone, so a function cannot be handed over: a macro
of that name, which stands before the template, takes its place.
"""

from __future__ import annotations

import datetime
import json

_FUNCTION = "strftime_now"
# All of datetime.strftime, the C library's included, but for "%%": what stands behind that is no directive.
_DIRECTIVES = (*(f"-{name}" for name in "demyjHIMS"), *"aAbBcCdDeFfgGhHIjmMnpRrStTuUVwWxXyYzZ")


def on_day(template: str, day: datetime.date) -> str:
    """`template`, which takes the beginning of `day` for now."""
    if _FUNCTION not in template:
        return template
    of_day = ((f"%{name}", day.strftime(f"%{name}")) for name in _DIRECTIVES)
    said = "".join(f" | replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in of_day)
    part = f"{{{{ ('' if loop.first else '%') ~ (part{said}) }}}}"
    parts = f"{{% for part in format.split('%%') %}}{part}{{% endfor %}}"
    macro = f"{{% macro {_FUNCTION}(format) %}}{parts}{{% endmacro %}}"
    return macro + "{{ '' }}" + template  # after a block a line break would be left out
