"""The example of docs/adding_a_drafter.md is a drafter and changes no token; the site has all pages."""

from doc_blocks import blocks
from engine_fixture import make_engine, request, run, tokens_of
from places import ROOT
from tiny_models import make_tiny_model


def test_the_example_of_a_drafter_drafts_and_changes_no_token(tmp_path):
    (block,) = [block for block in blocks("python") if block.page.name == "adding_a_drafter.md"]
    names: dict = {}
    exec(block.text, names)
    engine = make_engine(make_tiny_model(tmp_path / "model"))
    requests = [request(i, [5 + i, 7, 7, 7], max_tokens=24, mode="fixed", ignore_eos=True) for i in range(3)]
    plain = run(engine, requests)
    engine.proposer.sources.of = lambda _: [names["RepeatSource"]()]
    drafted = run(engine, requests)
    assert tokens_of(drafted) == tokens_of(plain)
    assert {name for result in drafted.values() for name in result.usage.accepted_by_source} <= {"repeat"}
    assert sum(result.usage.draft_tokens for result in drafted.values()) > 0


def test_every_page_of_the_documentation_is_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"- {page.name}" not in nav] == []
