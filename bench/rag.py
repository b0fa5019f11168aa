"""Do answers say what the documents say, and what do drafts bring where text is copied?

examples/rag answers its questions, which are about packages that its adapters were not trained on: is a question's
package among the nearest by vectors, is it first for the re-ranker, is it the one that is quoted, and is the quotation
one, useful (the sentence that shares most with the question) or missing. The same passages are quoted in four ways, in
turns: with and without drafts, under a grammar of the passages' sentences or free and then checked. No way finds
another's prefix in the cache. The limit is printed first: no step takes less time than reading the weights.

    python -m bench.rag [--adapters-dir DIR] [--questions 140] [--no-rerank]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click

from . import common, options
from .server_process import serving
from .tasks import EXAMPLES, BaseModel

RAG = EXAMPLES / "rag"
sys.path.append(str(RAG))  # its programs are no package

from answering import NUM_CANDIDATES, NUM_PASSAGES, Adapters, Answerer, Found  # noqa: E402
from client import Server  # noqa: E402
from corpus import Document, read_documents  # noqa: E402

WAYS = {
    "grammar, drafts": (True, True),
    "free, drafts": (False, True),
    "grammar": (True, False),
    "free": (False, False),
}


def measure(answerer: Answerer, documents: Sequence[Document], questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    places = {document.name: idx for idx, document in enumerate(documents)}
    found: dict[str, list[Found]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in ("search", "rerank", *WAYS)}
    ranks: dict[str, list[int | None]] = {"search": [], "rerank": []}  # of the right document, from 0

    def timed(name: str, begin: float) -> None:
        seconds[name].append(time.perf_counter() - begin)

    for number, row in enumerate(questions):
        question, own = row["question"], places.get(row["name"])
        begin = time.perf_counter()
        candidates = answerer.search(question)
        timed("search", begin)
        begin = time.perf_counter()
        order = answerer.ranked(question, candidates)
        timed("rerank", begin)
        if own is not None:
            ranks["search"].append(candidates.index(own) if own in candidates else None)
            ranks["rerank"].append(order.index(own) if own in order else None)
        names = list(WAYS)
        for way in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            fields = {"cache_salt": f"{number} {way}"}
            found[way].append(answerer.quoted(question, candidates, order[:NUM_PASSAGES], *WAYS[way], fields))
            timed(way, begin)
        if (number + 1) % 10 == 0:
            click.echo(f"{number + 1} of {len(questions)} questions")
    return {
        "questions": len(questions),
        "without_answer": sum(row["name"] is None for row in questions),
        "documents": len(documents),
        **{name: _places(each) for name, each in ranks.items()},
        "quotes": {way: _figures(each, questions, places) for way, each in found.items()},
        "equal_with_and_without_drafts": _share(
            a.text == b.text
            for drafted, plain in (("grammar, drafts", "grammar"), ("free, drafts", "free"))
            for a, b in zip(found[drafted], found[plain], strict=True)
        ),
        "seconds": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "ratio": {
            way: common.spread([a / b for a, b in zip(seconds[way], seconds[f"{way}, drafts"], strict=True)])
            for way in ("grammar", "free")
        },
    }


def _places(ranks: Sequence[int | None]) -> dict[str, float]:
    """Share of the questions whose document is among so many."""
    return {
        f"among_{most}": _share(rank is not None and rank < most for rank in ranks)
        for most in (1, NUM_PASSAGES, NUM_CANDIDATES)
    }


def _figures(found: Sequence[Found], rows: Sequence[dict[str, Any]], places: dict[str, int]) -> dict[str, Any]:
    pairs = list(zip(found, rows, strict=True))
    own = [(each, places[row["name"]], row) for each, row in pairs if row["name"] is not None]
    shown = [(each, place, row) for each, place, row in own if place in each.shown]
    tokens = sum(each.num_tokens for each in found)
    forwards = sum(each.speculation["num_forwards"] for each in found)
    sources = Counter()
    for each in found:
        sources.update(each.speculation["accepted_by_source"])
    return {
        "right_package": _share(each.source == place for each, place, _ in own),
        "right_package_of_shown": _share(each.source == place for each, place, _ in shown),
        "useful_of_shown": _share(each.source == place and each.quote == row["sentence"] for each, place, row in shown),
        "not_found_where_shown": _share(each.source is None and not each.problem for each, _, _ in shown),
        "not_found_where_missing": _share(
            each.source is None and not each.problem for each, row in pairs if row["name"] is None
        ),
        "verbatim": _share(not each.problem for each in found),
        "tokens": tokens,
        "tokens_a_verification": round(tokens / max(1, forwards), 3),
        "accepted_by_source": dict(sources),
    }


def _share(values) -> float | None:
    """Of what is true; None of nothing."""
    given = [bool(value) for value in values]
    return round(sum(given) / len(given), 4) if given else None


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--adapters-dir", type=options.ADAPTER, default=EXAMPLES / "adapters", help="With search, rerank, quote.")
@options.at_least(1, "--questions", 140, "Of examples/rag/questions.jsonl, at most.")
@click.option("--rerank/--no-rerank", default=True, help="Without: the search's order.")
@options.save("rag")
def main(model: str, adapters_dir: Path, questions: int, rerank: bool, save: bool) -> None:
    run = common.start("rag", "torch")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    documents = read_documents(RAG / "corpus.jsonl")
    with (RAG / "questions.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, questions)]
    with serving(str(base.path), "--adapters-dir", str(adapters_dir)) as server, tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        adapters = Adapters() if rerank else Adapters(rerank=None)
        answerer = Answerer(Server(server.url), documents, Path(cache), adapters)
        index_s = round(time.perf_counter() - begin, 2)
        figures = measure(answerer, documents, rows)
    for way, each in figures["quotes"].items():
        click.echo(f"{way}: {each}")
    run.finish({"model": base.name, "reranked": rerank, "index_s": index_s, **figures}, save)


if __name__ == "__main__":
    main()
