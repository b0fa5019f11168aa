"""Links between pages: what they lead to is there, its heading too, in the repository and on the site."""

import re
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@cache
def text_of(page: Path) -> str:
    return _FENCED.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, those that GitHub and Python-Markdown write alike: most without a dash or a lone mark."""
    words = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in _HEADING.findall(text_of(page))]
    return {re.sub(r"\s", "-", text) for text in words} & {re.sub(r"[\s-]+", "-", text) for text in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for target, anchor in _LINK.findall(text_of(page)):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or anchor and file.suffix == ".md" and anchor not in anchors(file):
            wrong.append(f"{target}#{anchor}" if anchor else target)
    assert wrong == []
