"""PEFT's rules for which modules an adapter_config.json selects, and with which rank and alpha.

Owns the rules alone, over fields that were checked and module names without `base_model.model.`; they are peft's own
(`check_target_module_exists`, `get_pattern_key`), regular expressions and all. Python's `re` can be neither interrupted
nor bounded, and holds the interpreter's lock while it matches: so this file imports only the standard library and can
also be run as a program, `python -I -S peft_matching.py`, in a process that ends itself when it takes too long.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

MAX_MEMORY_BYTES = 2**30
ALL_LINEAR, OUTPUT_LAYER, EMBEDDING = "all-linear", "lm_head", "embed_tokens"
DEFAULT_TARGETS = ("q_proj", "v_proj")  # peft's, for every architecture that is served and for which it has any
# No repetition, no choice: as fast in the engine's process as any comparison of text.
_PLAIN = re.compile(r"\^?(?:\\?\.|[A-Za-z0-9_-])*\$?", re.ASCII)
_MAX_PLAIN = 1000  # patterns; compiling one takes up to 0.1 ms
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # peft's, where no layers_pattern is given

Note = Callable[[str, str], None]  # told the field and pattern that are matched next


def resolve(fields: dict[str, Any], modules: list[str], note: Note = lambda field, pattern: None) -> dict[str, Any]:
    """What the configuration says of each module: {"rank", "alpha"}, or {"field"} that leaves the module out.

    `fields` are r, lora_alpha, rank_pattern, alpha_pattern, target_modules, exclude_modules, layers_to_transform and
    layers_pattern (lists), and is_tied: the lm_head shares the embedding's LoRA. Raises what `re` raises.
    """
    targets = DEFAULT_TARGETS if fields["target_modules"] is None else fields["target_modules"]
    not_linear = [module for last in (EMBEDDING, OUTPUT_LAYER) for module in modules if _ends(module)[-1] == last]
    tied = not_linear if fields["is_tied"] and _targets_tied(targets, note) else []
    out: dict[str, Any] = {}
    excluded = _named("exclude_modules", fields["exclude_modules"], modules, note)
    left = _leave_out(out, "exclude_modules", modules, excluded - {*tied[1:]})
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = {module for module in left if module not in not_linear}
    else:
        found = _named("target_modules", targets, left, note)
    left = _leave_out(out, "target_modules", left, {*left} - found - {*tied})
    if fields["layers_to_transform"] and not isinstance(targets, str):
        # A module that is named in full, or tied, is not asked for its layer.
        asked = [module for module in left if module not in (*targets, *tied)]
        wanted = _in_layers(fields["layers_to_transform"], fields["layers_pattern"], asked, note)
        left = _leave_out(out, "layers_to_transform", left, {*asked} - wanted)
    ranks = _first_matches("rank_pattern", fields["rank_pattern"], left, note)
    alphas = _first_matches("alpha_pattern", fields["alpha_pattern"], left, note)
    for module in left:
        out[module] = {"rank": ranks.get(module, fields["r"]), "alpha": alphas.get(module, fields["lora_alpha"])}
    return out


def is_plain(fields: dict[str, Any]) -> bool:
    """Whether matching is fast whatever the module names are, so that it needs no process of its own."""
    patterns = [*fields["rank_pattern"], *fields["alpha_pattern"], *fields["layers_pattern"]]
    patterns += [fields[key] for key in ("target_modules", "exclude_modules") if isinstance(fields[key], str)]
    return len(patterns) <= _MAX_PLAIN and all(_PLAIN.fullmatch(pattern) for pattern in patterns)


def _leave_out(out: dict[str, Any], field: str, modules: list[str], left_out: set[str]) -> list[str]:
    """Write down that `field` leaves modules out; returns the others."""
    out |= {module: {"field": field} for module in modules if module in left_out}
    return [module for module in modules if module not in left_out]


def _named(field: str, names: Any, modules: list[str], note: Note) -> set[str]:
    """The modules that a string, as a regular expression, or a list of names or of their ends stands for."""
    if not names:
        return set()
    if isinstance(names, str):
        note(field, names)
        pattern = re.compile(names)
        return {module for module in modules if pattern.fullmatch(module)}
    known = set(names)
    return {module for module in modules if not known.isdisjoint(_ends(module))}


@functools.lru_cache(maxsize=4096)
def _ends(module: str) -> tuple[str, ...]:
    """a.b.c -> a.b.c, b.c, c"""
    parts = module.split(".")
    return tuple(".".join(parts[idx:]) for idx in range(len(parts)))


def _targets_tied(targets: Any, note: Note) -> bool:
    ends = [EMBEDDING, OUTPUT_LAYER]
    if isinstance(targets, str):
        return bool(_named("target_modules", targets, ends, note))
    return any(target.rpartition(".")[2] in ends for target in targets)


def _in_layers(layers: list[int], layers_pattern: list[str], modules: list[str], note: Note) -> set[str]:
    """The modules whose layer, by the first pattern that matches their name, is one of `layers`."""
    texts = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in layers_pattern] or [_LAYER]
    wanted, left = set(layers), modules
    found: set[str] = set()
    for idx, text in enumerate(texts):
        if not left:
            break
        note("layers_pattern", layers_pattern[idx] if layers_pattern else text)
        pattern = re.compile(text)
        matches = {module: pattern.match(module) for module in left}
        left = [module for module, match in matches.items() if match is None]
        numbers = {module: match["idx"] for module, match in matches.items() if match is not None}
        found |= {module for module, number in numbers.items() if number is not None and int(number) in wanted}
    return found


def _first_matches(field: str, patterns: dict[str, Any], modules: list[str], note: Note) -> dict[str, Any]:
    """module -> the value of the first pattern that matches the end of its name."""
    left: list[str] = modules
    found: dict[str, Any] = {}
    for key, value in patterns.items():
        if not left:
            break
        note(field, key)
        pattern = re.compile(rf"(.*\.)?({key})$")
        matched = [module for module in left if pattern.match(module)]
        found |= dict.fromkeys(matched, value)
        left = [module for module in left if module not in found]
    return found


def main() -> None:
    """Reads {"fields", "modules", "cpu_s"}; writes each pattern as it is begun, then the result or what `re` says."""
    import resource
    import signal

    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # The signal ends the process, in the midst of a match too.
    signal.setitimer(signal.ITIMER_VIRTUAL, request["cpu_s"])

    def note(field: str, pattern: str) -> None:
        print(json.dumps({"field": field, "pattern": pattern}), flush=True)

    try:
        print(json.dumps({"result": resolve(request["fields"], request["modules"], note)}))
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        print(json.dumps({"error": str(error) or type(error).__name__}))


if __name__ == "__main__":
    main()
