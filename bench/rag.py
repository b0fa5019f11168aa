"""Do answers say what the documents say, and what do drafts bring where text is copied?

examples/rag answers its questions, which are about packages that its adapters were not trained on: is a question's
package among the nearest by vectors, is it first for the re-ranker, is it the one that is quoted, and is the quotation
one, useful (the sentence that shares most with the question) or missing. The same passages are quoted in four ways, in
turns: with and without drafts, under a grammar of the passages' sentences or free and then checked. No way finds
another's prefix in the cache. Before that the held-out rows of the quoting adapter, whose passages are BM25's, say what
it is worth by itself. The limit is printed first: no step takes less time than reading the weights.

    python -m bench.rag [--adapters-dir DIR] [--questions 140] [--rows 60] [--no-rerank]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import click

from . import common, options
from .server_process import serving
from .tasks import EXAMPLES, BaseModel, demo_rows

RAG = EXAMPLES / "rag"
sys.path.append(str(RAG))  # its programs are no package

from answering import NUM_CANDIDATES, NUM_PASSAGES, Adapters, Answerer  # noqa: E402
from client import Server  # noqa: E402
from corpus import Document, read_documents  # noqa: E402
from passages import read_prompt, source_of  # noqa: E402
from quoting import Quoted, quote  # noqa: E402

T = TypeVar("T")
WAYS = {
    "grammar, drafts": (True, True),
    "free, drafts": (False, True),
    "grammar": (True, False),
    "free": (False, False),
}


def measure_alone(server: Server, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The quoting adapter on its own held-out rows: `completion` is the wanted answer."""
    figures = {}
    for way in ("grammar, drafts", "free, drafts"):
        said, wanted = [], []
        for row in rows:
            question, passages = read_prompt(row["prompt"])
            said.append(quote(server, Adapters().quote, question, passages, *WAYS[way], {"cache_salt": way}))
            wanted.append(source_of(row["completion"], passages))
        pairs = list(zip(said, wanted, strict=True))
        there = [(each, own) for each, own in pairs if own is not None]
        figures[way] = {
            "right_passage": _share(each.place == own[0] for each, own in there),
            "useful": _share((each.place, each.quote) == own for each, own in there),
            "not_found_where_there": _share(each.is_missing for each, _ in there),
            "not_found_where_missing": _share(each.is_missing for each, own in pairs if own is None),
            **_drafted(said),
        }
    return {"rows": len(rows), **figures}


def measure(
    server: Server, answerer: Answerer, documents: Sequence[Document], questions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    places = {document.name: idx for idx, document in enumerate(documents)}
    said: dict[str, list[Quoted]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in ("search", "rerank", *WAYS)}
    orders: dict[str, list[list[int]]] = {"search": [], "rerank": []}
    own = [places.get(row["name"]) for row in questions]

    def timed(name: str, call: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - begin)
        return result

    for number, row in enumerate(questions):
        question = row["question"]
        candidates = timed("search", partial(answerer.search, question))
        order = timed("rerank", partial(answerer.ranked, question, candidates))
        orders["search"].append(candidates)
        orders["rerank"].append(order)
        passages = answerer.passages(order[:NUM_PASSAGES])
        names = list(WAYS)
        for way in names[number % len(names) :] + names[: number % len(names)]:
            fields = {"cache_salt": f"{number} {way}"}
            asked = partial(quote, server, Adapters().quote, question, passages, *WAYS[way], fields)
            said[way].append(timed(way, asked))
        if (number + 1) % 10 == 0:
            click.echo(f"{number + 1} of {len(questions)} questions")
    return {
        "questions": len(questions),
        "without_answer": own.count(None),
        "documents": len(documents),
        **{name: _places(each, own) for name, each in orders.items()},
        "quotes": {way: _figures(each, orders["rerank"], own, questions) for way, each in said.items()},
        "equal_with_and_without_drafts": _share(
            a.text == b.text
            for way in ("grammar", "free")
            for a, b in zip(said[f"{way}, drafts"], said[way], strict=True)
        ),
        "seconds": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "ratio": {
            way: common.spread([a / b for a, b in zip(seconds[way], seconds[f"{way}, drafts"], strict=True)])
            for way in ("grammar", "free")
        },
    }


def _places(orders: Sequence[list[int]], own: Sequence[int | None]) -> dict[str, float | None]:
    """Share of the questions whose document is among so many."""
    pairs = [(order, place) for order, place in zip(orders, own, strict=True) if place is not None]
    return {
        f"among_{most}": _share(place in order[:most] for order, place in pairs)
        for most in (1, NUM_PASSAGES, NUM_CANDIDATES)
    }


def _figures(
    said: Sequence[Quoted], orders: Sequence[list[int]], own: Sequence[int | None], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`of_shown`: of the questions whose package is among the passages."""
    asked = []
    for each, order, place, row in zip(said, orders, own, rows, strict=True):
        source = None if each.place is None else order[each.place]
        asked.append((each, source, place, place in order[:NUM_PASSAGES], row["sentence"]))
    shown = [row for row in asked if row[3]]
    return {
        "right_package": _share(source == place for _, source, place, _, _ in asked if place is not None),
        "right_package_of_shown": _share(source == place for _, source, place, _, _ in shown),
        "useful_of_shown": _share(source == place and each.quote == best for each, source, place, _, best in shown),
        "not_found_where_shown": _share(each.is_missing for each, *_ in shown),
        "not_found_where_missing": _share(each.is_missing for each, _, place, _, _ in asked if place is None),
        **_drafted(said),
    }


def _drafted(said: Sequence[Quoted]) -> dict[str, Any]:
    tokens = sum(each.num_tokens for each in said)
    forwards = sum(each.speculation["num_forwards"] for each in said)
    sources: Counter[str] = Counter()
    for each in said:
        sources.update(each.speculation["accepted_by_source"])
    return {
        "verbatim": _share(not each.problem for each in said),
        "tokens": tokens,
        "tokens_a_verification": round(tokens / max(1, forwards), 3),
        "accepted_by_source": dict(sources),
    }


def _share(values: Iterable[object]) -> float | None:
    """Of what is true; None of nothing."""
    given = [bool(value) for value in values]
    return round(sum(given) / len(given), 4) if given else None


def read(path: Path, most: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, most)]


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--adapters-dir", type=options.ADAPTER, default=EXAMPLES / "adapters", help="With search, rerank, quote.")
@options.at_least(1, "--questions", 140, "Of examples/rag/questions.jsonl, at most.")
@options.at_least(1, "--rows", 60, "Held-out rows of the quoting adapter, at most.")
@click.option("--rerank/--no-rerank", default=True, help="Without: the search's order.")
@options.save("rag")
def main(model: str, adapters_dir: Path, questions: int, rows: int, rerank: bool, save: bool) -> None:
    run = common.start("rag", "torch")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    documents = read_documents(RAG / "corpus.jsonl")
    asked, held_out = read(RAG / "questions.jsonl", questions), read(demo_rows("quote"), rows)
    with serving(str(base.path), "--adapters-dir", str(adapters_dir)) as server, tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        adapters = Adapters() if rerank else Adapters(rerank=None)
        client = Server(server.url)
        answerer = Answerer(client, documents, Path(cache), adapters)
        index_s = round(time.perf_counter() - begin, 2)
        alone = measure_alone(client, held_out)
        click.echo(f"alone: {alone}")
        figures = measure(client, answerer, documents, asked)
    for way, each in figures["quotes"].items():
        click.echo(f"{way}: {each}")
    run.finish({"model": base.name, "reranked": rerank, "index_s": index_s, "alone": alone, **figures}, save)


if __name__ == "__main__":
    main()
