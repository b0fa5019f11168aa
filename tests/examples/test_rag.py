"""examples/rag on a tiny server: quotations that are none are seen, and an index follows what changes under it."""

import os
import shutil
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from peft_adapters import make_peft_adapter
from places import ROOT
from pooling_adapters import make_pooling_adapter
from served_poolers import EMBEDDER, RANKER
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.errors import UserError

sys.path.append(str(ROOT / "examples" / "rag"))

import ask  # noqa: E402
from answering import Adapters, Answerer  # noqa: E402
from client import Server  # noqa: E402
from corpus import Document  # noqa: E402
from passages import NOT_FOUND, choices, one_line, passage, prompt, read_prompt, sentences, source_of  # noqa: E402
from vectors import PART, make_index  # noqa: E402

TEXT = (
    """Foxes jump over dogs. They are quick:  * brown foxes, e.g. those of Kent
 * red foxes of the north  Version 1.2 was better.

This package has the documentation of all foxes that jump, """
    + "and of more of them " * 20
)
DOCUMENTS = [
    Document(name, one_line(f"{name} is a package. It has {name}s that jump.")) for name in ("fox", "dog", "jug")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("rag")
    model = make_tiny_model(root / "model", max_position_embeddings=1024)
    make_pooling_adapter(model, root / "adapters" / "search", config=EMBEDDER, seed=1)
    make_pooling_adapter(model, root / "adapters" / "rerank", "SEQ_CLS", num_labels=1, config=RANKER, seed=2)
    make_peft_adapter(model, root / "adapters" / "quote", r=4, std=0.3)
    make_pooling_adapter(model, root / "other", config=EMBEDDER, seed=5)
    server = ServerProcess(model, "--adapters-dir", str(root / "adapters")).wait_ready()
    server.root = root
    yield server
    assert server.stop() == 0


class StandIn:
    """Embeds a text as its length; `changes`: the adapter is another one after so many requests."""

    def __init__(self, changes=(), breaks_at=None):
        self.changes, self.breaks_at = set(changes), breaks_at
        self.num, self.version, self.embedded = 0, 0, []

    def content_hash(self, adapter):
        return f"{self.version:016x}"

    def post(self, path, body):
        self.num += 1
        self.version += self.num in self.changes
        if self.num == self.breaks_at:
            raise KeyboardInterrupt
        self.embedded += body["input"]
        rows = [{"index": i, "embedding": [len(text), self.version]} for i, text in enumerate(body["input"])]
        return {"data": rows[::-1]}


TEXTS = ["x" * length for length in range(1, 3 * PART)]


def embedded(server, cache):
    return make_index(server, "search", TEXTS, cache, lambda done, of: None)


def test_sentences_are_pieces_of_their_text_and_passages_are_short():
    found = sentences(TEXT)
    assert (
        found[0] == "Foxes jump over dogs. They are quick:"
        and "red foxes of the north Version 1.2 was better." in found
    )
    assert all(piece in one_line(TEXT) for piece in found) and len(found) == 4
    assert len(" ".join(passage(TEXT))) <= 200 and passage("") == []
    whole = passage("word " * 100)
    assert len(whole) == 1 and len(whole[0]) <= 160 and whole[0].endswith("word")


def test_what_the_grammar_leaves_open_is_what_the_check_takes():
    passages = [passage(document.text) for document in DOCUMENTS]
    quoted = [source_of(choice, passages) for choice in choices(passages)]
    assert quoted[0] == (0, "fox is a package. It has foxs that jump.") and quoted[-1] is None
    assert {number for number, _ in quoted[:-1]} == {0, 1, 2}


def test_a_prompt_is_read_again_as_what_it_was_made_of():
    passages = [passage(TEXT), passage("Only this one [1] here.")]
    assert read_prompt(prompt("Which [2] fox?", passages)) == ("Which [2] fox?", passages)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1] a dog that jumps", "does not say"),
        ("[2] fox is a package.", "sentence 2 does not say"),
        ("[9] fox is a package.", "no sentence 9"),
        ("fox is a package.", "not a quotation"),
        ("", "not a quotation"),
    ],
)
def test_what_no_passage_says_is_no_quotation(text, words):
    with pytest.raises(ValueError, match=words):
        source_of(text, [passage(document.text) for document in DOCUMENTS])


def test_an_interrupted_index_goes_on_behind_its_last_part(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embedded(StandIn(breaks_at=3), tmp_path)
    (part,) = tmp_path.rglob("*.npz")
    server = StandIn()
    vectors = embedded(server, tmp_path).vectors
    assert vectors[:, 0].tolist() == [len(text) for text in TEXTS]
    assert server.embedded == [TEXTS[0], *TEXTS[PART:]]  # the first loads the adapter
    part.write_bytes(part.read_bytes()[:100])
    again = StandIn()
    assert np.array_equal(embedded(again, tmp_path).vectors, vectors) and len(again.embedded) == 1 + PART


def test_an_adapter_that_changes_within_leaves_vectors_of_one_alone(tmp_path):
    index = embedded(StandIn(changes=[3]), tmp_path)
    assert index.content_hash == f"{1:016x}" and set(index.vectors[:, 1]) == {1}
    with pytest.raises(UserError, match="change while"):
        embedded(StandIn(changes=range(100)), tmp_path / "elsewhere")


def test_answers_quote_or_say_that_there_is_nothing_and_drafts_change_none(server, tmp_path):
    answerer = Answerer(Server(server.url), DOCUMENTS, tmp_path)
    for question in ("Which fox jumps?", "What is a jug?"):
        found, plain = answerer.answer(question), answerer.answer(question, drafts=False)
        said, plainly = found.quoted, plain.quoted
        assert not said.problem and said.text == plainly.text
        assert said.speculation["num_forwards"] < plainly.speculation["num_forwards"] == plainly.num_tokens
        assert said.text == NOT_FOUND if said.is_missing else said.quote in DOCUMENTS[found.source].text
        assert sorted(found.shown) == [0, 1, 2] and set(found.seconds) == {"search", "rerank", "quote"}
    free = answerer.answer("Which fox jumps?", constrained=False)
    assert free.quoted.problem, "random weights quote nothing"


def test_an_embedder_that_is_replaced_between_two_questions_has_an_index_of_its_own(server, tmp_path):
    root = server.root
    answerer = Answerer(Server(server.url), DOCUMENTS, tmp_path)
    answerer.answer("fox")
    shutil.move(root / "adapters" / "search", root / "old")
    shutil.copytree(root / "other", root / "adapters" / "search")
    try:
        answerer.answer("fox")
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        shutil.rmtree(root / "adapters" / "search")
        shutil.move(root / "old", root / "adapters" / "search")


def test_what_cannot_be_answered_is_said_in_a_line(server, tmp_path):
    asked = Server(server.url)
    with pytest.raises(UserError, match="no adapter 'ranker'"):
        Answerer(asked, DOCUMENTS, tmp_path, Adapters(rerank="ranker"))
    with pytest.raises(UserError, match="wrong|embed"):
        Answerer(asked, DOCUMENTS, tmp_path, Adapters(search="rerank"))
    answerer = Answerer(asked, DOCUMENTS, tmp_path)
    for question in (" ", "why " * 200):
        with pytest.raises(UserError, match="1 to 400 characters"):
            answerer.answer(question)


def test_a_re_ranker_is_used_where_there_is_one_unless_somebody_says(server, monkeypatch, capsys):
    asked = Server(server.url)
    assert ask.chosen(asked, None).rerank == "rerank" and ask.chosen(asked, False).rerank is None
    monkeypatch.setattr(Server, "has", lambda self, adapter: False)
    assert ask.chosen(asked, None).rerank is None and "order is kept" in capsys.readouterr().err
    assert ask.chosen(asked, True).rerank == "rerank"


@pytest.mark.parametrize(
    "content, words",
    [("", "no documents"), ('{"name": "a"}\n', "1 is no document"), ('{"name": "a", "text": "b"}\n[', "2 is no JSON")],
)
def test_a_corpus_without_documents_is_refused_before_a_server_is_asked(content, words, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    result = CliRunner().invoke(ask.main, ["--corpus", str(path), "--url", "http://127.0.0.1:1", "fox?"])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_program_answers_and_shades(server, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"name": "fox\\u001b[31m", "text": "A fox jumps over dogs and jugs."}\n')
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")
    flags = ["--url", server.url, "--corpus", str(corpus), "--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(ask.main, [*flags, "Who jumps?"])
    assert result.exit_code == 0, result.output
    assert "forwards" in result.output and "rerank" in result.output and "\x1b" not in result.output
    typed = CliRunner().invoke(ask.main, flags, input="Who jumps?\n\nnot asked\n")
    assert typed.exit_code == 0 and typed.output.count("forwards") == 1
