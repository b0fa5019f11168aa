"""Names, sentences and colours of sources: the page's copies are the table's."""

import re

import pytest
from places import ROOT

from specserve.cli import shading
from specserve.draft_sources import SOURCES, source_name
from specserve.messages import TARGET

PAGE = ROOT / "specserve" / "server" / "page"


def test_the_page_has_the_same_names_and_sentences_in_the_same_order():
    script = (PAGE / "sources.js").read_text(encoding="utf-8")
    (model, *found) = re.findall(r'^  (\w+): \{ name: "([^"]+)", says: "([^"]+)"', script, re.MULTILINE)
    assert found == [(key, source.name, source.what) for key, source in SOURCES.items()]
    assert model[:2] == (TARGET, source_name(TARGET))


@pytest.mark.parametrize("source", SOURCES)
def test_the_page_has_the_same_colours(source):
    style, shown = (PAGE / "base.css").read_text(encoding="utf-8"), SOURCES[source]
    shades, lines = (re.findall(rf"--{source}{suffix}: (#\w{{6}});", style) for suffix in ("", "-line"))
    assert list(zip(shades, lines, strict=True)) == [shown.light, shown.dark]
    rule = f'[data-source="{source}"] {{ --shade: var(--{source}); --mark: var(--{source}-line); --under: '
    assert f"{rule}{shown.underline}; }}" in style


def test_a_terminal_has_a_shade_for_each():
    assert set(shading._BACKGROUNDS) == set(SOURCES)
    assert source_name("of an extension") == "of an extension"
