"""report.html of an adapter: one file without scripts or anything from elsewhere, light and dark.

Everything in it that came from rows or answers is text, escaped by the template: rows are not trusted. The server shows
the page of any adapter that has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...draft_sources import SOURCES, source_name
from .plots import BATCH_LABELS, Plot

Kind = Literal["lora", "lora alone", "base head"]
# What the page says that it is about, in its title and in a sentence.
_KINDS: dict[Kind, tuple[str, str]] = {
    "lora": ("a lookahead LoRA", "A lookahead LoRA: a LoRA, and what drafts its next tokens."),
    "lora alone": ("a LoRA", "A LoRA without a lookahead head."),
    "base head": ("a head of the base", "A lookahead head of the base model itself, without a LoRA."),
}
_TASK_TILES = {"field_match": "of the fields are right", "exact_match": "of the answers are right to the letter"}


def kind_of(report: Mapping[str, Any]) -> Kind:
    """What was measured."""
    if report.get("is_base_head"):
        return "base head"
    return "lora" if report["lookahead"] else "lora alone"


def html_report(
    name: str, report: Mapping[str, Any], plots: Sequence[Plot], examples: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page; `examples` are prompts with the traces of their answers' tokens, as the HTTP API has them."""
    kind, what = _KINDS[kind_of(report)]
    used = {token["source"] for example in examples for token in example["tokens"]}
    return _render(
        "report.html.jinja",
        name,
        report,
        _tiles(report),
        plots,
        kind=kind,
        what=what,
        examples=[_example(example) for example in examples],
        sources=[{"css": key, "source": source} for key, source in SOURCES.items() if key in used],
        speeds=[(BATCH_LABELS.get(batch, batch), values) for batch, values in report["speed"].items()],
        metrics=[(key, f"{value:.4f}") for key, value in report["task"].items() if key != "main"],
    )


def pooling_page(
    name: str,
    what: str,
    report: Mapping[str, Any],
    tiles: Sequence[tuple[str, str]],
    plots: Sequence[Plot],
    tables: Sequence[tuple[str, list[str], list[list[str]]]],
) -> str:
    """The page of an adapter that pools; `tables` are title, columns and rows."""
    return _render("pooling_report.html.jinja", name, report, tiles, plots, what=what, tables=tables)


def tables_page(
    name: str,
    kind: str,
    what: str,
    tiles: Sequence[tuple[str, str]],
    plots: Sequence[Plot],
    tables: Sequence[tuple[str, list[str], list[list[str]]]],
    *,
    warnings: Sequence[str] = (),
    footer: str = "",
) -> str:
    """A page of tiles, plots and `tables` in the same form, of what is no adapter."""
    report = {"warnings": warnings}
    return _render("tables.html.jinja", name, report, tiles, plots, kind=kind, what=what, tables=tables, footer=footer)


def page_environment(*folders: Path) -> Environment:
    """Of templates in `folders`, which may extend those here; all that they show is escaped."""
    loader = FileSystemLoader([*folders, Path(__file__).parent])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _render(
    template: str,
    name: str,
    report: Mapping[str, Any],
    tiles: Sequence[tuple[str, str]],
    plots: Sequence[Plot],
    **values: Any,
) -> str:
    drawn = [{"svg": plot.svg(), "caption": plot.caption} for plot in plots]
    return (
        page_environment()
        .get_template(template)
        .render(name=name, report=report, tiles=tiles, plots=drawn, shades=SOURCES, **values)
    )


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    task = report["task"]
    tiles = [(label, f"{task[key]:.1%}") for key, label in _TASK_TILES.items() if key in task]
    if "rouge_l" in task and "field_match" not in task:
        tiles.append(("ROUGE-L against the wanted answers", f"{task['rouge_l']:.2f}"))
    tiles += [
        (f"times as fast, {BATCH_LABELS.get(batch, batch)}", f"{values['ratio']:.2f}")
        for batch, values in report["speed"].items()
    ]
    tiles.append(("tokens a verification, one at a time", f"{report['mean_accepted_length_batch_1']:.2f}"))
    tiles.append(("answers equal with and without drafts", f"{report['answers_equal_with_and_without_drafts']:.0%}"))
    return tiles


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    tokens = example["tokens"]
    return {
        "prompt": example["prompt"],
        "runs": [_run(token) for token in tokens if token["text"] or token.get("rejected")],
        "num_tokens": len(tokens),
        "num_forwards": 1 + max((token["forward"] for token in tokens), default=-1),
    }


def _run(token: Mapping[str, Any]) -> dict[str, str]:
    source, rejected = token["source"], token.get("rejected", [])
    classes, titles = [], []
    if source != "target":
        classes += ["token", source if source in SOURCES else "other"]
        titles.append(f"{source_name(source)}, expected {token['chance']:.0%}")
    if rejected:
        classes.append("missed")
        wrong, first = "".join(draft["text"] for draft in rejected), rejected[0]
        titles.append(f"{source_name(first['source'])} had guessed {wrong!r} ({first['chance']:.0%})")
    return {"text": token["text"], "css": " ".join(classes), "title": "; ".join(titles)}
